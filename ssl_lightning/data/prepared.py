"""Images whose pixels are made alike, whatever their files hold."""

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.data.decoding import OpenedImage
from ssl_lightning.data.images import Images
from ssl_lightning.data.pixels import Preparation
from ssl_lightning.errors import UserError, printable


class PreparedImages(Images):
    """Images whose pixels are made alike.

    Args:
        images: The images.
        preparation: What is done to their pixels.
        example: Name and number of channels of an image that the others must be like; the number is None for ordinary
            8-bit images, which go together with gray and color. No example takes any images.
    """

    def __init__(self, images: Images, preparation: Preparation, example: tuple[str, int | None] | None = None) -> None:
        self.images, self.preparation, self.example = images, preparation, example
        self.labels, self.channels, self.dtype = images.labels, preparation.channels, preparation.dtype

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def open(self, index: int) -> OpenedImage:
        image = self.images.open(index)
        return image._replace(decode=functools.partial(self._decode, image, index))

    def path(self, index: int) -> str | None:
        return self.images.path(index)

    def partner(self, index: int, random: np.random.Generator) -> int:
        return self.images.partner(index, random)

    @property
    def paired(self) -> bool:
        return self.images.paired

    def _decode(self, image: OpenedImage, index: int, rows: int) -> Tensor:
        return prepared(image, self.preparation, rows, lambda: self.name(index), self.example)

    def subset(self, indices: NDArray[np.int64]) -> "PreparedImages":
        return PreparedImages(self.images.subset(indices), self.preparation, self.example)

    def sample(self, count: int) -> NDArray[np.int64]:
        return self.images.sample(count)

    def fingerprint(self) -> str | None:
        return self.images.fingerprint()

    def order(self, random: np.random.Generator) -> NDArray[np.int64]:
        return self.images.order(random)


def prepared(
    image: OpenedImage,
    preparation: Preparation,
    rows: int,
    name: Callable[[], str],
    example: tuple[str, int | None] | None = None,
) -> Tensor:
    """Decode an image and prepare its pixels.

    Args:
        image: The image.
        preparation: What is done to its pixels.
        rows: Number of rows that are needed, from the top.
        name: Returns the name of the image.
        example: See PreparedImages.

    Raises:
        UserError: It has another number of channels.
    """
    wants_bands = image.is_photo and preparation.channels not in (1, 3)
    pixels = image.bands() if wants_bands and image.bands is not None else image.decode(rows)
    own = pixels.shape[0]
    if own != preparation.channels and (wants_bands or (example is not None and not image.is_photo)):
        other, channels = example or ("what is wanted", None)
        if channels != own and (wants_bands or channels is not None or own not in (1, 3)):
            raise mixed_channels(printable(name()), own, other, preparation.channels if channels is None else channels)
    return preparation(pixels)


def mixed_channels(first: str, first_channels: int, second: str, second_channels: int) -> UserError:
    """The error about two images of one data set."""
    return UserError(
        f"{first} has {first_channels} channels, but {second} has {second_channels}, and all images of a data set must "
        "have the same number; convert them to color or gray with --data.channels 3 or --data.channels 1, or move one "
        "kind away."
    )
