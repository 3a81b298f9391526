"""SimDINO: the coding rate, architecture, health, and whole steps against a plain restatement."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_lightning import Optim, SimDINO, losses
from tests.oracle import Weights, adamw, compare, linear, moved, parameters, random_views, run, unit
from tests.small import VIT, small

APART, SAME = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)


def plain_rate(rows: Tensor, epsilon: float) -> Tensor:
    images, dimensions = rows.shape
    return 0.5 * torch.logdet(torch.eye(dimensions) + dimensions / (images * epsilon) * rows.T @ rows)


@pytest.mark.parametrize(("epsilon", "apart", "same"), [(0.5, 1.098612, 0.804719), (0.05, 3.044522, 1.856786)])
def test_the_coding_rate_of_the_worked_example(epsilon: float, apart: float, same: float) -> None:
    assert losses.coding_rate(APART, epsilon).item() == pytest.approx(apart, abs=1e-6)
    assert losses.coding_rate(7 * SAME, epsilon).item() == pytest.approx(same, abs=1e-6)  # of any scale, not centered
    for rows, rate in ((APART, apart), (SAME, same)):
        for smooth in (True, False):
            loss = losses.simdino(rows.expand(3, 2, 2), rows.expand(2, 2, 2), epsilon, 2.0, smooth)
            assert loss.item() == pytest.approx(-2 - rate, abs=1e-6)


@pytest.mark.parametrize(("images", "dimensions", "epsilon"), [(128, 64, 0.05), (128, 128, 0.5), (64, 256, 0.05)])
def test_the_expansion_lies_between_collapse_and_orthogonal_rows(images: int, dimensions: int, epsilon: float) -> None:
    rank = min(images, dimensions)
    rows = torch.eye(rank, dimensions, dtype=torch.float64).repeat(images // rank, 1)[None]
    largest = math.log1p(dimensions / epsilon / rank) * rank / 2 * (1 / images + 1 / dimensions)
    assert losses.expansion(rows, rows, epsilon).item() == pytest.approx(largest)
    same = torch.ones_like(rows)
    collapsed = losses.collapsed_expansion(images, dimensions, epsilon)
    assert losses.expansion(same, same, epsilon).item() == pytest.approx(collapsed)


@pytest.mark.parametrize("smooth", [True, False])
def test_the_loss_of_any_crops_is_that_of_all_pairs(smooth: bool) -> None:
    torch.manual_seed(0)
    student = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    s, t = unit(student), unit(teacher)
    pairs = torch.stack([(t[g] * s[v]).sum(1).mean() for g in range(2) for v in range(4) if v != g])
    rates = [plain_rate((s[g] + t[g].detach()) / 2 if smooth else s[g], 0.1) for g in range(2)]
    expected = -0.7 * pairs.mean() - (5 + 3) / (5 * 3) * sum(rates[1:], rates[0]) / 2
    loss = losses.simdino(student, teacher, 0.1, 0.7, smooth)
    torch.testing.assert_close(loss, expected)
    expected_gradient = torch.autograd.grad(expected, student)[0]
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, expected_gradient)


def test_half_precision_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 256, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        rate = losses.coding_rate(rows, 0.05)
    rate.backward()
    assert rows.grad is not None
    assert rate.dtype == torch.float32
    assert rows.grad.isfinite().all()
    torch.testing.assert_close(rate, losses.coding_rate(rows.float(), 0.05))


def test_defaults_are_the_released_codes() -> None:
    with torch.device("meta"):
        method = SimDINO()
    assert parameters(method.backbone) == 85_798_656
    assert parameters(method.projector) == 768 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert sum(isinstance(layer, nn.Linear) for layer in method.projector) == 3
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in method.backbone.blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert (method.epsilon, method.coefficient, method.smooth, method.momentum) == (0.05, 1.0, True, 0.996)
    assert method.optim.peak_lr(512) == pytest.approx(1e-3)
    assert method.optim.peak_lr(512) * method.optim.end_lr_factor == pytest.approx(1e-6)
    assert not [name for name, _ in method.named_buffers() if "center" in name]


def test_chance_loss_and_health_know_the_collapse() -> None:
    method = small(SimDINO)
    assert method.chance_loss is None
    method.global_batch = 4  # as within a training
    views = [torch.rand(4, 3, size, size) for size in (16, 16, 8)]
    spread = method.health(views)
    assert spread["expansion"] > spread["collapsed_expansion"] * 1.01
    for head in (method.projector, method.teacher_projector):
        nn.init.zeros_(head[-1].weight)
        nn.init.ones_(head[-1].bias)
    readings = method.health(views)
    assert readings["compression"].item() == pytest.approx(1)
    assert readings["expansion"].item() == pytest.approx(readings["collapsed_expansion"], rel=1e-5)
    assert method.training_loss(views).item() == pytest.approx(method.chance_loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_whole_steps_equal_a_plain_restatement(kind: str) -> None:
    torch.manual_seed(0)
    net = {} if kind == "resnet" else {**VIT, "drop_path": 0.0}
    optim = Optim("adamw", base_lr=1e-2, lr_scaling="none", weight_decay=0.1)
    method: Any = small(SimDINO, net, momentum=0.9, clip_gradient=0.05, optim=optim).double()
    sizes = (16, 16, 8, 8) if kind == "resnet" else (32, 32, 16, 16)

    def head(h: Tensor, weights: Weights, name: str) -> Tensor:
        for layer in (0, 2, 4):
            h = linear(h, weights, f"{name}.{layer}")
            h = nn.functional.gelu(h) if layer < 4 else h
        return unit(h)

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        h = run(method.teacher_backbone, weights, "teacher_backbone.", torch.cat(views[:2]))
        t = head(h, weights, "teacher_projector").detach().view(2, 4, -1)
        h = torch.cat(
            [run(method.backbone, weights, "backbone.", torch.cat(views[part : part + 2])) for part in (0, 2)]
        )
        s = head(h, weights, "projector").view(4, 4, -1)
        cosines = [(t[g] * s[v]).sum(1).mean() for g in range(2) for v in range(4) if v != g]
        rates = [plain_rate((s[g] + t[g]) / 2, 0.05) for g in range(2)]
        return -torch.stack(cosines).mean() - (4 + 16) / (4 * 16) * torch.stack(rates).mean()

    def clipped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: g * min(1.0, 0.05 / (g.norm().item() + 1e-6)) for name, g in gradients.items()}

    compare(
        method,
        loss_of,
        adamw(1e-2, 0.1),
        random_views(3, *sizes),
        clip=method.edit_gradients,
        gradients_of=clipped,
        after=lambda weights: moved(weights, 0.9),
    )
