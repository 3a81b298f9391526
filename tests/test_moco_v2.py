"""MoCo v2: architecture, queue, shuffled and split BatchNorm, and whole steps against a plain restatement."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import FakeData, MoCoV2, Optim, UserError
from ssl_lightning.methods.moco_v2 import SplitBatchNorm2d
from tests.oracle import Weights, compare, linear, moved, parameters, random_views, run, sgd, unit
from tests.processes import run_processes
from tests.small import small, trainer


def test_head_and_defaults_are_the_papers() -> None:
    method = MoCoV2()
    assert parameters(method.projector) == 4_458_624
    assert (method.temperature, method.momentum, method.views) == (0.2, 0.999, "moco_v2")
    assert method.queue.rows.shape == (65536, 128)
    torch.testing.assert_close(method.queue.rows.norm(dim=1), torch.ones(65536))
    assert method.optim.peak_lr(256) == 0.03
    assert [method.optim.lr_factor(step, 40, 10) for step in (0, 9, 10, 39)] == pytest.approx(
        [1, 1, 0.5 * (1 + math.cos(math.pi / 4)), 0.5 * (1 + math.cos(math.pi * 0.75))]
    )
    (group,) = method.optim.create(method, 256).param_groups  # every weight is decayed
    assert group["weight_decay"] == 1e-4
    assert all((block.bn3.weight == 1).all() for block in method.backbone.layer1)  # type: ignore[union-attr]
    assert method.chance_loss == pytest.approx(11.0904, abs=1e-4)


def test_keys_of_the_step_are_no_negatives_of_it_and_enter_the_queue_after() -> None:
    method = small(MoCoV2, queue_length=8, bn_splits=1)
    old = method.queue.rows.clone()
    views = list(torch.rand(2, 4, 3, 16, 16))
    loss = method.training_loss(views)
    assert torch.equal(method.queue.rows, old)
    queries = unit(method.projector(method.backbone(views[0])))
    keys = unit(method.teacher_projector(method.teacher_backbone(views[1])))
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ old.T], dim=1) / method.temperature
    assert loss.item() == pytest.approx(-logits.log_softmax(1)[:, 0].mean().item(), abs=1e-5)
    method.update_teacher()
    torch.testing.assert_close(method.queue.rows[:4], keys, atol=1e-5, rtol=0)
    assert torch.equal(method.queue.rows[4:], old[4:])


def test_one_device_without_split_batch_norm_is_warned_of(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="bn_splits to 8"):
        trainer(tmp_path, limit_train_batches=1).fit(small(MoCoV2, bn_splits=1), FakeData(batch_size=8))
    with pytest.raises(UserError, match=r"supports only nn\.BatchNorm2d"):
        MoCoV2(backbone="mobilenetv3_small_050", bn_splits=2)


@pytest.mark.parametrize(("length", "splits", "message"), [(12, 1, "set it to 8"), (64, 3, "bn_splits=3")])
def test_queue_and_splits_must_fit_the_batch(tmp_path: Any, length: int, splits: int, message: str) -> None:
    method = small(MoCoV2, queue_length=length, bn_splits=splits)
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(method, FakeData(batch_size=8))


def test_synchronised_batch_norm_is_refused(tmp_path: Any) -> None:
    method = nn.SyncBatchNorm.convert_sync_batchnorm(small(MoCoV2))
    with pytest.raises(UserError, match="sync_batchnorm to false"):
        trainer(tmp_path).fit(method, FakeData(batch_size=8))


def test_split_batch_norm_normalises_each_group_on_its_own() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 2, 2) * torch.arange(1.0, 9).view(-1, 1, 1, 1)
    split, plain = nn.BatchNorm2d(3), [nn.BatchNorm2d(3) for _ in range(2)]
    split.__class__, split.splits = SplitBatchNorm2d, 2
    out = split(images)
    for group in range(2):
        torch.testing.assert_close(out[group::2], plain[group](images[group::2]))
    torch.testing.assert_close(split.running_mean, (plain[0].running_mean + plain[1].running_mean) / 2)  # type: ignore[operator]
    torch.testing.assert_close(split.running_var, (plain[0].running_var + plain[1].running_var) / 2)  # type: ignore[operator]
    torch.testing.assert_close(split.eval()(images), F.batch_norm(images, split.running_mean, split.running_var))


def test_shuffled_keys_come_back_in_order_and_see_other_statistics() -> None:
    torch.manual_seed(0)
    method = small(MoCoV2, bn_splits=4)
    images = torch.rand(16, 3, 16, 16)
    method.teacher_backbone.eval()
    expected = unit(method.teacher_projector(method.teacher_backbone(images)))
    torch.testing.assert_close(method._keys(images), expected, atol=1e-5, rtol=0)
    method.teacher_backbone.train()
    assert not torch.allclose(method._keys(images), method._keys(images), atol=1e-3)  # another permutation


def _two_processes(rank: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    method, images = small(MoCoV2, queue_length=16).double(), torch.rand(8, 3, 16, 16, dtype=torch.float64)
    own = images[rank * 4 : rank * 4 + 4]
    torch.manual_seed(1)  # the permutation is the same on both, as within a step
    method.teacher_backbone.eval()  # else each process has statistics of its own
    seen: list[Tensor] = []
    hook = method.teacher_backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method.training_loss([own, own])
    method.update_teacher()
    hook.remove()
    return method.queue.rows, method._keys(own), method.teacher_projector(method.teacher_backbone(images)), seen


def test_two_processes_shuffle_images_and_hold_one_queue() -> None:
    (queue, keys, expected, seen), (queue1, keys1, _, seen1) = run_processes(_two_processes, 2)
    assert torch.equal(queue, queue1)
    assert torch.equal(keys, keys1)
    torch.testing.assert_close(keys, F.normalize(expected, dim=1))  # in order, whoever computed them
    torch.manual_seed(0)
    small(MoCoV2, queue_length=16)
    images = torch.rand(8, 3, 16, 16, dtype=torch.float64)
    parts = [[int((images == image).all(dim=(1, 2, 3)).nonzero()) for image in part[0]] for part in (seen, seen1)]
    assert sorted(parts[0] + parts[1]) == list(range(8))
    assert parts[0] != [0, 1, 2, 3]


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    optim = Optim("sgd", base_lr=0.3, weight_decay=1e-2, decay_norm_and_bias=True)
    method = small(MoCoV2, temperature=0.3, momentum=0.9, queue_length=8, bn_splits=1, optim=optim).double()
    queue, pointer = method.queue.rows.clone(), 0

    def encode(weights: Weights, who: str, view: Tensor) -> Tensor:
        h = run(method.backbone, weights, f"{who}backbone.", view)
        return unit(linear(F.relu(linear(h, weights, f"{who}projector.0")), weights, f"{who}projector.2"))

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        nonlocal pointer, queue
        queries, keys = encode(weights, "", views[0]), encode(weights, "teacher_", views[1]).detach()
        total = queries.new_zeros(())
        for query, key in zip(queries, keys, strict=True):
            scores = torch.cat([(query @ key)[None], queue @ query]) / 0.3
            total = total - torch.log_softmax(scores, 0)[0]
        queue = queue.clone()
        queue[pointer : pointer + 4] = keys
        pointer = (pointer + 4) % 8
        return total / 4

    compare(method, loss_of, sgd(0.3, 1e-2), random_views(5, 16, 16), after=lambda weights: moved(weights, 0.9))
    torch.testing.assert_close(method.queue.rows, queue)
