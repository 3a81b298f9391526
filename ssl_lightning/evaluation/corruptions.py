"""Changes to images that features should be robust to: noise, blur, brightness, rotation."""

from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from ssl_lightning.evaluation.features import Corruption


def noise(images: Tensor, indices: Tensor, std: float) -> Tensor:
    """Add Gaussian noise, the same for an image each time.

    Args:
        images: ``(B, 3, S, S)`` in [0, 1].
        indices: ``(B,)`` indices of the images in the data set.
        std: Standard deviation, with pixel values from 0 to 1.
    """
    drawn = [
        torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(index)) for index in indices.tolist()
    ]
    return images + std * torch.stack(drawn).to(images)


def blur(images: Tensor, _indices: Tensor, share: float) -> Tensor:
    """Apply Gaussian blur whose standard deviation is a fraction of the image's side."""
    sigma = share * images.shape[-1]
    return vision.gaussian_blur(images, [2 * round(3 * sigma) + 1] * 2, [sigma] * 2)


def brightness(images: Tensor, _indices: Tensor, factor: float) -> Tensor:
    """Multiply the brightness."""
    return vision.adjust_brightness(images, factor)


def rotation(images: Tensor, _indices: Tensor, degrees: float) -> Tensor:
    """Rotate about the center; the corners become black."""
    return vision.rotate(images, degrees, InterpolationMode.BILINEAR)


CORRUPTIONS: dict[str, Corruption] = {
    **{f"noise {std}": partial(noise, std=std) for std in (0.05, 0.1, 0.2)},
    **{f"blur {share}": partial(blur, share=share) for share in (0.02, 0.04, 0.08)},
    **{f"brightness {factor}": partial(brightness, factor=factor) for factor in (0.5, 0.75, 1.5)},
    **{f"rotation {degrees}": partial(rotation, degrees=degrees) for degrees in (10, 30, 90)},
}
"""Noise by its standard deviation (of pixels from 0 to 1), blur by its standard deviation as a fraction of the side,
brightness by its factor, rotation in degrees."""
