"""A look at some images of a data set before training: their channels, and the range of their values."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.data.decoding import OpenedImage
from ssl_lightning.data.images import ImageArray, Images
from ssl_lightning.data.pixels import Preparation, robust_range
from ssl_lightning.data.prepared import mixed_channels, prepared
from ssl_lightning.data.stream import StreamStart
from ssl_lightning.data.views import IMAGENET_MEAN, Statistics, ViewSpec, color_operations
from ssl_lightning.errors import UserError, printable

LOOKED_AT = 256
"""Number of images to look at, evenly spread over the data set, so that every process sees the same ones."""

_PIXELS = 2048
"""Number of pixels of each image that count, evenly spread over it."""


class Alike(NamedTuple):
    """How the pixels of all images of a data set are made alike."""

    preparation: Preparation
    """What is done to the pixels of each image."""
    statistics: Statistics | None
    """Mean and standard deviation of each channel for the views. None keeps the views' own."""
    example: tuple[str, int | None] | None
    """See PreparedImages."""

    def as_in(self, image_transform: dict[str, Any], value_range: Any) -> "Alike":
        """The same with the range, mean and deviation of a checkpoint, as far as they were measured.

        Args:
            image_transform: How the checkpoint says that images are prepared.
            value_range: See SSLDataModule.
        """
        preparation, measured = self.preparation, self.statistics
        if not image_transform or preparation.channels != image_transform.get("channels", 3):
            return self
        if preparation.is_deep and value_range == "auto" and "value_range" in image_transform:
            low, high = image_transform["value_range"]
            preparation = replace(preparation, value_range=(float(low), float(high)))
        if measured is not None:
            measured = tuple(image_transform["mean"]), tuple(image_transform["std"])
        return self._replace(preparation=preparation, statistics=measured)


def make_alike(
    images: Images,
    specs: Sequence[ViewSpec],
    own_views: bool,
    channels: int | None,
    value_range: Literal["auto"] | tuple[float, float],
    wanted: int | None,
    checkpoint: dict[str, Any],
) -> Alike:
    """Look at some images, decide how the pixels of all are made alike, and say what is unusual.

    Args:
        images: The images, not yet prepared.
        specs: The views.
        own_views: Whether the user wrote these views, mean and standard deviation included.
        channels: See SSLDataModule.
        value_range: See SSLDataModule.
        wanted: Number of channels that the backbone takes, if it is known.
        checkpoint: The ``image_transform`` of the checkpoint that is evaluated; empty in training.

    Raises:
        UserError: The images do not fit each other or the backbone.
    """
    look = look_at(images, may_differ=channels is not None)
    if not look.example and not isinstance(images, StreamStart):  # further examples of a stream may be readable
        raise _none_readable(images)
    wanted = checkpoint.get("channels") if wanted is None else wanted
    number = number_of_channels(look, channels, wanted, trains=not checkpoint)
    example = f"e.g. {look.example}"
    if number != 3 or look.channels not in (None, 3):
        origin = "" if look.channels in (None, number) else f", made from {look.channels}"
        rank_zero_info(f"images of {number} channel{'s' * (number > 1)}{origin}, {example}")
    bounds = look.value_range
    if bounds is not None:
        chosen = checkpoint.get("value_range", "auto") if value_range == "auto" else value_range
        bounds = bounds if chosen == "auto" else (float(chosen[0]), float(chosen[1]))
        rank_zero_info(f"values from {bounds[0]:g} to {bounds[1]:g} become 0 to 1; choose with --data.value_range")
    preparation = Preparation(number, bounds, bounds is not None)
    if number != 3 and (left_out := color_operations(specs)):
        rank_zero_info(f"the views leave out {', '.join(left_out)}, which need images of 3 channels")
    measured = None
    is_given = len(specs[0].mean) == number if checkpoint else own_views and specs[0].mean != IMAGENET_MEAN
    if (number != 3 or bounds is not None) and not is_given:
        measured = statistics(images, preparation)
        mean, std = ([float(f"{value:.3g}") for value in values] for values in measured)
        rank_zero_info(f"mean {mean}, standard deviation {std}")
    return Alike(preparation, measured, None if channels else (look.example, look.channels))


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


def number_of_channels(look: Look, given: int | None, wanted: int | None, trains: bool) -> int:
    """The number of channels that all images get.

    Args:
        look: What the images are like.
        given: The number that the user asks for.
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


def statistics(images: Images, preparation: Preparation) -> Statistics:
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
    for index in images.sample(LOOKED_AT):
        try:
            image = images.open(int(index))
        except UserError:
            raise
        except Exception:
            continue
        yield printable(images.name(int(index))), image


def _none_readable(images: Images) -> UserError:
    """The error about a data set none of whose images can be read, with the reason for the first of them."""
    index, reason = int(images.sample(LOOKED_AT)[0]), "unreadable"
    try:
        images.read(index)
    except Exception as error:
        reason = printable(str(error))
    name = printable(images.name(index))
    return UserError(f"none of {len(images):,} images can be read, e.g. {name}: {reason}; give other images.")


def _some(pixels: Tensor) -> Tensor:
    """Some pixels of an image ``(C, H, W)``, ``(C, P)``."""
    flat = pixels.flatten(1).numpy()  # torch 2.6 cannot index 16-bit values without a sign
    count = flat.shape[1]
    places = torch.linspace(0, count - 1, min(count, _PIXELS), dtype=torch.float64).long()
    return torch.from_numpy(flat[:, places.numpy()])


def _rounded(values: Tensor) -> list[float]:
    """Values with six digits, which is what is printed."""
    return [float(f"{value:.6g}") for value in values.tolist()]
