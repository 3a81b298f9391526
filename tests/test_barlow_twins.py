"""Barlow Twins: loss, architecture, the learning rate of biases, and whole steps against a plain restatement."""

from typing import Any

import pytest
import torch
from lightly.loss import BarlowTwinsLoss
from torch import Tensor, nn

from ssl_lightning import BarlowTwins, Optim, losses
from tests.oracle import Update, Weights, batch_norm, compare, lars, parameters, random_views, relu_mlp, run
from tests.processes import run_processes
from tests.small import small

Z1 = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 4.0]], dtype=torch.float64)
Z2 = torch.tensor([[2.0, 1.0], [2.0, 3.0], [5.0, 2.0]], dtype=torch.float64)


def test_loss_of_the_worked_example() -> None:
    assert losses.barlow_twins(z0=Z1, z1=Z2, lambd=0.0051).item() == pytest.approx(2.273036, abs=1e-6)
    assert losses.barlow_twins(Z1, Z2, 0.0).item() == pytest.approx(2.267936, abs=1e-6)
    off_diagonal = losses.barlow_twins(Z1, Z2, 1.0) - losses.barlow_twins(Z1, Z2, 0.0)
    assert off_diagonal.item() == pytest.approx(0.999989, abs=1e-6)


def test_loss_equals_lightly() -> None:
    torch.manual_seed(0)
    pair = [torch.randn(16, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    theirs = [z.detach().clone().requires_grad_() for z in pair]
    loss, expected = losses.barlow_twins(*pair, 0.01), BarlowTwinsLoss(0.01)(*theirs)
    loss.backward(), expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    for z, other in zip(pair, theirs, strict=True):
        torch.testing.assert_close(z.grad, other.grad, atol=1e-10, rtol=0)


def test_independent_dimensions_lose_nothing_and_constant_ones_their_number() -> None:
    hadamard = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    assert losses.barlow_twins(hadamard, hadamard, 0.0051).item() == pytest.approx(0, abs=1e-8)
    assert losses.barlow_twins(torch.ones(4, 3), torch.ones(4, 3), 0.0051).item() == 3
    assert BarlowTwins(projector_dim=16, hidden_dim=16).chance_loss == 16


def test_loss_of_half_precision_is_computed_in_float32() -> None:
    z0, z1 = torch.randn(2, 8, 16).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.barlow_twins(z0, z1, 0.0051)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, losses.barlow_twins(z0.float(), z1.float(), 0.0051))


def _two_processes(rank: int, z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    part = slice(rank * 4, rank * 4 + 4)
    z0, z1 = z0[part].requires_grad_(), z1[part].requires_grad_()
    loss = losses.barlow_twins(z0, z1, 0.0051)
    loss.backward()
    return loss.detach(), torch.stack([z0.grad, z1.grad])  # type: ignore[list-item]


def test_loss_of_two_processes_equals_one() -> None:
    torch.manual_seed(0)
    z0, z1 = torch.randn(2, 8, 4, dtype=torch.float64)
    results = run_processes(_two_processes, 2, z0, z1)
    whole = [z.clone().requires_grad_() for z in (z0, z1)]
    loss = losses.barlow_twins(*whole, 0.0051)
    loss.backward()
    for value, _ in results:
        torch.testing.assert_close(value, loss.detach())
    gradients = torch.cat([result[1] for result in results], dim=1) / 2  # processes average their gradients
    torch.testing.assert_close(gradients, torch.stack([z.grad for z in whole]))  # type: ignore[arg-type,misc]


def test_projector_and_defaults_are_the_papers() -> None:
    with torch.device("meta"):
        method = BarlowTwins()
    assert parameters(method.projector) == 151_027_712
    assert (method.lambd, method.views) == (0.0051, "barlow_twins")
    assert method.zero_init_residual
    optim = method.optim
    assert (optim.name, optim.weight_decay, optim.warmup_epochs, optim.end_lr_factor) == ("lars", 1e-6, 10, 0.001)


def test_biases_and_norms_have_their_own_learning_rate() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optim = Optim("lars", base_lr=0.2, weight_decay=1e-6, norm_and_bias_lr_scale=0.0048 / 0.2)
    weights, others = optim.create(module, 2048).param_groups
    assert (weights["lr"], others["lr"]) == pytest.approx((1.6, 0.0384))
    assert [p.ndim for p in others["params"]] == [1, 1, 1]
    assert (weights["weight_decay"], others["weight_decay"]) == (1e-6, 0.0)
    assert BarlowTwins(projector_dim=16, hidden_dim=16).optim.norm_and_bias_lr_scale == pytest.approx(0.024)


def test_each_view_has_its_own_forward() -> None:
    method = small(BarlowTwins)
    method.training_loss([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)])
    assert method.backbone.bn1.num_batches_tracked == 2  # type: ignore[union-attr]
    assert method.projector[1].num_batches_tracked == 2


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    optim = Optim("lars", base_lr=2.0, weight_decay=1e-2, norm_and_bias_lr_scale=0.024)
    method = small(BarlowTwins, lambd=0.1, projector_dim=5, optim=optim).double()

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        first, second = (
            relu_mlp(run(method.backbone, weights, "backbone.", view), weights, "projector", (1, 4)) for view in views
        )
        correlation = batch_norm(first, {}, "").T @ batch_norm(second, {}, "") / len(first)
        total = first.new_zeros(())
        for i in range(5):
            for j in range(5):
                total = total + ((1 - correlation[i, j]) ** 2 if i == j else 0.1 * correlation[i, j] ** 2)
        return total

    fast, slow = lars(2.0, 1e-2), lars(2.0 * 0.024, 1e-2)

    def update(name: str, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        return (fast if p.ndim > 1 else slow)(name, p, gradient, state)

    chosen: Update = update
    compare(method, loss_of, chosen, random_views(4, 16, 16))
