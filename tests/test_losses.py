"""Losses against worked examples, lightly, and one process against several."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightly.loss import DCLLoss, DINOLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from lightly.models import utils as lightly_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_lightning import losses
from ssl_lightning.commands.benchmark.counter import OperationCounter
from ssl_lightning.distributed import gather
from ssl_lightning.heads import patchify
from ssl_lightning.losses import nt_xent
from tests.processes import run_processes
from tests.small import slow_unless

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


@pytest.mark.parametrize(("decoupled", "lightly"), [(False, NTXentLoss), (True, DCLLoss)])
def test_nt_xent_equals_lightly(decoupled: bool, lightly: Callable[[float], nn.Module]) -> None:
    torch.manual_seed(0)
    pair = [torch.randn(16, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    theirs = [z.detach().clone().requires_grad_() for z in pair]
    loss, expected = nt_xent(*pair, 0.2, decoupled=decoupled), lightly(0.2)(*theirs)
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


def _two_processes(rank: int, z0: Tensor, z1: Tensor, decoupled: bool) -> tuple[Tensor, Tensor]:
    part = slice(rank * 4, rank * 4 + 4)
    z0, z1 = z0[part].requires_grad_(), z1[part].requires_grad_()
    loss = nt_xent(z0, z1, 0.2, decoupled=decoupled)
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


@pytest.mark.parametrize("decoupled", [False, True])
def test_nt_xent_of_two_processes_equals_one(decoupled: bool) -> None:
    torch.manual_seed(0)
    z0, z1 = torch.randn(2, 8, 4, dtype=torch.float64)
    results = run_processes(_two_processes, 2, z0, z1, decoupled)
    whole = [z.clone().requires_grad_() for z in (z0, z1)]
    loss = nt_xent(*whole, 0.2, decoupled=decoupled)
    loss.backward()
    torch.testing.assert_close(torch.stack([result[0] for result in results]).mean(), loss.detach())
    gradients = torch.cat([result[1] for result in results], dim=1) / 2  # processes average their gradients
    torch.testing.assert_close(gradients, torch.stack([z.grad for z in whole]))  # type: ignore[arg-type,misc]


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("temperature", "expected"), [(0.2, 0.0489068), (0.07, 0.000189406)])
def test_info_nce_worked_example(temperature: float, expected: float) -> None:
    queries, keys = double([[1, 0]]).requires_grad_(), double([[0.6, 0.8]]).requires_grad_()
    negatives = double([[0, 1], [-1, 0]]).requires_grad_()
    loss = losses.info_nce(queries, keys, negatives, temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    loss.backward()
    assert keys.grad is None
    assert negatives.grad is None
    if temperature == 0.2:
        torch.testing.assert_close(queries.grad, double([[0, 0.0461]]), atol=1e-4, rtol=0)


def test_info_nce_equals_lightlys_with_a_memory_bank() -> None:
    torch.manual_seed(0)
    bank = NTXentLoss(0.3, memory_bank_size=(16, 8)).double()
    queries, keys = torch.randn(2, 4, 8, dtype=torch.float64)
    theirs = queries.clone().requires_grad_()
    queries.requires_grad_()
    bank(theirs.detach(), keys)  # fills the bank
    negatives = bank.memory_bank.bank.clone().double()
    negatives = negatives if negatives.shape == (16, 8) else negatives.T
    expected = bank(theirs, keys)
    loss = losses.info_nce(queries, keys, negatives, 0.3)
    loss.backward(), expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(queries.grad, theirs.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 1.018556), (0.2, 0.262835)])
def test_moco_v3_worked_example(temperature: float, expected: float) -> None:
    queries, keys = Z0.clone().requires_grad_(), Z1.clone().requires_grad_()
    loss = losses.moco_v3(queries, keys, temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert keys.grad is None
    if temperature == 0.2:
        torch.testing.assert_close(queries.grad, double([[0, -1.8217e-4], [1.0235, 0]]), atol=1e-4, rtol=0)


def test_byol_and_negative_cosine_worked_example() -> None:
    for loss_of, expected, gradient in (
        (losses.byol, 0.8, [[0, -1.6]]),
        (losses.negative_cosine, -0.6, [[0, -0.8]]),
    ):
        predictions, targets = double([[1, 0]]).requires_grad_(), double([[3, 4]]).requires_grad_()
        loss = loss_of(predictions, targets)
        assert loss.item() == pytest.approx(expected)
        loss.backward()
        torch.testing.assert_close(predictions.grad, double(gradient))
        assert targets.grad is None


def test_negative_cosine_equals_lightly() -> None:
    torch.manual_seed(0)
    predictions, targets = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = NegativeCosineSimilarity()(predictions, targets)
    torch.testing.assert_close(losses.negative_cosine(predictions, targets), expected)


SCORES = double([[1, 0], [0.9, 0.3], [0.5, 0.4]])
ASSIGNED = double([[0.703041, 0.296959], [0.515451, 0.484549], [0.281269, 0.718731]])


def test_sinkhorn_worked_example() -> None:
    once = double([[0.697743, 0.302257], [0.509142, 0.490858], [0.276192, 0.723808]])
    torch.testing.assert_close(losses.sinkhorn(SCORES, 0.5, 1), once, atol=1e-6, rtol=0)
    torch.testing.assert_close(losses.sinkhorn(SCORES, 0.5, 3), ASSIGNED, atol=1e-6, rtol=0)


def test_sinkhorn_properties() -> None:
    torch.manual_seed(0)
    scores = torch.rand(12, 5, dtype=torch.float64)
    q = losses.sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(q.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(losses.sinkhorn(scores + 3, 0.05, 3), q)
    order = torch.randperm(12)
    torch.testing.assert_close(losses.sinkhorn(scores[order], 0.05, 3), q[order])
    torch.testing.assert_close(losses.sinkhorn(torch.ones(4, 1), 0.05, 3), torch.ones(4, 1))
    torch.testing.assert_close(losses.sinkhorn(torch.ones(4, 8), 0.05, 3), torch.full((4, 8), 1 / 8))
    assert not q.requires_grad
    half = losses.sinkhorn(torch.ones(4, 8, dtype=torch.float16), 0.05, 3)  # exp(20) overflows float16
    assert half.dtype == torch.float32
    assert torch.isfinite(half).all()
    torch.testing.assert_close(q, lightly_sinkhorn(scores, 3, 0.05))


def test_swav_worked_example() -> None:
    predictions = double([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    scores = torch.stack([predictions, predictions])
    # two crops with the same scores: each predicts the other
    loss = losses.swav(scores, torch.stack([ASSIGNED, ASSIGNED]), 0.1)
    assert loss.item() == pytest.approx(2.054777, abs=1e-5)


def test_swav_equals_lightly() -> None:
    torch.manual_seed(0)
    scores = torch.rand(4, 6, 5, dtype=torch.float64, requires_grad=True)
    theirs = scores.detach().clone().requires_grad_()
    assignments = torch.stack([losses.sinkhorn(scores[crop], 0.05, 3) for crop in range(2)])
    loss = losses.swav(scores, assignments, 0.1)
    expected = SwaVLoss(temperature=0.1)(list(theirs[:2]), list(theirs[2:]))
    loss.backward(), expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(scores.grad, theirs.grad)


def test_dino_worked_examples() -> None:
    student, teacher = double([[[1, 0]], [[0, 1]], [[0.5, 0.5]]]), double([[[0.5, 0.3]], [[0.1, 0.2]]])
    loss = losses.dino(student, teacher, torch.zeros(2, dtype=torch.float64), 0.1, 0.04)
    assert loss.item() == pytest.approx(5.140219, abs=1e-6)
    teacher, center = double([[[0.5, 0.3]]]), double([0.1, 0])
    pair = losses.dino(double([[[0, 0]], [[1, 0]]]), teacher, center, 0.1, 0.04)
    assert pair.item() == pytest.approx(0.758628, abs=1e-5)
    shifted = losses.dino(student, teacher - center, torch.zeros(2, dtype=torch.float64), 0.1, 0.04)
    torch.testing.assert_close(losses.dino(student, teacher, center, 0.1, 0.04), shifted)


def test_dino_equals_lightly_and_leaves_the_teacher_alone() -> None:
    torch.manual_seed(0)
    student = torch.randn(5, 3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    theirs = student.detach().clone().requires_grad_()
    # lightly's temperatures are float32
    oracle = DINOLoss(output_dim=7, warmup_teacher_temp=0.04, teacher_temp=0.04, student_temp=0.1).double()
    loss = losses.dino(student, teacher, torch.zeros(7, dtype=torch.float64), 0.1, 0.04)
    expected = oracle(list(teacher.detach()), list(theirs), epoch=0)
    loss.backward(), expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)
    torch.testing.assert_close(student.grad, theirs.grad, atol=1e-6, rtol=0)
    assert teacher.grad is None


def test_patchify_keeps_pixels_together() -> None:
    image = torch.arange(48.0).view(1, 3, 4, 4)
    patches = patchify(image, 2)
    assert patches.shape == (1, 4, 12)
    assert patches[0, 0].tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(patchify(images, 8), lightly_utils.patchify(images, 8))


def test_mae_worked_examples() -> None:
    torch.manual_seed(0)
    images, mask = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    zeros = torch.zeros(2, 4, 768, dtype=torch.float64)
    assert losses.mae(zeros, images, mask, 16, normalize=True).item() == pytest.approx(0.998698, abs=1e-4)
    # targets of rows 1, 2, 3, 0; the first and third are masked: (1 + 9) / 2
    patches = double([1, 2, 3, 0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert losses.mae(torch.zeros(1, 4, 3), patches, torch.tensor([[1.0, 0, 1, 0]]), 1, normalize=False).item() == 5
    # what is visible does not count
    targets = patchify(images, 16)
    mask[:, 0] = 0
    predictions = targets.clone()
    predictions[:, 0] = 99
    assert losses.mae(predictions, images, mask, 16, normalize=False).item() == 0


def test_losses_of_half_precision_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 8, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for loss, expected in (
            (losses.info_nce(a, b, c, 0.05), losses.info_nce(a.float(), b.float(), c.float(), 0.05)),
            (losses.moco_v3(a, b, 0.05), losses.moco_v3(a.float(), b.float(), 0.05)),
            (losses.byol(a, b), losses.byol(a.float(), b.float())),
        ):
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected)


def _distributed_losses(rank: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    part = slice(rank * 4, rank * 4 + 4)
    queries = a[part].requires_grad_()
    loss = losses.moco_v3(queries, b[part], 0.2)
    loss.backward()
    assert queries.grad is not None
    return loss.detach(), queries.grad, losses.sinkhorn(a[part].detach(), 0.5, 3)


def test_moco_v3_and_sinkhorn_of_two_processes_equal_one() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 4, dtype=torch.float64)
    results = run_processes(_distributed_losses, 2, a, b)
    whole = a.clone().requires_grad_()
    loss = losses.moco_v3(whole, b, 0.2)
    loss.backward()
    torch.testing.assert_close(torch.stack([result[0] for result in results]).mean(), loss.detach())
    torch.testing.assert_close(torch.cat([result[1] for result in results]) / 2, whole.grad)
    torch.testing.assert_close(torch.cat([result[2] for result in results]), losses.sinkhorn(a, 0.5, 3))


# Logits in blocks


def of_view(loss: Any, *arguments: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Value of a loss and its gradient to both views, zero where the loss stops it."""
    torch.manual_seed(0)
    views = torch.randn(2, 37, 8, dtype=torch.float64, requires_grad=True)
    value = loss(*views, *arguments, **kwargs)
    value.backward()
    assert views.grad is not None
    return value.detach(), views.grad


@pytest.mark.parametrize("chunk", [1, 5, 37, 100])
def test_losses_in_blocks_equal_those_of_the_whole_matrix(chunk: int) -> None:
    for loss, arguments in ((nt_xent, (0.2, "mean")), (nt_xent, (0.2, "sum")), (losses.moco_v3, (0.2,))):
        whole, blocks = of_view(loss, *arguments), of_view(loss, *arguments, chunk=chunk)
        torch.testing.assert_close(blocks, whole, atol=1e-13, rtol=1e-13)


def _two_processes_in_blocks(rank: int, z0: Tensor, z1: Tensor) -> list[tuple[Tensor, Tensor]]:
    results = []
    for loss in (nt_xent, losses.moco_v3):
        views = torch.stack([z.chunk(2)[rank] for z in (z0, z1)]).requires_grad_()
        value = loss(*views, 0.2, chunk=3)
        value.backward()
        assert views.grad is not None
        results.append((value.detach(), views.grad))
    return results


def test_losses_in_blocks_of_two_processes_equal_one() -> None:
    torch.manual_seed(0)
    pair = torch.randn(2, 16, 4, dtype=torch.float64)
    results = run_processes(_two_processes_in_blocks, 2, *pair)
    for loss, first, second in zip((nt_xent, losses.moco_v3), *results, strict=True):
        views = pair.clone().requires_grad_()
        value = loss(*views, 0.2)
        value.backward()
        torch.testing.assert_close((first[0] + second[0]) / 2, value.detach(), atol=1e-12, rtol=0)
        torch.testing.assert_close(torch.cat([first[1], second[1]], dim=1) / 2, views.grad, atol=1e-12, rtol=0)


def test_losses_in_blocks_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    z0, z1 = torch.randn(2, 8, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z0, z1, 0.05, chunk=3)
    torch.testing.assert_close(loss, nt_xent(z0, z1, 0.05))
    gradients = [torch.autograd.grad(value, [z0, z1]) for value in (loss, nt_xent(z0, z1, 0.05))]
    torch.testing.assert_close(*gradients)


def peak(loss: Any, rows: int, chunk: int | None) -> int:
    views = torch.zeros(2, rows, 16).normal_().requires_grad_()
    with OperationCounter() as memory:
        loss(*views, 0.2, chunk=chunk).backward()
    return memory.peak_bytes


@pytest.mark.parametrize("loss", slow_unless(lambda loss: loss is losses.moco_v3, [nt_xent, losses.moco_v3]))
def test_memory_of_losses_in_blocks_is_linear_in_the_batch(loss: Any) -> None:
    small, large = peak(loss, 512, 256), peak(loss, 2048, 256)
    assert large < 4.1 * small
    assert peak(loss, 2048, None) > 15 * peak(loss, 512, None)
    with FakeTensorMode():  # the same operations on tensors without values
        assert peak(loss, 2048, 256) == large
        assert peak(loss, 16_384, 256) < 32.8 * small
