"""iBOT: masks, the loss of patches, heads and centres, and whole steps against a plain restatement."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_lightning import IBOT, FakeData, Optim, UserError, ViewSpec, losses
from ssl_lightning.backbones.tokens import masked_tokens
from ssl_lightning.heads import IBOTHead
from ssl_lightning.masks import block_mask, masked_patches, random_mask
from ssl_lightning.optim import clip_each
from tests.oracle import Weights, adamw, compare, linear, moved, parameters, random_views, run, unit
from tests.small import VIT, small, trainer

CROPS = [ViewSpec(size=32, count=2), ViewSpec(size=16, count=2)]
TEACHER = [[[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], [[0.6, 0.4], [0.3, 0.7], [0.1, 0.9]]]
STUDENT = [[[0.1, 0.0], [0.0, 0.1], [0.2, 0.1]], [[0.0, 0.0], [0.1, 0.3], [0.2, 0.0]]]


def patch_loss(mask: Tensor) -> float:
    rows, counts = masked_patches(mask)
    teacher, student = (torch.tensor(values).flatten(0, 1)[rows] for values in (TEACHER, STUDENT))
    return float(losses.ibot(student, teacher, counts, 0.1))


def test_the_loss_of_patches_is_a_mean_per_image_as_in_the_worked_example() -> None:
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert patch_loss(mask) == pytest.approx(0.745095, abs=1e-5)  # over all masked patches it would be 0.751150
    only_first = mask.clone()
    only_first[1] = False  # an image without masked patches counts with 0
    assert patch_loss(only_first) == pytest.approx(0.763262 / 2, abs=1e-5)
    assert patch_loss(torch.zeros_like(mask)) == 0


def test_the_teacher_of_patches_gets_no_gradient() -> None:
    student, teacher = torch.rand(3, 4, requires_grad=True), torch.rand(3, 4, requires_grad=True)
    losses.ibot(student, teacher, torch.ones(3), 0.1).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_defaults_are_the_papers() -> None:
    method = IBOT()
    assert parameters(method.backbone) == 21_665_664
    head = 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert parameters(method.projector) == head + 8192 * 257
    assert method.projector.prototype_norms.requires_grad  # norm_last_layer is false for ViT-S
    assert method.optim.peak_lr(1024) == pytest.approx(2e-3)
    assert method.optim.peak_lr(1024) * method.optim.end_lr_factor == pytest.approx(1e-6)
    assert method.chance_loss == pytest.approx(1.5 * math.log(8192))
    assert not method.mask_token.any()
    assert method.current_teacher_temperatures == (0.04, 0.04)


def test_own_prototypes_for_patches_share_the_rest_of_the_head() -> None:
    head = IBOTHead(8, 16, 4, 32, norm_last_layer=True)
    features = torch.rand(2, 5, 8)
    assert head(features).shape == head.of_patches(features).shape == (2, 5, 32)
    assert not torch.allclose(head(features), head.of_patches(features))
    with torch.no_grad():
        head.patch_prototypes.copy_(head.prototypes)
    torch.testing.assert_close(head(features), head.of_patches(features))


def test_half_of_the_crops_are_masked_in_blocks_by_a_tenth_to_a_half() -> None:
    torch.manual_seed(0)
    method = small(IBOT, {"backbone_kwargs": {**VIT["backbone_kwargs"], "img_size": 112}})
    shares = method.draw_masks(torch.zeros(800, 3, 112, 112)).float().mean(1)
    assert 0.45 < (shares > 0).float().mean() < 0.55
    assert shares.max() <= 0.5
    assert 0.2 < shares[shares > 0].mean() < 0.32  # a bit less than 0.3, as blocks may not fit


def test_random_masks_have_exactly_as_many_patches_anywhere() -> None:
    torch.manual_seed(0)
    method = small(IBOT, {"backbone_kwargs": {**VIT["backbone_kwargs"], "img_size": 112}}, mask_shape="random")
    masks = method.draw_masks(torch.zeros(800, 3, 112, 112)).float()
    shares = masks.mean(1)
    assert 0.45 < (shares > 0).float().mean() < 0.55
    assert shares[shares > 0].mean() == pytest.approx(0.3, abs=0.02)  # all that were drawn
    alone = masks[shares > 0].mean(0)  # how often each place is masked
    assert alone.min() > 0.2
    assert alone.max() < 0.4
    assert random_mask((4, 7), 9, 3).sum() == 9
    assert not torch.equal(random_mask((4, 7), 9, 3), random_mask((4, 7), 9, 4))


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (2, 2), (4, 7)])
def test_block_masks_never_hide_more_than_they_should(grid: tuple[int, int]) -> None:
    patches = grid[0] * grid[1]
    for seed, count in enumerate([0, 1, patches // 10, patches // 3, patches // 2] * 5):
        mask = block_mask(grid, count, (min(grid) // 3) ** 2, patches, seed)
        assert mask.shape == grid
        assert int(mask.sum()) <= count


def test_the_student_does_not_see_what_is_masked_and_the_teacher_does() -> None:
    torch.manual_seed(0)
    method = small(IBOT, drop_path=0.0)
    crops, mask = torch.rand(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :4] = True  # the first row of patches
    changed = crops.clone()
    changed[:, :, :8] = torch.rand(2, 3, 8, 32)
    tokens = [masked_tokens(method.backbone, views, mask, method.mask_token) for views in (crops, changed)]
    torch.testing.assert_close(*tokens)
    tokens = [method.backbone.forward_features(views) for views in (crops, changed)]
    assert not torch.allclose(*tokens)
    unmasked = masked_tokens(method.backbone, crops, torch.zeros_like(mask), method.mask_token)
    torch.testing.assert_close(unmasked, tokens[0])


def test_prototypes_stay_bit_for_bit_while_they_are_frozen(tmp_path: Any) -> None:
    optim = Optim("adamw", base_lr=0.1, weight_decay=0.4, lr_scaling="none", warmup_epochs=0)
    method = small(IBOT, shared_head=False, optim=optim)
    before = {name: p.detach().clone() for name, p in method.projector.named_parameters()}
    trainer(tmp_path).fit(method, FakeData(batch_size=8, views=CROPS))
    kept = {name for name, p in method.projector.named_parameters() if torch.equal(p, before[name])}
    assert kept == {"prototypes", "prototype_norms", "patch_prototypes", "patch_prototype_norms"}


def test_centres_follow_all_views_and_all_patches_masked_or_not() -> None:
    method = small(IBOT)
    views = [torch.rand(4, 3, size, size) for size in (32, 32, 16)]
    tokens = method.teacher_backbone.forward_features(torch.cat(views[:2]))
    logits = method.teacher_projector(tokens)
    method.training_loss(views)
    assert not method.center.any()
    method.update_teacher()
    torch.testing.assert_close(method.center, 0.1 * logits[:, 0].mean(0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(method.patch_center, 0.1 * logits[:, 1:].mean((0, 1)), atol=1e-6, rtol=1e-4)
    found = method.health(views)
    assert 0 < float(found["patch_entropy"]) < math.log(32)


def test_both_teacher_temperatures_rise_by_epoch() -> None:
    method = small(IBOT, teacher_patch_temperature=0.06)
    found = []
    for epoch in (0, 1, 29, 50):
        method._trainer = type("Trainer", (), {"current_epoch": epoch})()
        found.append(method.current_teacher_temperatures)
    assert [one for one, _ in found] == pytest.approx([0.04, 0.0410345, 0.07, 0.07], abs=1e-7)
    assert [other for _, other in found] == pytest.approx([0.04, 0.0406897, 0.06, 0.06], abs=1e-7)


@pytest.mark.parametrize(
    "arguments",
    [
        {"backbone": "resnet18"},
        {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": {"global_pool": "avg"}},
        {"backbone": "vit_base_patch16_siglip_224", "backbone_kwargs": {"depth": 1}},
    ],
)
def test_backbones_without_a_class_token_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"IBOT reads the patch tokens of a ViT .* set --model.backbone"):
        IBOT(**arguments)


@pytest.mark.parametrize("shared", [True, False])
def test_whole_steps_equal_a_plain_restatement(shared: bool) -> None:
    torch.manual_seed(0)
    optim = Optim("adamw", base_lr=1e-2, weight_decay=0.1)
    arguments = {"momentum": 0.9, "clip_gradient": 0.05, "drop_path": 0.0, "shared_head": shared, "optim": optim}
    method = small(IBOT, **arguments).double()
    vit: Any = method.backbone
    masks: list[Tensor] = []

    def draw(crops: Tensor) -> Tensor:
        masks.append(torch.rand(len(crops), 16) < 0.4)
        masks[-1][1] = False
        return masks[-1]

    method.draw_masks = draw
    center, patch_center = torch.zeros(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)

    def tokens_of(image: Tensor, weights: Weights, name: str, mask: Tensor | None = None) -> Tensor:
        patches = run(vit.patch_embed, weights, f"{name}.patch_embed.", image[None])[0].flatten(0, 1)
        if mask is not None:
            patches = torch.stack([weights["mask_token"][0] if hide else p for hide, p in zip(mask, patches)])  # noqa: B905
        tokens = torch.cat([weights[f"{name}.cls_token"][0], patches]) + weights[f"{name}.pos_embed"][0]
        return run(vit.norm, weights, f"{name}.norm.", run(vit.blocks, weights, f"{name}.blocks.", tokens[None]))[0]

    def head(h: Tensor, weights: Weights, name: str, patches: bool = False) -> Tensor:
        for layer in (0, 2, 4):
            h = linear(h, weights, f"{name}.mlp.{layer}")
            h = nn.functional.gelu(h) if layer < 4 else h
        last = "patch_prototype" if patches and not shared else "prototype"
        return unit(h) @ (unit(weights[f"{name}.{last}s"]) * weights[f"{name}.{last}_norms"]).T

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        nonlocal center, patch_center
        mask = masks[-1].view(2, 4, 16)
        t = torch.stack([torch.stack([tokens_of(x, weights, "teacher_backbone") for x in v]) for v in views[:2]])
        t_cls, t_patch = (
            head(h, weights, "teacher_projector", patches).detach()
            for h, patches in ((t[:, :, 0], False), (t[:, :, 1:], True))
        )
        s = [torch.stack([tokens_of(x, weights, "backbone", m) for x, m in zip(views[i], mask[i])]) for i in range(2)]  # noqa: B905
        s_cls = [head(h[:, 0], weights, "projector") for h in s]
        s_cls += [head(run(vit, weights, "backbone.", view), weights, "projector") for view in views[2:]]
        pairs, images = [], []
        for g in range(2):
            p = torch.softmax((t_cls[g] - center) / 0.04, 1)
            pairs += [-(p * torch.log_softmax(s_cls[v] / 0.1, 1)).sum(1).mean() for v in range(4) if v != g]
            p = torch.softmax((t_patch[g] - patch_center) / 0.04, -1)
            errors = -(p * torch.log_softmax(head(s[g][:, 1:], weights, "projector", True) / 0.1, -1)).sum(-1)
            images += [errors[i][mask[g, i]].mean() if mask[g, i].any() else 0 * errors.sum() for i in range(4)]
        center = 0.9 * center + 0.1 * t_cls.mean((0, 1))
        patch_center = 0.9 * patch_center + 0.1 * t_patch.mean((0, 1, 2))
        return sum(pairs[1:], pairs[0]) / len(pairs) + sum(images[1:], images[0]) / len(images)

    def clipped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: g * min(1.0, 0.05 / (g.norm().item() + 1e-6)) for name, g in gradients.items()}

    compare(
        method,
        loss_of,
        adamw(1e-2, 0.1),
        random_views(3, 32, 32, 16, 16),
        clip=lambda: clip_each(method.parameters(), method.clip_gradient),
        gradients_of=clipped,
        after=lambda weights: moved(weights, 0.9),
    )
    torch.testing.assert_close(method.center, center)
    torch.testing.assert_close(method.patch_center, patch_center)
