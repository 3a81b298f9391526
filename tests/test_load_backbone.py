"""Backbones out of checkpoints: ours, and the layouts of the official files."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18

from ssl_lightning import DINO, MAE, SimCLR, SSLModule, UserError
from ssl_lightning.checkpoints import load_backbone
from tests.small import CNN_AND_VIT, VIT, data, slow_unless, small, trainer

Weights = dict[str, Tensor]
IMAGES = torch.rand(3, 3, 32, 32)


@pytest.mark.parametrize(
    ("method", "net"), slow_unless(lambda method, net: (method, net) in ((SimCLR, {}), (DINO, VIT)), CNN_AND_VIT)
)
def test_our_checkpoints_know_their_backbone(method: type[SSLModule], net: dict[str, Any], tmp_path: Path) -> None:
    module = small(method, net)
    running = trainer(tmp_path, limit_train_batches=2)
    running.fit(module, data(method))
    running.save_checkpoint(tmp_path / "x.ckpt")
    loaded = load_backbone(tmp_path / "x.ckpt")
    assert not loaded.training
    for images in (IMAGES, torch.rand(2, 3, 16, 16)) if net else (IMAGES,):
        torch.testing.assert_close(loaded(images), module.eval()(images), atol=1e-5, rtol=0)


def test_arguments_that_a_method_adds_are_known(tmp_path: Path) -> None:
    module = small(MAE, backbone_kwargs={**VIT["backbone_kwargs"], "global_pool": "avg"})  # without fc_norm
    running = trainer(tmp_path, limit_train_batches=1)
    running.fit(module, data(MAE))
    running.save_checkpoint(tmp_path / "x.ckpt")
    torch.testing.assert_close(load_backbone(tmp_path / "x.ckpt")(IMAGES), module.eval()(IMAGES), atol=1e-5, rtol=0)


def named(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


HEAD = {"weight": torch.rand(4, 4), "bias": torch.rand(4)}
NET = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 12}
LAYOUTS: dict[str, tuple[str, Callable[[Weights], Any]]] = {
    "MoCo v2": (
        "resnet18",
        lambda w: {
            "arch": "resnet18",
            "state_dict": {
                **named("module.encoder_q.", {**w, **named("fc.0.", HEAD)}),
                **named("module.encoder_k.", {name: torch.zeros_like(value) for name, value in w.items()}),
                "module.queue": torch.rand(4, 8),
            },
        },
    ),
    "MoCo v3": (
        "vit_small_patch16_224",
        lambda w: {
            "state_dict": {
                **named("module.base_encoder.", {**w, **named("head.0.", HEAD)}),
                **named("module.momentum_encoder.", w),
                **named("module.predictor.0.", HEAD),
            }
        },
    ),
    "SimSiam": (
        "resnet18",
        lambda w: {
            "state_dict": {
                **named("module.encoder.", {**w, **named("fc.0.", HEAD)}),
                **named("module.predictor.0.", HEAD),
            }
        },
    ),
    "SwAV": (
        "resnet18",
        lambda w: named("module.", {**w, **named("projection_head.0.", HEAD), **named("prototypes.", HEAD)}),
    ),
    "DINO": (
        "vit_small_patch16_224",
        lambda w: {
            "student": named("module.backbone.", {name: value + 1 for name, value in w.items()}),
            "teacher": {**named("backbone.", w), **named("head.mlp.0.", HEAD)},
            "args": argparse.Namespace(arch="vit_small"),
            "epoch": 3,
        },
    ),
    "DINO's backbone alone": ("vit_small_patch16_224", lambda w: w),
    "DINOv2 in chunks": (
        "vit_small_patch16_224",
        lambda w: {
            "teacher": {
                **named("backbone.", {name.replace("blocks.", "blocks.0."): value for name, value in w.items()}),
                "backbone.mask_token": torch.rand(1, 48),
                **named("dino_head.mlp.0.", HEAD),
                **named("ibot_head.mlp.0.", HEAD),
            }
        },
    ),
    "MAE": (
        "vit_small_patch16_224",
        lambda w: {
            "model": {**w, **named("decoder_blocks.0.", HEAD), "mask_token": torch.rand(1, 1, 8)},
            "args": argparse.Namespace(model="mae"),
        },
    ),
    "Barlow Twins, torchvision": ("resnet18", lambda w: {**w, **named("fc.", HEAD)}),
    "lightly": ("resnet18", lambda w: {"state_dict": named("backbone.", w) | named("projection_head.layers.0.", HEAD)}),
}


def source(name: str) -> nn.Module:
    torch.manual_seed(3)
    if name == "resnet18":
        model: nn.Module = resnet18()
        model.fc = nn.Identity()
    else:
        model = timm.create_model(name, num_classes=0, **NET)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_layouts_give_the_features_of_their_source(layout: str, tmp_path: Path) -> None:
    name, wrapped = LAYOUTS[layout]
    model = source(name)
    torch.save(wrapped(dict(model.state_dict())), tmp_path / "x.pth")
    kwargs = None if name == "resnet18" else {key: value for key, value in NET.items() if key != "num_heads"}
    if kwargs is not None and layout != "MoCo v3":  # whose twelve heads are known
        kwargs["num_heads"] = 12
    loaded = load_backbone(tmp_path / "x.pth", name, kwargs)
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES), atol=1e-5, rtol=0)


def test_safetensors_are_read(tmp_path: Path) -> None:
    model = source("resnet18")
    save_file(dict(model.state_dict()), tmp_path / "x.safetensors")
    torch.testing.assert_close(load_backbone(tmp_path / "x.safetensors", "resnet18")(IMAGES), model(IMAGES))


class Code:
    """What a pickle may hide."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def resnet() -> Weights:
    return dict(source("resnet18").state_dict())


def vit() -> Weights:
    return dict(source("vit_small_patch16_224").state_dict())


@pytest.mark.parametrize(
    ("content", "name", "kwargs", "message"),
    [
        (
            lambda: {"state_dict": resnet()},
            "resnet50",
            None,
            "not hold a resnet50. .* no prefix: .* missing",
        ),
        (lambda: {"state_dict": {"conv1.weight": torch.ones(64, 3, 3, 3)}}, None, None, "does not name its backbone"),
        (lambda: {**resnet(), "extra.weight": torch.ones(1)}, "resnet18", None, "1 are left over, e.g. extra.weight"),
        (lambda: {"state_dict": {"other": torch.ones(1)}}, "resnet18", None, "are missing, e.g. conv1.weight"),
        (vit, "vit_small_patch16_224", {**NET, "embed_dim": 96}, r"\(48,\), not \(96,\)|is \(.*48.*\), not"),
        (lambda: {"weights": Code()}, "resnet18", None, r"weights are in an object of \w+.print, which cannot be read"),
    ],
)
def test_files_that_do_not_fit_say_why(content: Any, name: Any, kwargs: Any, message: str, tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        load_backbone(tmp_path / "x.pth", name, kwargs)
    (tmp_path / "x.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(UserError, match=r"x.safetensors is damaged or no checkpoint"):
        load_backbone(tmp_path / "x.safetensors", name)
    with pytest.raises(UserError, match="does not exist"):
        load_backbone(tmp_path / "y.pth", name)


def test_the_branch_that_the_paper_evaluates_is_taken(tmp_path: Path) -> None:
    class Own(DINO):
        """A subclass takes the branch of its base."""

    for method, teacher in ((Own, True), (MAE, False)):
        module = small(method, VIT)
        if teacher:
            nn.init.constant_(module.teacher_backbone.cls_token, 5)
        running = trainer(tmp_path, limit_train_batches=1)
        running.fit(module, data(method))
        running.save_checkpoint(tmp_path / "x.ckpt")
        loaded = load_backbone(tmp_path / "x.ckpt")
        assert torch.equal(loaded.cls_token, module.evaluated_backbone.cls_token)
