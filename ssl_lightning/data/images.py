"""Where images come from: files that are decoded when needed, or one array in memory."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

Labels = NDArray[np.int64]


class ImageFiles:
    """Image files, decoded one at a time.

    Args:
        paths: The files.
        labels: Class of each file; -1 or None is unknown.
    """

    def __init__(self, paths: Sequence[Path | bytes], labels: Labels | None = None) -> None:
        self.paths = np.array([os.fsencode(path) for path in paths])  # one block of memory, shared with the workers
        self.labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """What to call an image in a message: its path."""
        return os.fsdecode(self.paths[index])

    def read(self, index: int) -> Tensor:
        """Decode one image to uint8 RGB ``(3, H, W)``, laid out channels last.

        Raises:
            OSError, ValueError, SyntaxError: The file is missing, truncated or no image.
        """
        return decode(self.name(index))

    def subset(self, indices: NDArray[np.int64]) -> "ImageFiles":
        """Some of the images."""
        return ImageFiles(self.paths[indices], None if self.labels is None else self.labels[indices])


class ImageArray:
    """Images of one size held in memory.

    Args:
        images: ``(N, 3, H, W)``, uint8.
        labels: ``(N,)`` class of each image; -1 or None is unknown.
    """

    def __init__(self, images: NDArray[np.uint8] | Tensor, labels: Labels | None = None) -> None:
        self.images = torch.as_tensor(images)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """What to call an image in a message: its number."""
        return f"image {index}"

    def read(self, index: int) -> Tensor:
        """One image, uint8 RGB ``(3, H, W)``."""
        return self.images[index]

    def subset(self, indices: NDArray[np.int64]) -> "ImageArray":
        """Some of the images."""
        return ImageArray(self.images[indices], None if self.labels is None else self.labels[indices])

    @classmethod
    def from_files(cls, files: ImageFiles) -> "ImageArray":
        """Decode all files, which must be of one size, into memory.

        Raises:
            ValueError: Two images differ in size.
        """
        first = files.read(0)
        images = torch.empty(len(files), *first.shape, dtype=torch.uint8)
        for index in range(len(files)):
            image = files.read(index)
            if image.shape != first.shape:
                raise ValueError(f"{files.name(index)} is {_size(image)} px, {files.name(0)} {_size(first)} px")
            images[index] = image
        return cls(images, files.labels)


Images = ImageFiles | ImageArray


def _size(image: Tensor) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"


def decode(path: str | Path) -> Tensor:
    """Read an image file of any mode Pillow knows as RGB, upright by its EXIF tag.

    Palette, CMYK and transparent images are converted, transparency dropped; 16-bit gray is scaled to 8 bits.

    Args:
        path: The file.

    Returns:
        uint8 ``(3, H, W)``, laid out channels last, as the resize wants it.

    Raises:
        OSError, ValueError, SyntaxError: The file is missing, truncated or no image.
    """
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # Pillow clips 16-bit gray when it converts
            wide = np.asarray(image).astype(np.float64)
            image = Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8))
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
