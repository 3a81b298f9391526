"""Pixels of any dtype and any number of channels, made alike for a whole data set."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.errors import UserError


@dataclass(frozen=True)
class Preparation:
    """What is done to the pixels of each image of a data set before anything else.

    8-bit values stay as they are. Other values are scaled linearly from a range, the same for all images, to 0 to 255,
    and are not rounded.

    Args:
        channels: Number of channels that each image gets.
        value_range: The values that become 0 and 255; values outside of them are clipped. An image that would become
            constant, because all its values are outside, is scaled by its own values. None does so with all images.
        is_deep: Whether some images have values of more than 8 bits. Then all images become float32, else uint8.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    is_deep: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Type of the prepared pixels."""
        return torch.float32 if self.is_deep else torch.uint8

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps: ``channels`` if they are not 3, and ``value_range`` if there is one."""
        facts = {"channels": self.channels, "value_range": self.value_range}
        return {key: value for key, value in facts.items() if value not in (3, None)}

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare one image ``(C, H, W)`` or a batch ``(B, C, H, W)``."""
        if images.dtype != torch.uint8:
            scaled = with_channels(self._scaled(images), self.channels)
            return scaled if self.is_deep else scaled.round().to(torch.uint8)
        images = with_channels(images, self.channels)
        return images.float() if self.is_deep else images

    def _scaled(self, images: Tensor) -> Tensor:
        """Values of any kind as float32 from 0 to 255."""
        if images.ndim == 4:
            return torch.stack([self._scaled(image) for image in images])
        low, high = robust_range(images.flatten().double().numpy()) if self.value_range is None else self.value_range
        exact = images.dtype in (torch.float32, torch.uint16, torch.int16, torch.int8)  # in float32
        values = images.to(torch.float32 if exact else torch.float64)
        if images.dtype.is_floating_point:
            values = values.nan_to_num(nan=low, posinf=high, neginf=low)
        scaled = _between(values, low, high)
        if scaled.min() == scaled.max() and (bounds := values.aminmax()).min < bounds.max:
            scaled = _between(values.double(), float(bounds.min), float(bounds.max))
        return scaled


def _between(values: Tensor, low: float, high: float) -> Tensor:
    return ((values - low) * (255 / (high - low))).clamp_(0, 255).float()


def as_batch(images: NDArray[Any] | Tensor) -> Tensor:
    """Images in memory as a tensor ``(N, C, H, W)``.

    Args:
        images: Their pixels, of any real dtype.

    Raises:
        UserError: They are no images, or their channels come last.
    """
    if isinstance(images, Tensor):
        images, is_real = images.detach().cpu(), not images.is_complex()
    else:
        images = np.asarray(images)
        is_real = images.dtype.kind in "biuf"
    if not is_real or len(images.shape) != 4 or 0 in images.shape[1:]:
        kind = f"{images.dtype} {tuple(images.shape)}"
        raise UserError(f"images must be numbers of shape (N, C, H, W), not {kind}; convert them.")
    if isinstance(images, np.ndarray):
        odd = images.dtype.kind == "f" and images.dtype.itemsize not in (4, 8)  # half precision holds 11 bits
        images = images.astype(np.float32 if odd else images.dtype.newbyteorder("="), copy=False)
    channels, height, width = images.shape[1:]
    if channels > 4 >= width or channels == height > width:
        raise UserError(
            f"images of shape {tuple(images.shape)} have their channels last; put them first with "
            "images.transpose(0, 3, 1, 2)."
        )
    images = torch.as_tensor(images)
    return images.to(torch.uint8) * 255 if images.dtype == torch.bool else images


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Convert ``(..., C, H, W)`` to another number of channels: to gray or to color.

    Gray is the luma of three channels, and the mean of any other number. Color is the first three channels, or gray
    three times.

    Args:
        images: The images.
        channels: The number of channels that is wanted.

    Raises:
        ValueError: These images cannot have that number.
    """
    own = images.shape[-3]
    if own == channels:
        return images
    if channels == 3 and own > 3:
        return images[..., :3, :, :]
    if channels not in (1, 3):
        raise ValueError(f"an image of {own} channels cannot become an image of {channels}")
    gray = images
    if own == 3:
        red, green, blue = (images if images.is_floating_point() else images.int()).unbind(-3)
        luma = red * 19595 + green * 38470 + blue * 7471  # as Pillow computes it
        gray = (luma / 65536 if images.is_floating_point() else (luma + 0x8000) >> 16).to(images.dtype).unsqueeze(-3)
    elif own > 1:
        gray = images.float().mean(-3, keepdim=True)
        gray = gray if images.is_floating_point() else gray.round().to(images.dtype)
    return gray.expand(*images.shape[:-3], channels, *images.shape[-2:])


def robust_range(values: NDArray[Any]) -> tuple[float, float]:
    """The values that become black and white: all but a thousandth at each end lie between them.

    Where the values come close to the ends of a usual range, these are the ends: 8, 10, 12, 14 or 16 bits, reflectance
    times 10,000, [0, 1], [-1, 1]. Marks of missing values do not count.

    Args:
        values: ``(N,)`` values.
    """
    values = values[np.isfinite(values)]
    present = values[~np.isin(values, _MISSING) & (np.abs(values) < 1e30)]
    values = present if len(present) else values
    if not len(values):
        return 0.0, 1.0
    low, high = (float(bound) for bound in np.quantile(values, (0.001, 0.999)))
    if low < high and low >= 0:
        tops = (255.0, 1023.0, 4095.0, 10000.0, 16383.0, 65535.0) if high > 2 else (1.0,)
        return 0.0 if low < high / 2 else low, next((top for top in tops if top / 2 < high <= top), high)
    if -1 <= low < -0.5 and 0.5 < high <= 1:
        return -1.0, 1.0
    if not low < high:
        low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low, low + 1)


_MISSING = (-9999.0, -32768.0, -99999.0, -2147483648.0)
