"""Data sets that make whole batches: random crops with their numbers for training, plain images for evaluation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ssl_lightning.data.augment import augment, normalize, resized_crop
from ssl_lightning.data.draw import NUMBERS_PER_VIEW, Augmentation, draw, uniforms
from ssl_lightning.data.images import ImageArray, Images, Unreadable
from ssl_lightning.data.sampler import BatchKey
from ssl_lightning.data.views import ViewSpec


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

    def augmented(self, specs: Sequence[ViewSpec], dtype: torch.dtype = torch.float32) -> Views:
        """Crop if the workers did not, augment in float32, and split into views; on the device where the batch is."""
        views: list[Tensor] = []
        for spec, crops, augmentation in zip(specs, self.crops, self.augmentations, strict=True):
            if self.images is not None:
                images = self.images.repeat(spec.count, 1, 1, 1)
                crops = resized_crop(images, crops, spec.size, spec.interpolation)
            views += augment(crops, augmentation, spec).to(dtype).chunk(spec.count)
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

    def normalized(self, spec: ViewSpec, dtype: torch.dtype = torch.float32) -> "PlainImages":
        """The batch as the backbone wants it, float with the mean and deviation of ``spec``."""
        return self._replace(images=normalize(self.images.float() / 255, spec.mean, spec.std).to(dtype))


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
            boxes_of, augmentations = self._draw(epoch, indices, heights, widths)
            crops = [torch.from_numpy(boxes) for boxes in boxes_of]
            labels = _labels(self.images, indices)
            return RawViews(batch, crops, augmentations, labels, torch.from_numpy(indices), [])

        images, read, unreadable = self._read(indices)
        heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (1, 2))
        boxes_of, augmentations = self._draw(epoch, indices, heights, widths)
        crops = []
        for spec, boxes in zip(self.specs, boxes_of, strict=True):
            pixels = torch.empty(len(boxes), 3, spec.size, spec.size, dtype=torch.uint8)
            for row, (top, left, height, width) in enumerate(boxes.tolist()):
                crop = images[row % len(images)][:, top : top + height, left : left + width]
                pixels[row] = _resize(crop, (spec.size, spec.size), spec.interpolation)
            crops.append(pixels)
        labels = _labels(self.images, read)
        return RawViews(None, crops, augmentations, labels, torch.from_numpy(read), unreadable)

    def _draw(
        self, epoch: int, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[list[np.ndarray], list[Augmentation]]:
        """Boxes and augmentation of each ViewSpec, rows ordered view by view."""
        boxes, augmentations, view = [], [], 0
        for spec in self.specs:
            numbers = uniforms(self.seed, epoch, indices, np.arange(view, view + spec.count), NUMBERS_PER_VIEW)
            flat = numbers.reshape(spec.count * len(indices), NUMBERS_PER_VIEW)
            draws = draw(spec, flat, np.tile(heights, spec.count), np.tile(widths, spec.count))
            boxes.append(draws.boxes)
            augmentations.append(draws.augmentation)
            view += spec.count
        return boxes, augmentations

    def _read(self, indices: np.ndarray) -> tuple[list[Tensor], np.ndarray, list[Unreadable]]:
        """Decode; the next readable image of the data set stands in for one that cannot be read."""
        unreadable: list[Unreadable] = []
        images, read = zip(*(self._first_readable(int(index), unreadable) for index in indices), strict=True)
        return list(images), np.array(read), unreadable

    def _first_readable(self, index: int, unreadable: list[Unreadable]) -> tuple[Tensor, int]:
        for candidate in range(index, index + min(100, len(self.images))):
            candidate %= len(self.images)
            try:
                return self.images.read(candidate), candidate
            except Exception as error:
                unreadable.append(Unreadable.because(self.images.name(candidate), error))
        return torch.zeros(3, 8, 8, dtype=torch.uint8), index  # hopeless: the limit will stop the run


class PlainDataset(Dataset[PlainImages]):
    """Images with the deterministic transform of evaluation: resize, then central crop.

    Args:
        images: Where images come from.
        spec: Gives size and interpolation.
        crop_fraction: Share of the shorter side that the central crop keeps; 0.875 at 224 px is "resize to 256,
            crop 224".
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
            except Exception as error:
                unreadable.append(Unreadable.because(self.images.name(index), error))
        kept = np.array(read, dtype=np.int64)
        return PlainImages(torch.cat(pixels), _labels(self.images, kept), torch.from_numpy(kept), unreadable)

    def _transform(self, image: Tensor) -> Tensor:
        """Resize of the shorter side, then CenterCrop."""
        size = self.spec.size
        short = round(size / self.crop_fraction)
        height, width = image.shape[1:]
        height, width = max(short, short * height // width), max(short, short * width // height)
        image = _resize(image, (height, width), self.spec.interpolation)
        top, left = round((height - size) / 2), round((width - size) / 2)
        return image[:, top : top + size, left : left + size]


def _resize(image: Tensor, shape: tuple[int, int], interpolation: str) -> Tensor:
    """Antialiased resize of a uint8 image ``(3, H, W)``."""
    if image.shape[1:] == shape:
        return image
    return F.interpolate(image[None], shape, mode=interpolation, antialias=True)[0]


def _labels(images: Images, indices: np.ndarray) -> Tensor:
    if images.labels is None:
        return torch.full((len(indices),), -1)
    return torch.from_numpy(images.labels[indices])
