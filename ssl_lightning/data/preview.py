"""The training views as a picture and a few numbers."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ssl_lightning.data.batches import RawViews
from ssl_lightning.data.crops import ViewMaker
from ssl_lightning.data.datasets import StreamedViews, ViewDataset
from ssl_lightning.data.loader import Loader
from ssl_lightning.data.transforms import OwnViewMaker
from ssl_lightning.data.views import ViewSpec
from ssl_lightning.drawing import CELL, are_blank, fitted, framed, picture_of, pixels_of, sheet

_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4", "#469990")


class Preview(NamedTuple):
    """A picture of training views, and numbers about them."""

    sheet: Image.Image
    """A row for each image: the original with its crops outlined, its partner if it has one, then its views."""
    blank: float
    """Fraction of views that show nothing: the pixels of each channel, from 0 to 1, deviate by less than 0.02."""
    overlap: float | None
    """Mean intersection over union of the crops of positive pairs: a full-size view and another view of its image."""
    disjoint: float | None
    """Fraction of positive pairs without a common pixel."""
    images_per_second: float
    """How many images this process reads and augments per second, all on the CPU."""

    def __str__(self) -> str:
        lines = [f"blank views                    {self.blank:7.1%}"]
        if self.overlap is not None:
            lines.append(
                f"overlap of positive pairs      {self.overlap:7.1%}  (intersection over union of their crops)"
            )
            lines.append(f"pairs without a common pixel   {self.disjoint:7.1%}")
        return "\n".join([*lines, f"images per second              {self.images_per_second:7.1f}  (one process, CPU)"])


def preview(loader: Loader, specs: Sequence[ViewSpec], num_rows: int = 8, num_images: int = 256) -> Preview:
    """Make the first training views exactly as training does.

    Args:
        loader: Batches of training views.
        specs: The views.
        num_rows: Images in the picture.
        num_images: Images to compute the numbers on.
    """
    dataset = loader.dataset
    assert isinstance(dataset, ViewDataset | StreamedViews)
    batches, read_original = _batches(loader, num_images), _originals(dataset)
    sources = dataset.maker.sources
    columns = ["original", "partner"] if sources.any() else ["original"]
    view_specs = [spec for spec in specs for _ in range(spec.count)]
    rows: list[list[Image.Image]] = []
    blank: list[bool] = []
    overlaps: list[float] = []
    seconds = 0.0
    while len(blank) < num_images * len(view_specs):
        start = time.perf_counter()
        indices, raw = next(batches, (None, None))
        if indices is None or raw is None:
            break
        augmented = raw.augmented(specs)
        seconds += time.perf_counter() - start
        images = [read_original(int(index)) for index in raw.indices]
        partners = _partners(dataset, indices, raw, images)
        all_crops = _crops(dataset.maker, indices, [*images, *partners])
        for batch_of_views, spec in zip(augmented.views, view_specs, strict=True):
            blank += are_blank(batch_of_views, spec.std).tolist()
        for number, views in enumerate(zip(*augmented.views, strict=True)):
            shown, crops = [images[number], *partners[number : number + 1]], all_crops[:, number]  # (V, 4)
            pixels = [pixels_of(view, spec.mean, spec.std) for view, spec in zip(views, view_specs, strict=True)]
            for source in range(len(shown)):
                own = [
                    view
                    for view in range(len(crops))
                    if sources[view] == source and view_specs[view].same_crop_as is None
                ]
                overlaps += _overlaps(crops[own], [view_specs[view] for view in own])
            if len(rows) < num_rows:
                outlined = [
                    _outlined(image, [(view, crop) for view, crop in enumerate(crops) if sources[view] == source])
                    for source, image in enumerate(shown)
                ]
                rows.append([*outlined, *_framed(pixels, view_specs)])
    return Preview(
        sheet=sheet(rows, [*columns, *(str(number + 1) for number in range(len(view_specs)))]),
        blank=float(np.mean(blank)),
        overlap=float(np.mean(overlaps)) if overlaps else None,
        disjoint=float(np.mean(np.array(overlaps) == 0)) if overlaps else None,
        images_per_second=len(blank) / len(view_specs) / seconds,
    )


def _batches(loader: Loader, num_images: int) -> Iterator[tuple[NDArray[np.int64], RawViews]]:
    """The first batches of training, cut to ``num_images``, each with the indices that its numbers were drawn for."""
    if isinstance(loader.dataset, StreamedViews):
        for raw in loader.dataset:
            yield raw.indices.numpy(), raw
    else:
        for epoch, indices in loader.sampler:
            yield indices[:num_images], loader.dataset[epoch, indices[:num_images]]


def _originals(dataset: ViewDataset | StreamedViews) -> Callable[[int], Tensor]:
    """A function that returns the original of an image; call it for the images of the batches in their order."""
    if isinstance(dataset, ViewDataset):
        return lambda index: (image := dataset.first_readable(index, True, [])[0]).decode(image.height)
    stream = dataset.decoded()
    return lambda _: next(stream)[0].decode(0)


def _partners(
    dataset: ViewDataset | StreamedViews, indices: NDArray[np.int64], raw: RawViews, images: Sequence[Tensor]
) -> list[Tensor]:
    """The originals of the partners of a batch; an image stands for a partner that is unreadable."""
    if not isinstance(dataset, ViewDataset) or not dataset.paired:
        return []
    numbers = dataset.partners(0, indices, raw.indices.numpy())
    opened = [dataset.readable(number, True, []) for number in numbers]
    return [
        image if partner is None else partner.decode(partner.height)
        for image, partner in zip(images, opened, strict=True)
    ]


def _crops(maker: ViewMaker | OwnViewMaker, indices: NDArray[np.int64], images: Sequence[Tensor]) -> NDArray[np.int64]:
    """The crop of each view of a batch, ``(V, B, 4)``; no views if a transform of one's own makes them."""
    if isinstance(maker, OwnViewMaker):
        return np.empty((0, len(indices), 4), np.int64)
    heights, widths = np.array([image.shape[1:] for image in images]).T
    return np.concatenate(maker.draw(0, indices, heights, widths)[0]).reshape(-1, len(indices), 4)


def _overlaps(crops: NDArray[np.int64], specs: Sequence[ViewSpec]) -> list[float]:
    """Intersection over union of each full-size crop with each later crop."""
    tops, lefts, heights, widths = crops.T
    bottoms, rights = tops + heights, lefts + widths
    full_size = max((spec.size for spec in specs), default=0)
    overlaps = []
    for first in (view for view, spec in enumerate(specs) if spec.size == full_size):
        for second in range(first + 1, len(specs)):
            height = min(bottoms[first], bottoms[second]) - max(tops[first], tops[second])
            width = min(rights[first], rights[second]) - max(lefts[first], lefts[second])
            intersection = max(0, height) * max(0, width)
            union = heights[first] * widths[first] + heights[second] * widths[second] - intersection
            overlaps.append(float(intersection / union))
    return overlaps


def _outlined(image: Tensor, crops: Sequence[tuple[int, NDArray[np.int64]]]) -> Image.Image:
    """The original, fitted into a cell, with the outlines of its crops, each with the number of its view."""
    scale = CELL / max(image.shape[1:])
    picture = fitted(picture_of(image))
    canvas = ImageDraw.Draw(picture)
    for view, crop in crops:
        top, left, bottom, right = (crop * scale)[[0, 1]].tolist() + ((crop[:2] + crop[2:]) * scale - 1).tolist()
        canvas.rectangle((left, top, max(left, right), max(top, bottom)), outline=_COLORS[view % len(_COLORS)])
    return picture


def _framed(views: Sequence[Tensor], specs: Sequence[ViewSpec]) -> list[Image.Image]:
    """The views in their relative sizes, framed in the colors of their outlines."""
    largest, cells = max(spec.size for spec in specs), []
    for pixels, spec, color in zip(views, specs, itertools.cycle(_COLORS), strict=False):
        side = max(CELL * spec.size // largest, 16)
        cells.append(framed(picture_of(pixels).resize((side, side)), color))
    return cells
