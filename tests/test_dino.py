"""DINO: architecture, centre, clipping and freezing, and whole steps against a plain restatement."""

import math
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import DINO, FakeData, Optim, ViewSpec, ema
from ssl_lightning.heads import DINOHead
from ssl_lightning.optim import clip_each
from tests.oracle import Weights, adamw, compare, linear, moved, parameters, random_views, run, unit
from tests.processes import run_processes
from tests.small import VIT, small, trainer

CROPS = [ViewSpec(size=32, count=2), ViewSpec(size=16, count=2)]


@pytest.mark.parametrize(("width", "count"), [(384, 22_352_128), (768, 23_138_560), (2048, 25_760_000)])
def test_head_has_the_published_size(width: int, count: int) -> None:
    head = DINOHead(width, 2048, 256, 65536, norm_last_layer=True)
    assert parameters(head) == count
    assert sum(p.numel() for p in head.parameters() if not p.requires_grad) == 65536
    assert head(torch.rand(2, width)).abs().max() <= 1  # cosine similarities: bottleneck and prototypes have norm 1


def test_defaults_are_the_papers() -> None:
    method = DINO()
    assert parameters(method.backbone) == 21_665_664
    assert method.backbone.blocks[0].attn.num_heads == 6  # type: ignore[index,union-attr]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in method.backbone.blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert all(getattr(block.drop_path1, "drop_prob", 0) == 0 for block in method.teacher_backbone.blocks)  # type: ignore[union-attr]
    assert (method.momentum, method.student_temperature, method.views) == (0.996, 0.1, "dino")
    assert method.optim.peak_lr(512) == pytest.approx(1e-3)
    # 4 epochs of 2 steps with one of warm-up, to 0: the released code's schedule
    optim = Optim(warmup_epochs=1, warmup_inclusive=True)
    expected = [0, 1, 1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]
    assert [optim.lr_factor(step, 8, 2) for step in range(8)] == pytest.approx(expected, abs=1e-6)


def test_teacher_temperature_rises_by_epoch() -> None:
    method = small(DINO, warmup_teacher_temperature_epochs=30)
    temperatures = []
    for epoch in (0, 1, 29, 50):
        method._trainer = type("Trainer", (), {"current_epoch": epoch})()
        temperatures.append(method.current_teacher_temperature)
    assert temperatures == pytest.approx([0.04, 0.0410345, 0.07, 0.07], abs=1e-7)


def test_weight_decay_rises_for_what_is_decayed(tmp_path: Any) -> None:
    method = small(DINO, VIT, optim=Optim("adamw", weight_decay=0.04, end_weight_decay=0.4, warmup_epochs=0))
    seen: list[tuple[float, float]] = []
    method.on_before_zero_grad = lambda optimizer: seen.append(  # type: ignore[method-assign]
        tuple(group["weight_decay"] for group in optimizer.param_groups)  # type: ignore[arg-type]
    )
    running = trainer(tmp_path, limit_train_batches=4, max_epochs=1)
    running.fit(method, FakeData(batch_size=8, views=CROPS))
    decayed, undecayed = zip(*seen, strict=True)
    expected = [0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert decayed == pytest.approx(expected)
    assert set(undecayed) == {0.0}
    names = {id(p): name for name, p in method.named_parameters()}
    group = {names[id(p)] for p in running.optimizers[0].param_groups[0]["params"]}
    assert {"backbone.cls_token", "backbone.pos_embed"} <= group
    assert not any("bias" in name or "norm" in name for name in group)


def test_each_gradient_is_clipped_on_its_own() -> None:
    method = small(DINO, clip_gradient=3.0, freeze_last_layer=0)
    for parameter in method.parameters():
        parameter.grad = None
    one, other = method.projector.mlp[0].bias, method.projector.mlp[2].bias
    one.grad = F.normalize(torch.ones_like(one), dim=0) * 6  # type: ignore[arg-type]
    other.grad = F.normalize(torch.ones_like(other), dim=0)  # type: ignore[arg-type]
    clip_each(method.parameters(), method.clip_gradient)
    assert [p.grad.norm().item() for p in (one, other)] == pytest.approx([3, 1], abs=1e-5)  # type: ignore[union-attr]


def test_gradients_are_clipped_in_training_and_the_momentum_rises(tmp_path: Any) -> None:
    method = small(DINO, clip_gradient=1e-3, momentum=0.6, freeze_last_layer=0)
    norms: list[float] = []
    momenta: list[float] = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norms.extend(p.grad.norm().item() for p in pl_module.parameters() if p.grad is not None)

    follow = ema.follow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema, "follow", lambda *parts: momenta.append(parts[2]) or follow(*parts))  # type: ignore[func-returns-value]
        running = trainer(tmp_path, max_epochs=1, limit_train_batches=4, callbacks=[Watch()])
        running.fit(method, FakeData(batch_size=8, views=CROPS))
    assert max(norms) == pytest.approx(1e-3, rel=2e-3)
    expected = [1 - 0.4 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert momenta[::2] == pytest.approx(expected)  # backbone and head
    assert momenta[1::2] == pytest.approx(expected)


def test_prototypes_stay_bit_for_bit_while_they_are_frozen(tmp_path: Any) -> None:
    def prototypes(epochs: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        optim = Optim("adamw", base_lr=0.1, weight_decay=0.4, lr_scaling="none", warmup_epochs=0)
        method = small(DINO, optim=optim)
        before = method.projector.prototypes.detach().clone()
        trainer(tmp_path, max_epochs=epochs).fit(method, FakeData(batch_size=8, views=CROPS))
        return before, method.projector.prototypes.detach()

    assert torch.equal(*prototypes(1))
    assert not torch.equal(*prototypes(2))


def test_the_centre_moves_in_training_alone(tmp_path: Any) -> None:
    method = small(DINO)
    views = [torch.rand(4, 3, size, size) for size in (32, 32, 16)]
    logits = method.teacher_projector(method.teacher_backbone(torch.cat(views[:2])))
    method.training_loss(views)
    assert not method.center.any()
    method.update_teacher()
    torch.testing.assert_close(method.center, 0.1 * logits.mean(0), atol=1e-6, rtol=1e-4)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    trainer(tmp_path).validate(method, FakeData(batch_size=8), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_the_teacher_is_what_is_evaluated_and_drops_no_path() -> None:
    method = small(DINO, VIT, drop_path=0.5).train()
    images = torch.rand(32, 3, 32, 32)
    assert torch.equal(method(images), method(images))
    assert not torch.equal(method.backbone(images), method.backbone(images))
    with torch.no_grad():
        for parameter in method.teacher_backbone.parameters():
            parameter += 0.1
    assert not torch.allclose(method(images), method.eval().backbone(images))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_whole_steps_equal_a_plain_restatement(kind: str) -> None:
    torch.manual_seed(0)
    optim = Optim("adamw", base_lr=1e-2, weight_decay=0.1)
    net = {} if kind == "resnet" else {**VIT, "drop_path": 0.0}
    method = small(DINO, net, momentum=0.9, clip_gradient=0.05, freeze_last_layer=0, optim=optim).double()
    sizes = (16, 16, 8, 8) if kind == "resnet" else (32, 32, 16, 16)
    center = torch.zeros(32, dtype=torch.float64)

    def head(h: Tensor, weights: Weights, name: str) -> Tensor:
        for layer in (0, 2, 4):
            h = linear(h, weights, f"{name}.mlp.{layer}")
            h = nn.functional.gelu(h) if layer < 4 else h
        return unit(h) @ unit(weights[f"{name}.prototypes"]).T

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        nonlocal center
        h = run(method.teacher_backbone, weights, "teacher_backbone.", torch.cat(views[:2]))
        t = head(h, weights, "teacher_projector").detach()
        h = torch.cat(
            [run(method.backbone, weights, "backbone.", torch.cat(views[part : part + 2])) for part in (0, 2)]
        )
        s = head(h, weights, "projector").view(4, 4, -1)
        pairs = []
        for g in range(2):
            p = torch.softmax((t.view(2, 4, -1)[g] - center) / 0.04, 1)
            pairs += [-(p * torch.log_softmax(s[v] / 0.1, 1)).sum(1).mean() for v in range(4) if v != g]
        center = 0.9 * center + 0.1 * t.mean(0)
        return sum(pairs[1:], pairs[0]) / len(pairs)

    def clipped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: g * min(1.0, 0.05 / (g.norm().item() + 1e-6)) for name, g in gradients.items()}

    compare(
        method,
        loss_of,
        adamw(1e-2, 0.1),
        random_views(3, *sizes),
        clip=lambda: clip_each(method.parameters(), method.clip_gradient),
        gradients_of=clipped,
        after=lambda weights: moved(weights, 0.9),
    )
    torch.testing.assert_close(method.center, center)


def _centre(rank: int) -> Tensor:
    method = small(DINO, num_prototypes=2)
    rows = torch.tensor([[[1.0, 0], [3, 0]], [[0, 2], [0, 4]]])[rank]
    method.defer(means=rows.mean(0))
    method.update_teacher()
    return method.center


def test_the_centre_of_two_processes_is_that_of_all_rows() -> None:
    for center in run_processes(_centre, 2):
        torch.testing.assert_close(center, torch.tensor([0.1, 0.15]))
