"""Batched augmentation on the device: each operation equals torchvision's, applied to every image with its numbers."""

import functools

import torch
from torch import Tensor

from ssl_lightning.data.draw import Augmentation
from ssl_lightning.data.views import ViewSpec

_BRIGHTNESS, _CONTRAST = 0, 1


def augment(images: Tensor, numbers: Augmentation, spec: ViewSpec) -> Tensor:
    """Apply all operations of a view after the crop, in the papers' order.

    Args:
        images: ``(N, 3, S, S)``, uint8.
        numbers: What was drawn for these N images.
        spec: The view.

    Returns:
        ``(N, 3, S, S)``, float32, normalised.
    """
    x = images.float() / 255  # (N, 3, S, S) in [0, 1]
    if spec.flip > 0:
        x = flip(x, numbers.flip)
    if spec.grayscale > 0 and spec.grayscale_first:
        x = grayscale(x, numbers.grayscale)
    if spec.jitter > 0:
        x = color_jitter(x, numbers)
    if spec.grayscale > 0 and not spec.grayscale_first:
        x = grayscale(x, numbers.grayscale)
    if spec.blur > 0:
        x = x.index_copy(0, numbers.blur_rows, blur(x[numbers.blur_rows], numbers.blur_sigmas, spec.blur_kernel))
    if spec.solarize > 0:
        x = solarize(x, numbers.solarize, spec.solarize_threshold / 255)
    return normalize(x, spec.mean, spec.std)


def flip(images: Tensor, where: Tensor) -> Tensor:
    """Mirror the images ``(N, C, H, W)`` left to right ``where`` ``(N,)`` says so."""
    return torch.where(_per_image(where), images.flip(-1), images)


def color_jitter(images: Tensor, numbers: Augmentation) -> Tensor:
    """Brightness, contrast, saturation and hue, in each image's own order.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1].
        numbers: Operations, factors and turns of the hue.
    """
    for step in range(4):
        images = blend(images, numbers.operations[:, step], numbers.factors[:, step])
        rows = numbers.hue_rows[step]
        if len(rows):
            images.index_copy_(0, rows, turn_hue(images[rows], numbers.hue_turns[step]))
    return images


def blend(images: Tensor, operations: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast or saturation: each blends the image with black, its mean gray, or its gray version.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1].
        operations: ``(N,)``: 0 brightness, 1 contrast, else saturation.
        factors: ``(N,)``: 1 leaves an image as it is.
    """
    gray = to_gray(images)  # (N, 1, H, W)
    contrast = _per_image(operations == _CONTRAST)
    other = torch.where(contrast, gray.mean(dim=(-3, -2, -1), keepdim=True), gray)
    other = other.masked_fill_(_per_image(operations == _BRIGHTNESS), 0.0)
    factor = _per_image(factors.to(images.dtype))
    return torch.addcmul(other * (1 - factor), images, factor).clamp_(0, 1)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of ``(N, 3, H, W)`` images in [0, 1] by ``turns`` ``(N,)``, keeping saturation and value (HSV)."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)  # (N, H, W)
    chroma = value - low
    divisor = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * turns.to(images.dtype)[:, None, None]  # in sixths of a turn

    def channel(offset: int) -> Tensor:
        sixths = torch.remainder(hue + offset, 6)
        return value - chroma * torch.minimum(sixths, 4 - sixths).clamp_(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], dim=1)


def to_gray(images: Tensor) -> Tensor:
    """Luma of ``(N, 3, H, W)`` images, ``(N, 1, H, W)``."""
    red, green, blue = images.split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def grayscale(images: Tensor, where: Tensor) -> Tensor:
    """Remove the colour of the images ``(N, 3, H, W)`` ``where`` ``(N,)`` says so."""
    return torch.where(_per_image(where), to_gray(images), images)


def blur(images: Tensor, sigmas: Tensor, kernel: int) -> Tensor:
    """Gaussian blur with a reflected border, one deviation per image.

    Written as two matrix products, since each image has its own kernel.

    Args:
        images: ``(N, 3, H, W)``.
        sigmas: ``(N,)`` standard deviations in pixels.
        kernel: Number of taps, odd.
    """
    radius = kernel // 2
    taps = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (taps / sigmas.to(images.dtype)[:, None]) ** 2)  # (N, K)
    weights = weights / weights.sum(1, keepdim=True)
    height, width = images.shape[-2:]
    rows = _band(weights, height)
    columns = rows if width == height else _band(weights, width)
    return rows[:, None] @ (images @ columns.mT[:, None])  # (N, 1, T, H) @ ((N, C, H, W) @ (N, 1, W, S))


def _band(weights: Tensor, size: int) -> Tensor:
    """``(N, K)`` taps as ``(N, S, S)`` matrices that convolve a line, reflecting at its ends."""
    radius = weights.shape[1] // 2
    position = torch.arange(size, device=weights.device)
    source = position[:, None] + torch.arange(-radius, radius + 1, device=weights.device)  # (S, K)
    source = size - 1 - (size - 1 - source.abs()).abs()
    band = weights.new_zeros(len(weights), size, size)
    return band.scatter_add_(2, source.expand(len(weights), -1, -1), weights[:, None].expand(-1, size, -1))


def solarize(images: Tensor, where: Tensor, threshold: float) -> Tensor:
    """Invert the pixels at or above ``threshold`` of the images ``(N, C, H, W)`` ``where`` ``(N,)`` says so."""
    return torch.where(_per_image(where) & (images >= threshold), 1 - images, images)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract the mean and divide by the deviation of each channel of ``(N, C, H, W)`` images."""
    return (images - _channels(mean, images.device)) / _channels(std, images.device)


@functools.lru_cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value per channel; kept on the device, as copying there waits for it."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def resized_crop(images: Tensor, boxes: Tensor, size: int, interpolation: str) -> Tensor:
    """Crop each image to its own box and resize it with antialiasing, the whole batch in two matrix products.

    Equals torchvision's crop and antialiased resize of uint8 images, within the rounding of their fixed-point weights.

    Args:
        images: ``(N, C, H, W)``, uint8.
        boxes: ``(N, 4)``: top, left, height, width in pixels.
        size: Side of the result in pixels.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        ``(N, C, size, size)``, uint8.
    """
    top, left, height, width = boxes.float().unbind(1)
    rows = _resize_weights(top, height, images.shape[-2], size, interpolation)
    columns = _resize_weights(left, width, images.shape[-1], size, interpolation)
    narrow = (images.float() @ columns.mT[:, None]).round_().clamp_(0, 255)  # as Pillow: rounded after each direction
    return (rows[:, None] @ narrow).round_().clamp_(0, 255).to(torch.uint8)


def _resize_weights(start: Tensor, length: Tensor, source: int, size: int, interpolation: str) -> Tensor:
    """``(N, size, source)`` weights that take ``length`` pixels from ``start`` on to ``size`` pixels."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    center = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale  # (N, size, 1)
    pixel = torch.arange(source, device=start.device) + 0.5  # (source,)
    distance = (pixel - center).abs() / scale.clamp(min=1)  # (N, size, source)
    weights = (1 - distance).clamp_(min=0) if interpolation == "bilinear" else _cubic(distance)
    weights = weights * ((pixel > start) & (pixel < start + length))
    return weights / weights.sum(-1, keepdim=True)


def _cubic(distance: Tensor, a: float = -0.5) -> Tensor:
    """Cubic convolution kernel (Keys 1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
