"""Noise on a part of an image, before its views are cropped."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def noisy_square(pixels: NDArray[Any], height: int, largest: float, *place: int) -> NDArray[Any]:
    """A copy of an image with Gaussian noise on a random square (FastDINOv2's released code).

    Args:
        pixels: ``(rows, W, C)`` uint8, or float32 from 0 to 255: the image, or its upper rows.
        height: Height of the image in pixels.
        largest: Largest standard deviation of the noise, where white is 1; each image draws its own below.
        place: Seed, epoch, index of the image, and 1 for a partner or 0: they determine the noise.
    """
    seed, epoch, index, partner = place
    # partners take their numbers from the counters [0, 0, n, 1]
    random = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, index, 2 + partner]))
    width, channels = pixels.shape[1:]
    side = int(random.integers(1, min(height, width) + 1))
    top, left = int(random.integers(height - side + 1)), int(random.integers(width - side + 1))
    scale = 255 * largest * random.random()
    noise = scale * random.standard_normal((side, side, channels), dtype=np.float32)
    pixels = pixels.copy(order="K")  # an image in memory stays as it is
    square = pixels[top : top + side, left : left + side]
    changed = np.clip(square + noise[: len(square)], 0, 255)
    square[:] = np.rint(changed) if pixels.dtype == np.uint8 else changed
    return pixels
