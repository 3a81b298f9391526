"""LeJEPA: SIGReg against the closed form and a plain integral, prediction, and whole steps."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import MAE, FakeData, LeJEPA, Optim, UserError, losses
from ssl_lightning.checkpoints import load_backbone
from tests.oracle import Weights, adamw, compare, random_views, relu_mlp, run
from tests.small import VIT, small, trainer

AT_ZERO = math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))


def epps_pulley(values: np.ndarray) -> float:
    """The statistic in closed form: the weight exp(-t^2 / 2) on the whole line."""
    differences = values[:, None] - values[None]
    first = np.exp(-(differences**2) / 2).mean()
    second = 2 * np.exp(-(values**2) / 4).mean() / math.sqrt(2)
    return len(values) * math.sqrt(2 * math.pi) * (first - second + 1 / math.sqrt(3))


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 2.0])
def test_sigreg_is_the_epps_pulley_statistic(scale: float) -> None:
    values = scale * np.random.default_rng(0).standard_normal(40)
    found = losses.sigreg(torch.from_numpy(values)[:, None], torch.ones(1, 1, dtype=torch.float64))
    assert float(found) == pytest.approx(epps_pulley(values), rel=5e-3, abs=1e-4)


def test_sigreg_integrates_from_minus_five_to_five_by_17_trapezoids() -> None:
    torch.manual_seed(0)
    embeddings, directions = torch.randn(30, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    t = np.linspace(-5, 5, 17)
    projections = (embeddings @ (directions / directions.norm(dim=0))).numpy()  # (30, 6)
    characteristic = np.exp(1j * projections[:, :, None] * t).mean(0)  # (6, 17)
    errors = np.abs(characteristic - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
    expected = 30 * torch.trapezoid(torch.from_numpy(errors), torch.from_numpy(t)).mean().item()
    assert float(losses.sigreg(embeddings, directions)) == pytest.approx(expected, rel=1e-9)
    assert float(losses.sigreg(embeddings, 3 * directions)) == pytest.approx(expected, rel=1e-9)


def test_sigreg_is_least_for_an_isotropic_gaussian() -> None:
    torch.manual_seed(0)
    gaussian, directions = torch.randn(1000, 8), torch.randn(8, 256)
    least = float(losses.sigreg(gaussian, directions))
    assert least < 2
    stretched = gaussian * torch.tensor([3.0] + [1.0] * 7)
    for other in (2 * gaussian, 0.5 * gaussian, gaussian + 1, stretched, torch.zeros(1000, 8)):
        assert float(losses.sigreg(other, directions)) > 3 * least
    assert float(losses.sigreg(torch.zeros(1000, 8), directions)) == pytest.approx(1000 * AT_ZERO, rel=1e-4)


def test_gradients_of_sigreg_are_those_of_its_value() -> None:
    torch.manual_seed(0)
    directions = torch.randn(3, 4, dtype=torch.float64)
    embeddings = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: losses.sigreg(z, directions), embeddings)


def test_all_views_predict_the_centre_of_the_global_ones() -> None:
    embeddings = torch.tensor([[[1.0, 0]], [[3.0, 0]], [[2.0, 4]]], requires_grad=True)  # centre (2, 0)
    loss = losses.lejepa(embeddings, 2)
    assert float(loss) == pytest.approx((1 + 1 + 16) / 6)
    loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad[2].any()
    moved_centre = losses.lejepa(torch.tensor([[[1.0, 0]], [[3.0, 8]], [[2.0, 4]]]), 2)
    assert float(moved_centre) == pytest.approx((1 + 1 + 16 + 16) / 6)


def test_defaults_are_the_authors() -> None:
    method = LeJEPA(backbone="resnet18")
    optim = method.optim
    assert (optim.name, optim.peak_lr(64), optim.weight_decay, optim.end_lr_factor) == ("adamw", 5e-4, 0.05, 1e-3)
    assert (method.sigreg_weight, method.num_slices, method.views) == (0.05, 1024, "lejepa")
    assert method.chance_loss is None
    views = list(torch.rand(2, 8, 3, 32, 32))
    method.global_batch = 8  # as within a training
    assert method.chance_loss == pytest.approx(0.05 * 8 * AT_ZERO)
    found = method.health(views)
    assert {name: bool(torch.as_tensor(value).isfinite()) for name, value in found.items()} == {
        "prediction_error": True,
        "sigreg": True,
    }


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_whole_steps_equal_a_plain_restatement(kind: str) -> None:
    torch.manual_seed(0)
    net = {} if kind == "resnet" else {**VIT, "drop_path": 0.0}
    optim = Optim("adamw", base_lr=1e-3, lr_scaling="none", weight_decay=0.05)
    method = small(LeJEPA, net, sigreg_weight=0.2, optim=optim).double()
    sizes = (16, 16, 8) if kind == "resnet" else (32, 32, 16)
    directions: list[Tensor] = []
    method.random_to_device = lambda host: directions.append(host) or host  # type: ignore[func-returns-value]
    t = torch.linspace(-5, 5, 17, dtype=torch.float64)

    def statistic(z: Tensor) -> Tensor:
        along = directions[-1].double() / directions[-1].double().norm(dim=0)
        characteristic = torch.exp(1j * (z @ along)[:, :, None] * t).mean(0)
        errors = (characteristic - torch.exp(-(t**2) / 2)).abs() ** 2 * torch.exp(-(t**2) / 2)
        return len(z) * torch.trapezoid(errors, t).mean()

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        h = [run(method.backbone, weights, "backbone.", part) for part in (torch.cat(views[:2]), views[2])]
        z = relu_mlp(torch.cat(h), weights, "projector", (1, 4)).view(3, 4, -1)
        centre = (z[0] + z[1]) / 2
        prediction = sum(((one - centre) ** 2).mean() for one in z) / 3
        return 0.8 * prediction + 0.2 * sum(statistic(one) for one in z) / 3

    compare(method, loss_of, adamw(1e-3, 0.05), random_views(3, *sizes))


def test_the_example_on_imagenette_probes_a_linear_layer_and_integrates_to_three(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kwargs = {"backbone_kwargs": {**VIT["backbone_kwargs"], "num_classes": 20}}
    method: Any = small(LeJEPA, VIT, kwargs, knots=33, limit=3.0)
    images = torch.rand(8, 3, 32, 32)
    assert (method.embed_dim, method(images).shape, method.projector[0].in_features) == (20, (8, 20), 20)
    directions: list[Tensor] = []
    method.random_to_device = lambda host: directions.append(host) or host  # type: ignore[func-returns-value]
    method.eval()
    _, regularizer = method._parts([images] * 4)
    along = method.projector(method(images)) @ F.normalize(directions[0], dim=0)  # (8, S)
    t = torch.linspace(0, 3, 17)
    characteristic, gaussian = torch.exp(1j * along[:, :, None] * t).mean(0), torch.exp(-(t**2) / 2)
    errors = (characteristic - gaussian).abs() ** 2 * gaussian
    torch.testing.assert_close(regularizer, 8 * 2 * torch.trapezoid(errors, t).mean())
    running = trainer(tmp_path, max_steps=1)
    running.fit(method, FakeData(batch_size=8))
    running.save_checkpoint(tmp_path / "x.ckpt")
    torch.testing.assert_close(load_backbone(tmp_path / "x.ckpt")(images), method.eval()(images))
    with pytest.raises(UserError, match=r"leave num_classes out of --model.backbone_kwargs"):
        small(MAE, kwargs)


def test_embeddings_of_a_new_model_do_not_depend_on_the_order_of_the_local_views() -> None:
    torch.manual_seed(0)
    method: Any = small(LeJEPA).double()
    views = [torch.rand(4, 3, size, size, dtype=torch.float64) for size in (32, 32, 16, 16)]
    values = []
    for order in ([0, 1, 2, 3], [1, 0, 3, 2]):
        torch.manual_seed(0)
        values.append(float(method.training_loss([views[i] for i in order])))
    assert values[0] == pytest.approx(values[1], rel=1e-9)
