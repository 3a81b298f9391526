"""Where images come from: files that are decoded when needed, or one array in memory."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ssl_lightning.errors import UserError

Labels = NDArray[np.int64]


class Unreadable(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str

    @classmethod
    def because(cls, name: str, error: Exception) -> "Unreadable":
        """The image of that name, and what reading it raised."""
        return cls(name, f"{type(error).__name__}: {error}")


class ImageFiles:
    """Image files, decoded one at a time.

    Args:
        paths: The files.
        labels: Class of each file; -1 or None is unknown.
    """

    def __init__(self, paths: Iterable[Path | bytes], labels: Labels | None = None) -> None:
        self.paths = np.array([os.fsencode(path) for path in paths])  # one block of memory, shared with the workers
        self.labels = _checked(labels, len(self))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """What to call an image in a message: its path."""
        return os.fsdecode(self.paths[index])

    def read(self, index: int) -> Tensor:
        """Decode one image to uint8 RGB ``(3, H, W)``, laid out channels last.

        Raises:
            Exception: The file is missing, truncated or no image.
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
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            kind = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise UserError(f"ImageArray wants uint8 images of shape (N, 3, H, W), not {kind}; convert them.")
        self.labels = _checked(labels, len(self))

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
    def from_files(cls, files: ImageFiles) -> "tuple[ImageArray, list[Unreadable]]":
        """Decode all files into memory, and list those that cannot be read.

        Raises:
            UserError: Two images differ in size, or none can be read.
        """
        images: list[Tensor] = []
        read: list[int] = []
        unreadable: list[Unreadable] = []
        for index in range(len(files)):
            try:
                image = files.read(index)
            except Exception as error:
                unreadable.append(Unreadable.because(files.name(index), error))
                continue
            if images and image.shape != images[0].shape:
                raise UserError(
                    f"data.in_memory needs images of one size, but {files.name(index)} is {_size(image)} px and "
                    f"{files.name(read[0])} {_size(images[0])} px; leave it off."
                )
            images.append(image)
            read.append(index)
        if not images:
            raise UserError(f"none of {len(files)} files could be read as an image, e.g. {': '.join(unreadable[0])}")
        return cls(torch.stack(images), None if files.labels is None else files.labels[read]), unreadable


Images = ImageFiles | ImageArray


def _checked(labels: Labels | None, count: int) -> Labels | None:
    if labels is None:
        return None
    labels = np.asarray(labels, dtype=np.int64)
    if labels.shape != (count,):
        raise UserError(f"{count} images need labels of shape ({count},), not {labels.shape}.")
    return labels


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
        Exception: The file is missing, truncated or no image; which one depends on its format.
    """
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # Pillow clips 16-bit gray when it converts
            wide = np.asarray(image).astype(np.float64)
            image = Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8))
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
