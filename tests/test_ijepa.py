"""I-JEPA: blocks, what the student sees, targets, and whole steps against a plain restatement."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import IJEPA, FakeData, LinearProbe, Optim, UserError, ema, losses
from ssl_lightning.masks import multi_block
from ssl_lightning.methods import ijepa
from tests.oracle import Weights, adamw, compare, linear, moved, random_views, run
from tests.processes import run_processes
from tests.small import VIT, small, trainer

PAPER: Any = (4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), 10)


def test_the_distance_of_the_worked_example() -> None:
    targets = torch.tensor([0.5, 2.0], requires_grad=True)
    predictions = torch.zeros(2, requires_grad=True)
    loss = losses.ijepa(predictions, targets)
    assert float(loss) == pytest.approx(0.8125)
    loss.backward()
    assert targets.grad is None


def test_the_chance_loss_is_that_of_predicting_nothing() -> None:
    torch.manual_seed(0)
    method = small(IJEPA)
    assert method.chance_loss == pytest.approx(0.425, abs=1e-3)
    normal = torch.randn(100_000)
    assert float(losses.ijepa(torch.zeros_like(normal), normal)) == pytest.approx(method.chance_loss, abs=5e-3)


def test_defaults_are_the_papers() -> None:
    method = IJEPA(backbone_kwargs={"depth": 1})  # of 12
    assert method.backbone.pos_embed.shape == (1, 196, 768)  # no class token
    assert not method.backbone.pos_embed.requires_grad
    assert (len(method.predictor.blocks), method.predictor.embed.out_features) == (6, 384)
    assert method.optim.peak_lr(2048) == pytest.approx(1e-3)
    assert [method.optim.lr_factor(step, 300, 1) * 1e-3 for step in (0, 40, 300)] == pytest.approx([2e-4, 1e-3, 1e-6])
    rows = method.backbone.pos_embed[0].unflatten(0, (14, 14))
    torch.testing.assert_close(rows[0, :, :384], rows[5, :, :384])  # the first half tells the column
    torch.testing.assert_close(rows[:, 0, 384:], rows[:, 5, 384:])


def test_blocks_of_the_papers_grid() -> None:
    for seed in range(5):
        context, _, targets = multi_block(16, (16, 16), *PAPER, seed)
        assert targets.shape[:2] == (16, 4)
        assert 35 <= targets.shape[2] <= 56
        assert context.shape[1] > 10
        for own, blocks in zip(context.tolist(), targets.tolist(), strict=True):
            assert not set(own) & {patch for block in blocks for patch in block}
            assert all(patch // 16 < 15 and patch % 16 < 15 for patch in own)  # the bound that corners lie below
            for block in blocks:
                rows, columns = {patch // 16 for patch in block}, {patch % 16 for patch in block}
                assert len(block) == len(rows) * len(columns)  # a rectangle
                assert block == sorted(block)
    assert len({tuple(block) for blocks in targets.tolist() for block in blocks}) > 30  # places differ by image
    assert torch.equal(multi_block(16, (16, 16), *PAPER, 3)[2], multi_block(16, (16, 16), *PAPER, 3)[2])


def test_area_and_aspect_of_blocks_come_from_one_number() -> None:
    shapes = set()
    for seed in range(60):
        block = multi_block(1, (16, 16), *PAPER, seed)[2][0, 0]
        shapes.add((len(block.div(16, rounding_mode="floor").unique()), len((block % 16).unique())))
    expected = set()
    for share in torch.linspace(0, 1, 2001).tolist():
        area, aspect = int(256 * (0.15 + share * 0.05)), 0.75 + share * 0.75
        expected.add((round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))))
    assert shapes <= expected
    assert len(shapes) > 2


def test_small_grids_let_targets_overlap_the_context_rather_than_leave_it_empty() -> None:
    for seed in range(20):
        context, _, targets = multi_block(8, (4, 4), 4, (0.3, 0.5), (0.75, 1.5), (0.85, 1.0), 8, seed)
        assert context.shape == (8, 9)  # the whole block of 3 x 3
        assert targets.shape[:2] == (8, 4)


def test_contexts_are_cut_to_the_shortest_of_128_images() -> None:
    cut: dict[int, list[float]] = {128: [], 2048: []}
    for seed in range(8):
        whole, own, _ = multi_block(2048, (14, 14), *PAPER, seed, group=1)
        for group, seen in cut.items():
            contexts, counts, _ = multi_block(2048, (14, 14), *PAPER, seed, group)
            expected = torch.cat([part.min().expand(len(part)) for part in own.split(group)])
            assert torch.equal(counts, expected)
            assert torch.equal(contexts[:, : counts.min()], whole[:, : counts.min()])
            seen.append(counts.float().mean().item())
    of_128, of_all = (sum(seen) / len(seen) for seen in cut.values())
    assert of_all + 5 < of_128 < 54  # of the paper's 14 x 14 patches; over many seeds 50 and 42


def _step(rank: int, processes: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    method = small(IJEPA, {"backbone_kwargs": {**VIT["backbone_kwargs"], "patch_size": 4, "depth": 1}}).double()
    images = torch.rand(192, 3, 32, 32, dtype=torch.float64).chunk(processes)[rank]
    torch.manual_seed(1)
    loss = method.training_loss([images])
    loss.backward()
    gradients = [p.grad for p in (method.mask_token, *method.backbone.blocks.parameters()) if p.grad is not None]
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.slow
def test_two_processes_whose_batches_share_a_group_train_as_one() -> None:  # 96 images each: the second has 32 + 64
    whole, parts = _step(0, 1), run_processes(_step, 2, 2)
    for expected, own in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(sum(own) / 2, expected, atol=1e-10, rtol=1e-8)


def test_a_process_takes_its_images_of_groups_that_it_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    method = small(IJEPA, {"backbone_kwargs": {**VIT["backbone_kwargs"], "patch_size": 4, "depth": 1}})
    images = torch.empty(192, 3, 32, 32)

    def drawn(rank: int, processes: int) -> tuple[list[Tensor], Tensor]:
        monkeypatch.setattr(ijepa, "world_size", lambda: processes)
        monkeypatch.setattr(ijepa, "own_part", lambda rows: rows.chunk(processes)[rank])
        torch.manual_seed(9)
        return method.draw_blocks(images[: 192 // processes])

    contexts, targets = drawn(0, 1)
    rows = [row.tolist() for context in contexts for row in context]
    assert [len(context) for context in contexts] == [128, 64]
    halves = [drawn(rank, 2) for rank in range(2)]
    assert [len(context) for half, _ in halves for context in half] == [96, 32, 64]
    assert [row.tolist() for half, _ in halves for context in half for row in context] == rows
    assert torch.equal(torch.cat([own for _, own in halves]), targets)


def test_the_student_sees_the_context_alone_at_its_own_place() -> None:
    torch.manual_seed(0)
    method = small(IJEPA)
    images, context = torch.rand(2, 3, 32, 32), torch.tensor([[0, 1, 2, 4]] * 2)
    targets = torch.tensor([[[10, 11], [14, 15]]] * 2)
    changed = images.clone()
    changed[:, :, 16:] = torch.rand(2, 3, 16, 32)  # patches 8 to 15
    predictions = method.predict(images, context, targets)
    assert predictions.shape == (2, 2, 2, 48)
    torch.testing.assert_close(method.predict(changed, context, targets), predictions)
    assert not torch.allclose(predictions[:, :, 0], predictions[:, :, 1])  # each place has its own
    alone = method.predict(images, context, targets[:, 1:])  # a block does not see the other
    torch.testing.assert_close(alone, predictions[:, 1:])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(method.predict(images, context[:, order], targets), predictions)


def test_targets_are_normalised_features_of_the_whole_image() -> None:
    method = small(IJEPA)
    features = method._teacher_features(torch.rand(4, 3, 32, 32))
    torch.testing.assert_close(features.mean(-1), torch.zeros(4, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(-1, correction=0), torch.ones(4, 16), atol=1e-2, rtol=0)


def test_probes_learn_from_the_mean_of_the_patches_of_whole_images(tmp_path: Any) -> None:
    seen: list[int] = []

    class Recorder(LinearProbe):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert outputs["features"].shape == (8, 48)
            seen.append(batch_idx)

    method = small(IJEPA, momentum=1.0)
    trainer(tmp_path, callbacks=[Recorder()], limit_train_batches=2).fit(method, FakeData(batch_size=8))
    assert seen == [0, 1]
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(method(images), method.teacher_backbone.forward_features(images).mean(1))


def test_the_momentum_rises_in_a_straight_line(tmp_path: Any) -> None:
    method, momenta = small(IJEPA, momentum=0.6), []
    follow = ema.follow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema, "follow", lambda *parts: momenta.append(parts[2]) or follow(*parts))  # type: ignore[func-returns-value]
        trainer(tmp_path, limit_train_batches=4).fit(method, FakeData(batch_size=8))
    assert momenta == pytest.approx([0.6, 0.7, 0.8, 0.9])


@pytest.mark.parametrize(
    "arguments",
    [{"backbone": "resnet18"}, {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": {"class_token": True}}],
)
def test_backbones_with_other_tokens_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="IJEPA reads the patch tokens of a ViT with no class token"):
        IJEPA(**arguments)


def test_views_of_another_size_have_fixed_positions_of_their_own() -> None:
    torch.manual_seed(0)
    method, other = small(IJEPA), small(IJEPA, {"backbone_kwargs": {**VIT["backbone_kwargs"], "img_size": 16}})
    fixed = ("backbone.pos_embed", "teacher_backbone.pos_embed", "predictor.positions")
    other.load_state_dict({k: v for k, v in method.state_dict().items() if k not in fixed}, strict=False)
    images, context, targets = torch.rand(2, 3, 16, 16), torch.tensor([[0, 1]] * 2), torch.tensor([[[2], [3]]] * 2)
    torch.testing.assert_close(method.predict(images, context, targets), other.predict(images, context, targets))
    torch.testing.assert_close(method(images), other(images))


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    method = small(IJEPA, momentum=0.9, optim=Optim("adamw", base_lr=1e-3, weight_decay=0.05)).double()
    vit: Any = method.backbone
    drawn: list[tuple[Tensor, Tensor]] = []

    def draw(images: Tensor) -> tuple[list[Tensor], Tensor]:
        context, _, targets = multi_block(len(images), (4, 4), *PAPER[:4], 1, len(drawn))
        drawn.append((context, targets))
        return [context], targets

    method.draw_blocks = draw

    def embedded(image: Tensor, weights: Weights, name: str) -> Tensor:
        patches = run(vit.patch_embed, weights, f"{name}.patch_embed.", image[None])[0].flatten(0, 1)
        return patches + weights[f"{name}.pos_embed"][0]

    def encoded(tokens: Tensor, weights: Weights, name: str) -> Tensor:
        return run(vit.norm, weights, f"{name}.norm.", run(vit.blocks, weights, f"{name}.blocks.", tokens[None]))[0]

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        errors = []
        positions = weights["predictor.positions"][0]
        for image, context, targets in zip(views[0], *drawn[-1], strict=True):
            features = encoded(embedded(image, weights, "teacher_backbone"), weights, "teacher_backbone").detach()
            features = (features - features.mean(1, True)) / (features.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            seen = encoded(embedded(image, weights, "backbone")[context], weights, "backbone")
            seen = linear(seen, weights, "predictor.embed") + positions[context]
            for block in targets:
                tokens = torch.cat([seen, weights["mask_token"][0] + positions[block]])
                tokens = run(method.predictor.blocks, weights, "predictor.blocks.", tokens[None])[0]
                tokens = run(method.predictor.norm, weights, "predictor.norm.", tokens[len(seen) :])
                predicted = linear(tokens, weights, "predictor.projection")
                errors.append(F.smooth_l1_loss(predicted, features[block]))
        return torch.stack(errors).mean()

    compare(method, loss_of, adamw(1e-3, 0.05), random_views(3, 32), after=lambda weights: moved(weights, 0.9))
