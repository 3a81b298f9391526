"""Data sets that make whole batches: random crops with their numbers for training, plain images for evaluation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ssl_lightning.data.augment import augment, normalize, resized_crop
from ssl_lightning.data.draw import _PER_VIEW, Augmentation, draw, uniforms
from ssl_lightning.data.images import ImageArray, Images
from ssl_lightning.data.sampler import BatchKey
from ssl_lightning.data.views import ViewSpec

_UNREADABLE = (OSError, ValueError, SyntaxError)  # what Pillow raises for broken files


class Unreadable(NamedTuple):
    """An image that could not be read."""

    index: int
    name: str
    reason: str


class Views(NamedTuple):
    """A training batch on the device."""

    views: list[Tensor]
    """One ``(B, 3, S, S)`` float tensor per view, in the order of the ViewSpecs."""
    labels: Tensor
    """``(B,)`` classes; -1 is unknown."""
    indices: Tensor
    """``(B,)`` indices of the images in the data set."""


class RawViews(NamedTuple):
    """A training batch as the workers send it, B images and V views."""

    images: Tensor | None
    """``(B, 3, H, W)`` uint8, where the device crops; else None."""
    crops: list[Tensor]
    """For each ViewSpec ``(count * B, 3, S, S)`` uint8 crops, or ``(count * B, 4)`` boxes where the device crops."""
    augmentations: list[Augmentation]
    """For each ViewSpec what was drawn for its ``count * B`` crops."""
    labels: Tensor
    indices: Tensor
    unreadable: list[Unreadable]

    def augmented(self, specs: Sequence[ViewSpec]) -> Views:
        """Crop if the workers did not, augment, and split into views; on the device where the batch is."""
        views: list[Tensor] = []
        for spec, crops, augmentation in zip(specs, self.crops, self.augmentations, strict=True):
            if self.images is not None:
                images = self.images.repeat(spec.count, 1, 1, 1)
                crops = resized_crop(images, crops, spec.size, spec.interpolation)
            views += augment(crops, augmentation, spec).chunk(spec.count)
        return Views(views, self.labels, self.indices)


class PlainImages(NamedTuple):
    """An evaluation batch: uint8 as the workers send it, float and normalised on the device."""

    images: Tensor
    """``(B, 3, S, S)``."""
    labels: Tensor
    """``(B,)`` classes; -1 is unknown."""
    indices: Tensor
    """``(B,)`` indices of the images in the data set."""
    unreadable: list[Unreadable]

    def normalized(self, spec: ViewSpec) -> "PlainImages":
        """The batch as the backbone wants it, float with the mean and deviation of ``spec``."""
        return self._replace(images=normalize(self.images.float() / 255, spec.mean, spec.std))


class ViewDataset(Dataset[RawViews]):
    """Random crops of images with all their random numbers, a batch at a time.

    Args:
        images: Where images come from.
        specs: The views.
        seed: Seed of all random decisions.
    """

    def __init__(self, images: Images, specs: Sequence[ViewSpec], seed: int) -> None:
        self.images, self.specs, self.seed = images, specs, seed

    def __getitem__(self, key: BatchKey) -> RawViews:
        epoch, indices = key
        if isinstance(self.images, ImageArray):
            batch = self.images.images[torch.from_numpy(indices)]
            heights, widths = (np.full(len(indices), side) for side in batch.shape[-2:])
            crops, augmentations = self._draw(epoch, indices, heights, widths)
            boxes = [torch.from_numpy(boxes) for boxes in crops]
            return RawViews(batch, boxes, augmentations, *self._about(indices, indices), [])

        images, read, unreadable = self._read(indices)
        heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (1, 2))
        boxes_of, augmentations = self._draw(epoch, indices, heights, widths)
        crops_of = []
        for spec, boxes in zip(self.specs, boxes_of, strict=True):
            pixels = torch.empty(len(boxes), 3, spec.size, spec.size, dtype=torch.uint8)
            for row, box in enumerate(boxes):
                pixels[row] = _crop_and_resize(images[row % len(images)], box, spec)
            crops_of.append(pixels)
        return RawViews(None, crops_of, augmentations, *self._about(indices, read), unreadable)

    def _draw(
        self, epoch: int, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[list[np.ndarray], list[Augmentation]]:
        """Boxes and augmentation of each ViewSpec, rows ordered view by view."""
        boxes, augmentations, view = [], [], 0
        for spec in self.specs:
            numbers = uniforms(self.seed, epoch, indices, np.arange(view, view + spec.count), _PER_VIEW)
            flat = numbers.reshape(spec.count * len(indices), _PER_VIEW)
            draws = draw(spec, flat, np.tile(heights, spec.count), np.tile(widths, spec.count))
            boxes.append(draws.boxes)
            augmentations.append(draws.augmentation)
            view += spec.count
        return boxes, augmentations

    def _read(self, indices: np.ndarray) -> tuple[list[Tensor], np.ndarray, list[Unreadable]]:
        """Decode; the next readable image of the data set stands in for one that cannot be read."""
        images, read, unreadable = [], [], []
        for index in indices:
            for candidate in (int(index + step) % len(self.images) for step in range(len(self.images))):
                try:
                    images.append(self.images.read(candidate))
                except _UNREADABLE as error:
                    unreadable.append(Unreadable(candidate, self.images.name(candidate), _reason(error)))
                    if len(unreadable) > 100 + len(indices):  # hopeless: let the limit stop the run
                        images.append(torch.zeros(3, 8, 8, dtype=torch.uint8))
                        read.append(int(index))
                        break
                else:
                    read.append(candidate)
                    break
        return images, np.array(read), unreadable

    def _about(self, indices: np.ndarray, read: np.ndarray) -> tuple[Tensor, Tensor]:
        return _labels(self.images, read), torch.from_numpy(indices)


class PlainDataset(Dataset[PlainImages]):
    """Images with the deterministic transform of evaluation: resize, then central crop.

    Args:
        images: Where images come from.
        spec: Gives size and interpolation.
        crop_fraction: Share of the resized image's shorter side that the central crop keeps; 0.875 at 224 px is
            "resize to 256, crop 224".
    """

    def __init__(self, images: Images, spec: ViewSpec, crop_fraction: float) -> None:
        self.images, self.spec, self.crop_fraction = images, spec, crop_fraction

    def __getitem__(self, key: BatchKey) -> PlainImages:
        _, indices = key
        size = self.spec.size
        pixels, read, unreadable = [torch.empty(0, 3, size, size, dtype=torch.uint8)], [], []
        for index in map(int, indices):
            try:
                pixels.append(self._transform(self.images.read(index))[None])
                read.append(index)
            except _UNREADABLE as error:
                unreadable.append(Unreadable(index, self.images.name(index), _reason(error)))
        kept = np.array(read, dtype=np.int64)
        return PlainImages(torch.cat(pixels), _labels(self.images, kept), torch.from_numpy(kept), unreadable)

    def _transform(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        side = round(min(height, width) * self.crop_fraction)  # crop, then resize: the same pixels, less work
        box = ((height - side) // 2, (width - side) // 2, side, side)
        return _crop_and_resize(image, box, self.spec)


def _crop_and_resize(image: Tensor, box: Sequence[int] | np.ndarray, spec: ViewSpec) -> Tensor:
    top, left, height, width = (int(value) for value in box)
    crop = image[None, :, top : top + height, left : left + width]
    if (height, width) == (spec.size, spec.size):
        return crop[0]
    return F.interpolate(crop, (spec.size, spec.size), mode=spec.interpolation, antialias=True)[0]


def _labels(images: Images, indices: np.ndarray) -> Tensor:
    if images.labels is None:
        return torch.full((len(indices),), -1)
    return torch.from_numpy(images.labels[indices])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
