"""A look at some images of a data set before training: their channels, and the range of their values."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl_lightning.data.decoding import OpenedImage
from ssl_lightning.data.images import ImageArray, Images, mixed_channels, prepared
from ssl_lightning.data.preparation import Preparation, robust_range
from ssl_lightning.data.sampler import spread
from ssl_lightning.errors import UserError

LOOKED_AT = 256
"""Number of images to look at, evenly spread over the data set, so that every process sees the same ones."""

_PIXELS = 2048
"""Number of pixels of each image that count, evenly spread over it."""


class Look(NamedTuple):
    """What the images of a data set are like."""

    example: str
    """Name of an image that shows the number of channels."""
    channels: int | None
    """Number of channels. None for ordinary 8-bit images, which may become gray or color."""
    value_range: tuple[float, float] | None
    """The values that should become black and white. None if all images have 8 bits."""
    has_bands: bool = False
    """Whether ordinary 8-bit images have a fourth channel."""


def look_at(images: Images, may_differ: bool) -> Look:
    """Look at the channels and values of some images.

    Args:
        images: The images, not yet prepared.
        may_differ: Whether images may have different numbers of channels, because they are converted.

    Raises:
        UserError: Two images have different numbers of channels.
    """
    if isinstance(images, ImageArray) and images.dtype == torch.uint8:
        return Look(images.name(0), images.channels, None)
    photo, example, channels, has_bands = "", "", None, True
    values: list[NDArray[np.float64]] = []
    for name, image in _opened(images):
        if image.is_photo:
            photo, has_bands = photo or name, has_bands and image.bands is not None
            continue
        try:
            pixels = image.decode(image.height)
        except UserError:
            raise
        except Exception:  # damaged further down: training lists it
            continue
        if channels is None:
            example, channels = name, len(pixels)
        elif len(pixels) != channels and not may_differ:
            raise mixed_channels(name, len(pixels), example, channels)
        if pixels.dtype != torch.uint8:
            values.append(_some(pixels).double().numpy().ravel())
    if photo and channels not in (None, 1, 3) and not may_differ:
        raise mixed_channels(example, channels or 0, photo, 3)
    value_range = robust_range(np.concatenate(values)) if values else None
    return Look(example or photo, channels, value_range, bool(photo) and has_bands)


def input_channels(module: Any) -> int | None:
    """Number of channels of the images that a module takes, by its first convolution; None if it has none.

    Args:
        module: A method or an evaluation; None if there is none.
    """
    layers = () if module is None else module.modules()
    return next((layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)), None)


def number_of_channels(look: Look, given: int | None, wanted: int | None, trains: bool) -> int:
    """The number of channels that all images get.

    Args:
        look: What the images are like.
        given: The number that the user, or the evaluated checkpoint, asks for.
        wanted: The number that the backbone takes, if it is known.
        trains: Whether the backbone is about to be trained.

    Raises:
        UserError: The images do not fit the backbone.
    """
    channels = given or look.channels or (4 if wanted == 4 and look.has_bands else 1 if wanted == 1 else 3)
    if given is None and wanted in (1, 3) and look.channels in (1, 3):
        channels = wanted
    if wanted not in (None, channels):
        ways = [f"set --model.backbone_kwargs.in_chans {channels}"] if trains else []
        if wanted in (1, 3):
            ways.append(f"convert the images with --data.channels {wanted}")
        raise UserError(
            f"the images have {channels} channels (e.g. {look.example}), and the backbone takes {wanted}; "
            f"{', or '.join(ways) or f'give images of {wanted} channels'}."
        )
    return channels


def statistics(images: Images, preparation: Preparation) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of some images, whose values then lie between 0 and 1.

    Args:
        images: The images, not yet prepared.
        preparation: What is done to their pixels.
    """
    values = []
    for name, image in _opened(images):
        try:
            values.append(_some(prepared(image, preparation, image.height, lambda name=name: name)))  # type: ignore[misc]
        except UserError:
            raise
        except Exception:  # training lists it
            continue
    if not values:
        return (0.0,), (1.0,)
    deviation, mean = torch.std_mean(torch.cat(values, dim=1).double() / 255, dim=1, correction=0)
    deviation[deviation < 1e-6] = 1  # a constant channel stays 0
    return tuple(_rounded(mean)), tuple(_rounded(deviation))


def _opened(images: Images) -> Iterator[tuple[str, OpenedImage]]:
    """Some images with their names, without those that cannot be opened, which training lists."""
    for index in spread(np.arange(len(images)), min(LOOKED_AT, len(images))):
        try:
            image = images.open(int(index))
        except UserError:
            raise
        except Exception:
            continue
        yield images.name(int(index)), image


def _some(pixels: Tensor) -> Tensor:
    """Some pixels of an image ``(C, H, W)``, ``(C, P)``."""
    flat = pixels.flatten(1)
    count = flat.shape[1]
    return flat[:, torch.linspace(0, count - 1, min(count, _PIXELS), dtype=torch.float64).long()]


def _rounded(values: Tensor) -> list[float]:
    """Values with six digits, which is what is printed."""
    return [float(f"{value:.6g}") for value in values.tolist()]
