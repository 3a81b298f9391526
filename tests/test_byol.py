"""BYOL: architecture, order of the computation, and whole steps against a plain restatement."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_lightning import BYOL, FakeData, Optim, ema
from tests.oracle import Weights, compare, lars, moved, parameters, random_views, relu_mlp, run, unit
from tests.small import small, trainer


def test_heads_have_the_published_size() -> None:
    method = BYOL()
    assert parameters(method.projector) == 9_449_472
    assert parameters(method.predictor) == 2_109_440
    assert all((block.bn3.weight == 1).all() for block in method.backbone.layer1)  # type: ignore[union-attr]


def test_defaults_are_the_papers() -> None:
    with torch.device("meta"):
        method = BYOL()
    assert (method.momentum, method.views, method.embed_dim) == (0.996, "byol", 2048)
    assert method.optim == Optim("lars", base_lr=0.2, weight_decay=1.5e-6, warmup_epochs=10)


def test_each_view_has_its_own_forward_and_the_teacher_keeps_its_own_statistics() -> None:
    method = small(BYOL)
    method.training_loss([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)])
    for backbone in (method.backbone, method.teacher_backbone):
        assert backbone.bn1.num_batches_tracked == 2  # type: ignore[union-attr]
    statistics = method.teacher_backbone.bn1.running_mean.clone()  # type: ignore[union-attr]
    with torch.no_grad():
        method.backbone.bn1.running_mean += 1  # type: ignore[union-attr,operator]
    method.update_teacher()
    assert torch.equal(method.teacher_backbone.bn1.running_mean, statistics)  # type: ignore[union-attr]


def test_without_predictor_and_with_equal_views_the_loss_is_zero() -> None:
    method = small(BYOL)
    method.predictor = nn.Identity()
    view = torch.rand(4, 3, 16, 16)
    assert abs(method.training_loss([view, view]).item()) < 1e-5


def test_the_predictor_may_learn_faster() -> None:
    method = small(BYOL)
    optimizer = Optim("sgd", base_lr=0.2, part_lr_scale={"predictor": 10.0}).create(method, 256)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for part, rate in (("backbone", 0.2), ("projector", 0.2), ("predictor", 2.0)):
        assert {rates[id(p)] for p in getattr(method, part).parameters()} == {rate}


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    method = small(BYOL, momentum=0.9, optim=Optim("lars", base_lr=5.0, weight_decay=1e-2)).double()

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        online, target = [], []
        for view in views:
            projection = relu_mlp(run(method.backbone, weights, "backbone.", view), weights, "projector", (1,))
            online.append(unit(relu_mlp(projection, weights, "predictor", (1,))))
            features = run(method.teacher_backbone, weights, "teacher_backbone.", view)
            target.append(unit(relu_mlp(features, weights, "teacher_projector", (1,))).detach())
        distances = (online[0] - target[1]).square().sum(1) + (online[1] - target[0]).square().sum(1)
        return distances.mean()

    compare(method, loss_of, lars(5.0, 1e-2), random_views(4, 16, 16), after=lambda weights: moved(weights, 0.9))


def test_momentum_rises_to_one_with_the_step_just_taken(tmp_path: Any) -> None:
    momenta: list[float] = []
    follow = ema.follow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema, "follow", lambda *parts: momenta.append(parts[2]) or follow(*parts))  # type: ignore[func-returns-value]
        running = trainer(tmp_path, max_epochs=2, limit_train_batches=4, accumulate_grad_batches=2)
        running.fit(small(BYOL, momentum=0.99), FakeData(batch_size=8))
    assert momenta[::2] == pytest.approx([0.99, 0.9914645, 0.995, 0.9985355], abs=1e-6)
