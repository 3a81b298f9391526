"""A look at the views that training sees: a picture and a few numbers."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ssl_lightning.data.base import Loader, SSLDataModule
from ssl_lightning.data.datasets import RawViews, StreamedViews, ViewDataset
from ssl_lightning.data.views import ViewSpec
from ssl_lightning.drawing import CELL, fitted, framed, picture_of, pixels_of, sheet

_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4", "#469990")


class Preview(NamedTuple):
    """What ``preview`` found."""

    sheet: Image.Image
    """One row for each image: the original with its crops outlined, then its views."""
    blank: float
    """Share of views that show nothing: their pixels deviate by less than 0.02, of 1."""
    overlap: float | None
    """Mean intersection over union of the crops of positive pairs: a full-size view and another view of its image."""
    disjoint: float | None
    """Share of those pairs without a common pixel."""
    images_per_second: float
    """How fast this process makes views, reading and augmentation on the CPU included."""

    def __str__(self) -> str:
        lines = [f"blank views                    {self.blank:7.1%}"]
        if self.overlap is not None:
            lines.append(
                f"overlap of positive pairs      {self.overlap:7.1%}  (intersection over union of their crops)"
            )
            lines.append(f"pairs without a common pixel   {self.disjoint:7.1%}")
        return "\n".join([*lines, f"images per second              {self.images_per_second:7.1f}  (one process, CPU)"])


def preview(data: SSLDataModule, num_rows: int = 8, num_images: int = 256) -> Preview:
    """Make the first views of training, exactly as training does.

    Args:
        data: The data module; its ``views`` say which.
        num_rows: Images in the picture.
        num_images: Images that the numbers are about.
    """
    loader, specs = data.train_dataloader(), data.view_specs
    dataset = loader.dataset
    assert isinstance(dataset, ViewDataset | StreamedViews)
    batches, originals = _batches(loader, num_images), _originals(dataset)
    kinds = [spec for spec in specs for _ in range(spec.count)]
    rows: list[list[Image.Image]] = []
    blank: list[bool] = []
    overlaps: list[float] = []
    seconds = 0.0
    while len(blank) < num_images * len(kinds):
        start = time.perf_counter()
        indices, raw = next(batches, (None, None))
        if indices is None or raw is None:
            break
        made = raw.augmented(specs)
        seconds += time.perf_counter() - start
        images = [originals(int(index)) for index in raw.indices]
        heights, widths = np.array([image.shape[1:] for image in images]).T
        boxes = [part.reshape(-1, len(images), 4) for part in dataset.maker.draw(0, indices, heights, widths)[0]]
        for image, crops, *views in zip(images, np.concatenate(boxes, axis=0).swapaxes(0, 1), *made.views, strict=True):
            pixels = [pixels_of(view, spec.mean, spec.std) for view, spec in zip(views, kinds, strict=True)]
            blank += [bool(one.double().std() < 0.02 * 255) for one in pixels]
            own = [view for view, spec in enumerate(kinds) if spec.same_crop_as is None]
            overlaps += _overlaps(crops[own], [kinds[view] for view in own])
            if len(rows) < num_rows:
                rows.append([_outlined(image, crops), *_framed(pixels, kinds)])
    return Preview(
        sheet=sheet(rows, ["original", *(str(number + 1) for number in range(len(kinds)))]),
        blank=float(np.mean(blank)),
        overlap=float(np.mean(overlaps)) if overlaps else None,
        disjoint=float(np.mean(np.array(overlaps) == 0)) if overlaps else None,
        images_per_second=len(blank) / len(kinds) / seconds,
    )


def _batches(loader: Loader, num_images: int) -> Iterator[tuple[NDArray[np.int64], RawViews]]:
    """The first batches of training, cut to so many images, with the indices that their numbers were drawn for."""
    if isinstance(loader.dataset, StreamedViews):
        for raw in loader.dataset:
            yield raw.indices.numpy(), raw
    else:
        for epoch, indices in loader.sampler:
            yield indices[:num_images], loader.dataset[epoch, indices[:num_images]]


def _originals(dataset: ViewDataset | StreamedViews) -> Callable[[int], Tensor]:
    """Gives the original of each image of the batches, asked for in their order."""
    if isinstance(dataset, ViewDataset):
        return dataset.images.read
    stream = dataset.decoded()
    return lambda _: next(stream)[0].decode(0)


def _overlaps(crops: NDArray[np.int64], kinds: Sequence[ViewSpec]) -> list[float]:
    """Intersection over union of each full-size crop with each crop after it."""
    tops, lefts, heights, widths = crops.T
    bottoms, rights = tops + heights, lefts + widths
    found = []
    for one in (view for view, spec in enumerate(kinds) if spec.size == max(one.size for one in kinds)):
        for other in range(one + 1, len(kinds)):
            height = min(bottoms[one], bottoms[other]) - max(tops[one], tops[other])
            width = min(rights[one], rights[other]) - max(lefts[one], lefts[other])
            common = max(0, height) * max(0, width)
            union = heights[one] * widths[one] + heights[other] * widths[other] - common
            found.append(float(common / union))
    return found


def _outlined(image: Tensor, crops: NDArray[np.int64]) -> Image.Image:
    """The original, fitted into a cell, with the outlines of its crops."""
    scale = CELL / max(image.shape[1:])
    picture = fitted(picture_of(image))
    draw = ImageDraw.Draw(picture)
    for view, crop in enumerate(crops):
        top, left, bottom, right = (crop * scale)[[0, 1]].tolist() + ((crop[:2] + crop[2:]) * scale - 1).tolist()
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=_COLORS[view % len(_COLORS)])
    return picture


def _framed(views: Sequence[Tensor], kinds: Sequence[ViewSpec]) -> list[Image.Image]:
    """The views in their relative sizes, framed in the colour of their outlines."""
    largest, cells = max(spec.size for spec in kinds), []
    for pixels, spec, color in zip(views, kinds, itertools.cycle(_COLORS), strict=False):
        side = max(CELL * spec.size // largest, 16)
        cells.append(framed(picture_of(pixels).resize((side, side)), color))
    return cells
