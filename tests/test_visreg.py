"""VISReg: the regularizer against a plain restatement, which views are global, and whole steps."""

from statistics import NormalDist
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import FakeData, LeJEPA, Optim, SSLModule, UserError, VISReg, losses
from tests.oracle import Weights, adamw, batch_norm, compare, linear, random_views, run
from tests.small import VIT, small, trainer


def restated(view: Tensor, directions: Tensor) -> Tensor:
    """Of one view, column by column."""
    images, width = view.shape
    quantiles = [NormalDist().inv_cdf(i / (images + 1)) for i in range(1, images + 1)]
    scale = center = shape = torch.zeros((), dtype=view.dtype)
    columns = []
    for column in view.T:
        spread = column - column.sum() / images
        deviation = (spread.square().sum() / images).sqrt() + 1e-6
        scale, center = scale + (deviation - 1) ** 2 / width, center + column.mean() ** 2 / width
        columns.append(spread / deviation.detach())
    for direction in directions.T:
        along = sum(w * column for w, column in zip(direction / direction.norm(), columns, strict=True))
        errors = [(a - q) ** 2 for a, q in zip(sorted(along), quantiles, strict=True)]  # type: ignore[arg-type,type-var]
        shape = shape + sum(errors) / images / directions.shape[1]
    return scale + center + shape


@pytest.mark.parametrize(
    ("embeddings", "expected"),
    [
        ([[-1.0], [0.0], [1.0]], 0.235526),
        ([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], 0.291286),
        ([[0.0, 0, 0, 0]] * 8, 1.569945),
    ],
)
def test_worked_numbers(embeddings: list[list[float]], expected: float) -> None:
    view = torch.tensor([embeddings], dtype=torch.float64)
    assert float(losses.visreg(view, 3 * torch.eye(view.shape[2]))) == pytest.approx(expected, abs=1e-6)


def test_the_regularizer_and_its_gradient_are_those_of_the_formulas() -> None:
    torch.manual_seed(0)
    views = (torch.randn(3, 7, 4, dtype=torch.float64) * 2 + 0.5).requires_grad_()
    directions = torch.randn(4, 5, dtype=torch.float64)
    found, expected = losses.visreg(views, directions), sum(restated(view, directions) for view in views) / 3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, views)[0] for loss in (found, expected)))


def test_the_gradient_grows_at_collapse_and_is_finite_in_it() -> None:
    torch.manual_seed(0)
    gaussian, directions = torch.randn(1, 256, 16), torch.randn(16, 64)
    norms = []
    for scale in (0.1, 0.01, 0.001, 0.0):
        embeddings = (scale * gaussian).requires_grad_()
        losses.visreg(embeddings, directions).backward()
        assert embeddings.grad is not None
        norms.append(float(embeddings.grad.norm()))
    assert norms[0] < norms[1] < norms[2] < float("inf")
    assert norms[3] < float("inf")


@pytest.mark.parametrize("method", [VISReg, LeJEPA])
def test_all_views_of_full_size_are_global(method: type[SSLModule]) -> None:
    torch.manual_seed(0)
    module: Any = small(method).double()
    sizes = (32, 32, 32, 16)
    views = [torch.rand(4, 3, size, size, dtype=torch.float64) for size in sizes]
    with torch.no_grad():
        z = module.projector(torch.cat([module.backbone(torch.cat(views[:3])), module.backbone(views[3])]))
        prediction, _ = module._parts(views)
    z = z.view(4, 4, -1)
    assert float(prediction) == pytest.approx(float((z - (z[0] + z[1] + z[2]) / 3).square().mean()), rel=1e-9)


def test_defaults_are_the_authors() -> None:
    method = VISReg(backbone="resnet18")
    optim = method.optim
    assert (optim.name, optim.peak_lr(64), optim.weight_decay, optim.end_lr_factor) == ("adamw", 9e-4, 0.05, 1e-3)
    assert (method.regularizer_weight, method.num_slices, method.projector[-1].out_features) == (0.9, 4096, 256)
    assert method.chance_loss is None
    method.global_batch = 8  # as within a training
    assert method.chance_loss == pytest.approx(0.9 * 1.569945)


def test_a_batch_too_small_to_show_a_distribution_is_refused(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"set --data.batch_size to 8 or more"):
        trainer(tmp_path).fit(small(VISReg), FakeData(batch_size=4))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_whole_steps_equal_a_plain_restatement(kind: str) -> None:
    torch.manual_seed(0)
    net = {} if kind == "resnet" else {**VIT, "drop_path": 0.0}
    optim = Optim("adamw", base_lr=1e-3, lr_scaling="none", weight_decay=0.05)
    method = small(VISReg, net, regularizer_weight=0.6, optim=optim).double()
    sizes = (16, 16, 8) if kind == "resnet" else (32, 32, 16)
    directions: list[Tensor] = []
    method.random_to_device = lambda host: directions.append(host) or host  # type: ignore[func-returns-value]

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        h = [run(method.backbone, weights, "backbone.", part) for part in (torch.cat(views[:2]), views[2])]
        z = torch.cat(h)
        for layer in (0, 3):
            z = F.gelu(batch_norm(linear(z, weights, f"projector.{layer}"), weights, f"projector.{layer + 1}"))
        z = linear(z, weights, "projector.6").view(3, 4, -1)
        centre = (z[0] + z[1]) / 2
        prediction = sum(((one - centre) ** 2).mean() for one in z) / 3
        return 0.4 * prediction + 0.6 * sum(restated(one, directions[-1].double()) for one in z) / 3

    compare(method, loss_of, adamw(1e-3, 0.05), random_views(3, *sizes))
