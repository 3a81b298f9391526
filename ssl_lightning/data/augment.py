"""Batched augmentation on the device: the operations of torchvision, each image with its own random numbers."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.data.randomness import Augmentation
from ssl_lightning.data.views import ViewSpec

_LUMA = (0.2989, 0.587, 0.114)


def augment(images: Tensor, numbers: Augmentation, spec: ViewSpec, out: Tensor | None = None) -> Tensor:
    """Apply all operations of a view after the crop, in the papers' order.

    Args:
        images: ``(N, C, S, S)``, uint8, or float from 0 to 255.
        numbers: The random numbers of these N images.
        spec: The view.
        out: Tensor to write the result to. None makes a new tensor.

    Returns:
        ``(N, C, S, S)``, float32, normalized.
    """
    if out is None:
        out = torch.empty(images.shape, device=images.device)
    if images.device.type == "cpu" and images[:1].numel() > _LARGE:
        for row, (flipped, steps) in enumerate(_steps_of_each(numbers, spec)):
            image, result = images[row : row + 1], out[row : row + 1]
            x = result.copy_(image.flip(flipped) if flipped else image).div_(255)  # (1, C, S, S) in [0, 1]
            for operation, arguments in steps:
                x = operation(x, *arguments)
            _normalize_into(result, x, spec)
        return out
    for rows in chunks(images):
        chunk = numbers.select(rows)
        x = out[rows].copy_(images[rows]).div_(255)  # (N, C, S, S) in [0, 1]
        for operation, chosen, amounts in _steps(chunk, spec, images.device):
            if len(chosen) == len(x):
                x = operation(x, *amounts)
            else:
                x.index_copy_(0, chosen, operation(x.index_select(0, chosen), *amounts))
        _normalize_into(out[rows], x, spec)
    return out


_LARGE = 2**16
"""Number of values from which on the CPU augments an image separately."""
_CPU_CHUNK = 2**20
"""Values of small images that the CPU augments together."""


def chunks(images: Tensor) -> list[slice]:
    """Which images to augment together: all of them on a GPU, on the CPU only as many as fit into its cache.

    Measured on the CPU: images of 224 px are 1.4 times as fast separately as six at a time. Images of 96 px and less
    are faster together, because they share the overhead of each operation.

    Args:
        images: ``(N, C, S, S)``.
    """
    length = len(images)
    if images.device.type == "cpu":
        values = images[:1].numel()
        length = 1 if values > _LARGE else _CPU_CHUNK // values
    return [slice(start, start + length) for start in range(0, len(images), length)]


def _normalize_into(out: Tensor, x: Tensor, spec: ViewSpec) -> None:
    """Write ``x``, which may share memory with ``out``, normalized to ``out``."""
    if any(spec.mean):  # SimCLR's is 0, and its standard deviation 1
        x.sub_(_channels(spec.mean, x.device))
    if any(std != 1 for std in spec.std):
        torch.mul(x, _scale(spec, x.device), out=out)
    elif x.data_ptr() != out.data_ptr():
        out.copy_(x)


def _steps_of_each(
    numbers: Augmentation, spec: ViewSpec
) -> Iterator[tuple[list[int], list[tuple[Callable[..., Tensor], tuple[Any, ...]]]]]:
    """For each image the axes to flip, and the operations that follow with their arguments, in order.

    What is done for all images together costs little: on a single image, a tensor of a few numbers takes as long as
    a pass over its pixels.
    """
    weights = _blur_weights(torch.from_numpy(numbers.sigmas), spec.blur_kernel) if numbers.sigmas.any() else None
    columns, colors = [values.tolist() for values in numbers], _color_operations(spec)
    for row, (flips, flips_vertically, turns, degrees, operations, amounts, grays, sigma, solarizes) in enumerate(
        zip(*columns, strict=True)
    ):
        jitter = [(colors[which], (amount,)) for which, amount in zip(operations, amounts, strict=True) if which >= 0]
        gray = [(grayscale, ())] * grays
        steps: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = []
        if turns:
            steps.append((quarter_turn, (turns,)))
        if degrees:
            steps.append((rotate, (torch.tensor([degrees]),)))
        steps += gray + jitter if spec.grayscale_first else jitter + gray
        if weights is not None and sigma > 0:
            steps.append((_convolved, (weights[row : row + 1], _reach(spec.blur_kernel, sigma))))
        if solarizes:
            steps.append((solarize, (spec.solarize_threshold / 255,)))
        yield [-1] * flips + [-2] * flips_vertically, steps


_Drawn = tuple[Callable[..., Tensor], NDArray[np.bool_], list[NDArray[np.float32]]]
"""An operation, ``(N,)`` whether to apply it to each image, and ``(N,)`` its strength if it has a random one."""


def _steps(
    numbers: Augmentation, spec: ViewSpec, device: torch.device
) -> Iterator[tuple[Callable[..., Tensor], Tensor, list[Tensor]]]:
    """The operations of a view in order, each with the rows it applies to and its strengths if they are random."""
    blurring = functools.partial(blur, kernel=spec.blur_kernel, widest=float(numbers.sigmas.max(initial=0)))
    solarizing = functools.partial(solarize, threshold=spec.solarize_threshold / 255)
    colors = _color_operations(spec)
    gray: list[_Drawn] = [(grayscale, numbers.grayscale, [])]
    jitter: list[_Drawn] = [
        (colors[operation], numbers.operations[:, step] == operation, [amounts])
        for step, amounts in enumerate(numbers.amounts.T)
        for operation in set(numbers.operations[:, step].tolist()) - {-1}
    ]
    drawn: list[_Drawn] = [
        (flip, numbers.flip, []),
        (vertical_flip, numbers.vertical_flip, []),
        *((functools.partial(quarter_turn, turns=turns), numbers.quarter_turns == turns, []) for turns in (1, 2, 3)),
        (rotate, numbers.degrees != 0, [numbers.degrees]),
        *(gray + jitter if spec.grayscale_first else jitter + gray),
        (blurring, numbers.sigmas > 0, [numbers.sigmas]),
        (solarizing, numbers.solarize, []),
    ]
    for operation, where, amounts in drawn:
        rows = where.nonzero()[0]
        if len(rows):
            yield operation, _to_device(rows, device), [_to_device(amount[rows], device) for amount in amounts]


def _to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on the device, copied without waiting for it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# Operations work in place where they can, and return the result.


def flip(images: Tensor) -> Tensor:
    """Flip ``(N, C, H, W)`` images horizontally."""
    return images.flip(-1)


def vertical_flip(images: Tensor) -> Tensor:
    """Flip ``(N, C, H, W)`` images vertically."""
    return images.flip(-2)


def quarter_turn(images: Tensor, turns: int) -> Tensor:
    """Turn square ``(N, C, S, S)`` images counterclockwise by 90 degrees, ``turns`` times."""
    return images.rot90(turns, (-2, -1))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate ``(N, C, H, W)`` images counterclockwise around their centers, bilinear, with black outside.

    Args:
        images: The images.
        degrees: ``(N,)`` angles.
    """
    height, width = images.shape[-2:]
    y, x = (torch.arange(side, device=images.device) + (0.5 - side / 2) for side in (height, width))
    y, x = y[:, None], x[None]
    radians = torch.deg2rad(degrees).view(-1, 1, 1)
    cosines, sines = radians.cos(), radians.sin()
    columns, rows = cosines * x - sines * y, sines * x + cosines * y  # (N, H, W) where to read, in pixels
    grid = torch.stack([columns / (width / 2), rows / (height / 2)], -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def brightness(images: Tensor, factors: Tensor | float) -> Tensor:
    """Blend ``(N, C, H, W)`` images in [0, 1] with black by factors ``(N,)``; a factor of 1 is no change."""
    return images.mul_(_per_image(factors)).clamp_(0, 1)


def shift_brightness(images: Tensor, shifts: Tensor | float) -> Tensor:
    """Add shifts ``(N,)`` to ``(N, C, H, W)`` images in [0, 1]."""
    return images.add_(_per_image(shifts)).clamp_(0, 1)


def contrast(images: Tensor, factors: Tensor | float) -> Tensor:
    """Blend ``(N, C, H, W)`` images in [0, 1] with their mean gray by factors ``(N,)``.

    The gray of three channels is their luma, of any other number their mean.
    """
    if images.shape[1] == 3:
        red, green, blue = images.mean((-2, -1)).unbind(1)
        mean = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]  # (N,); a matrix product would depend on N
    else:
        mean = images.mean((-3, -2, -1))
    return images.mul_(_per_image(factors)).add_(_per_image(mean * (1 - factors))).clamp_(0, 1)


def saturation(images: Tensor, factors: Tensor | float) -> Tensor:
    """Blend ``(N, 3, H, W)`` images in [0, 1] with their gray versions by factors ``(N,)``."""
    gray = to_gray(images).mul_(_per_image(1 - factors))
    return images.mul_(_per_image(factors)).add_(gray).clamp_(0, 1)


def hue(images: Tensor, turns: Tensor | float) -> Tensor:
    """Shift the hue of ``(N, 3, H, W)`` images in [0, 1], keeping saturation and value (HSV).

    Args:
        images: The images.
        turns: ``(N,)`` shifts, as fractions of the color circle.
    """
    red, green, blue = images.unbind(1)
    value, low = torch.maximum(red, green), torch.minimum(red, green)  # (N, H, W)
    value, low = torch.maximum(value, blue, out=value), torch.minimum(low, blue, out=low)
    chroma = value - low
    # With the channels scaled to r, g, b between 0 and 1, the hue in sixths of the circle is 1 - r + g + b, negative
    # where g < b. Here as a fraction of the circle from 0 to 1, in few passes over memory, and without masks, which are
    # slow on the CPU.
    hue = _mixed(images, (-1 / 6, 1 / 6, 1 / 6))[:, 0].add_(value, alpha=1 / 6).sub_(low, alpha=1 / 3)
    hue.div_(chroma.clamp(min=1e-9)).copysign_(green - blue).add_(_per_image(turns + 1, 3)).frac_()
    # A channel is 1 within a sixth of its own hue, and 0 beyond two sixths. The hue of red is 0, at both ends of the
    # range, so red uses the distance from the opposite hue, 1/2.
    high, low = torch.add(low, chroma, alpha=2), low.sub_(chroma)
    chroma.mul_(6)
    for channel, center, start, slope in ((red, 1 / 2, low, 1), (green, 1 / 3, high, -1), (blue, 2 / 3, high, -1)):
        distance = torch.sub(hue, center, out=value).abs_().clamp_(1 / 6, 1 / 3)
        torch.addcmul(start, distance, chroma, value=slope, out=channel)
    return images


def _color_operations(spec: ViewSpec) -> tuple[Callable[..., Tensor], ...]:
    """The operations that ``Augmentation.operations`` numbers."""
    return shift_brightness if spec.additive_brightness else brightness, contrast, saturation, hue


def to_gray(images: Tensor) -> Tensor:
    """Luma of ``(N, 3, H, W)`` images, ``(N, 1, H, W)``."""
    return _mixed(images, _LUMA)


def _mixed(images: Tensor, weights: tuple[float, ...]) -> Tensor:
    """``(N, 1, H, W)`` weighted sums of the channels of ``(N, C, H, W)`` images."""
    return (_channels(weights, images.device).view(1, -1) @ images.flatten(2)).unflatten(2, images.shape[2:])


def grayscale(images: Tensor) -> Tensor:
    """Convert ``(N, 3, H, W)`` images to gray, with three equal channels."""
    return images.copy_(to_gray(images))


def blur(images: Tensor, sigmas: Tensor, kernel: int, widest: float = math.inf) -> Tensor:
    """Gaussian blur with a reflected border, and a standard deviation for each image.

    Each image has its own kernel, so the blur is a product with band matrices. Images are cut into pieces, so that the
    products skip most zeros of these matrices.

    Args:
        images: ``(N, C, H, W)``.
        sigmas: ``(N,)`` standard deviations in pixels.
        kernel: Number of taps, odd.
        widest: At least the largest standard deviation. The products are smaller for a small one.
    """
    return _convolved(images, _blur_weights(sigmas, kernel), _reach(kernel, widest))


def _blur_weights(sigmas: Tensor, kernel: int) -> Tensor:
    """``(N, K)`` taps of Gaussian kernels."""
    taps = torch.arange(kernel, device=sigmas.device) - kernel // 2
    weights = torch.exp(-0.5 * (taps / sigmas[:, None]) ** 2)
    weights = weights * (weights > 1e-9)  # arithmetic with denormal numbers is slow
    return weights / weights.sum(1, keepdim=True)


def _reach(kernel: int, sigma: float) -> int:
    """How far the taps that are not 0 reach: 6.44 standard deviations away, a weight is below 1e-9 of the largest."""
    return math.ceil(min(kernel // 2, 6.44 * sigma))


def _convolved(images: Tensor, weights: Tensor, reach: int) -> Tensor:
    """Convolve rows and columns of ``(N, C, H, W)`` images with taps ``(N, K)``, whose outer ones may be 0."""
    channels, height, width = images.shape[1:]
    rows = _band(weights, height)
    columns = (rows if width == height else _band(weights, width)).mT
    lines = images.flatten(1, 2)  # (N, C * H, W)
    blurred = torch.empty_like(lines)
    for piece, read in _pieces(width, reach):
        torch.bmm(lines[..., read], columns[:, read, piece], out=blurred[..., piece])
    # the channels next to each other, so that a product has long lines
    lines = blurred.unflatten(1, (channels, height)).transpose(1, 2).flatten(2)  # (N, H, C * W)
    blurred = torch.empty_like(lines)
    for piece, read in _pieces(height, reach):
        torch.bmm(rows[:, piece, read], lines[:, read], out=blurred[:, piece])
    return blurred.unflatten(2, (channels, width)).transpose(1, 2)


def _pieces(size: int, reach: int) -> list[tuple[slice, slice]]:
    """Cut a line into pieces of up to 56 pixels; with each piece, the pixels that its convolution reads."""
    count = -(-size // 56)
    cuts = [size * piece // count for piece in range(count + 1)]
    return [(slice(start, end), slice(max(0, start - reach), end + reach)) for start, end in itertools.pairwise(cuts)]


def _band(weights: Tensor, size: int) -> Tensor:
    """``(N, K)`` taps as ``(N, S, S)`` matrices that convolve a line, with reflection at its ends."""
    sources = _reflected(size, weights.shape[1], weights.device).expand(len(weights), -1, -1)
    return weights.new_zeros(len(weights), size, size).scatter_add_(2, sources, weights[:, None].expand_as(sources))


@functools.lru_cache
def _reflected(size: int, kernel: int, device: torch.device) -> Tensor:
    """``(S, K)`` indices of the pixels that the K taps at each pixel of a line read."""
    sources = torch.arange(size, device=device)[:, None] + torch.arange(kernel, device=device) - kernel // 2
    return size - 1 - (size - 1 - sources.abs()).abs()


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the pixels of ``(N, C, H, W)`` images that are at or above ``threshold``."""
    above = torch.ge(images, threshold, out=torch.empty_like(images))
    return images.addcmul_(above, 1 - 2 * images)


def normalize(images: Tensor, spec: ViewSpec) -> Tensor:
    """Normalize each channel of ``(N, C, H, W)`` images in [0, 1] with the mean and standard deviation of a view."""
    return (images - _channels(spec.mean, images.device)).mul_(_scale(spec, images.device))


def _scale(spec: ViewSpec, device: torch.device) -> Tensor:
    return _channels(tuple(1 / std for std in spec.std), device)


@functools.lru_cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A value for each channel. Cached on the device, because copying to it would wait for it."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def resized_crop(images: Tensor, boxes: Tensor, size: int, interpolation: str) -> Tensor:
    """Crop each image to its own box and resize it with antialiasing: two matrix products for the whole batch.

    Equals torchvision's crop and antialiased resize of uint8 images, up to the rounding of its fixed-point weights.

    Args:
        images: ``(N, C, H, W)``, uint8, or float32 from 0 to 255.
        boxes: ``(N, 4)``: top, left, height, width in pixels.
        size: Side of the result in pixels.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        ``(N, C, size, size)``, float32 from 0 to 255; integers if the images are uint8.
    """
    top, left, height, width = boxes.float().unbind(1)
    rows = _resize_weights(top, height, images.shape[-2], size, interpolation)  # (N, S, H)
    columns = _resize_weights(left, width, images.shape[-1], size, interpolation)  # (N, S, W)
    # One product for all channels of an image, because small products are slow. Columns first, and rounded twice, as in
    # Pillow.
    rounded = Tensor.round_ if images.dtype == torch.uint8 else torch.positive
    x = rounded(images.float().flatten(1, 2) @ columns.mT).clamp_(0, 255)  # (N, C * H, S)
    x = x.unflatten(1, images.shape[1:3]).transpose(1, 2).flatten(2)  # (N, H, C * S)
    x = rounded(rows @ x).clamp_(0, 255).unflatten(2, (images.shape[1], size))  # (N, S, C, S)
    return x.transpose(1, 2)


def _resize_weights(start: Tensor, length: Tensor, source: int, size: int, interpolation: str) -> Tensor:
    """``(N, size, source)`` weights that resize the ``length`` pixels from ``start`` on to ``size`` pixels."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    center = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale  # (N, size, 1)
    pixel = torch.arange(source, device=start.device) + 0.5  # (source,)
    distance = (pixel - center).abs_().div_(scale.clamp(min=1))  # (N, size, source)
    weights = distance.neg_().add_(1).clamp_(min=0) if interpolation == "bilinear" else _cubic(distance)
    inside = (pixel > start).float() * (pixel < start + length)  # (N, 1, source)
    weights = weights.mul_(inside)
    return weights.div_(weights.sum(-1, keepdim=True))


def _cubic(distance: Tensor) -> Tensor:
    """Twice the cubic convolution kernel for a = -0.5 (Keys 1981), in place, with both of its pieces in one sum."""
    outer = distance.neg_().add_(2).clamp_(min=0)
    inner = outer - 1
    weights = inner * outer * outer
    inner.clamp_(min=0)
    return weights.addcmul_(inner * inner, inner.mul_(-4).add_(2))


def _per_image(values: Tensor | float, dimensions: int = 4) -> Tensor | float:
    """A value for each of N images, or of a single image, so that it goes with their pixels."""
    return values.view(-1, *[1] * (dimensions - 1)) if isinstance(values, Tensor) else values
