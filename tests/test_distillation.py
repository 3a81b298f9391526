"""Distillation: what teachers see and say, statistics, and whole steps against a plain restatement."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from ssl_lightning import Distillation, FakeData, KNNProbe, Optim, UserError, ViewSpec, heads, losses
from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.checkpoints import load_backbone
from ssl_lightning.data.views import CIFAR_MEAN, CIFAR_STD
from ssl_lightning.teachers import FrozenTeacher
from tests.oracle import Weights, adamw, compare, linear, random_views, run, unit
from tests.small import BACKBONE, TEACHER, VIT, Viewed, digits, small, trainer

REGISTERS: dict[str, Any] = {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3}
DINOV2 = "vit_small_patch14_reg4_dinov2"


@pytest.fixture(scope="module")
def registers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Checkpoint of a small DINOv2 with patches of 14 px and registers."""
    file = tmp_path_factory.mktemp("weights") / "dinov2.ckpt"
    state = {f"backbone.{name}": value for name, value in create_backbone(DINOV2, **REGISTERS).state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"backbone": DINOV2, "backbone_kwargs": REGISTERS}}, file)
    return str(file)


def teacher_of(source: Any, size: int | None = None, channels: Any = None, **kwargs: Any) -> FrozenTeacher:
    return FrozenTeacher(source, kwargs, size, channels)


# Loss, grids, statistics


def test_the_loss_and_its_gradient_are_the_worked_ones() -> None:
    predictions = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0.6, 0.8], [0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    loss = losses.distillation(predictions, targets, 0.9)
    assert loss.item() == pytest.approx(1.1525, abs=1e-12)
    loss.backward()
    expected = torch.tensor([[0.01, -0.38], [0.0, 0.025]], dtype=torch.float64)
    torch.testing.assert_close(predictions.grad, expected, check_dtype=False)
    assert targets.grad is None
    normal = torch.randn(20_000, 64)
    zero = losses.distillation(torch.zeros_like(normal), normal, 0.9)
    assert 2 * zero.item() == pytest.approx(small(Distillation).chance_loss, abs=2e-3)


@pytest.mark.parametrize(("old", "new"), [((16, 16), (7, 7)), ((4, 6), (2, 3)), ((3, 8), (5, 2))])
def test_grids_are_averaged_to_the_coarser_side(old: tuple[int, int], new: tuple[int, int]) -> None:
    first, second = torch.randn(2, 3, *old), torch.randn(2, 5, *new)
    rows, columns = map(min, zip(old, new, strict=True))
    mirrored = heads.same_grid(first.flip(3), second.flip(3))
    for grid, averaged, flipped in zip((first, second), heads.same_grid(first, second), mirrored, strict=True):
        torch.testing.assert_close(averaged, nn.functional.adaptive_avg_pool2d(grid, (rows, columns)))
        torch.testing.assert_close(flipped, averaged.flip(3))
    assert heads.same_grid(first.bfloat16(), second)[0].dtype == torch.float32


def test_one_scale_for_all_dimensions_gives_the_norms_of_phi_s() -> None:
    torch.manual_seed(0)
    features = (torch.randn(500, 8) @ torch.randn(8, 8) + 50).double()
    mean, scale = heads.standardizer(features)
    values, vectors = torch.linalg.eigh(features.T.cov())
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(3):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]) / 2**0.5
    phi_s = (features - features.mean(0)) @ vectors @ hadamard.T / values.mean().sqrt()
    torch.testing.assert_close(phi_s.var(0), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(((features - mean) / scale).norm(dim=1), phi_s.norm(dim=1), rtol=1e-6, atol=0)


# Teachers


def test_a_teacher_has_its_own_size_normalization_and_patches(registers: str, tmp_path: Path) -> None:
    torch.save(load_backbone(registers).state_dict(), tmp_path / "weights.pth")  # which name no network
    with pytest.raises(UserError, match=r"give --model.teacher_kwargs.backbone"):
        teacher_of(str(tmp_path / "weights.pth"))
    teacher = teacher_of(str(tmp_path / "weights.pth"), backbone=DINOV2, **REGISTERS)
    seen: list[Tensor] = []
    teacher.network.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    white = torch.ones(1, 3, 96, 96)
    features, grid = teacher(white)
    assert grid is not None
    assert (tuple(features.shape), tuple(grid.shape)) == ((1, 48), (1, 48, 7, 7))  # 98 px, without 5 other tokens
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), expected)
    torch.testing.assert_close(seen[0].std((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    tokens = teacher.network.forward_features(teacher.prepared(white))
    torch.testing.assert_close(grid.flatten(2).mT, tokens[:, 5:])


def test_a_teacher_sees_the_channels_that_it_knows() -> None:
    bands, gray = torch.rand(2, 5, 32, 32), torch.rand(2, 1, 32, 32)
    plain = teacher_of(TEACHER)
    torch.testing.assert_close(teacher_of(TEACHER, channels=[3, 2, 1])(bands)[0], plain(bands[:, [3, 2, 1]])[0])
    torch.testing.assert_close(teacher_of(TEACHER, channels=[0])(gray)[0], plain(gray.repeat(1, 3, 1, 1))[0])


def test_teachers_stay_as_they_are_and_out_of_checkpoints(registers: str, tmp_path: Path) -> None:
    method = small(Distillation, teacher=[registers, TEACHER], patch_weight=0.5)
    running = trainer(tmp_path, limit_train_batches=3)
    running.fit(method, FakeData(batch_size=8))
    before = [teacher_of(source).network.state_dict() for source in (registers, TEACHER)]
    for teacher, state in zip(method.teachers, before, strict=True):
        assert not teacher.network.training
        assert all(torch.equal(value, state[name]) for name, value in teacher.network.state_dict().items())
        assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    running.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    widths = {name: len(method.projectors[name].weight) for name in method.projectors}
    assert widths == {"image0": 48, "patch0": 48, "image1": 16, "patch1": 16}
    assert len(saved["state_dict"]) == len(method.backbone.state_dict()) + 3 * len(widths)
    Path(saved["hyper_parameters"]["teacher"][1]).rename(tmp_path / "away")  # readers of the checkpoint need no teacher
    try:
        images = torch.rand(2, 3, 32, 32)
        again = Distillation.load_from_checkpoint(tmp_path / "x.ckpt").eval()
        torch.testing.assert_close(again(images), method.eval()(images))
        torch.testing.assert_close(load_backbone(tmp_path / "x.ckpt")(images), method(images))
        with pytest.raises(UserError, match=r"--model.teacher .*teacher.ckpt: .* does not exist"):
            trainer(tmp_path).fit(again, FakeData(batch_size=8))
    finally:
        (tmp_path / "away").rename(TEACHER)


def test_teachers_see_the_pixels_before_the_normalization_of_the_data(tmp_path: Path) -> None:
    method = small(Distillation)
    trainer(tmp_path, limit_train_batches=1).fit(method, FakeData(batch_size=8))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    pixels = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(method.pixels((pixels - mean) / std), pixels)


@pytest.mark.parametrize("student", [BACKBONE, VIT, {"backbone": nn.Sequential(nn.Conv2d(3, 6, 4, 4))}])
def test_any_network_learns_from_any_other(student: dict[str, Any], registers: str, tmp_path: Path) -> None:
    method = small(Distillation, student, teacher=registers)
    trainer(tmp_path, limit_train_batches=2).fit(method, FakeData(batch_size=8, image_size=64))
    assert {*method.projectors} == {"image0", "patch0"}


def test_a_network_without_a_map_learns_whole_images(tmp_path: Path) -> None:
    teacher = Viewed()
    method = small(Distillation, teacher=teacher, teacher_channels=[1])
    trainer(tmp_path, limit_train_batches=2).fit(method, FakeData(batch_size=8))
    assert {*method.projectors} == {"image0"}
    assert method.chance_loss == pytest.approx(0.94242, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": ""}, "set --model.teacher to a checkpoint or to the name"),
        ({"teacher": "nowhere.ckpt"}, "--model.teacher nowhere.ckpt: nowhere.ckpt does not exist"),
        ({"teacher": "resnet19"}, "--model.teacher resnet19: unknown backbone 'resnet19'.*did you mean"),
        ({"teacher": "resnet10t_cifar"}, "--model.teacher resnet10t_cifar: unknown backbone"),
        ({"teacher_size": 30, "teacher": "REGISTERS"}, "do not divide --model.teacher_size 30; set it to 28 or 42"),
        ({"teacher_size": 0}, "--model.teacher_size 0: give a number of pixels"),
        ({"teacher_channels": [0, 1]}, "takes images of 3 channels, but gets 2; set --model.teacher_channels"),
        ({"teacher_channels": [0, 1, 3]}, r"--model.teacher_channels \[0, 1, 3\]: the images have the channels 0 to 2"),
        ({"teacher": [TEACHER, ""]}, "set --model.teacher to"),
    ],
)
def test_teachers_that_do_not_fit_are_refused_before_training(
    arguments: dict[str, Any], message: str, registers: str, tmp_path: Path
) -> None:
    arguments = {key: registers if value == "REGISTERS" else value for key, value in arguments.items()}
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(small(Distillation, **arguments), FakeData(batch_size=8))


# Training


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    method = small(
        Distillation,
        VIT,
        optim=Optim("adamw", base_lr=1e-3, lr_scaling="none", weight_decay=0.5),
        cosine_weight=0.7,
        patch_weight=0.5,
        teacher_size=64,
    ).double()
    vit: Any = method.backbone
    (teacher,) = method.teachers
    seen: dict[str, list[Tensor]] = {"image": [], "patch": []}

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        tokens = run(vit, weights, "backbone.", views[0])  # only to have the same inputs as ``norm`` below
        h = run(vit.patch_embed, weights, "backbone.patch_embed.", views[0]).flatten(1, 2)
        h = torch.cat([weights["backbone.cls_token"].expand(len(h), -1, -1), h], 1) + weights["backbone.pos_embed"]
        h = run(vit.norm, weights, "backbone.norm.", run(vit.blocks, weights, "backbone.blocks.", h))
        torch.testing.assert_close(tokens, h[:, 0])
        grid = teacher.network.forward_features(teacher.prepared(method.pixels(views[0])))  # (B, 16, 4, 4)
        patches = h[:, 1:].mT.unflatten(2, (4, 4))
        rows = {
            "image": (h[:, 0], grid.mean((2, 3))),
            "patch": tuple(part.permute(0, 2, 3, 1).flatten(0, 2) for part in (patches, grid)),
        }
        loss: Any = 0
        for term, (features, targets) in rows.items():
            seen[term].append(targets)
            known = torch.cat(seen[term])
            targets = (targets - known.mean(0)) / known.var(0).mean().sqrt()
            predictions = linear(features, weights, f"projectors.{term}0")
            cosines = (unit(predictions) * unit(targets)).sum(1)
            distances = (predictions - targets).abs()
            smooth = torch.where(distances < 1, distances**2 / 2, distances - 0.5)
            loss = loss + (0.5 if term == "patch" else 1) * (0.7 * (1 - cosines) + 0.3 * smooth.mean(1)).mean()
        return loss

    update = adamw(1e-3, 0.5)
    compare(method, loss_of, update, random_views(3, 32, batch=3), atol=2e-6)
    statistics = method.teacher_statistics["image0"]
    torch.testing.assert_close(statistics.scale, heads.standardizer(torch.cat(seen["image"]))[1])


def test_statistics_are_fixed_after_their_steps(tmp_path: Path) -> None:
    method = small(Distillation, standardize_steps=3)
    counts: list[float] = []

    class Counts(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            counts.append(float(method.teacher_statistics["image0"].moments[0, 0]))

    running = trainer(tmp_path, callbacks=[Counts()], limit_train_batches=5)
    running.fit(method, FakeData(batch_size=8))
    assert counts == [8, 16, 24, 24, 24]


def test_the_student_is_compared_with_its_start_and_its_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = small(Distillation)
    few: dict[str, Any] = {"views": [ViewSpec(size=16, flip=0)], "train_samples": 256, "val_samples": 100}

    def fit(epochs: int, ckpt_path: str | None = None) -> dict[str, float]:
        running = trainer(tmp_path, callbacks=[KNNProbe()], max_epochs=epochs, limit_train_batches=1)
        running.fit(method, digits(**few), ckpt_path=ckpt_path)
        running.save_checkpoint(tmp_path / "x.ckpt")
        return {name: float(value) for name, value in running.callback_metrics.items() if "knn" in name}

    first = fit(1)
    assert {*first} == {"val/knn_top1", "val/start_knn_top1", "val/teacher_knn_top1"}
    validating = trainer(tmp_path, callbacks=[KNNProbe()])
    teacher = small(Distillation)
    teacher.backbone.load_state_dict(load_backbone(TEACHER).state_dict())
    validating.validate(teacher, digits(**few), verbose=False)  # of the same network, and both normalize alike
    assert first["val/teacher_knn_top1"] == pytest.approx(float(validating.callback_metrics["val/knn_top1"]), abs=0.05)
    second = fit(2, str(tmp_path / "x.ckpt"))
    assert second["val/start_knn_top1"] == first["val/start_knn_top1"]
