"""Batches: training views and plain images, as the workers send them and as the method gets them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_lightning.data.augment import augment, chunks, normalize, resized_crop
from ssl_lightning.data.images import Unreadable
from ssl_lightning.data.randomness import Augmentation
from ssl_lightning.data.views import ViewSpec, with_side


class Views(NamedTuple):
    """A training batch on the device."""

    views: list[Tensor]
    """A float tensor ``(B, C, S, S)`` for each view, in the order of the ViewSpecs."""
    labels: Tensor
    """``(B,)`` classes; -1 is unknown."""
    indices: Tensor
    """``(B,)`` indices of the images in the data set."""


class RawViews(NamedTuple):
    """A training batch of B images as the workers send it, before augmentation."""

    images: Tensor | None
    """``(B, C, H, W)`` if the device crops, else None: uint8, or float32 from 0 to 255; with partners ``(2B, ...)``."""
    crops: list[Tensor]
    """For each ViewSpec ``(count * B, C, S, S)`` crops of that dtype; if the device crops, ``(count * B, 5)``: which of
    the images, top, left, height, width."""
    augmentations: list[Augmentation]
    """For each ViewSpec the random numbers of its ``count * B`` crops; empty if the crops are finished views."""
    labels: Tensor
    """``(B,)`` classes; -1 is unknown."""
    indices: Tensor
    """``(B,)`` indices of the images in the data set."""
    unreadable: list[Unreadable]
    """Images that could not be read, and that others replace."""
    sizes: list[int]
    """For each ViewSpec the side in pixels of its views, which may be smaller than the spec says."""

    def to(self, device: torch.device) -> "RawViews":
        """The batch with its tensors on a device. The random numbers stay on the host until they are used."""
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        crops = [crop.to(device, non_blocking=True) for crop in self.crops]
        labels, indices = self.labels.to(device, non_blocking=True), self.indices.to(device, non_blocking=True)
        return self._replace(images=images, crops=crops, labels=labels, indices=indices)

    def augmented(self, specs: Sequence[ViewSpec], dtype: torch.dtype = torch.float32) -> Views:
        """Crop if the workers did not, augment in float32, and split into views, on the device that holds the batch."""
        views: list[Tensor] = []
        specs = [
            spec if spec.size == size else with_side(spec, size) for spec, size in zip(specs, self.sizes, strict=True)
        ]
        if not self.augmentations:  # a transform of one's own made them; it may leave the normalization to us
            for spec, crops in zip(specs, self.crops, strict=True):
                finished = normalize(crops.float() / 255, spec) if crops.dtype == torch.uint8 else crops
                views += finished.to(dtype).chunk(spec.count)
            return Views(views, self.labels, self.indices)
        for spec, crops, numbers in zip(specs, self.crops, self.augmentations, strict=True):
            channels = (crops if self.images is None else self.images).shape[1]
            augmented = torch.empty(len(crops), channels, spec.size, spec.size, device=crops.device)
            if self.images is None:
                augment(crops, numbers, spec, out=augmented)
                views += augmented.to(dtype).chunk(spec.count)
                continue
            for rows in chunks(augmented):
                images, boxes = self.images.index_select(0, crops[rows, 0]), crops[rows, 1:]
                chunk = resized_crop(images, boxes, spec.size, spec.interpolation)
                augment(chunk, numbers.select(rows), spec, out=augmented[rows])
            views += augmented.to(dtype).chunk(spec.count)
        return Views(views, self.labels, self.indices)


class PlainImages(NamedTuple):
    """An evaluation batch: values from 0 to 255 as the workers send it, float and normalized on the device."""

    images: Tensor
    """``(B, C, S, S)``."""
    labels: Tensor
    """``(B,)`` classes; -1 is unknown."""
    indices: Tensor
    """``(B,)`` indices of the images in the data set."""
    unreadable: list[Unreadable]
    """Images that could not be read, and that are missing here."""

    def normalized(self, spec: ViewSpec, dtype: torch.dtype = torch.float32) -> "PlainImages":
        """The batch as the backbone expects it: float, with the mean and standard deviation of ``spec``."""
        return self._replace(images=normalize(self.images.float() / 255, spec).to(dtype))
