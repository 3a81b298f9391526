"""Losses against worked examples, lightly, and one process against several."""

import math

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor

from ssl_lightning.distributed import gather
from ssl_lightning.losses import nt_xent
from tests.processes import run_processes

Z0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
Z1 = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.802079), (0.5, 0.668040), (0.1, 1.064850)])
def test_nt_xent_worked_example(temperature: float, expected: float) -> None:
    assert nt_xent(Z0, Z1, temperature).item() == pytest.approx(expected, abs=1e-6)
    assert nt_xent(Z0, Z1, temperature, reduction="sum").item() == pytest.approx(2 * expected, abs=2e-6)


def test_losses_take_keywords() -> None:
    assert nt_xent(z0=Z0, z1=Z1, temperature=0.5).item() == pytest.approx(0.668040, abs=1e-6)


def test_nt_xent_gradient_of_the_worked_example() -> None:
    z = torch.cat([Z0, Z1]).requires_grad_()
    nt_xent(*z.chunk(2), 0.5).backward()
    expected = [[0, -0.171823], [0.848066, 0], [-0.678453, 0.508840], [-0.103094, -0.137459]]
    torch.testing.assert_close(z.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (z.grad * z).sum(1).abs().max() < 1e-12  # the scale of a projection does not matter


def test_nt_xent_equals_lightly() -> None:
    torch.manual_seed(0)
    pair = [torch.randn(16, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    theirs = [z.detach().clone().requires_grad_() for z in pair]
    loss, expected = nt_xent(*pair, 0.2), NTXentLoss(0.2)(*theirs)
    loss.backward(), expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    for z, other in zip(pair, theirs, strict=True):
        torch.testing.assert_close(z.grad, other.grad, atol=1e-10, rtol=0)


def test_nt_xent_does_not_care_for_the_order_of_views_or_images() -> None:
    torch.manual_seed(0)
    z0, z1 = torch.randn(2, 8, 4, dtype=torch.float64)
    order = torch.randperm(8)
    loss = nt_xent(z0, z1, 0.3)
    torch.testing.assert_close(loss, nt_xent(z1, z0, 0.3))
    torch.testing.assert_close(loss, nt_xent(z0[order], z1[order], 0.3))


def test_nt_xent_of_collapsed_and_of_orthogonal_projections() -> None:
    assert nt_xent(torch.ones(4, 3), torch.ones(4, 3), 0.5).item() == pytest.approx(math.log(7))
    assert nt_xent(torch.eye(2), torch.eye(2), 0.5).item() == pytest.approx(0.239545, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nt_xent_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z0, z1 = torch.randn(2, 8, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z0, z1, 0.01)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(z0.float(), z1.float(), 0.01))


def _two_processes(rank: int, z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    part = slice(rank * 4, rank * 4 + 4)
    z0, z1 = z0[part].requires_grad_(), z1[part].requires_grad_()
    loss = nt_xent(z0, z1, 0.2)
    loss.backward()
    return loss.detach(), torch.stack([z0.grad, z1.grad])  # type: ignore[list-item]


def _shared_gradient(rank: int) -> Tensor:
    a, b = (torch.full((1, 2), float(rank), requires_grad=True) for _ in range(2))
    whole = gather(b)
    (torch.cat([a, a]) * (rank + 1) + whole).square().sum().backward()
    assert a.grad is not None
    return a.grad


def test_gather_leaves_the_gradient_of_others_alone() -> None:
    for rank, gradient in enumerate(run_processes(_shared_gradient, 2)):
        scale, rows = rank + 1, torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        expected = (2 * scale * (rank * scale + rows)).sum(0, keepdim=True)
        torch.testing.assert_close(gradient, expected)


def test_nt_xent_of_two_processes_equals_one() -> None:
    torch.manual_seed(0)
    z0, z1 = torch.randn(2, 8, 4, dtype=torch.float64)
    results = run_processes(_two_processes, 2, z0, z1)
    whole = [z.clone().requires_grad_() for z in (z0, z1)]
    loss = nt_xent(*whole, 0.2)
    loss.backward()
    torch.testing.assert_close(torch.stack([result[0] for result in results]).mean(), loss.detach())
    gradients = torch.cat([result[1] for result in results], dim=1) / 2  # processes average their gradients
    torch.testing.assert_close(gradients, torch.stack([z.grad for z in whole]))  # type: ignore[arg-type,misc]
