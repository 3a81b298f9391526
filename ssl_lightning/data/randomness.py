"""The random numbers of a view: a function of (seed, epoch, sample index, view) and nothing else.

A counter-based generator draws them for whole batches. A view therefore does not depend on the number of workers or
processes, on where training was interrupted, or on the device that applies the numbers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_lightning.data.views import ViewSpec

_CROP_TRIES = 10
_TENSORFLOW_TRIES = 100
_SMALLEST_TENSORFLOW_CROP = 0.1
NUMBERS_PER_VIEW = 40
"""22 for the crop, 14 for colors and the horizontal flip, 4 for the vertical flip and turns."""

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)

Array = NDArray[np.floating[Any]]


def philox(counters: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al. 2011), vectorized over counters; numpy's generates only one stream at a time.

    Args:
        counters: ``(4, ...)`` counters of 32 bits.
        key: Key of 64 bits.

    Returns:
        ``(4, ...)`` random integers of 32 bits.
    """
    c0, c1, c2, c3 = counters
    key_0, key_1 = np.uint64(key & 0xFFFFFFFF), np.uint64((key >> 32) & 0xFFFFFFFF)
    for _ in range(10):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ key_0,
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ c3 ^ key_1,
            product_0 & _LOW,
        )
        key_0, key_1 = (key_0 + _WEYL_0) & _LOW, (key_1 + _WEYL_1) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniforms(seed: int, epoch: int, indices: NDArray[np.int64], views: NDArray[np.int64], count: int) -> Array:
    """Uniform numbers in [0, 1), each a function of only (seed, epoch, index, view, position).

    Args:
        seed: Seed of the run.
        epoch: Epoch.
        indices: ``(B,)`` indices of samples in the data set.
        views: ``(V,)`` indices of the views.
        count: How many numbers for each view of each sample.

    Returns:
        ``(V, B, count)``.
    """
    blocks = -(-count // 4)
    shape = (len(views), len(indices), blocks)
    counters = np.empty((4, *shape), dtype=np.uint64)
    counters[0] = np.arange(blocks)
    counters[1] = np.asarray(views)[:, None, None]
    counters[2] = np.asarray(indices)[None, :, None]
    counters[3] = epoch
    numbers = np.moveaxis(philox(counters, seed), 0, -1).reshape(len(views), len(indices), blocks * 4)
    return numbers[..., :count] * 2.0**-32


class Augmentation(NamedTuple):
    """What ``augment`` does to each of N crops of a ViewSpec."""

    flip: NDArray[np.bool_]
    """``(N,)`` whether to flip horizontally."""
    vertical_flip: NDArray[np.bool_]
    """``(N,)`` whether to flip vertically."""
    quarter_turns: NDArray[np.int8]
    """``(N,)`` number of counterclockwise turns by 90 degrees."""
    degrees: NDArray[np.float32]
    """``(N,)`` counterclockwise angle of a rotation; 0 for none."""
    operations: NDArray[np.int8]
    """``(N, 4)`` color operation of each step: 0 brightness, 1 contrast, 2 saturation, 3 hue, -1 none."""
    amounts: NDArray[np.float32]
    """``(N, 4)`` factor of each operation; for hue the shift, as a fraction of the color circle, and for additive
    brightness what to add."""
    grayscale: NDArray[np.bool_]
    """``(N,)`` whether to convert to grayscale."""
    sigmas: NDArray[np.float32]
    """``(N,)`` standard deviation of the blur in pixels; 0 for no blur."""
    solarize: NDArray[np.bool_]
    """``(N,)`` whether to solarize."""

    def select(self, rows: slice) -> "Augmentation":
        """The augmentation of some of the crops."""
        return Augmentation(**{name: values[rows] for name, values in self._asdict().items()})

    def placed_as(self, other: "Augmentation") -> "Augmentation":
        """This augmentation with the flips and turns of another."""
        return self._replace(
            flip=other.flip,
            vertical_flip=other.vertical_flip,
            quarter_turns=other.quarter_turns,
            degrees=other.degrees,
        )

    @classmethod
    def concatenated(cls, parts: Sequence["Augmentation"]) -> "Augmentation":
        """The augmentations of several kinds of views, one after the other."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


class Draws(NamedTuple):
    """All random decisions for N crops of a ViewSpec."""

    boxes: NDArray[np.int64]
    """``(N, 4)`` crops: top, left, height, width in pixels."""
    augmentation: Augmentation


def draw(spec: ViewSpec, numbers: Array, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> Draws:
    """Turn uniform numbers into the random decisions of a ViewSpec.

    Args:
        spec: The view.
        numbers: ``(N, 40)`` uniform numbers, see ``uniforms``.
        heights: ``(N,)`` heights of the images in pixels.
        widths: ``(N,)`` widths of the images in pixels.
    """
    crop, rest = np.split(numbers, [2 * _CROP_TRIES + 2], axis=1)
    return Draws(crop_boxes(spec, crop, heights, widths), _augmentation(spec, rest))


def crop_boxes(
    spec: ViewSpec, numbers: Array, heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Crops distributed as ``torchvision.transforms.RandomResizedCrop.get_params``, or as the view asks.

    Args:
        spec: Its ``scale``, ``ratio``, ``single_draw`` and ``tensorflow_crop`` apply.
        numbers: ``(N, 22)`` uniform numbers: ten areas, ten ratios, top, left.
        heights: ``(N,)`` heights of the images in pixels.
        widths: ``(N,)`` widths of the images in pixels.

    Returns:
        ``(N, 4)``: top, left, height, width in pixels.
    """
    if spec.tensorflow_crop:
        return _tensorflow_boxes(spec, numbers, heights, widths)
    areas = (heights * widths)[:, None] * _between(numbers[:, :_CROP_TRIES], *spec.scale)
    ratios = np.exp(_between(numbers[:, _CROP_TRIES : 2 * _CROP_TRIES], *np.log(spec.ratio)))
    tried_widths, tried_heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (
        (tried_widths > 0)
        & (tried_widths <= widths[:, None])
        & (tried_heights > 0)
        & (tried_heights <= heights[:, None])
    )
    if spec.single_draw:
        box_widths = np.clip(tried_widths[:, 0], 1, widths)
        box_heights = np.clip(tried_heights[:, 0], 1, heights)
        central = np.full(len(numbers), False)
    else:
        rows, first = np.arange(len(numbers)), fits.argmax(axis=1)
        central = np.logical_not(fits.any(axis=1))  # no try fits: take the largest central crop whose ratio is allowed
        low, high = spec.ratio
        image_ratios = widths / heights
        central_widths = np.where(image_ratios > high, np.rint(heights * high), widths)
        central_heights = np.where(image_ratios < low, np.rint(widths / low), heights)
        box_widths = np.where(central, central_widths, tried_widths[rows, first])
        box_heights = np.where(central, central_heights, tried_heights[rows, first])
    free_heights, free_widths = heights - box_heights, widths - box_widths
    top = np.where(central, free_heights // 2, np.floor(numbers[:, -2] * (free_heights + 1)))
    left = np.where(central, free_widths // 2, np.floor(numbers[:, -1] * (free_widths + 1)))
    return np.stack([top, left, box_heights, box_widths], axis=1).astype(np.int64)


def _tensorflow_boxes(
    spec: ViewSpec, numbers: Array, heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Crops distributed as TensorFlow's ``sample_distorted_bounding_box``; for the arguments see ``crop_boxes``."""
    sizes = _first_tensorflow_size(spec, numbers[:, : 2 * _CROP_TRIES], heights, widths)
    if len(late := np.flatnonzero(sizes[:, 0] == 0)):  # hardly ever, unless the image is long and narrow
        further = _further_uniforms(numbers[late], 2 * (_TENSORFLOW_TRIES - _CROP_TRIES))
        sizes[late] = _first_tensorflow_size(spec, further, heights[late], widths[late])
    images = np.stack([heights, widths], axis=1)
    sizes = np.where(sizes == 0, images, sizes)
    corners = np.floor(numbers[:, -2:] * (images - sizes))  # below the bound, so that the last place is left out
    return np.concatenate([corners, sizes], axis=1).astype(np.int64)


def _first_tensorflow_size(
    spec: ViewSpec, numbers: Array, heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> Array:
    """Height and width ``(N, 2)`` of the first attempt that fits, or zeros; half the numbers are ratios."""
    shares, numbers = np.split(numbers, 2, axis=1)
    height, width = heights[:, None], widths[:, None]
    image, ratios = height * width, _between(numbers, *spec.ratio)
    smallest, largest = (share * image for share in spec.scale)
    lowest, highest = np.rint(np.sqrt(smallest / ratios)), np.rint(np.sqrt(largest / ratios))
    highest = np.where(np.rint(highest * ratios) > width, np.floor((width + 0.5) / ratios), highest)
    highest = np.minimum(highest - (np.rint(highest * ratios) > width), height)
    lowest = np.minimum(lowest, highest)
    tried = lowest + np.floor(shares * (highest - lowest + 1))
    tried += tried * np.rint(tried * ratios) < smallest  # what rounding has moved out of the range
    tried -= tried * np.rint(tried * ratios) > largest
    tried_widths = np.rint(tried * ratios)
    areas = tried * tried_widths
    fits = (tried <= height) & (tried_widths <= width) & (areas >= smallest) & (areas <= largest)
    fits &= areas >= np.maximum(1, _SMALLEST_TENSORFLOW_CROP * image)
    rows, first = np.arange(len(fits)), fits.argmax(axis=1)
    return np.stack([tried, tried_widths], axis=2)[rows, first] * fits[rows, first, None]


def _further_uniforms(numbers: Array, count: int) -> Array:
    """Uniform numbers ``(N, count)`` that follow from each row's first three."""
    counters = np.empty((4, len(numbers), -(-count // 4)), dtype=np.uint64)
    counters[0] = np.arange(counters.shape[2])
    counters[1:] = (numbers[:, :3].T * 2.0**32)[..., None]
    return np.moveaxis(philox(counters, 0), 0, -1).reshape(len(numbers), -1)[:, :count] * 2.0**-32


def _augmentation(spec: ViewSpec, numbers: Array) -> Augmentation:
    flip, jitter, grayscale, blur, sigma, solarize = numbers[:, :6].T
    strengths, order = numbers[:, 6:10], numbers[:, 10:14]
    vertical_flip, quarter_turn, rotation, angle = numbers[:, 14:18].T

    strongest = np.array([spec.brightness, spec.contrast, spec.saturation, spec.hue])
    factors = _between(strengths[:, :3], np.maximum(0, 1 - strongest[:3]), 1 + strongest[:3])
    if spec.additive_brightness:
        factors[:, 0] = _between(strengths[:, 0], -spec.brightness, spec.brightness)
    turns = _between(strengths[:, 3:], -spec.hue, spec.hue)
    operations = order.argsort(axis=1)  # (N, 4): a random permutation
    amounts = np.take_along_axis(np.concatenate([factors, turns], axis=1), operations, axis=1)
    changes = (jitter < spec.jitter)[:, None] & (strongest > 0)[operations]
    return Augmentation(
        flip=flip < spec.flip,
        vertical_flip=vertical_flip < spec.vertical_flip,
        quarter_turns=np.where(  # a number below the probability is uniform there
            quarter_turn < spec.quarter_turn, 1 + np.floor(3 * quarter_turn / (spec.quarter_turn or 1)), 0
        ).astype(np.int8),
        degrees=np.where(rotation < spec.rotation, _between(angle, *spec.rotation_degrees), 0).astype(np.float32),
        operations=np.where(changes, operations, -1).astype(np.int8),
        amounts=amounts.astype(np.float32),
        grayscale=grayscale < spec.grayscale,
        sigmas=np.where(blur < spec.blur, _between(sigma, *spec.blur_sigma), 0).astype(np.float32),
        solarize=solarize < spec.solarize,
    )


def _between(numbers: Array, low: Array | float, high: Array | float) -> Array:
    return low + (high - low) * numbers
