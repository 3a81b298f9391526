"""Backbones by name: the width they promise is the width they give."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import BYOL, CAPI, IJEPA, MAE, BEiT, MoCoV3, SimCLR, SimMIM, UserError
from ssl_lightning.backbones.initialization import residual_branches
from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.backbones.tokens import multi_crop, sincos_positions
from ssl_lightning.backbones.whitened import Whitening
from ssl_lightning.callbacks.checkpoint import LastCheckpoint
from tests.processes import run_processes
from tests.small import data, small, trainer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet50", 23_508_032),
        ("resnet18", 11_176_512),
        ("resnet18_cifar", 11_168_832),
        ("whitened_cnn", 654_840),
        ("whitened_vit", 944_312),
        ("vit_tiny_patch16_224", 5_524_416),
        ("vit_small_patch16_224", 21_665_664),
        ("vit_base_patch16_224", 85_798_656),
        ("torchvision/resnet18", 11_176_512),
        ("torchvision/vit_b_16", 85_798_656),
    ],
)
def test_backbones_have_the_published_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        backbone = create_backbone(name)
    assert sum(p.numel() for p in backbone.parameters()) == parameters


@pytest.mark.parametrize(
    "name",
    [
        "resnet10_cifar",
        "whitened_cnn",
        "whitened_vit",
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
        ("whitened_cnn", {"pretrained": True}, "no pretrained weights"),
        ("whitened_cnn", {"num_classes": 10}, "has no classifier"),
        ("whitened_vit", {"pretrained": True}, "no pretrained weights"),
        ("whitened_vit", {"patch_size": 4}, "takes no patch_size; set channels"),
        ("torchvision/squeezenet1_0", {}, "does not give one feature vector"),
    ],
)
def test_wrong_backbones_say_what_to_change(name: str, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_backbone(name, **kwargs)


@pytest.mark.parametrize("size", [32, 96, 224])
def test_one_vit_takes_images_of_any_size_its_patch_divides(size: int) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", depth=1).eval()
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, size, size)).shape == (1, 192)


def test_positions_are_interpolated_as_in_dinos_released_code() -> None:
    torch.manual_seed(0)
    vit = create_backbone("vit_tiny_patch16_224", depth=1)
    assert vit.positions(14, 14) is vit.pos_embed  # type: ignore[operator]
    torch.nn.init.normal_(vit.pos_embed)  # type: ignore[arg-type]
    grid = vit.pos_embed[:, 1:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)  # type: ignore[index]
    released = F.interpolate(grid, scale_factor=((6 + 0.1) / 14, (6 + 0.1) / 14), mode="bicubic")
    positions = vit.positions(6, 6)  # type: ignore[operator]
    assert positions.shape == (1, 37, 192)
    assert torch.equal(positions[:, 0], vit.pos_embed[:, 0])  # type: ignore[index]
    torch.testing.assert_close(positions[:, 1:], released.permute(0, 2, 3, 1).reshape(1, 36, 192))
    to_the_grid = F.interpolate(grid, size=(6, 6), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 36, 192)
    assert (positions[:, 1:] - to_the_grid).abs().max() > 0.1


def test_an_any_size_vit_is_timms_at_its_own_size() -> None:
    import timm

    torch.manual_seed(0)
    ours = create_backbone("vit_tiny_patch16_224", depth=2).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_fixed_positions_of_moco_v3_and_mae() -> None:
    moco_v3 = sincos_positions(8, (2, 2), rows_first=True)
    mae = sincos_positions(8, (2, 2), rows_first=False)
    column = [0.841471, 0.010000, 0.540302, 0.999950]
    torch.testing.assert_close(moco_v3[0, 2], torch.tensor([0.0, 0, 1, 1, *column]), atol=1e-6, rtol=0)
    torch.testing.assert_close(mae[0, 2], torch.tensor([*column, 0.0, 0, 1, 1]), atol=1e-6, rtol=0)
    assert not mae[0, 0].any()
    assert mae.shape == (1, 5, 8)


def test_crops_are_grouped_by_neighbouring_sizes_and_stay_in_order() -> None:
    calls: list[tuple[int, int]] = []

    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            calls.append((len(images), images.shape[-1]))
            return images.mean((2, 3))

    views = [torch.full((2, 3, size, size), float(i)) for i, size in enumerate((8, 8, 4, 8))]
    features = multi_crop(Mean(), views)
    assert calls == [(4, 8), (2, 4), (2, 8)]
    assert features[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "torchvision/resnet18", "resnet18_cifar"])
def test_residual_branches_start_at_zero_or_one(name: str) -> None:
    backbone = create_backbone(name)
    for scale in (0.0, 1.0):
        residual_branches(backbone, scale)
        last = [
            p
            for key, p in backbone.named_parameters()
            if key.endswith("1.bn3.weight" if "50" in name else "1.bn2.weight")
        ]
        assert last
        assert all((p == scale).all() for p in last)
    assert (backbone.bn1.weight == 1).all()  # type: ignore[union-attr]


def test_whitening_gives_uncorrelated_components_of_unit_variance() -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 3, 1, 1) + 0.2 * torch.rand(8, 3, 16, 16)  # channels and neighbors are correlated
    whitening = Whitening(3, epsilon=0.0).double()
    whitening.begin_with_images(images.double())
    components = whitening(images.double()).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(components[:12]), torch.eye(12, dtype=torch.float64), atol=1e-2, rtol=0)
    assert torch.equal(components[12:], -components[:12])


def test_the_first_filters_of_a_whitened_cnn_copy_the_channels() -> None:
    images = torch.randn(2, 3, 9, 9)
    network = create_backbone("whitened_cnn", channels=(32, 48))
    maps = F.gelu(network.whitening(images))  # type: ignore[union-attr, operator]
    for block in network.blocks:  # type: ignore[union-attr]
        copied = block[0](maps)[:, : maps.shape[1]]
        torch.testing.assert_close(copied, maps)
        assert block[0].weight[maps.shape[1] :].abs().min() > 0
        maps = block(maps)


def test_patches_of_a_whitened_vit_lie_where_the_image_has_them() -> None:
    vit = create_backbone("whitened_vit", channels=(8, 24)).eval()
    images = torch.rand(1, 3, 48, 40).expand(2, 1, 3, 48, 40).clone()
    images[1, :, :, 16:20, 8:12] += 1
    before, after = (vit.patch_embed(view) for view in images)  # type: ignore[operator]
    assert before.shape == (1, 12, 10, 24)
    changed = (before != after).any(-1)[0].nonzero().tolist()
    assert [4, 2] in changed
    assert all(abs(row - 4) <= 3 and abs(column - 2) <= 3 for row, column in changed)


@pytest.mark.parametrize("method", [MAE, SimMIM, BEiT, IJEPA, CAPI, MoCoV3])
def test_methods_that_need_projected_patches_say_so(method: Any) -> None:
    with pytest.raises(UserError, match=r"whitened_vit"):
        method(backbone="whitened_vit")


def _whitened(_rank: int, processes: int, folder: Path) -> list[Tensor]:
    net = {"backbone": "whitened_cnn", "backbone_kwargs": {"channels": (8, 8, 16)}}
    byol = small(BYOL, net)
    together = trainer(folder, strategy="ddp" if processes > 1 else "auto", devices=processes, max_steps=2)
    together.fit(byol, data(BYOL, batch_size=16 // processes))
    return [byol.backbone.whitening.weight.data, byol.teacher_backbone.whitening.weight.data]


def test_a_whitening_backbone_meets_the_first_images_once_on_any_number_of_processes(tmp_path: Path) -> None:
    (student, teacher), other = run_processes(_whitened, 2, 2, tmp_path)
    ((one, _),) = run_processes(_whitened, 1, 1, tmp_path)
    assert torch.equal(student, teacher)
    assert torch.equal(student, other[0])
    torch.testing.assert_close(student, one)
    assert not torch.equal(one, create_backbone("whitened_cnn").whitening.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("channels", "message"),
    [((), r"channels in --model.backbone_kwargs needs"), ((8, 8, 8, 8, 8), r"views of 32 px are too .* needs 33 px")],
)
def test_a_whitening_backbone_says_what_does_not_fit(channels: tuple[int, ...], message: str, tmp_path: Path) -> None:
    net = {"backbone": "whitened_cnn", "backbone_kwargs": {"channels": channels}}
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(small(SimCLR, net), data(SimCLR))


def test_a_whitening_backbone_keeps_its_whitening_in_a_second_training(tmp_path: Path) -> None:
    model = small(SimCLR, {"backbone": "whitened_cnn", "backbone_kwargs": {"channels": (8, 8, 16)}})
    trainer(tmp_path, max_steps=1).fit(model, data(SimCLR))
    before = model.backbone.whitening.weight.clone()
    trainer(tmp_path, max_steps=1).fit(model, data(SimCLR, seed=1))
    assert torch.equal(before, model.backbone.whitening.weight)


def test_a_training_with_a_whitening_backbone_resumes_after_an_epoch(tmp_path: Path) -> None:
    def run(ckpt_path: str | None = None) -> dict[str, Tensor]:
        model = small(SimCLR, {"backbone": "whitened_cnn", "backbone_kwargs": {"channels": (8, 8, 16)}})
        last = LastCheckpoint(dirpath=str(tmp_path), keep_epochs=[1])
        running = trainer(tmp_path, max_epochs=2, callbacks=[last], enable_checkpointing=True)
        running.fit(model, data(SimCLR, num_workers=0), ckpt_path=ckpt_path)
        return model.state_dict()

    whole, resumed = run(), run(str(tmp_path / "epoch_1.ckpt"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
