"""CAPI: assignments, masks, what each loss reaches, and whole steps against a plain restatement."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import CAPI, FakeData, Optim, UserError, backbones, losses
from ssl_lightning.backbones.tokens import sincos_positions
from ssl_lightning.masks import inverse_block_mask
from ssl_lightning.methods.capi import released_network
from tests.oracle import Weights, adamw, compare, linear, moved, random_views, run, unit
from tests.small import Endless, small, trainer


def assigned(scores: Tensor, epsilon: float) -> Tensor:
    """Of one position, (B, K), written down plainly."""
    exponentials = torch.stack([(column / epsilon - (column / epsilon).max() + 50).exp() for column in scores.T], 1)
    for _ in range(3):
        exponentials = exponentials / (exponentials.sum(0) + 1e-8)
        exponentials = torch.stack([row / (row.sum() + 1e-8) for row in exponentials])
    return exponentials


def test_each_position_is_assigned_by_itself() -> None:
    scores = torch.tensor([[2.0, 0], [1, 0], [0, 0]], dtype=torch.float64)
    expected = torch.tensor([[0.729833, 0.270167], [0.498444, 0.501556], [0.267719, 0.732281]], dtype=torch.float64)
    torch.testing.assert_close(losses.positionwise_sinkhorn(scores[None], 1.0, 3)[0], expected, rtol=0, atol=1e-6)
    torch.manual_seed(0)
    scores = torch.randn(3, 6, 5, dtype=torch.float64)
    found = losses.positionwise_sinkhorn(scores, 0.5, 3)
    torch.testing.assert_close(found, torch.stack([assigned(position, 0.5) for position in scores]))
    assert not torch.allclose(found.flatten(0, 1), losses.sinkhorn(scores.flatten(0, 1), 0.5, 3), atol=0.01)


def test_clusters_far_below_the_largest_score_are_used_in_single_precision() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 16, 8) - torch.tensor([20.0] + [0.0] * 7)
    found = losses.positionwise_sinkhorn(scores, 0.06, 3)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(2), torch.ones(2, 16))
    torch.testing.assert_close(found, losses.positionwise_sinkhorn(scores.double(), 0.06, 3).float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("size", "counts"), [(256, (90, 8)), (224, (69, 6)), (128, (23, 2))])
def test_a_block_is_visible_and_some_of_the_other_patches_are_predicted(size: int, counts: tuple[int, int]) -> None:
    method = small(CAPI, predicted_share=0.05)
    method.backbone.patch_embed.patch_size = (16, 16)
    torch.manual_seed(0)
    visible, predicted = method.draw_patches(torch.zeros(16, 3, size, size))
    assert (visible.shape, predicted.shape) == ((16, counts[0]), (16, counts[1]))
    for seen, hidden in zip(visible.tolist(), predicted.tolist(), strict=True):
        assert len({*seen, *hidden}) == sum(counts)
    assert len({tuple(row) for row in predicted.tolist()}) == 16


def test_the_visible_block_is_a_rectangle_up_to_its_last_cells_and_a_cyclic_shift() -> None:
    aspects = set()
    for seed in range(100):
        visible = ~inverse_block_mask((16, 16), 166, seed).numpy()
        assert visible.sum() == 90
        rows, columns = visible.any(1).sum(), visible.any(0).sum()
        assert 0 <= rows * columns - 90 < rows + columns + 20  # the sides are rounded up
        aspects.add((int(rows), int(columns)))
        full = visible.sum(1)
        assert (full == columns).sum() >= 90 // columns
    assert {(7, 14), (13, 7)} <= aspects
    assert all(0.4 < rows / columns < 2.3 for rows, columns in aspects)
    assert [int(inverse_block_mask((2, 16), count, 0).sum()) for count in (0, 1, 31, 32)] == [0, 1, 31, 32]


def test_predictions_do_not_see_each_other() -> None:
    method = small(CAPI).eval()
    images, visible = torch.rand(2, 3, 32, 32), torch.tensor([[0, 1, 4, 5]] * 2)
    both = method.predict(images, visible, torch.tensor([[10, 15]] * 2))
    torch.testing.assert_close(method.predict(images, visible, torch.tensor([[15]] * 2)), both[:, 1:])
    assert not torch.allclose(both[:, 0], both[:, 1])
    changed = images.clone()
    changed[:, :, 16:] = torch.rand(2, 3, 16, 32)  # patches 8 to 15
    torch.testing.assert_close(method.predict(changed, visible, torch.tensor([[10, 15]] * 2)), both)


def test_each_loss_reaches_weights_of_its_own() -> None:
    torch.manual_seed(0)
    method = small(CAPI)
    prediction, clustering, _ = method._parts(torch.rand(4, 3, 32, 32))
    clusters = [*method.clusters.parameters()]
    others = [p for name, p in method.named_parameters() if p.requires_grad and not name.startswith("clusters.")]
    assert torch.autograd.grad(prediction, clusters, allow_unused=True, retain_graph=True) == (None, None)
    assert all(gradient is None for gradient in torch.autograd.grad(clustering, others, allow_unused=True))


def test_the_clusters_learn_at_their_own_rate(tmp_path: Any) -> None:
    for rate, clustering_lr in ((0.0, 1e-3), (1e-3, 0.0)):
        method = small(CAPI, clustering_lr=clustering_lr, optim=Optim("adamw", rate, warmup_epochs=0))
        before = {name: p.detach().clone() for name, p in method.named_parameters() if p.requires_grad}
        trainer(tmp_path, max_steps=1).fit(method, FakeData(batch_size=8))
        for name, p in method.named_parameters():
            if name in before:
                moves = clustering_lr > 0 if name.startswith("clusters.") else rate > 0
                assert torch.equal(p, before[name]) != moves, name


@pytest.mark.parametrize("options", [{"part_lr_scale": {"predictor": 2.0}}, {"norm_and_bias_lr_scale": 0.5}])
def test_options_of_the_optimizer_that_it_would_ignore_are_refused(options: Any) -> None:
    with pytest.raises(UserError, match=rf"CAPI has no --model.optim.{next(iter(options))}; use --model.norm_weight"):
        small(CAPI, optim=Optim("adamw", **options))


def test_what_it_cannot_do_is_refused(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"CAPI has no --model.continued"):
        small(CAPI, init_from="x.ckpt", continued={})
    with pytest.raises(UserError, match=r"--model.mask_ratio=0.01 masks none of 16 patches"):
        small(CAPI, mask_ratio=0.01).check([32], 16)


def test_more_clusters_than_the_batch_can_fill_are_warned_of() -> None:
    small(CAPI).check([32], 8)
    with pytest.warns(UserWarning, match=r"set --model.num_prototypes to at most 8"):
        small(CAPI).check([32], 4)


def test_the_teacher_stays_at_the_first_step_of_the_warm_up(tmp_path: Any) -> None:
    optim = Optim("adamw", 1e-3, lr_scaling="none", warmup_epochs=0.5, warmup_inclusive=True, cosine_share=0.8)
    method, momenta, rates = small(CAPI, momentum=0.9, optim=optim), [], []
    method.update_teacher = lambda: (
        momenta.append(method.teacher_momentum(method.progress))
        or rates.append([group["lr"] for group in method.trainer.optimizers[0].param_groups])
    )
    trainer(tmp_path).fit(method, FakeData(batch_size=8))  # 8 steps, 4 of warm-up
    shares = [0, 1 / 3, 2 / 3, 1, *((1 + math.cos(0.2 * math.pi * step)) / 2 for step in range(4))]
    assert momenta == pytest.approx([1 - 0.1 * share for share in shares])
    for rate, share in zip(rates, shares, strict=True):
        assert (max(rate[:-1]), rate[-1]) == pytest.approx((1e-3 * share, 5e-4 * share))


def test_defaults_are_the_released_codes() -> None:
    method = CAPI(backbone_kwargs={"depth": 1, "img_size": 224}, predictor_depth=1, num_prototypes=64)
    vit: Any = method.backbone
    assert (vit.num_prefix_tokens, vit.cls_token, vit.blocks[0].attn.qkv.bias, vit.embed_dim) == (16, None, None, 1024)
    assert (vit.patch_embed.proj.bias is None, vit.norm.weight.requires_grad) == (False, False)
    assert float(vit.reg_token.std()) == pytest.approx(0.02, rel=0.05)
    assert float(method.clusters.weight.std()) == pytest.approx(1, rel=0.05)
    groups = method.create_optimizer(16384).param_groups
    found = [(round(group["lr"], 9), round(group["weight_decay"], 9), group["betas"]) for group in groups]
    rates = [(1e-3, 0.1), (1e-3, 0.01), (2e-4, 0.1), (2e-4, 0.0), (5e-4, 0.01)]
    assert found == [(*rate, (0.9, 0.95)) for rate in rates]
    assert method.chance_loss == pytest.approx(math.log(64))
    images = torch.rand(2, 3, 224, 224)
    assert method(images).shape == method.global_features(images).shape == (2, 1024)


def test_rotations_keep_norms_and_depend_on_the_distance() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 16, dtype=torch.float64)
    places = torch.tensor([[0.2, 0.3], [0.5, 0.1]], dtype=torch.float64)

    def product(shift: float, crossed: bool) -> Tensor:
        both = zip((q, k), places[:, None] + shift, strict=True)
        rotated = [backbones.rope_2d(x, place, 7, 7e-4, crossed) for x, place in both]
        assert (rotated[0].norm() - q.norm()).abs() < 1e-12 or crossed
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(product(0.0, False), product(0.1, False))
    assert (product(0.0, True) - product(0.1, True)).abs() > 0.1
    quarter = backbones.rope_2d(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[0.0, 0.25]]), 1.0, 0.5, crossed=True)
    torch.testing.assert_close(quarter, torch.tensor([[1.0, 2, 1, 2]]))


WIDTHS = {
    "q_proj": (16, 16),
    "k_proj": (16, 16),
    "v_proj": (16, 16),
    "proj": (16, 16),
    "fc1": (64, 16),
    "fc2": (16, 64),
}


def test_the_released_network_computes_what_the_authors_code_does() -> None:
    shapes = {"mask_token": (1, 16), "patch_embed.bias": (16,), "patch_embed.weight": (16, 3, 4, 4)}
    shapes |= {"registers": (1, 4, 16)}
    for block in ("encoder.blocks.0", "decoder.blocks.0"):
        shapes |= {f"{block}.residual{i}.norm.weight": (16,) for i in (1, 2)}
        shapes |= {f"{block}.residual{1 + ('f' in k)}.fn.{k}.weight": v for k, v in WIDTHS.items()}
        shapes |= {f"{block}.residual1.fn.rope.freqs": (2, 8)}

    def filled(number: int, shape: tuple[int, ...]) -> Tensor:
        return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * (number + 1)).view(shape)

    state = {f"backbone.{name}": filled(number, shape) for number, (name, shape) in enumerate(sorted(shapes.items()))}
    turns = 14 * math.pi * torch.tensor([1, 1e-4, 1, 1e-4], dtype=torch.float64)
    state |= {name: torch.block_diag(turns[None], turns[None]) for name in state if "rope" in name}
    network = released_network(state, patch_size=4, num_heads=2)
    images, weights = filled(0, (2, 3, 12, 12)), torch.arange(16, dtype=torch.float64).cos()
    visible, predicted = torch.tensor([0, 4, 5, 12, 16, 17]), torch.tensor([2, 6, 9, 10])
    expected = [[2.2073056759, 2.2352184626, 2.4826079229], [2.2115684443, 3.0441770073, 2.1017048768]]
    near: Any = {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(
        network.encode(images, visible) @ weights, torch.tensor(expected, dtype=torch.float64), **near
    )
    expected = [-0.0870719971, -0.0873929532, -0.0441467375, 0.0171724560]
    found = network.predict(images, visible, predicted) @ weights
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **near)
    assert float((network.encode(images) @ weights).sum()) == pytest.approx(43.7624738009)


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    optim = Optim("adamw", base_lr=1e-3, lr_scaling="none", weight_decay=0.1, extra={"betas": (0.9, 0.95)})
    method = small(CAPI, momentum=0.9, clustering_lr=2e-3, drop_path=0.0, optim=optim).double()
    vit: Any = method.backbone
    drawn: list[tuple[Tensor, Tensor]] = []

    def draw(images: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.stack([torch.randperm(16) for _ in images])
        drawn.append((order[:, :6], order[:, 6:8]))
        return drawn[-1]

    method.draw_patches = draw
    places = sincos_positions(48, (4, 4), rows_first=False)[0, 1:].double()

    def rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def encoded(image: Tensor, weights: Weights, name: str, kept: Tensor) -> Tensor:
        patches = run(vit.patch_embed, weights, f"{name}.patch_embed.", image[None])[0].flatten(0, 1) + places
        tokens = torch.cat([weights[f"{name}.reg_token"][0], patches[kept]])
        return run(vit.norm, weights, f"{name}.norm.", run(vit.blocks, weights, f"{name}.blocks.", tokens[None]))[0]

    def predicted(tokens: Tensor, place: Tensor, weights: Weights) -> Tensor:
        x, block = weights["predictor.mask_token"][0, 0] + place, "predictor.blocks.0"
        q = linear(rms(x, weights[f"{block}.norm1.weight"]), weights, f"{block}.attention.q").view(3, 16)
        k, v = (part.view(-1, 3, 16) for part in linear(tokens, weights, f"{block}.attention.kv").chunk(2, 1))
        heads = [(k[:, h] @ q[h] / 4).softmax(0) @ v[:, h] for h in range(3)]
        x = x + linear(torch.cat(heads), weights, f"{block}.attention.projection")
        hidden = F.gelu(linear(rms(x, weights[f"{block}.norm2.weight"]), weights, f"{block}.mlp.0"))
        return rms(x + linear(hidden, weights, f"{block}.mlp.2"))

    def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
        return -(targets.detach() * (scores / 0.12).log_softmax(-1)).sum()

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        everything = torch.arange(16)
        patches = [encoded(image, weights, "teacher_backbone", everything)[16:].detach() for image in views[0]]
        scores = torch.stack([linear(unit(one), weights, "clusters") for one in patches])  # (B, N, K)
        targets = torch.stack([assigned(scores[:, place], 0.06) for place in range(16)], 1)
        clustering = torch.stack([cross_entropy(s, a) for s, a in zip(scores, targets, strict=True)]).sum() / 64
        prototypes = unit(weights["projector.prototypes"]) * weights["projector.prototype_norms"]
        errors = []
        for image, target, visible, hidden in zip(views[0], targets, *drawn[-1], strict=True):
            tokens = encoded(image, weights, "backbone", visible)
            vectors = [unit(predicted(tokens, places[place], weights)) for place in hidden]
            errors += [cross_entropy(prototypes @ v, target[place]) for v, place in zip(vectors, hidden, strict=True)]
        return torch.stack(errors).mean() + clustering - clustering.detach()

    def update(name: str, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        if name.startswith("clusters."):
            lr, decay = 2e-3, 0.01
        else:
            lr = 2e-4 if "patch_embed" in name else 1e-3
            decay = 0.0 if name.endswith("bias") else 0.1 if p.ndim > 1 else 0.01
        return adamw(lr, 0.0, 0.9, 0.95)(name, p * (1 - lr * decay), gradient, state)

    compare(
        method, loss_of, update, random_views(3, 32),
        after=lambda weights: moved(weights, 0.9), optimizer=method.create_optimizer(256),
    )  # fmt: skip


def test_a_teacher_without_warm_up_follows_from_the_first_step_without_a_length_of_the_loader(tmp_path: Any) -> None:
    method, momenta = small(CAPI, momentum=0.9, optim=Optim("adamw", 1e-3, lr_scaling="none", warmup_epochs=0)), []
    method.update_teacher = lambda: momenta.append(method.teacher_momentum(method.progress))
    loader = ([views[:1], labels] for views, labels in Endless())
    trainer(tmp_path, max_epochs=-1, max_steps=4).fit(method, loader)
    assert momenta[0] == pytest.approx(0.9)
    assert momenta == sorted(momenta)
