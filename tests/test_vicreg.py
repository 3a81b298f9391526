"""VICReg: loss in both forms, architecture, and whole steps against a plain restatement."""

import pytest
import torch
from lightly.loss import VICRegLoss
from torch import Tensor

from ssl_lightning import Optim, VICReg, losses
from tests.oracle import Weights, compare, lars, parameters, random_views, relu_mlp, run
from tests.processes import run_processes
from tests.small import small
from tests.test_barlow_twins import Z1, Z2

X, Y = 0.2 * Z1, 0.2 * Z2


def test_loss_of_the_worked_example() -> None:
    assert losses.vicreg(z0=X, z1=Y, invariance=25, variance=25, covariance=1).item() == pytest.approx(
        19.253977, abs=1e-6
    )
    assert losses.vicreg(X, Y, 25, 25, 1, "sum").item() == pytest.approx(35.834888, abs=1e-6)
    assert losses.vicreg(X, Y, 1, 0, 0).item() == pytest.approx(0.106667, abs=1e-6)
    assert losses.vicreg(X, Y, 0, 1, 0, "sum").item() == pytest.approx(0.599875 + 0.726598, abs=1e-6)
    assert losses.vicreg(X, Y, 0, 0, 1).item() == pytest.approx(0.0064, abs=1e-9)


@pytest.mark.parametrize("shape", [(16, 8), (4, 12)])
def test_loss_equals_lightly(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    pair = [(0.5 * torch.randn(*shape, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    theirs = [z.detach().clone().requires_grad_() for z in pair]
    loss, expected = losses.vicreg(*pair, 25, 25, 1), VICRegLoss()(*theirs)
    loss.backward(), expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    for z, other in zip(pair, theirs, strict=True):
        torch.testing.assert_close(z.grad, other.grad, atol=1e-10, rtol=0)


def test_variance_and_covariance_do_not_care_for_the_mean() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 8, 4, dtype=torch.float64)
    torch.testing.assert_close(losses.vicreg(x, y, 0, 25, 1), losses.vicreg(x + 7, y - 3, 0, 25, 1))


def test_collapsed_projections_have_the_loss_that_the_alarm_knows() -> None:
    for form, collapsed in (("mean", 24.75), ("sum", 49.5)):
        assert losses.vicreg(torch.ones(4, 3), torch.ones(4, 3), 25, 25, 1, form).item() == pytest.approx(collapsed)  # type: ignore[arg-type]
        assert small(VICReg, variance_of_views=form).collapsed_loss == pytest.approx(collapsed)


def _two_processes(rank: int, z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    part = slice(rank * 4, rank * 4 + 4)
    z0, z1 = z0[part].requires_grad_(), z1[part].requires_grad_()
    loss = losses.vicreg(z0, z1, 25, 25, 1)
    loss.backward()
    return loss.detach(), torch.stack([z0.grad, z1.grad])  # type: ignore[list-item]


def test_loss_of_two_processes_equals_one() -> None:
    torch.manual_seed(0)
    z0, z1 = 0.5 * torch.randn(2, 8, 4, dtype=torch.float64)
    results = run_processes(_two_processes, 2, z0, z1)
    whole = [z.clone().requires_grad_() for z in (z0, z1)]
    loss = losses.vicreg(*whole, 25, 25, 1)
    loss.backward()
    torch.testing.assert_close(torch.stack([result[0] for result in results]).mean(), loss.detach())
    gradients = torch.cat([result[1] for result in results], dim=1) / 2  # processes average their gradients
    torch.testing.assert_close(gradients, torch.stack([z.grad for z in whole]))  # type: ignore[arg-type,misc]


def test_projector_and_defaults_are_the_papers() -> None:
    with torch.device("meta"):
        method = VICReg()
    assert parameters(method.projector) == 151_044_096
    assert (method.invariance, method.variance, method.covariance, method.views) == (25, 25, 1, "vicreg")
    optim = method.optim
    assert (optim.name, optim.base_lr, optim.weight_decay, optim.end_lr_factor) == ("lars", 0.2, 1e-6, 0.001)
    assert method.chance_loss is None


def test_each_view_has_its_own_forward() -> None:
    method = small(VICReg)
    method.training_loss([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)])
    assert method.backbone.bn1.num_batches_tracked == 2  # type: ignore[union-attr]
    assert method.projector[1].num_batches_tracked == 2


@pytest.mark.parametrize("form", ["mean", "sum"])
def test_whole_steps_equal_a_plain_restatement(form: str) -> None:
    torch.manual_seed(1)
    optim = Optim("lars", base_lr=2.0, weight_decay=1e-2)
    method = small(VICReg, variance_of_views=form, projector_dim=5, optim=optim).double()

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        pair = [
            relu_mlp(run(method.backbone, weights, "backbone.", view), weights, "projector", (1, 4)) for view in views
        ]
        total = 25 * (pair[0] - pair[1]).square().sum() / pair[0].numel()
        for z in pair:
            missing = (1 - (z.var(0) + 1e-4).sqrt()).clamp(min=0).sum() / 5
            total = total + 25 * missing / (2 if form == "mean" else 1)
            covariance = torch.cov(z.T)
            for i in range(5):
                for j in range(5):
                    total = total + (covariance[i, j] ** 2 / 5 if i != j else 0)
        return total

    compare(method, loss_of, lars(2.0, 1e-2), random_views(4, 16, 16))
