"""Random masks over grids of patches."""

import math

import numpy as np
import torch
from torch import Tensor


def block_mask(grid: tuple[int, int], count: int, smallest: int, largest: int, seed: int) -> Tensor:
    """Mask rectangles of patches until enough are masked.

    Bao et al. 2022, BEiT, algorithm 1; iBOT and DINOv2 have it with other sizes. A few less than ``count`` where ten
    rectangles in a row do not fit.

    Args:
        grid: Rows and columns of patches.
        count: Patches to mask.
        smallest: Smallest area of a rectangle.
        largest: Largest area of a rectangle.
        seed: Of the random numbers.

    Returns:
        ``(rows, columns)`` bool, true where masked.
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
