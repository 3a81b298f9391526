"""SwAV: architecture, prototypes, queue, and whole steps against a plain restatement."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_lightning import FakeData, Optim, SwAV, UserError, ViewSpec
from tests.oracle import Weights, compare, larc, parameters, random_views, relu_mlp, run, unit
from tests.processes import run_processes
from tests.small import small, trainer

CROPS = [ViewSpec(size=32, count=2), ViewSpec(size=16, count=2)]


def test_head_and_defaults_are_the_papers() -> None:
    method = SwAV()
    assert parameters(method.projector) == 4_462_720
    assert parameters(method.prototypes) == 384_000
    assert (method.temperature, method.epsilon, method.sinkhorn_iterations, method.views) == (0.1, 0.05, 3, "swav")
    assert method.optim.peak_lr(4096) == pytest.approx(4.8)
    factors = [method.optim.lr_factor(step, 100, 1) for step in (0, 9, 10, 99, 100)]
    assert [4.8 * factor for factor in factors] == pytest.approx([0.3, 4.8, 4.8, 0.0063, 0.0048], abs=1e-4)
    assert method.chance_loss == pytest.approx(8.0064, abs=1e-4)
    assert all((block.bn3.weight == 1).all() for block in method.backbone.layer1)  # type: ignore[union-attr]


def test_crops_of_one_size_share_a_forward_and_all_crops_the_head() -> None:
    method = small(SwAV)
    method.training_loss([torch.rand(4, 3, size, size) for size in (32, 32, 16, 16, 16)])
    assert method.backbone.bn1.num_batches_tracked == 2  # type: ignore[union-attr]
    assert method.projector[1].num_batches_tracked == 1  # type: ignore[union-attr]


def test_prototypes_have_unit_norm_when_they_are_used() -> None:
    method = small(SwAV)
    with torch.no_grad():
        method.prototypes.weight *= 7
    method.training_loss([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)])
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(16))


def test_prototypes_are_frozen_at_first(tmp_path: Any) -> None:
    def moved(steps: int) -> bool:
        method = small(SwAV, freeze_prototypes_steps=3, optim=Optim("adamw", lr_scaling="none", warmup_epochs=0))
        before = unit(method.prototypes.weight.detach().clone())
        trainer(tmp_path, max_steps=steps).fit(method, FakeData(batch_size=8, views=CROPS))
        return not torch.allclose(unit(method.prototypes.weight.detach()), before, atol=1e-6)

    assert not moved(3)
    assert moved(4)


def test_queue_is_filled_from_its_epoch_and_used_once_full(tmp_path: Any) -> None:
    method = small(SwAV, queue_length=32, queue_start_epoch=1)
    sizes: list[int] = []
    method.prototypes.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    running = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, limit_val_batches=0)
    running.fit(method, FakeData(batch_size=8, views=CROPS[:1]))  # 8 steps an epoch
    assert sizes == [16] * 12 + [16, 32, 32] * 4  # 4 steps fill it; then two crops score 32 earlier embeddings each
    assert method.queue.written == 64


def test_queue_keeps_embeddings_not_scores() -> None:
    torch.manual_seed(0)
    method = small(SwAV, queue_length=8, queue_start_epoch=0)
    views = [torch.rand(4, 3, 16, 16) for _ in range(2)]
    for _ in range(2):
        method.training_loss(views)
        method.update_teacher()
    rows = method.queue.rows
    assert rows.shape == (8, 2, 128)
    torch.testing.assert_close(rows.norm(dim=2), torch.ones(8, 2))
    assert not torch.equal(rows[:, 0], rows[:, 1])


@pytest.mark.parametrize(("length", "remedy"), [(4, 8), (20, 16)])
def test_queue_must_fit_the_batch(tmp_path: Any, length: int, remedy: int) -> None:
    with pytest.raises(UserError, match=f"queue_length={length} .* set it to {remedy}"):
        trainer(tmp_path).fit(small(SwAV, queue_length=length), FakeData(batch_size=8))


def plain_sinkhorn(scores: Tensor, epsilon: float) -> Tensor:
    q = torch.exp(scores / epsilon).T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    optim = Optim("larc", base_lr=3.0, weight_decay=1e-2, decay_norm_and_bias=True)
    method = small(SwAV, num_prototypes=6, queue_length=8, queue_start_epoch=0, epsilon=0.5, optim=optim).double()
    earlier: list[Tensor] = []  # embeddings (2, B, D) of the steps before, newest first

    def before(weights: Weights) -> None:
        weights["prototypes.weight"] = unit(weights["prototypes.weight"])

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        prototypes = weights["prototypes.weight"]
        large = run(method.backbone, weights, "backbone.", torch.cat(views[:2]))
        local = run(method.backbone, weights, "backbone.", torch.cat(views[2:]))
        z = unit(relu_mlp(torch.cat([large, local]), weights, "projector", (1,)))
        z = z.view(4, 4, -1)
        scores = z @ prototypes.T
        total = z.new_zeros(())
        for crop in range(2):
            queue = [part[crop] for part in earlier[:2]] if len(earlier) >= 2 else []
            with torch.no_grad():
                q = plain_sinkhorn(torch.cat([*queue, z[crop]]) @ prototypes.T, 0.5)[-4:]
            for other in range(4):
                if other != crop:
                    total = total - (q * torch.log_softmax(scores[other] / 0.1, 1)).sum(1).mean() / 3
        earlier.insert(0, z.detach()[:2])
        return total / 2

    compare(method, loss_of, larc(3.0, 1e-2), random_views(4, 16, 16, 8, 8), before=before)


def _two_processes(rank: int) -> tuple[float, Tensor]:
    torch.manual_seed(0)
    method = small(SwAV, queue_length=8, queue_start_epoch=0).double().eval()
    images = torch.rand(2, 8, 3, 16, 16, dtype=torch.float64)
    part = [view[rank * 4 : rank * 4 + 4] for view in images]
    method.training_loss(part)
    method.update_teacher()
    return float(method.training_loss(part)), method.queue.rows


def test_two_processes_share_assignments_and_queue() -> None:
    (loss0, queue0), (loss1, queue1) = run_processes(_two_processes, 2)
    assert torch.equal(queue0, queue1)
    torch.manual_seed(0)
    method = small(SwAV, queue_length=8, queue_start_epoch=0).double().eval()
    images = list(torch.rand(2, 8, 3, 16, 16, dtype=torch.float64))
    method.training_loss(images)
    method.update_teacher()
    torch.testing.assert_close(method.queue.rows, queue0)
    assert (loss0 + loss1) / 2 == pytest.approx(float(method.training_loss(images)), abs=1e-10)
    assert math.isfinite(loss0)
