"""Gram anchoring: similarities of patches, and when which teacher is the anchor."""

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import DINOv2, FakeData, GramAnchoring, UserError, ViewSpec, losses
from tests.small import small, trainer
from tests.test_init_from import Begin

CROPS = [ViewSpec(size=32, count=2), ViewSpec(size=16, count=2)]


def test_the_loss_compares_similarities_within_an_image() -> None:
    student = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]], requires_grad=True)  # cosine 0.6
    anchor = torch.tensor([[[0.0, 2.0], [5.0, 0.0]]], requires_grad=True)  # cosine 0
    loss = losses.gram(student, anchor)
    assert float(loss) == pytest.approx(2 * 0.6**2 / 4)
    loss.backward()
    assert anchor.grad is None
    apart = losses.gram(torch.cat([student, anchor]), torch.cat([anchor, anchor]))
    assert float(apart) == pytest.approx(0.6**2 / 4)  # images are not compared with each other


def test_features_are_free_to_turn() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 5, 4, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    scales = torch.rand(2, 5, 1, dtype=torch.float64) + 0.5
    assert float(losses.gram(features @ turn * scales, features)) == pytest.approx(0, abs=1e-20)


class Recorder(L.Callback):
    """The anchor and the teacher after each step."""

    def __init__(self) -> None:
        self.anchors: list[Tensor] = []
        self.teachers: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for kept, part in ((self.anchors, pl_module.gram_backbone), (self.teachers, pl_module.teacher_backbone)):
            kept.append(torch.cat([p.detach().flatten() for p in part.parameters()]))


def test_the_anchor_is_the_teacher_of_the_snapshot_then_of_every_few_steps(tmp_path: Any) -> None:
    recorder, calls = Recorder(), []
    method = small(GramAnchoring, gram_snapshot=0.25, gram_start=0.5, gram_every=2, gram_updates=1, momentum=0.5)
    whole = method.gram_backbone.forward_features
    method.gram_backbone.forward_features = lambda crops: calls.append(method.global_step) or whole(crops)  # type: ignore[func-returns-value]
    start = torch.cat([p.detach().flatten().clone() for p in method.teacher_backbone.parameters()])
    trainer(tmp_path, callbacks=[recorder]).fit(method, FakeData(batch_size=8, views=CROPS))
    assert calls == [4, 5, 6, 7]  # from half of the 8 steps on
    assert torch.equal(recorder.anchors[0], start)
    for step, teacher in enumerate([1, 1, 1, 1, 5, 5, 5], start=1):
        assert torch.equal(recorder.anchors[step], recorder.teachers[teacher]), step


def test_the_anchor_pulls_the_students_patches_and_gets_no_gradient() -> None:
    torch.manual_seed(0)
    method = small(GramAnchoring, gram_start=0.0, gram_weight=0.0, drop_path=0.0)
    views = [torch.rand(4, 3, size, size) for size in (32, 32, 16)]
    values = []
    for weight in (0.0, 2.0):
        torch.manual_seed(1)
        method.gram_weight = weight
        values.append(method.training_loss(views))
    torch.manual_seed(1)
    _, patches = method.distillation(views)
    anchor = method.gram_backbone.forward_features(torch.cat(views[:2]))[:, 1:]
    torch.testing.assert_close(values[1] - values[0], 2 * losses.gram(patches, anchor), atol=1e-6, rtol=0)
    values[1].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.gram_backbone.parameters())


def test_larger_crops_of_the_anchor_are_interpolated_to_the_grid_of_the_student() -> None:
    torch.manual_seed(0)
    method = small(GramAnchoring, gram_start=0.0, drop_path=0.0)
    views, crops = [torch.rand(4, 3, size, size) for size in (32, 32, 16)], [torch.rand(4, 3, 64, 64) for _ in range(2)]
    values = []
    for of_anchor in ([], crops):
        torch.manual_seed(1)
        values.append(method.training_loss([*views, *of_anchor]))
    torch.manual_seed(1)
    loss, patches = method.distillation(views)
    grids = method.gram_backbone.forward_features(torch.cat(crops))[:, 1:].mT.unflatten(2, (8, 8))
    anchors = F.interpolate(grids, size=(4, 4), mode="bicubic", align_corners=False).flatten(2).mT
    torch.testing.assert_close(values[1], loss + 2 * losses.gram(patches, anchors))
    assert not torch.allclose(values[0], values[1])


def test_the_anchors_crops_fit_its_patches(tmp_path: Any) -> None:
    views = [ViewSpec(size=32, count=2), ViewSpec(size=36, count=2, same_crop_as=0)]
    with pytest.raises(UserError, match="patches of 8 px do not divide the anchor's crops of 36 px"):
        trainer(tmp_path).fit(small(GramAnchoring), FakeData(batch_size=8, views=views))


@pytest.mark.parametrize("separate", [False, True])
def test_as_a_stage_it_goes_on_with_the_teacher_of_dinov2(separate: bool, tmp_path: Any) -> None:
    heads = {"separate_heads": separate, "momentum": 0.5}
    running = trainer(tmp_path, limit_train_batches=2, limit_val_batches=0)
    running.fit(small(DINOv2, **heads), FakeData(batch_size=8, views=CROPS))
    running.save_checkpoint(tmp_path / "first.ckpt")
    left = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]

    views = [*CROPS, ViewSpec(size=64, count=2, same_crop_as=0)]
    stage, begin = (
        small(GramAnchoring, **heads, gram_snapshot=0, gram_start=0, init_from=str(tmp_path / "first.ckpt")),
        Begin(),
    )
    trainer(tmp_path, callbacks=[begin]).fit(stage, FakeData(batch_size=8, views=views))
    for name, value in begin.state.items():
        part, _, rest = name.partition(".")
        teachers = f"teacher_backbone.{rest}" if part.endswith("backbone") else f"teacher_{name}"
        assert torch.equal(value, left.get(teachers, left.get(name))), name

    other = small(GramAnchoring, **heads, num_prototypes=7, init_from=str(tmp_path / "first.ckpt"))
    with pytest.raises(UserError, match=r"heads of .*first.ckpt differ in .*set --model.num_prototypes"):
        trainer(tmp_path).fit(other, FakeData(batch_size=8, views=CROPS))
