"""Random masks over grids of patches."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ssl_lightning.distributed import own_part, world_size
from ssl_lightning.errors import UserError


def checked_ratio(mask_ratio: float) -> float:
    """The share of patches to mask, if it can be that.

    Args:
        mask_ratio: Share of the patches.

    Raises:
        UserError: It does not lie between 0 and 1.
    """
    if not 0 < mask_ratio < 1:
        raise UserError(f"--model.mask_ratio={mask_ratio} must lie between 0 and 1.")
    return mask_ratio


def checked_crop_masks(mask_ratio: tuple[float, float], masked_share: float) -> None:
    """Raise a UserError if crops cannot be masked like that.

    Args:
        mask_ratio: Smallest and largest share of the patches of a masked crop.
        masked_share: Share of the crops that are masked.
    """
    if not 0 <= mask_ratio[0] <= mask_ratio[1] <= 1:
        raise UserError(f"--model.mask_ratio={list(mask_ratio)} must be two shares from 0 to 1, the smaller one first.")
    if not 0 <= masked_share <= 1:
        raise UserError(f"--model.masked_share={masked_share} must lie between 0 and 1.")


def block_mask(grid: tuple[int, int], count: int, smallest: int, largest: int, seed: int) -> Tensor:
    """Mask rectangles of patches until enough are masked.

    Bao et al. 2022, BEiT, algorithm 1; iBOT and DINOv2 use other sizes. Slightly fewer than ``count`` are masked where
    ten rectangles in a row do not fit.

    Args:
        grid: Rows and columns of patches.
        count: Number of patches to mask.
        smallest: Smallest area of a rectangle, in patches.
        largest: Largest area of a rectangle, in patches.
        seed: Seed of the random numbers.

    Returns:
        ``(rows, columns)`` bool, true where masked.

    Example:
        >>> mask = block_mask((14, 14), count=75, smallest=16, largest=75, seed=0)
        >>> mask.shape, bool(60 <= mask.sum() <= 75)
        (torch.Size([14, 14]), True)
    """
    random = np.random.Generator(np.random.Philox(seed))
    mask = np.zeros(grid, dtype=bool)
    rows, columns = grid
    while (left := count - int(mask.sum())) > 0:
        for _ in range(10):
            area = smallest + (min(left, largest) - smallest) * random.random()  # less, where less is left
            aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))  # height / width
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, start = random.integers(rows - height + 1), random.integers(columns - width + 1)
            block = mask[top : top + height, start : start + width]
            if 0 < block.size - int(block.sum()) <= min(left, largest):
                block[:] = True
                break
        else:
            break
    return torch.from_numpy(mask)


def inverse_block_mask(grid: tuple[int, int], count: int, seed: int) -> Tensor:
    """Mask all patches but a rectangle, which may lie across the border of the image.

    Darcet et al. 2025, CAPI, and its released code: the rectangle has an aspect of 1/2 to 2, or what fits; of its
    patches the last ones, row by row, are masked until the number is exact; then everything is shifted cyclically.

    Args:
        grid: Rows and columns of patches.
        count: Number of patches to mask.
        seed: Seed of the random numbers.

    Returns:
        ``(rows, columns)`` bool, true where masked.

    Example:
        >>> inverse_block_mask((4, 4), count=10, seed=1)
        tensor([[False, False, False, False],
                [False, False,  True,  True],
                [ True,  True,  True,  True],
                [ True,  True,  True,  True]])
    """
    random = np.random.Generator(np.random.Philox(seed))
    (rows, columns), mask = grid, np.ones(grid, dtype=bool)
    if visible := rows * columns - count:
        fitting = visible / columns**2, rows**2 / visible  # smallest and largest height / width
        low, high = (math.log(min(max(aspect, fitting[0]), fitting[1])) for aspect in (0.5, 2.0))
        aspect = math.exp(random.uniform(low, high))
        height, width = (math.ceil(math.sqrt(part) - 1e-9) for part in (visible * aspect, visible / aspect))
        top, start = random.integers(rows - height + 1), random.integers(columns - width + 1)
        cells = np.arange(height * width).reshape(height, width)
        mask[top : top + height, start : start + width] = cells >= visible
    shifts = random.integers(rows), random.integers(columns)
    return torch.from_numpy(np.roll(mask, shifts, axis=(0, 1)))


def random_mask(grid: tuple[int, int], count: int, seed: int) -> Tensor:
    """Mask single patches (the ``rand`` masks of iBOT's released code).

    Args:
        grid: Rows and columns of patches.
        count: Number of patches to mask.
        seed: Seed of the random numbers.

    Returns:
        ``(rows, columns)`` bool, true where masked.

    Example:
        >>> random_mask((4, 4), count=6, seed=0).sum()
        tensor(6)
    """
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(grid[0] * grid[1]) < count
    return torch.from_numpy(chosen.reshape(grid))


def block_masks(
    grid: tuple[int, int], counts: Iterable[int], smallest: int, largest: int, seeds: Iterable[int]
) -> Tensor:
    """Mask rectangles of each image, see ``block_mask``.

    Args:
        grid: Rows and columns of patches.
        counts: Patches to mask in each image.
        smallest: Smallest area of a rectangle.
        largest: Largest area of a rectangle.
        seeds: Of the random numbers of each image.

    Returns:
        ``(B, rows * columns)`` bool on the CPU, true where masked.

    Example:
        >>> block_masks((14, 14), counts=[75, 0], smallest=16, largest=75, seeds=[0, 1]).sum(1)  # a few may not fit
        tensor([73,  0])
    """
    masks = [block_mask(grid, count, smallest, largest, seed) for count, seed in zip(counts, seeds, strict=True)]
    return torch.stack(masks).flatten(1)


def random_masks(grid: tuple[int, int], counts: Iterable[int], seeds: Iterable[int]) -> Tensor:
    """Mask single patches of each image, see ``random_mask``.

    Args:
        grid: Rows and columns of patches.
        counts: Patches to mask in each image.
        seeds: Of the random numbers of each image.

    Returns:
        ``(B, rows * columns)`` bool on the CPU, true where masked.
    """
    return torch.stack([random_mask(grid, count, seed) for count, seed in zip(counts, seeds, strict=True)]).flatten(1)


def global_crop_masks(
    grid: tuple[int, int], images: int, mask_ratio: tuple[float, float], masked_share: float, generator: torch.Generator
) -> Tensor:
    """Mask rectangles in some of the two global crops of each image, with ratios that are spread evenly.

    Oquab et al. 2023, DINOv2. The number of masked crops is exact over all processes.

    Args:
        grid: Rows and columns of patches.
        images: Images B of this process.
        mask_ratio: Smallest and largest share of patches to mask in a masked crop.
        masked_share: Share of the crops that are masked.
        generator: Random numbers, the same on every process.

    Returns:
        ``(2B, rows * columns)`` bool on the CPU, true where masked.

    Example:
        >>> masks = global_crop_masks((14, 14), 4, (0.1, 0.5), 0.5, torch.Generator().manual_seed(0))
        >>> masks.shape, masks.any(1).sum()
        (torch.Size([8, 196]), tensor(4))
    """
    patches, crops = grid[0] * grid[1], 2 * images * world_size()
    bins = torch.linspace(*mask_ratio, int(crops * masked_share) + 1)
    ratios = bins[:-1] + torch.rand(len(bins) - 1, generator=generator) * bins.diff()  # one ratio per bin
    ratios = torch.cat([ratios, ratios.new_zeros(crops - len(ratios))])
    ratios = ratios[torch.randperm(crops, generator=generator)]
    masks = []
    for ratios_of_view in ratios.chunk(2):
        seeds = own_part(torch.randint(2**62, (crops // 2,), generator=generator)).tolist()
        counts = [int(ratio * patches) for ratio in own_part(ratios_of_view).tolist()]
        masks.append(block_masks(grid, counts, 4, patches // 2, seeds))
    return torch.cat(masks)


def masked_patches(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the masked patches, and the divisor of each in a mean over the patches of an image, then over images.

    Args:
        mask: ``(B, N)`` bool, true where masked. On the CPU: on a device, finding the indices would make the host wait.

    Returns:
        ``(M,)`` indices among all ``B * N`` patches, and ``(M,)`` divisors: masked patches of the image, times B.

    Example:
        >>> mask = torch.tensor([[True, False, True], [False, True, False]])
        >>> masked_patches(mask)
        (tensor([0, 2, 4]), tensor([4, 4, 2]))
    """
    rows, columns = mask.numpy().nonzero()
    counts = mask.numpy().sum(1)[rows] * len(mask)
    return torch.from_numpy(rows * mask.shape[1] + columns), torch.from_numpy(counts)


def multi_block(
    images: int,
    grid: tuple[int, int],
    targets: int,
    target_scale: tuple[float, float],
    target_aspect: tuple[float, float],
    context_scale: tuple[float, float],
    min_context: int,
    seed: int,
    group: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of patches to predict, and the context: one block to predict them from, without the patches to predict.

    Assran et al. 2023, I-JEPA, section 3 and its released code. All images share the sizes of the blocks, and one
    random number sets both area and aspect. No block touches the last row or column, as the code draws corners below an
    exclusive bound. The contexts of a group of images are cut to the shortest by dropping their last patches. Where a
    context stays too small after 20 draws, it may overlap the last target, then also the one before, and so on.

    Args:
        images: Number of images.
        grid: Rows and columns of patches.
        targets: Number of blocks to predict in each image.
        target_scale: Smallest and largest share of patches in such a block.
        target_aspect: Smallest and largest height / width of such a block.
        context_scale: Smallest and largest share of patches in the context before targets are removed; it is a square.
        min_context: Contexts with no more patches than this are drawn again.
        seed: Seed of the random numbers.
        group: Number of consecutive images whose contexts have the same length; the last group may be smaller.

    Returns:
        Indices ``(images, C)`` of the context, of which the first ``(images,)`` count, and indices
        ``(images, targets, P)`` of the patches to predict; both ascending.

    Example:
        >>> contexts, lengths, targets = multi_block(2, (16, 16), 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), 10, seed=0)
        >>> lengths[0] == lengths[1] == contexts.shape[1]
        tensor(True)
        >>> targets.shape[:2]
        torch.Size([2, 4])
        >>> [set(context.tolist()) & set(blocks.flatten().tolist()) for context, blocks in zip(contexts, targets)]
        [set(), set()]
    """
    random = np.random.Generator(np.random.Philox(seed))
    target_size = _block_size(grid, target_scale, target_aspect, random.random())
    context_size = _block_size(grid, context_scale, (1.0, 1.0), random.random())
    blocks = _blocks(grid, target_size, (images, targets), random)
    contexts = np.zeros((images, *grid), dtype=bool)
    small = np.arange(images)
    for avoided in range(targets, -1, -1):
        for _ in range(20):
            covered = blocks[small, :avoided].any(1)
            contexts[small] = _blocks(grid, context_size, (len(small),), random) & ~covered
            small = small[contexts[small].sum((1, 2)) <= min_context]
    counts = np.split(contexts.sum((1, 2)), range(group, images, group))
    lengths = np.concatenate([np.full(len(numbers), numbers.min()) for numbers in counts])
    order = _indices(contexts.reshape(images, -1), lengths.max())
    return order, torch.from_numpy(lengths), _indices(blocks.reshape(images, targets, -1), blocks[0, 0].sum())


def _block_size(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float], share: float
) -> tuple[int, int]:
    """Height and width of a block, smaller than the grid; ``share`` sets where area and aspect lie in their ranges."""
    area = int(grid[0] * grid[1] * (scale[0] + share * (scale[1] - scale[0])))
    ratio = aspect[0] + share * (aspect[1] - aspect[0])
    sides = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return max(1, min(sides[0], grid[0] - 1)), max(1, min(sides[1], grid[1] - 1))


def _blocks(
    grid: tuple[int, int], size: tuple[int, int], shape: tuple[int, ...], random: np.random.Generator
) -> np.ndarray:
    """Masks ``(*shape, rows, columns)``, true inside a block."""
    inside = []
    for side, length in zip(grid, size, strict=True):
        start = random.integers(side - length, size=(*shape, 1))
        inside.append((np.arange(side) >= start) & (np.arange(side) < start + length))
    return inside[0][..., :, None] & inside[1][..., None, :]


def _indices(masks: np.ndarray, count: int) -> Tensor:
    """Indices of the first ``count`` true entries along the last axis."""
    return torch.from_numpy(np.argsort(~masks, axis=-1, kind="stable")[..., :count])


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the visible patches of each image (He et al. 2022, MAE, section 3).

    Args:
        noise: ``(B, N)``; the patches of the smallest values stay visible.
        mask_ratio: Share of patches that are masked; at least one stays visible.

    Returns:
        Indices ``(B, visible)`` of the visible patches, indices ``(B, N)`` that bring visible and masked patches back
        into their order, and the mask ``(B, N)``, 1 where masked.

    Example:
        >>> visible, restore, mask = random_masking(torch.tensor([[0.3, 0.1, 0.9, 0.5, 0.7, 0.2, 0.8, 0.4]]), 0.75)
        >>> visible, mask
        (tensor([[1, 5]]), tensor([[1., 0., 1., 1., 1., 0., 1., 1.]]))
    """
    visible = max(1, int(noise.shape[1] * (1 - mask_ratio)))
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return shuffle[:, :visible], restore, (restore >= visible).to(noise.dtype)


def taken(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens ``(B, M, D)`` at some positions of each image.

    Args:
        tokens: ``(B, N, D)``.
        indices: ``(B, M)`` positions.

    Example:
        >>> taken(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[2, 0]]))
        tensor([[[3.],
                 [1.]]])
    """
    return tokens.gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[2]))
