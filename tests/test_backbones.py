"""Backbones by name: the width they promise is the width they give."""

import pytest
import torch

from ssl_lightning import UserError
from ssl_lightning.backbones import create_backbone


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet50", 23_508_032),
        ("resnet18", 11_176_512),
        ("resnet18_cifar", 11_168_832),
        ("vit_tiny_patch16_224", 5_524_416),
        ("torchvision/resnet18", 11_176_512),
        ("torchvision/vit_b_16", 85_798_656),
    ],
)
def test_backbones_have_the_published_size(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in create_backbone(name).parameters()) == parameters


@pytest.mark.parametrize(
    "name",
    [
        "resnet10_cifar",
        "mobilenetv3_small_050",
        "ghostnet_050",
        "efficientvit_b0",
        "convnext_atto",
        "regnety_002",
        "torchvision/mobilenet_v3_small",
        "torchvision/convnext_tiny",
        "torchvision/shufflenet_v2_x0_5",
    ],
)
def test_features_are_as_wide_as_promised(name: str) -> None:
    backbone = create_backbone(name).eval()
    with torch.no_grad():
        assert backbone(torch.rand(2, 3, 64, 64)).shape == (2, backbone.num_features)


def test_vision_transformers_take_other_image_sizes() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=4)
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, 192)


def test_pixels_are_the_flattened_image() -> None:
    images = torch.rand(2, 3, 8, 8)
    backbone = create_backbone("pixels", img_size=8)
    assert torch.equal(backbone(images), images.reshape(2, 192))
    assert backbone.num_features == 192


def test_the_cifar_stem_keeps_the_resolution() -> None:
    backbone = create_backbone("resnet18_cifar")
    stem = backbone.maxpool(backbone.conv1(torch.rand(1, 3, 32, 32)))  # type: ignore[operator]
    assert stem.shape == (1, 64, 32, 32)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnt50", {}, "did you mean .*resnet50"),
        ("resnet18", {"colour": 1}, "does not accept backbone_kwargs"),
        ("resnet18_cifar", {"pretrained": True}, "no pretrained weights"),
        ("torchvision/squeezenet1_0", {}, "does not give one feature vector"),
    ],
)
def test_wrong_backbones_say_what_to_change(name: str, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_backbone(name, **kwargs)
