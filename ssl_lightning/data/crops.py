"""Random crops, made in the workers: each image is decoded once, then cropped and resized for all its views."""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssl_lightning.data.decoding import OpenedImage
from ssl_lightning.data.noise import noisy_square
from ssl_lightning.data.pairs import view_sources
from ssl_lightning.data.randomness import NUMBERS_PER_VIEW, Augmentation, Draws, draw, uniforms
from ssl_lightning.data.resolution import Stages
from ssl_lightning.data.views import ViewSpec
from ssl_lightning.errors import UserError
from ssl_lightning.seeding import generators_put_back


class ViewMaker:
    """Draws the random numbers of all views of a batch, and makes its crops.

    Args:
        specs: The views.
        seed: Seed of all random decisions.
        paired: Whether each image comes with a partner, which other views show.
        stages: The views of each epoch, if their size changes. Nothing else changes with it.

    Attributes:
        sources: ``(V,)`` for each view 0 if it shows the image, 1 if it shows the partner.
    """

    def __init__(
        self, specs: Sequence[ViewSpec], seed: int, paired: bool = False, stages: Stages | None = None
    ) -> None:
        self.specs, self.seed = specs, seed
        self.stages = stages or Stages(tuple(specs))
        self.needs_pixels = any(spec.rand_augment for spec in specs)
        self.sources = view_sources(specs) * paired

    def sizes(self, epoch: int) -> list[int]:
        """Side in pixels of the views of each ViewSpec in an epoch."""
        return [spec.size for spec in self.stages.at(epoch)]

    def image_rows(self, batch_size: int) -> list[NDArray[np.int64]]:
        """For each ViewSpec ``(count * B,)``: which of the B images, followed by their partners, each view shows."""
        rows = self.sources[:, None] * batch_size + np.arange(batch_size)  # (V, B)
        counts = [spec.count for spec in self.specs]
        return [part.ravel() for part in np.split(rows, np.cumsum(counts)[:-1])]

    def draw(
        self, epoch: int, indices: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64]
    ) -> tuple[list[NDArray[np.int64]], list[Augmentation]]:
        """Crop boxes and augmentation of each ViewSpec: first all images of its first view, then of its second, ...

        Args:
            epoch: Epoch.
            indices: ``(B,)`` indices of the images in the data set, which determine the random numbers.
            heights: ``(B,)`` heights of the images in pixels; with partners ``(2B,)``.
            widths: ``(B,)`` or ``(2B,)`` widths of the images in pixels.
        """
        boxes: list[NDArray[np.int64]] = []
        augmentations: list[Augmentation] = []
        view = 0
        for spec, rows in zip(self.specs, self.image_rows(len(indices)), strict=True):
            numbers = uniforms(self.seed, epoch, indices, np.arange(view, view + spec.count), NUMBERS_PER_VIEW)
            flat = numbers.reshape(spec.count * len(indices), NUMBERS_PER_VIEW)
            draws = draw(spec, flat, heights[rows], widths[rows])
            if spec.same_crop_as is not None:
                same = slice(spec.same_crop_as * len(indices), (spec.same_crop_as + spec.count) * len(indices))
                earlier = Augmentation.concatenated(augmentations).select(same)
                draws = Draws(np.concatenate(boxes)[same], draws.augmentation.placed_as(earlier))
            boxes.append(draws.boxes)
            augmentations.append(draws.augmentation)
            view += spec.count
        return boxes, augmentations

    def noisy(
        self, pixels: NDArray[Any], height: int, epoch: int, indices: NDArray[np.int64], number: int
    ) -> NDArray[Any]:
        """An image with its noise, in the epochs that have some.

        Args:
            pixels: ``(rows, W, C)``: the image, or its upper rows.
            height: Height of the image in pixels.
            epoch: Epoch.
            indices: ``(B,)`` indices of the images in the data set, which determine the random numbers.
            number: Its place among the B images, followed by the B partners.
        """
        if not (noise := self.stages.noise_at(epoch)):
            return pixels
        partner, place = divmod(number, len(indices))
        return noisy_square(pixels, height, noise, self.seed, epoch, int(indices[place]), partner)

    def crop(
        self, epoch: int, indices: NDArray[np.int64], images: Sequence[OpenedImage]
    ) -> tuple[list[Tensor], list[Augmentation]]:
        """Crops ``(count * B, C, S, S)`` and augmentation of each ViewSpec. Each image is decoded once.

        Args:
            epoch: Epoch.
            indices: ``(B,)`` indices of the images in the data set, which determine the random numbers.
            images: The B images; with partners followed by the B partners.
        """
        heights, widths = np.array([(image.height, image.width) for image in images]).T
        all_boxes, augmentations = self.draw(epoch, indices, heights, widths)
        views: list[list[tuple[int, int, list[int]]]] = [[] for _ in images]  # of each image: ViewSpec, row, box
        for kind, (boxes, rows) in enumerate(zip(all_boxes, self.image_rows(len(indices)), strict=True)):
            for row, (number, box) in enumerate(zip(rows.tolist(), boxes.tolist(), strict=True)):
                views[number].append((kind, row, box))
        first_views = np.cumsum([0, *(spec.count for spec in self.specs)]).tolist()
        crops: list[Tensor] = []
        specs = self.stages.at(epoch)
        for number, image in enumerate(images):
            bottom = max((top + height for _, _, (top, _, height, _) in views[number]), default=0)
            pixels = image.decode(bottom).permute(1, 2, 0).numpy()  # (rows, W, C)
            pixels = self.noisy(pixels, image.height, epoch, indices, number)
            if not crops:
                channels, dtype = pixels.shape[2], torch.from_numpy(pixels).dtype
                shapes = [
                    (len(boxes), channels, spec.size, spec.size) for spec, boxes in zip(specs, all_boxes, strict=True)
                ]
                crops = [torch.empty(shape, dtype=dtype, memory_format=torch.channels_last) for shape in shapes]
            for kind, row, (top, left, height, width) in views[number]:
                spec, out = specs[kind], crops[kind][row : row + 1]
                crop = pixels[top : top + height, left : left + width]
                resize(crop, (spec.size, spec.size), spec.interpolation, out)
                if spec.rand_augment:
                    view = first_views[kind] + row // len(indices)
                    out[0] = rand_augmented(out[0], spec, self.seed, epoch, int(indices[number]), view)
        return crops, augmentations


def rand_augmented(image: Tensor, spec: ViewSpec, *seed: int) -> Tensor:
    """Apply timm's RandAugment to an image ``(3, S, S)``, as uint8. The result depends only on the image and the seed.

    Args:
        image: The image.
        spec: Its ``rand_augment`` has the settings, its ``mean`` is the color of areas that a rotation leaves empty.
        seed: Numbers that determine the randomness.
    """
    with generators_put_back():
        random.seed(str(seed))
        np.random.seed(random.getrandbits(32))  # noqa: NPY002 # timm draws from both
        pixels = Image.fromarray(image.round().to(torch.uint8).permute(1, 2, 0).numpy())
        return torch.from_numpy(np.array(_rand_augment(spec)(pixels))).permute(2, 0, 1)


@functools.cache
def _rand_augment(spec: ViewSpec) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    fill = tuple(round(255 * mean) for mean in (spec.mean * 3)[:3])
    settings = {"img_mean": fill, "translate_const": int(spec.size * 0.45), "interpolation": Image.Resampling.BICUBIC}
    try:
        transform = rand_augment_transform(spec.rand_augment, settings)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"view: rand_augment={spec.rand_augment!r}: {error}; see timm's documentation.") from error
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):  # may keep 0 bits, which newer versions of Pillow reject
            operation.level_fn = functools.partial(_at_least_one, operation.level_fn)
    return transform


def _at_least_one(level_fn: Any, level: float, settings: dict[str, Any]) -> tuple[int]:
    return (max(1, level_fn(level, settings)[0]),)


def resize(pixels: NDArray[Any], shape: tuple[int, int], interpolation: str, out: Tensor | None = None) -> Tensor:
    """Resize pixels ``(H, W, C)``, uint8 or float32 from 0 to 255, to ``(C, *shape)`` with antialiasing.

    Measured on one core, bicubic, 300x350 to 224x224 px: torch takes 0.45 ms on contiguous channels-last pixels, 0.69
    on a part of a larger image, and 1.4 on channels-first pixels; Pillow takes 2. OpenCV has no antialiased bicubic.

    Args:
        pixels: The pixels.
        shape: Height and width of the result.
        interpolation: ``bilinear`` or ``bicubic``.
        out: Tensor ``(1, C, *shape)`` to write the result to. None makes a new tensor.
    """
    image = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    if out is None:
        out = torch.empty((*image.shape[:2], *shape), dtype=image.dtype, memory_format=torch.channels_last)
    if image.shape == out.shape:
        return out.copy_(image)[0]
    _RESIZES[interpolation](image, shape, False, out=out)  # F.interpolate does the same, but takes no ``out``
    return out.clamp_(0, 255)[0] if out.is_floating_point() else out[0]  # bicubic overshoots; torch clamps only uint8


_RESIZES: dict[str, Callable[..., Tensor]] = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}
