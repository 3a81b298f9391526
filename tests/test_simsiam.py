"""SimSiam: architecture, stopped gradients, the predictor's learning rate, and whole steps against a restatement."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from ssl_lightning import FakeData, Optim, SimSiam, UserError, losses
from tests.oracle import Weights, compare, parameters, random_views, relu_mlp, run, sgd, unit
from tests.small import BACKBONE, HEADS, small, trainer


def test_heads_have_the_published_size() -> None:
    method = SimSiam()
    assert parameters(method.projector) == 12_593_152
    assert parameters(method.predictor) == 2_100_224
    assert all((block.bn3.weight == 0).all() for block in method.backbone.layer1)  # type: ignore[union-attr]
    trained = {name for name, p in method.projector.named_parameters() if p.requires_grad}
    assert trained == {"0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias", "6.weight"}
    assert {name for name, _ in method.predictor.named_parameters() if not name.startswith("1.")} == {
        "0.weight",
        "3.weight",
        "3.bias",
    }


def test_defaults_are_the_papers() -> None:
    method = SimSiam()
    assert (method.views, method.embed_dim, method.chance_loss, method.collapsed_loss) == ("simsiam", 2048, None, -1)
    optim = method.optim
    assert (optim.name, optim.weight_decay, optim.decay_norm_and_bias, optim.per_epoch) == ("sgd", 1e-4, True, True)
    assert optim.peak_lr(512) == pytest.approx(0.1)
    factors = [optim.lr_factor(step, 400, 4) for step in (0, 3, 4, 200, 396)]
    assert factors == pytest.approx([1, 1, 0.999753, 0.5, 0.000247], abs=1e-6)


def test_loss_of_the_worked_example_stops_the_gradient_of_projections() -> None:
    p1, z2, p2, z1 = (
        torch.tensor([row], requires_grad=True) for row in ([3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [0.0, 1.0])
    )
    loss = losses.negative_cosine(p1, z2) / 2 + losses.negative_cosine(p2, z1) / 2
    assert loss.item() == pytest.approx(-0.8)
    loss.backward()
    assert z1.grad is z2.grad is None
    assert p1.grad is not None


def test_the_gradient_reaches_the_backbone_through_predictions_alone() -> None:
    method = small(SimSiam)
    for parameter in method.predictor[-1].parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(method.predictor[-1].bias)  # predictions that do not depend on the image
    method.training_loss([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)]).backward()
    assert not any(p.grad.any() for p in method.backbone.parameters())


def test_each_view_has_its_own_forward() -> None:
    method = small(SimSiam)
    method.training_loss([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)])
    assert method.backbone.bn1.num_batches_tracked == 2  # type: ignore[union-attr]
    assert method.projector[1].num_batches_tracked == 2


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    optim = Optim("sgd", base_lr=0.5, weight_decay=1e-2, decay_norm_and_bias=True, constant_lr=("predictor",))
    method = small(SimSiam, optim=optim).double()

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        projections = [
            relu_mlp(run(method.backbone, weights, "backbone.", view), weights, "projector", (1, 4, 7))
            for view in views
        ]
        predictions = [relu_mlp(projection, weights, "predictor", (1,)) for projection in projections]
        targets = [unit(projection).detach() for projection in projections]
        cosines = (unit(predictions[0]) * targets[1]).sum(1) + (unit(predictions[1]) * targets[0]).sum(1)
        return -cosines.mean() / 2

    compare(method, loss_of, sgd(0.5, 1e-2), random_views(4, 16, 16))


def test_the_learning_rate_of_the_predictor_stays(tmp_path: Path) -> None:
    class Rates(L.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            (optimizer,) = trainer.optimizers
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            self.seen.append((rates[id(pl_module.backbone.conv1.weight)], rates[id(pl_module.predictor[0].weight)]))

    rates = Rates()
    method = SimSiam(**BACKBONE, **HEADS[SimSiam])
    trainer(tmp_path, max_epochs=4, limit_train_batches=2, callbacks=[rates]).fit(method, FakeData(batch_size=8))
    backbone, predictor = zip(*rates.seen, strict=True)
    peak = 0.05 * 8 / 256
    assert predictor == pytest.approx([peak] * 8)
    # the rates for the step to come: the cosine changes once per epoch of two steps
    assert [rate / peak for rate in backbone[:7]] == pytest.approx(
        [1, 0.853553, 0.853553, 0.5, 0.5, 0.146447, 0.146447], abs=1e-6
    )


@pytest.mark.parametrize(("option", "parts"), [("constant_lr", ("predictr",)), ("part_lr_scale", {"predictr": 10.0})])
def test_a_rate_of_no_part_is_refused(option: str, parts: Any) -> None:
    with pytest.raises(UserError, match=rf"{option}: no part predictr; choose from backbone, projector, predictor"):
        Optim("sgd", **{option: parts}).create(small(SimSiam), 256)


@torch.no_grad()
def test_health_tells_collapsed_projections() -> None:
    torch.manual_seed(0)
    method = small(SimSiam, projector_dim=64)
    views = [torch.rand(64, 3, 16, 16)]
    assert 0.5 / 8 < float(method.health(views)["projection_std"]) < 1.5 / 8
    torch.nn.init.zeros_(method.projector[-2].weight)
    method.eval()
    assert float(method.health(views)["projection_std"]) == pytest.approx(0, abs=1e-6)
