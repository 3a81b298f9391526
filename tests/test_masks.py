"""Random masks over grids of patches."""

from typing import Any

import pytest
import torch
from scipy.ndimage import label

from ssl_lightning import IBOT, DINOv2, SimDINOv2, UserError
from ssl_lightning.masks import block_mask
from tests.small import VIT, small


def test_beits_masks_hold_about_75_patches_of_196_and_never_more() -> None:
    counts = [int(block_mask((14, 14), 75, 16, 75, seed).sum()) for seed in range(200)]
    assert max(counts) == 75
    assert min(counts) >= 60
    assert sum(counts) / len(counts) > 72


def test_a_mask_is_a_function_of_its_seed() -> None:
    assert torch.equal(block_mask((14, 14), 75, 16, 75, 3), block_mask((14, 14), 75, 16, 75, 3))
    assert len({tuple(block_mask((14, 14), 75, 16, 75, seed).flatten().tolist()) for seed in range(50)}) == 50


def test_masks_are_made_of_blocks_not_of_scattered_patches() -> None:
    for seed in range(50):
        mask = block_mask((14, 14), 75, 16, 75, seed)
        _, parts = label(mask.numpy())
        assert parts <= 8  # 75 scattered patches of 196 make some 20


def test_every_place_is_masked_about_as_often_but_for_the_border() -> None:
    share = torch.stack([block_mask((14, 14), 75, 16, 75, seed) for seed in range(500)]).float().mean(0)
    assert share[3:-3, 3:-3].min() > 0.3
    assert share.min() > 0.02
    assert (share - share.T).abs().max() < 0.15  # no side is preferred
    assert (share - share.flip(0)).abs().max() < 0.15


@pytest.mark.parametrize(("grid", "count", "smallest"), [((4, 4), 6, 2), ((4, 8), 12, 4), ((2, 2), 2, 1)])
def test_small_grids_are_masked_too(grid: tuple[int, int], count: int, smallest: int) -> None:
    masks = torch.stack([block_mask(grid, count, smallest, count, seed) for seed in range(50)])
    assert masks.shape[1:] == grid
    assert int(masks.flatten(1).sum(1).max()) <= count
    assert float(masks.flatten(1).sum(1).float().mean()) > 0.6 * count


@pytest.mark.parametrize("method", [IBOT, DINOv2, SimDINOv2])
def test_masks_of_crops_fit_patches_of_any_shape(method: Any) -> None:
    net = {**VIT, "backbone_kwargs": {**VIT["backbone_kwargs"], "patch_size": (4, 8)}}
    masks = small(method, net, masked_share=1.0).draw_masks(torch.rand(8, 3, 32, 32))
    assert masks.shape == (8, 8 * 4)
    assert masks.any()


@pytest.mark.parametrize("method", [IBOT, DINOv2, SimDINOv2])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masked_share": 1.5}, r"--model.masked_share=1.5 must lie between 0 and 1"),
        ({"mask_ratio": [0.5, 1.5]}, r"--model.mask_ratio=\[0.5, 1.5\] must be two shares from 0 to 1"),
        ({"mask_ratio": (0.5, 0.1)}, r"the smaller one first"),
    ],
)
def test_shares_that_are_none_are_refused(method: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(method, **arguments)
