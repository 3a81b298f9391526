"""NNCLR: loss, architecture, the queue of neighbours, and whole steps against a plain restatement."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import NNCLR, FakeData, Optim, UserError, losses
from tests.oracle import Weights, batch_norm, compare, lars, parameters, random_views, relu_mlp, run, unit
from tests.processes import run_processes
from tests.small import small, trainer

NEIGHBOURS = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
PREDICTIONS = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_loss_is_the_cross_entropy_of_a_neighbour_over_all_predictions(temperature: float) -> None:
    neighbours, predictions = (3 * NEIGHBOURS).requires_grad_(), (2 * PREDICTIONS).requires_grad_()
    loss = losses.nnclr(neighbours, predictions, temperature)
    first = math.log(1 + math.exp((-0.8 - 0.6) / temperature))
    second = math.log(1 + math.exp((0.8 - 0.6) / temperature))
    assert loss.item() == pytest.approx((first + second) / 2)
    loss.backward()
    assert neighbours.grad is None
    assert predictions.grad is not None


def _two_processes(rank: int, neighbours: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
    part = slice(rank * 4, rank * 4 + 4)
    predictions = predictions[part].requires_grad_()
    loss = losses.nnclr(neighbours[part], predictions, 0.2)
    loss.backward()
    assert predictions.grad is not None
    return loss.detach(), predictions.grad


def test_loss_of_two_processes_equals_one() -> None:
    torch.manual_seed(0)
    neighbours, predictions = torch.randn(2, 8, 4, dtype=torch.float64)
    results = run_processes(_two_processes, 2, neighbours, predictions)
    predictions.requires_grad_()
    loss = losses.nnclr(neighbours, predictions, 0.2)
    loss.backward()
    torch.testing.assert_close(torch.stack([result[0] for result in results]).mean(), loss.detach())
    gradients = torch.cat([result[1] for result in results]) / 2  # processes average their gradients
    torch.testing.assert_close(gradients, predictions.grad)


def test_heads_and_defaults_are_the_papers() -> None:
    method = NNCLR()
    # linear layers of 2048, 2048 and 256 with BatchNorm after each; 4096 with BatchNorm, 256 without
    assert parameters(method.projector) == 2 * 2048 * 2048 + 2048 * 256 + 2 * (2048 + 2048 + 256)
    assert parameters(method.predictor) == 2 * 256 * 4096 + 2 * 4096 + 256
    assert isinstance(method.projector[-1], nn.BatchNorm1d)
    assert (method.temperature, method.queue.rows.shape, method.views) == (0.1, (98304, 256), "nnclr")
    torch.testing.assert_close(method.queue.rows.norm(dim=1), torch.ones(98304))


def test_queue_takes_the_first_view_after_the_step_and_must_fit_the_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = small(NNCLR, queue_length=8)
    before = method.queue.rows.clone()
    views = [torch.rand(4, 3, 16, 16) for _ in range(2)]
    method.training_loss(views)
    assert torch.equal(method.queue.rows, before), "a view is not its own neighbour"
    method.update_teacher()
    with torch.no_grad():
        expected = F.normalize(method.projector(method.backbone(views[0])), dim=1)
    torch.testing.assert_close(method.queue.rows[:4], expected)
    assert torch.equal(method.queue.rows[4:], before[4:])
    assert not method.queue.rows.requires_grad
    with pytest.raises(UserError, match=r"queue_length=20 .* set it to 16"):
        trainer(tmp_path).fit(small(NNCLR, queue_length=20), FakeData(batch_size=8))


def test_chance_loss_is_that_of_equal_predictions() -> None:
    method = small(NNCLR)
    assert method.chance_loss is None
    nn.init.zeros_(method.predictor[-1].weight)
    loss = method.training_loss([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)])
    assert loss.item() == pytest.approx(math.log(4))
    method.global_batch = 4  # as within a training
    assert method.chance_loss == pytest.approx(math.log(4))


@torch.no_grad()
def test_health_tells_when_all_images_have_one_neighbour() -> None:
    method = small(NNCLR, queue_length=64).eval()
    views = [torch.rand(16, 3, 16, 16)]
    for _ in range(4):
        method.train().training_loss([torch.rand(16, 3, 16, 16) for _ in range(2)])
        method.eval().update_teacher()
    assert method.health(views)["queue_age"] == 4
    nn.init.zeros_(method.projector[-2].weight)
    assert method.health(views)["neighbours_in_use"] == 1 / 16


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    method = small(NNCLR, queue_length=8, optim=Optim("lars", base_lr=3.0, weight_decay=1e-2)).double()
    queue = list(method.queue.rows.clone())
    written = 0

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        nonlocal written
        z = [relu_mlp(run(method.backbone, weights, "backbone.", view), weights, "projector", (1, 4)) for view in views]
        z = [batch_norm(one, weights, "projector.7") for one in z]
        p = [unit(relu_mlp(one, weights, "predictor", (1,))) for one in z]
        total = z[0].new_zeros(())
        for near, other in ((0, 1), (1, 0)):
            for i in range(4):
                neighbour = max(queue, key=lambda row, i=i, near=near: float(unit(z[near][i].detach()) @ row))
                similarity = torch.stack([unit(neighbour) @ p[other][k] / 0.1 for k in range(4)])
                total = total - (similarity[i] - torch.logsumexp(similarity, 0)) / 8
        for row in unit(z[0].detach()):
            queue[written % 8] = row
            written += 1
        return total

    compare(method, loss_of, lars(3.0, 1e-2), random_views(4, 16, 16))
    torch.testing.assert_close(method.queue.rows, torch.stack(queue), atol=1e-6, rtol=0)
