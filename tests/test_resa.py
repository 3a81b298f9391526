"""ReSA: the batch's assignment of itself, architecture, the teacher's moment, and whole steps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_lightning import Optim, ReSA, losses
from tests.oracle import Weights, compare, moved, parameters, random_views, relu_mlp, run, sgd, unit
from tests.small import VIT, small

H = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-0.6, 0.8]], dtype=torch.float64)
Z = torch.tensor([[[1.0, 0], [0, 1], [-1, 0]], [[0.8, 0.6], [0, 1], [-0.6, 0.8]]], dtype=torch.float64)


def test_the_assignment_and_the_loss_of_the_worked_example() -> None:
    smooth = losses.self_assignments(H, 7 * H, 0.5, 3)  # of any scale
    table = [[0.688124, 0.280678, 0.031198], [0.277257, 0.560138, 0.162604], [0.029795, 0.157211, 0.812994]]
    torch.testing.assert_close(smooth, torch.tensor(table, dtype=torch.float64), atol=1e-6, rtol=0)
    sharp = losses.self_assignments(H, H, 0.05, 3)
    assert sharp.diagonal().tolist() == pytest.approx([0.999665, 0.999664, 0.999999], abs=1e-6)
    embeddings = Z.clone().requires_grad_()
    loss = losses.resa(embeddings, 3 * Z, smooth, 0.4)
    assert loss.item() == pytest.approx(0.905690, abs=1e-6)
    assert losses.resa(Z, Z, sharp, 0.4).item() == pytest.approx(0.448564, abs=1e-6)
    loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad[0, 0].tolist() == pytest.approx([0, -0.0279], abs=1e-4)


def test_further_views_are_compared_with_both_of_the_teacher() -> None:
    torch.manual_seed(0)
    embeddings, teacher = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(2, 6, 5, dtype=torch.float64)
    assignments = torch.randn(3, 6, dtype=torch.float64).softmax(1).requires_grad_()
    embeddings.requires_grad_(), teacher.requires_grad_()
    pairs = [
        -(assignments * torch.log_softmax(unit(embeddings[v]) @ unit(teacher[g]).T / 0.4, 1)).sum(1).mean()
        for v in range(4)
        for g in range(2)
        if v != g
    ]
    assert len(pairs) == 6
    loss = losses.resa(embeddings, teacher, assignments, 0.4)
    torch.testing.assert_close(loss, torch.stack(pairs).mean())
    loss.backward()
    assert assignments.grad is None
    assert teacher.grad is None


def test_the_loss_of_half_precision_is_computed_in_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assignments = losses.self_assignments(H.half(), H.half(), 0.05, 3)
        loss = losses.resa(Z.half(), Z.half(), assignments, 0.4)
    assert assignments.dtype == loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.448564, abs=1e-3)


def test_defaults_are_the_released_codes() -> None:
    with torch.device("meta"):
        method = ReSA()
    assert parameters(method.backbone) == 23_508_032
    assert parameters(method.projector) == 9_449_984
    assert parameters(method.predictor) == 2_103_808
    assert not list(method.projector[-1].parameters())
    assert not any("predictor" in name for name in dict(method.named_children()) if name.startswith("teacher"))
    assert (method.temperature, method.epsilon, method.momentum, method.views) == (0.4, 0.05, 0.996, "resa")
    assert isinstance(small(ReSA, predictor_dim=0).predictor, nn.Identity)
    optim = method.optim
    assert optim.peak_lr(256) == 0.5
    factors = [optim.lr_factor(step, 100, 5) for step in (0, 9, 10, 100)]  # two epochs of warm-up, to a tenth
    assert factors == pytest.approx([0, 1, 1, 0.1])
    (group,) = optim.create(method, 256).param_groups  # nothing is left out of the decay
    assert group["weight_decay"] == 1e-5


def test_the_assignment_is_by_features_of_the_weak_view_only() -> None:
    torch.manual_seed(0)
    method = small(ReSA).double()
    seen: list[Tensor] = []
    assign = method._assignments
    method._assignments = lambda *features: seen.append(assign(*features)) or seen[-1]  # type: ignore[func-returns-value]
    weak, strong, other = torch.rand(3, 4, 3, 16, 16, dtype=torch.float64)
    method.training_loss([weak, strong])
    method.training_loss([weak, other])
    with torch.no_grad():
        for parameter in (*method.projector.parameters(), *method.teacher_projector.parameters()):
            parameter.normal_()
    method.training_loss([weak, strong])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    method.training_loss([strong, weak])
    assert not torch.allclose(seen[0], seen[3])
    assert method.backbone.bn1.num_batches_tracked == 8  # each view has its own forward


def test_chance_loss_is_that_of_equal_embeddings() -> None:
    method = small(ReSA)
    assert method.chance_loss is None
    for head in (method.projector, method.predictor, method.teacher_projector):
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    views = [torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)]
    loss = method.training_loss(views)
    method.global_batch = 4  # as within a training
    assert loss.item() == pytest.approx(math.log(4))
    assert method.chance_loss == pytest.approx(math.log(4))
    for backbone in (method.backbone, method.teacher_backbone):
        backbone.forward = lambda images: torch.ones(len(images), 16)  # type: ignore[method-assign]
    assert method.health(views)["assignment_entropy"].item() == pytest.approx(math.log(4))  # collapsed


def test_momentum_is_that_of_the_step_to_come() -> None:
    method = small(ReSA, momentum=0.5)
    method.progress_of = lambda step: step / 4
    with torch.no_grad():
        method.projector[0].weight += 1
    before = method.teacher_projector[0].weight.clone()
    method.update_teacher()
    share = (method.teacher_projector[0].weight - before).mean().item()
    assert share == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 4)), abs=1e-5)


def plain_sinkhorn(scores: Tensor, epsilon: float) -> Tensor:
    q = torch.exp(scores / epsilon).T
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize(("net", "predictor_dim"), [({}, 32), (VIT, 0)], ids=["resnet", "vit"])
def test_whole_steps_equal_a_plain_restatement(net: dict[str, Any], predictor_dim: int) -> None:
    torch.manual_seed(0)
    optim = Optim("sgd", base_lr=0.1, weight_decay=1e-2, decay_norm_and_bias=True)
    method = small(ReSA, net, momentum=0.9, predictor_dim=predictor_dim, epsilon=0.2, optim=optim).double()
    steps = 0

    def project(features: Tensor, weights: Weights, name: str) -> Tensor:
        return relu_mlp(features, weights, name, (1, 4, 7))

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        h = [run(method.backbone, weights, "backbone.", view) for view in views]
        z = [project(x, weights, "projector") for x in h]
        if predictor_dim:
            z = [relu_mlp(x, weights, "predictor", (1,)) for x in z]
        h_m = [run(method.teacher_backbone, weights, "teacher_backbone.", view).detach() for view in views[:2]]
        z_m = [project(x, weights, "teacher_projector").detach() for x in h_m]
        assignment = plain_sinkhorn(unit(h[0].detach()) @ unit(h_m[0]).T, 0.2)
        terms = []
        for v in range(len(views)):
            for g in range(2):
                if v != g:
                    logits = unit(z[v]) @ unit(z_m[g]).T / 0.4
                    terms.append(-(assignment * torch.log_softmax(logits, 1)).sum(1).mean())
        return torch.stack(terms).mean()

    def follow(weights: Weights) -> None:
        """The released code moves the teacher as a step starts, from weights of before the optimizer's step."""
        nonlocal steps
        steps += 1
        if steps == 3:
            moved(weights, 0.9)

    sizes = (32, 32, 16, 16)
    compare(method, loss_of, sgd(0.1, 1e-2), random_views(3, *sizes), before=lambda w: moved(w, 0.9), after=follow)
