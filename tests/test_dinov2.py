"""DINOv2: KoLeo, exact shares of masks, Sinkhorn over masked patches, learning rates by layer, and whole steps."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import DINOv2, FakeData, Optim, SimDINOv2, UserError, ViewSpec, losses
from ssl_lightning.backbones.tokens import layer_scale
from ssl_lightning.optim import clip_together
from tests.oracle import Weights, adamw, compare, linear, moved, random_views, run, unit
from tests.small import VIT, Endless, small, trainer

CROPS = [ViewSpec(size=32, count=2), ViewSpec(size=16, count=2)]


def test_koleo_of_the_worked_example() -> None:
    points = torch.tensor([[1.0, 0], [0, 1], [0.7071, 0.7071]], dtype=torch.float64)
    assert float(losses.koleo(points)) == pytest.approx(0.267400, abs=1e-4)
    assert float(losses.koleo(7 * points)) == pytest.approx(float(losses.koleo(points)))  # of any scale
    nearest = 2 * math.sin(math.pi / 8)  # chord of 45 degrees
    assert float(losses.koleo(points)) == pytest.approx(-math.log(nearest), abs=1e-4)


def test_koleo_pushes_neighbours_apart() -> None:
    torch.manual_seed(0)
    points = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.koleo, points)
    gradient = torch.autograd.grad(losses.koleo(points), points)[0]
    assert losses.koleo(points - 0.01 * gradient) < losses.koleo(points)
    same = torch.ones(3, 2, requires_grad=True)
    value = losses.koleo(same)
    value.backward()
    assert float(value) > 15  # collapsed features are dear, and not infinitely so
    assert torch.isfinite(same.grad).all()  # type: ignore[arg-type]


def test_defaults_are_the_released_codes() -> None:
    method = small(DINOv2, drop_path=0.3)
    default = DINOv2.__init__.__defaults__
    assert default is not None
    assert (method.momentum, method.koleo_weight, method.layer_decay, method.patch_embed_lr) == (0.992, 0.1, 0.9, 0.2)
    rates = {block.drop_path1.drop_prob for block in method.backbone.blocks}
    assert rates == {0.3}  # the same in all blocks, the first included
    assert all(getattr(block.drop_path1, "drop_prob", 0) == 0 for block in method.teacher_backbone.blocks)
    assert all((p == 1e-5).all() for name, p in method.backbone.named_parameters() if "gamma" in name)
    optim: Any = next(value for value in default if isinstance(value, Optim))
    for batch, rate in ((1024, 0.004), (2048, 0.004 * 2**0.5)):
        assert optim.peak_lr(batch) == pytest.approx(rate)
    assert optim.peak_lr(2048) * optim.end_lr_factor == pytest.approx(1e-6, rel=0.03)
    assert method.chance_loss == pytest.approx(1.5 * math.log(32))


def test_layers_have_their_share_of_the_learning_rate(tmp_path: Any) -> None:
    for embedding in ("cls_token", "mask_token", "reg_token"):  # upstream since 2023-10
        assert layer_scale(embedding, 12, 0.9) == pytest.approx(0.9**13)
    assert layer_scale("blocks.0.norm1.weight", 12, 0.9) == pytest.approx(0.9**12)
    assert layer_scale("blocks.11.mlp.fc1.bias", 12, 0.9) == pytest.approx(0.9)
    assert layer_scale("norm.weight", 12, 0.9) == 1
    method = small(DINOv2, separate_heads=True, optim=Optim("adamw", base_lr=1e-2, lr_scaling="none", warmup_epochs=0))
    seen: dict[str, tuple[float, float]] = {}

    def look(optimizer: Any) -> None:
        names = {id(p): name for name, p in method.named_parameters()}
        for group in optimizer.param_groups:
            seen.update({names[id(p)]: (group["lr"], group["weight_decay"]) for p in group["params"]})

    method.on_before_zero_grad = look
    trainer(tmp_path, limit_train_batches=1).fit(method, FakeData(batch_size=8, views=CROPS))
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert set(seen) == trained
    assert seen["backbone.patch_embed.proj.weight"][0] == pytest.approx(1e-2 * 0.9**3 * 0.2)
    assert seen["mask_token"][0] == seen["backbone.pos_embed"][0] == pytest.approx(1e-2 * 0.9**3)
    assert seen["backbone.blocks.1.mlp.fc1.weight"][0] == pytest.approx(1e-2 * 0.9)
    assert seen["projector.prototypes"][0] == seen["backbone.norm.weight"][0] == 1e-2
    assert all(
        (decay == 0) == (p.ndim < 2) for name, p in method.named_parameters() for decay in seen.get(name, ())[1:]
    )


def test_the_gradients_of_backbone_and_heads_are_clipped_by_their_norm_together() -> None:
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    one.grad, other.grad = torch.tensor([0.0, 6.0]), torch.tensor([1.0])
    clip_together([one, other, nn.Parameter(torch.zeros(1))], 3.0)
    assert [float(p.grad.norm()) for p in (one, other)] == pytest.approx([2.959, 0.493], abs=1e-3)  # type: ignore[union-attr]
    clip_together([one, other], 0.0)
    assert float(one.grad.norm()) == pytest.approx(2.959, abs=1e-3)


def test_frozen_prototypes_have_a_rate_of_zero_while_the_moments_run_on(tmp_path: Any) -> None:
    method = small(DINOv2, separate_heads=True, freeze_last_layer=1, optim=Optim("adamw", 1e-2, warmup_epochs=0))
    prototypes = [p for name, p in method.named_parameters() if "prototype" in name and not name.startswith("teacher_")]
    start, seen = [p.detach().clone() for p in prototypes], []
    method.on_train_epoch_end = lambda: seen.append([(p - q).abs().max().item() for p, q in zip(prototypes, start)])  # noqa: B905
    running = trainer(tmp_path, max_epochs=2, limit_train_batches=2)
    running.fit(method, FakeData(batch_size=8, views=CROPS))
    assert seen[0] == [0.0] * 4
    assert all(seen[1])
    state: Any = running.optimizers[0].state
    assert [int(state[p]["step"]) for p in prototypes] == [4] * 4


def test_exactly_half_of_the_crops_are_masked_with_one_ratio_of_each_bin() -> None:
    torch.manual_seed(0)
    method = small(DINOv2, {"backbone_kwargs": {**VIT["backbone_kwargs"], "img_size": 112}})
    for images in (20, 5):
        shares = method.draw_masks(torch.zeros(2 * images, 3, 112, 112)).float().mean(1).sort().values
        assert int((shares > 0).sum()) == images
        bins = torch.linspace(0.1, 0.5, images + 1)
        masked = shares[shares > 0]
        assert (masked <= bins[1:]).all()
        assert (masked > bins[:-1] - 0.12).all()  # a few patches less, where blocks do not fit


@pytest.mark.parametrize("centering", ["moving", "sinkhorn"])
def test_a_view_is_compared_with_the_teacher_on_the_other_view(centering: str) -> None:
    torch.manual_seed(0)
    method = small(DINOv2, centering=centering, koleo_weight=0.0, masked_share=0.0, drop_path=0.0).double().eval()
    view, other = torch.rand(2, 4, 3, 32, 32, dtype=torch.float64)
    logits = [method.teacher_projector(method.teacher_backbone(one)) for one in (view, other)]
    if centering == "moving":
        targets = [(one / 0.04).softmax(1) for one in logits]
    else:
        targets = list(losses.sinkhorn(torch.cat(logits), 0.04, 3).chunk(2))
    predictions = [F.log_softmax(method.projector(method.backbone(one)) / 0.1, 1) for one in (view, other)]
    crossed = -(targets[0] * predictions[1]).sum(1).mean() - (targets[1] * predictions[0]).sum(1).mean()
    torch.testing.assert_close(method.training_loss([view, other]), crossed / 2)


def test_sinkhorn_takes_any_number_of_masked_patches() -> None:
    torch.manual_seed(0)
    scores = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(losses.sinkhorn(scores, 0.1, 3, uneven=True), losses.sinkhorn(scores, 0.1, 3))
    assert losses.sinkhorn(scores[:0], 0.1, 3, uneven=True).shape == (0, 5)


def test_the_teacher_stays_in_eval_mode_and_its_temperature_rises_by_step(tmp_path: Any) -> None:
    method = small(DINOv2, separate_heads=True)
    trainer(tmp_path, limit_train_batches=1).fit(method, FakeData(batch_size=8, views=CROPS))
    method.train()
    for name, part in method.named_modules():
        if name:
            assert part.training != name.startswith("teacher_"), name
    temperatures = []
    for step in (0, 1, 59, 70):
        facts = {"global_step": step, "num_training_batches": 2, "accumulate_grad_batches": 1}
        method._trainer = type("Trainer", (), facts)()
        temperatures.append(method.current_teacher_temperature)
    assert temperatures == pytest.approx([0.04, 0.04 + 0.03 / 59, 0.07, 0.07])


@pytest.mark.parametrize("kind", [DINOv2, SimDINOv2])
def test_batchnorm_of_a_teacher_uses_the_batch(kind: type[DINOv2] | type[SimDINOv2]) -> None:
    method = small(kind)
    norm = method.teacher_backbone.norm = nn.BatchNorm1d(2)
    for mode in (False, True):
        method.train(mode)
        assert norm.training is mode
        assert not method.teacher_backbone.blocks.training


def test_centres_follow_class_tokens_and_masked_patches() -> None:
    torch.manual_seed(0)
    method = small(DINOv2, separate_heads=True)
    views = [torch.rand(4, 3, size, size) for size in (32, 32, 16)]
    masks: list[Tensor] = []
    draw = method.draw_masks
    method.draw_masks = lambda crops: masks.append(draw(crops)) or masks[-1]  # type: ignore[func-returns-value]
    tokens = method.teacher_backbone.forward_features(torch.cat(views[:2]))
    method.training_loss(views)
    method.update_teacher()
    expected = 0.1 * method.teacher_projector(tokens[:, 0]).mean(0)
    # the teacher has not moved before its first step: momentum is that of a student equal to it
    torch.testing.assert_close(method.center, expected, atol=1e-6, rtol=1e-4)
    expected = 0.1 * method.teacher_patch_projector(tokens[:, 1:][masks[0]]).mean(0)
    torch.testing.assert_close(method.patch_center, expected, atol=1e-6, rtol=1e-4)
    assert small(DINOv2, centering="sinkhorn").training_loss(views).isfinite()


def test_registers_and_patches_of_14_pixels_train() -> None:
    kwargs = {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 3}
    method = small(DINOv2, {"backbone": "vit_small_patch14_reg4_dinov2", "backbone_kwargs": kwargs})
    assert method.backbone.num_prefix_tokens == 5
    views = [torch.rand(4, 3, size, size) for size in (56, 56, 28)]
    loss = method.training_loss(views)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    assert method(views[2]).shape == (4, 48)


def test_backbones_without_patch_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"DINOv2 reads the patch tokens of a ViT .* set --model.backbone"):
        DINOv2(backbone="resnet18")


@pytest.mark.parametrize("separate", [True, False])
def test_whole_steps_equal_a_plain_restatement(separate: bool) -> None:
    torch.manual_seed(0)
    optim = Optim("adamw", base_lr=1e-3, lr_scaling="none", weight_decay=0.1)
    arguments = {"momentum": 0.9, "drop_path": 0.0, "separate_heads": separate, "optim": optim}
    method = small(DINOv2, **arguments).double()
    vit: Any = method.backbone
    masks: list[Tensor] = []
    draw = method.draw_masks
    method.draw_masks = lambda crops: masks.append(draw(crops)) or masks[-1]  # type: ignore[func-returns-value]
    center, patch_center = torch.zeros(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)

    def tokens_of(images: Tensor, weights: Weights, name: str, mask: Tensor) -> Tensor:
        patches = run(vit.patch_embed, weights, f"{name}.patch_embed.", images).flatten(1, 2)
        patches = patches * ~mask[:, :, None] + weights["mask_token"] * mask[:, :, None]
        tokens = torch.cat([weights[f"{name}.cls_token"].expand(len(images), 1, -1), patches], 1)
        tokens = run(vit.blocks, weights, f"{name}.blocks.", tokens + weights[f"{name}.pos_embed"])
        return run(vit.norm, weights, f"{name}.norm.", tokens)

    def head(h: Tensor, weights: Weights, name: str) -> Tensor:
        for layer in (0, 2, 4):
            h = linear(h, weights, f"{name}.mlp.{layer}")
            h = nn.functional.gelu(h) if layer < 4 else h
        return unit(h) @ (unit(weights[f"{name}.prototypes"]) * weights[f"{name}.prototype_norms"]).T

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        nonlocal center, patch_center
        of_patches = "patch_projector" if separate else "projector"
        crops, mask = torch.cat(views[:2]), masks[-1]
        t = tokens_of(crops, weights, "teacher_backbone", torch.zeros_like(mask)).detach()
        s = tokens_of(crops, weights, "backbone", mask)
        t_cls, s_cls = head(t[:, 0], weights, "teacher_projector").detach(), head(s[:, 0], weights, "projector")
        local = [head(run(vit, weights, "backbone.", view), weights, "projector") for view in views[2:]]
        t_patch = head(t[:, 1:], weights, f"teacher_{of_patches}").detach()
        p = torch.softmax((t_cls - center) / 0.04, 1)
        p = torch.cat([p[4:], p[:4]])  # that of the other view
        loss = 2 * -(p * torch.log_softmax(s_cls / 0.1, 1)).sum(1).mean() / 6
        for logits in local:
            for targets in p.chunk(2):
                loss = loss - (targets * torch.log_softmax(logits / 0.1, 1)).sum(1).mean() / 6
        q = torch.softmax((t_patch - patch_center) / 0.04, -1)
        errors = -(q * torch.log_softmax(head(s[:, 1:], weights, of_patches) / 0.1, -1)).sum(-1)
        loss = loss + sum(errors[i][mask[i]].mean() for i in range(8) if mask[i].any()) / 8
        for x in unit(s[:, 0]).chunk(2):
            for i in range(4):
                distance = min((x[i] - x[j] + 1e-8).norm() for j in range(4) if j != i)
                loss = loss - 0.1 * (distance + 1e-8).log() / 4
        center = 0.9 * center + 0.1 * t_cls.mean(0)
        patch_center = 0.9 * patch_center + 0.1 * t_patch[mask].mean(0)
        return loss

    compare(
        method, loss_of, adamw(1e-3, 0.1), random_views(3, 32, 32, 16, 16), after=lambda weights: moved(weights, 0.9)
    )
    torch.testing.assert_close(method.center, center, atol=1e-6, rtol=0)
    torch.testing.assert_close(method.patch_center, patch_center, atol=1e-6, rtol=0)


def test_a_loader_without_a_length_is_refused_only_if_the_temperature_counts_epochs(tmp_path: Any) -> None:
    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    constant = Optim("adamw", 1e-3, lr_scaling="none", warmup_epochs=0)
    with pytest.raises(UserError, match=r"--model.warmup_teacher_temperature_epochs to 0"):
        trainer(tmp_path, max_epochs=-1, max_steps=2).fit(small(DINOv2, optim=constant), loader)
    method = small(DINOv2, optim=constant, warmup_teacher_temperature_epochs=0)
    trainer(tmp_path, max_epochs=-1, max_steps=2).fit(method, loader)
    assert method.current_teacher_temperature == 0.07
