"""Jigsaw: permutations, patches and their places, probes, and whole steps against a plain restatement."""

import math
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import FakeData, Jigsaw, Optim, UserError
from ssl_lightning.data.views import preset
from ssl_lightning.methods.jigsaw import cut, distant_permutations, shuffled
from tests.oracle import Weights, batch_norm, compare, linear, parameters, random_views, run, sgd
from tests.processes import run_processes
from tests.small import VIT, small, trainer


def test_heads_and_defaults_are_the_papers() -> None:
    method = Jigsaw()
    assert parameters(method.projector) == 2048 * 1000 + 1000 + 2 * 1000
    assert parameters(method.head) == 9000 * 2000 + 2000
    assert method.chance_loss == pytest.approx(7.6009, abs=1e-4)
    factors = [method.optim.lr_factor(step, 105, 1) for step in (0, 5, 29, 30, 60, 90, 100)]
    assert factors == pytest.approx([0.25, 1, 1, 0.1, 0.01, 1e-3, 1e-4])
    (view,) = preset(method.views, 255)
    assert (view.size // 3, method.patch_size, view.grayscale) == (85, 64, 0.66)


@pytest.mark.parametrize(("count", "nearest", "mean"), [(100, 6, 8.0), (2000, 4, 8.0)])
def test_permutations_are_far_apart_always_the_same_and_soon_there(count: int, nearest: int, mean: float) -> None:
    start = time.process_time()
    permutations = distant_permutations(count)
    assert time.process_time() - start < 5
    assert torch.equal(permutations.sort(dim=1).values, torch.arange(9).expand(count, -1))
    distances = (permutations[:, None] != permutations[None]).sum(2)
    apart = distances[~torch.eye(count, dtype=torch.bool)]
    assert int(apart.min()) >= nearest  # so no two are the same
    assert float(apart.float().mean()) >= mean  # of random ones it is 8
    assert torch.equal(permutations, distant_permutations(count))


def test_patches_stay_in_their_cells_and_move_in_them() -> None:
    torch.manual_seed(0)
    method = small(Jigsaw, patch_size=64)
    corners, orders = method._drawn(torch.empty(400, 3, 255, 255))
    cells = torch.tensor([[85 * (place // 3), 85 * (place % 3)] for place in range(9)])
    offsets = corners - cells
    assert (int(offsets.min()), int(offsets.max())) == (0, 21)  # 85 - 64: the patch never crosses
    assert len(offsets.flatten().unique()) == 22
    assert len(orders.unique()) == len(method.permutations)


def test_patches_are_cut_and_laid_in_the_order_that_is_the_label() -> None:
    torch.manual_seed(0)
    method = small(Jigsaw)
    rows = torch.arange(32.0).view(1, 1, -1, 1).expand(4, 1, 32, 32)
    images = torch.cat([rows, rows.transpose(2, 3), torch.zeros(4, 1, 32, 32)], dim=1)  # pixels tell their place
    corners, orders = method._drawn(images)
    patches = cut(images, corners, 8)
    assert patches.shape == (4, 9, 3, 8, 8)
    assert torch.equal(patches[:, :, :2, 0, 0].long(), corners)
    assert torch.equal(patches[:, :, :2, 7, 7].long(), corners + 7)
    laid = shuffled(patches, method.permutations[orders])
    inverse = method.permutations[orders].argsort(dim=1)
    assert torch.equal(shuffled(laid, inverse), patches)
    for image in range(4):
        for place in range(9):
            assert torch.equal(laid[image, place], patches[image, method.permutations[orders[image], place]])


def test_the_backbone_sees_each_patch_on_its_own_scale_if_asked() -> None:
    seen: list[Tensor] = []
    images = torch.rand(4, 3, 32, 32) * 5 + 3
    for normalize in (False, True):
        method = small(Jigsaw, normalize_patches=normalize)
        method.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        method.training_loss([images])
    assert [len(patches) for patches in seen] == [36, 36]
    assert float(seen[0].mean()) > 3
    torch.testing.assert_close(seen[1].mean((1, 2, 3)), torch.zeros(36), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[1].std((1, 2, 3)), torch.ones(36), atol=1e-3, rtol=0)


def test_permutations_come_with_the_checkpoint(tmp_path: Any) -> None:
    running = trainer(tmp_path, limit_train_batches=1)
    method = small(Jigsaw)
    method.permutations.copy_(method.permutations.flip(0))  # as of an older version
    running.fit(method, FakeData(batch_size=8))
    running.save_checkpoint(tmp_path / "x.ckpt")
    again = Jigsaw.load_from_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(again.permutations, method.permutations)


def test_probes_have_features_of_whole_views_every_few_steps(tmp_path: Any) -> None:
    found: list[Any] = []

    class Noted(Jigsaw):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            outputs = super().training_step(batch, batch_idx)
            features = outputs["features"]
            found.append(None if features is None else (features.shape, features.requires_grad))
            return outputs

    method = small(Noted, probe_every=3)
    trainer(tmp_path, limit_train_batches=4).fit(method, FakeData(batch_size=8))
    whole = ((8, method.embed_dim), False)
    assert found == [whole, None, None, whole]
    assert method.backbone.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 11}, "patch_size=11 is larger than the cells of 10 px, a third of the view; set it to about 8"),
        ({**VIT, "patch_size": 10}, "patches of 8 px do not divide --model.patch_size=10"),
    ],
)
def test_patches_that_do_not_fit_are_refused(tmp_path: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(small(Jigsaw, arguments), FakeData(batch_size=8))
    with pytest.raises(UserError, match="num_permutations=1 must be from 2"):
        small(Jigsaw, num_permutations=1)


def _drawn_by(rank: int, processes: int) -> list[Tensor]:
    method = small(Jigsaw)
    method.randomness.generator = torch.Generator().manual_seed(3)  # as in a step
    return list(method._drawn(torch.empty(8 // processes, 3, 32, 32)))


def test_two_processes_draw_what_one_does() -> None:
    for one, *two in zip(_drawn_by(0, 1), *run_processes(_drawn_by, 2, 2), strict=True):
        assert torch.equal(torch.cat(two), one)
    assert all(not torch.equal(first, second) for first, second in pairwise(one.chunk(4)))


def test_a_blind_head_is_at_chance() -> None:
    method = small(Jigsaw)
    torch.nn.init.zeros_(method.head.weight), torch.nn.init.zeros_(method.head.bias)
    assert method.training_loss([torch.rand(4, 3, 32, 32)]).item() == pytest.approx(math.log(16))
    assert 0 <= float(method.health([torch.rand(4, 3, 32, 32)])["pretext_accuracy"]) <= 1


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    method = small(Jigsaw, optim=Optim("sgd", base_lr=0.1, weight_decay=1e-4)).double()
    drawn: list[tuple[Tensor, Tensor]] = []
    draw = method._drawn
    method._drawn = lambda images: drawn.append(draw(images)) or drawn[-1]  # type: ignore[method-assign,func-returns-value]

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        corners, orders = drawn[-1]
        patches = []
        for image, of_image, order in zip(views[0], corners.tolist(), orders.tolist(), strict=True):
            for place in method.permutations[order].tolist():
                row, column = of_image[place]
                patches.append(image[:, row : row + 8, column : column + 8])
        features = run(method.backbone, weights, "backbone.", torch.stack(patches))
        kept = F.relu(batch_norm(linear(features, weights, "projector.0"), weights, "projector.1"))
        logits = linear(torch.stack([kept[9 * i : 9 * i + 9].flatten() for i in range(4)]), weights, "head")
        return -torch.stack([F.log_softmax(row, 0)[order] for row, order in zip(logits, orders, strict=True)]).mean()

    def update(name: str, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        return sgd(0.1, 1e-4 if p.ndim > 1 else 0.0)(name, p, gradient, state)

    compare(method, loss_of, update, random_views(3, 32))
