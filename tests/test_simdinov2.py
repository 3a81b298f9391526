"""SimDINOv2: the patches' loss, registers, learning rates by layer, health, and whole steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_lightning import Optim, SimDINOv2, UserError, losses
from ssl_lightning.optim import by_layer
from tests.oracle import Weights, adamw, compare, linear, moved, parameters, random_views, run, unit
from tests.small import VIT, small
from tests.test_simdino import plain_rate


def test_the_cosine_patch_cosines_is_a_mean_over_an_image_and_then_over_images() -> None:
    torch.manual_seed(0)
    student = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    cosines = (unit(student) * unit(teacher)).sum(1)
    expected = -(cosines[:3].mean() + cosines[3]) / 3  # a third image has no masked patch
    loss = losses.simdino_patches(student, 5 * teacher, torch.tensor([9, 9, 9, 3]))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert losses.simdino_patches(student[:0], teacher[:0], torch.ones(0)) == 0


def test_defaults_are_the_released_codes() -> None:
    with torch.device("meta"):
        method = SimDINOv2()
    vit: Any = method.backbone
    assert (vit.embed_dim, len(vit.blocks), vit.num_prefix_tokens, vit.reg_token.shape) == (1024, 24, 5, (1, 4, 1024))
    assert vit.pos_embed.shape == (1, 196, 1024)
    assert {block.drop_path1.drop_prob for block in vit.blocks} == {0.2}
    assert parameters(method.projector) == 1024 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert (method.momentum, method.layer_decay, method.patch_embed_lr, method.views) == (0.9, 0.9, 0.2, "simdinov2")
    assert by_layer(method)("backbone.reg_token") == pytest.approx(0.9**25)
    assert by_layer(method)("backbone.patch_embed.proj.weight") == pytest.approx(0.2 * 0.9**25)
    assert by_layer(method)("projector.0.weight") == 1
    assert method.optim.peak_lr(1024) == pytest.approx(0.004)
    assert method.optim.peak_lr(1024) * method.optim.end_lr_factor == pytest.approx(1e-6)
    small_vit = small(SimDINOv2)
    assert all((p == 0.1).all() for name, p in small_vit.backbone.named_parameters() if "gamma" in name)
    plain = {**VIT["backbone_kwargs"], "reg_tokens": 0}
    assert small(SimDINOv2, {"backbone_kwargs": plain}).backbone.num_prefix_tokens == 1
    with pytest.raises(UserError, match=r"SimDINOv2 reads the patch tokens of a ViT .* set --model.backbone"):
        SimDINOv2(backbone="resnet18")


def test_chance_loss_and_health_know_the_collapse() -> None:
    torch.manual_seed(0)
    method = small(SimDINOv2, mask_ratio=(0.5, 0.5))
    assert method.chance_loss is None
    method.global_batch = 4  # as within a training
    for head in (method.projector, method.teacher_projector):
        nn.init.zeros_(head[-1].weight)
        nn.init.ones_(head[-1].bias)
    views = [torch.rand(4, 3, size, size) for size in (32, 32, 16)]
    readings = method.health(views)
    assert readings["compression"].item() == pytest.approx(1)
    assert readings["patch_compression"].item() == pytest.approx(0.5)  # of half of the crops
    assert readings["expansion"].item() == pytest.approx(readings["collapsed_expansion"], rel=1e-5)
    assert method.training_loss(views).item() == pytest.approx(method.chance_loss, rel=1e-5)


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    optim = Optim("adamw", base_lr=1e-3, lr_scaling="none", weight_decay=0.1)
    method = small(SimDINOv2, momentum=0.9, drop_path=0.0, coefficient=0.7, clip_gradient=0.05, optim=optim).double()
    vit: Any = method.backbone
    masks: list[Tensor] = []
    draw = method.draw_masks
    method.draw_masks = lambda crops: masks.append(draw(crops)) or masks[-1]  # type: ignore[func-returns-value]

    def tokens_of(images: Tensor, weights: Weights, name: str, mask: Tensor) -> Tensor:
        patches = run(vit.patch_embed, weights, f"{name}.patch_embed.", images).flatten(1, 2)
        patches = patches * ~mask[:, :, None] + weights["mask_token"] * mask[:, :, None]
        prefix = [weights[f"{name}.{token}"].expand(len(images), -1, -1) for token in ("cls_token", "reg_token")]
        tokens = torch.cat([*prefix, patches + weights[f"{name}.pos_embed"]], 1)
        return run(vit.norm, weights, f"{name}.norm.", run(vit.blocks, weights, f"{name}.blocks.", tokens))

    def head(h: Tensor, weights: Weights, name: str) -> Tensor:
        for layer in (0, 2, 4):
            h = linear(h, weights, f"{name}.{layer}")
            h = nn.functional.gelu(h) if layer < 4 else h
        return unit(h)

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        crops, mask = torch.cat(views[:2]), masks[-1]
        t = tokens_of(crops, weights, "teacher_backbone", torch.zeros_like(mask)).detach()
        s = tokens_of(crops, weights, "backbone", mask)
        t_cls = head(t[:, 0], weights, "teacher_projector").detach().chunk(2)
        s_cls = [*head(s[:, 0], weights, "projector").chunk(2)]
        s_cls += [head(run(vit, weights, "backbone.", view), weights, "projector") for view in views[2:]]
        cosines = [(t_cls[g] * s_cls[v]).sum(1).mean() for g in range(2) for v in range(4) if v != g]
        rates = [plain_rate((s_cls[g] + t_cls[g]) / 2, 0.05) for g in range(2)]
        loss = -0.7 * torch.stack(cosines).mean() - (4 + 16) / (4 * 16) * torch.stack(rates).mean()
        t_patch = head(t[:, 5:], weights, "teacher_projector").detach()
        patch_cosines = (head(s[:, 5:], weights, "projector") * t_patch).sum(-1)
        return loss - sum(patch_cosines[i][mask[i]].mean() for i in range(8) if mask[i].any()) / 8

    def clipped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for in_head in (True, False):
            part = {name: g for name, g in gradients.items() if name.startswith("projector.") == in_head}
            norm = torch.stack([g.norm() for g in part.values()]).norm()
            result |= {name: g * min(1.0, 0.05 / (norm.item() + 1e-6)) for name, g in part.items()}
        return result

    compare(
        method,
        loss_of,
        adamw(1e-3, 0.1),
        random_views(3, 32, 32, 16, 16),
        clip=method.edit_gradients,
        gradients_of=clipped,
        after=lambda weights: moved(weights, 0.9),
    )
