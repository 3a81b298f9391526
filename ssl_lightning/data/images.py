"""Where images come from: files, data sets, arrays in memory and streams, or a source that a user writes."""

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.data.decoding import OpenedImage, open_example, open_image, opened_already
from ssl_lightning.data.labels import Labels, as_labels
from ssl_lightning.data.pixels import Preparation, as_batch
from ssl_lightning.data.sampler import spread
from ssl_lightning.errors import UserError, printable


class Unreadable(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str

    @classmethod
    def because(cls, name: str, error: Exception) -> "Unreadable":
        """An image by its name, and the error that reading it raised."""
        return cls(printable(name), printable(f"{type(error).__name__}: {error}"))


class Images(ABC):
    """Images with random access. A new kind of source writes ``__len__``, ``name`` and ``open``.

    Attributes:
        labels: ``(N,)`` class of each image; -1 is unknown. None if there are no labels.
        channels: Number of channels of each image.
        pairs: Knows the partner of each image; None if images have no partners, or ``partner`` is overridden.
        dtype: Type of the pixels that ``read`` gives, once a data module has prepared the images.
    """

    labels: Labels | None = None
    channels: int = 3
    pairs: "Partners | None" = None
    dtype: torch.dtype = torch.uint8

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of an image in messages and listings."""

    @abstractmethod
    def open(self, index: int) -> OpenedImage:
        """Read one image as far as its size.

        Raises:
            UserError: No further image can be read either. Stops the run.
            Exception: This image is missing or broken. Another image replaces it.
        """

    def read(self, index: int) -> Tensor:
        """Decode one image to ``(C, H, W)``."""
        image = self.open(index)
        return image.decode(image.height)

    def subset(self, indices: NDArray[np.int64]) -> "Images":
        """Some of the images, in ascending order."""
        return _Subset(self, indices)

    def sample(self, count: int) -> NDArray[np.int64]:
        """Indices of some images, evenly spread, the same on every process."""
        return spread(np.arange(len(self)), min(count, len(self)))

    def with_labels(self, labels: Labels | None) -> "Images":
        """The same images with other labels."""
        if labels is self.labels:
            return self
        images = copy.copy(self)
        images.labels = labels
        return images

    def fingerprint(self) -> str | None:
        """A hash that identifies these images, without their labels; None if there is no cheap one."""
        return None

    def order(self, random: np.random.Generator) -> NDArray[np.int64]:
        """The order of an epoch: a random permutation."""
        return random.permutation(len(self))

    def path(self, index: int) -> str | None:
        """The name by which ``--data.positives`` groups an image, without the root; None if images have no names."""
        return self.name(index)

    def partner(self, index: int, random: np.random.Generator) -> int:
        """An image that shows the same as another: the views of a positive pair come from both.

        Override it in a source of your own. Without a partner, return the index itself.

        Args:
            index: The image.
            random: The only source of random numbers to use. They depend on the seed, the epoch and the image.
        """
        return index if self.pairs is None else self.pairs.partner(index, random)

    @property
    def paired(self) -> bool:
        """Whether images have partners."""
        return self.pairs is not None or type(self).partner is not Images.partner


class Partners(Protocol):
    """Something that knows the partner of an image."""

    def partner(self, index: int, random: np.random.Generator) -> int:
        """See ``Images.partner``."""


class _Subset(Images):
    def __init__(self, images: Images, indices: NDArray[np.int64]) -> None:
        self.images, self.indices = images, indices
        self.labels = None if images.labels is None else as_labels(images.labels)[indices]
        self.channels = images.channels

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.images.name(int(self.indices[index]))

    def open(self, index: int) -> OpenedImage:
        return self.images.open(int(self.indices[index]))

    def path(self, index: int) -> str | None:
        return self.images.path(int(self.indices[index]))

    @property
    def paired(self) -> bool:
        return self.pairs is not None or self.images.paired

    def partner(self, index: int, random: np.random.Generator) -> int:
        if self.pairs is not None:
            return self.pairs.partner(index, random)
        for _ in range(10):  # a partner may lie outside of the subset
            partner = self.images.partner(int(self.indices[index]), random)
            if not isinstance(partner, int | np.integer):
                return partner  # which is reported where it is used
            position = int(np.searchsorted(self.indices, partner))
            if position < len(self) and self.indices[position] == partner:
                return position
        return index

    def fingerprint(self) -> str | None:
        fingerprint = self.images.fingerprint()
        return fingerprint and _digest(fingerprint.encode(), self.indices)


class ImageFiles(Images):
    """Image files.

    Args:
        paths: The files.
        labels: ``(N,)`` class of each file; -1 is unknown.
        root: Folder that the paths are relative to.
    """

    def __init__(
        self, paths: Sequence[Path] | NDArray[np.bytes_], labels: Labels | None = None, root: Path = Path()
    ) -> None:
        # a single block of memory, which the workers share
        self.paths = paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(path) for path in paths])
        self.labels, self.root = _checked(labels, len(self)), root

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path."""
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def open(self, index: int) -> OpenedImage:
        """Read the file."""
        with open(self.name(index), "rb") as file:
            return open_image(file.read())

    def path(self, index: int) -> str:
        """The path below the root."""
        return os.fsdecode(self.paths[index])

    def fingerprint(self) -> str:
        """A hash of the paths, sizes and modification times of the files."""
        return _digest(self.paths, np.array([_size_and_time(self.name(index)) for index in range(len(self))]))


class DatasetImages(Images):
    """A data set whose examples are pairs or dictionaries with a PIL image, as in torchvision and Hugging Face.

    Args:
        dataset: Has a length, and an example for each index.
        labels: ``(N,)`` class of each image; -1 is unknown.
        key: Where an example holds its image: a position, or a key.
    """

    def __init__(self, dataset: Any, labels: Labels | None = None, key: str | int = 0) -> None:
        self.dataset, self.key = dataset, key
        self.labels = _checked(labels, len(self))

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """The number of the example."""
        return f"example {index}"

    def path(self, index: int) -> None:
        """Examples have no names."""

    def open(self, index: int) -> OpenedImage:
        """Open the image of the example."""
        return open_example(self.dataset[int(index)][self.key])

    def fingerprint(self) -> str | None:
        """The fingerprint that Hugging Face data sets have."""
        return getattr(self.dataset, "_fingerprint", None)


class ImageArray(Images):
    """Images of the same size held in memory.

    Args:
        images: ``(N, C, H, W)`` of any real dtype. What is not uint8 is scaled when a data module prepares it.
        labels: ``(N,)`` class of each image; -1 is unknown.
        names: ``(N,)`` name of each image. None means its index.
        preparation: What is done to the pixels when they are taken. None takes them as they are.
    """

    def __init__(
        self,
        images: NDArray[Any] | Tensor,
        labels: Any = None,
        names: NDArray[np.str_] | None = None,
        preparation: Preparation | None = None,
    ) -> None:
        self.images = as_batch(images)
        self.preparation = preparation
        self.channels = self.images.shape[1] if preparation is None else preparation.channels
        self.dtype = self.images.dtype if preparation is None else preparation.dtype
        self.labels, self.names = _checked(labels, len(self)), names

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Its name, or its index."""
        return f"image {index}" if self.names is None else str(self.names[index])

    def path(self, index: int) -> str | None:
        """Its name, if it has one."""
        return None if self.names is None else str(self.names[index])

    def open(self, index: int) -> OpenedImage:
        """The image, which is already decoded."""
        return opened_already(self.batch(index))

    def batch(self, indices: Tensor | int) -> Tensor:
        """The pixels of some images, ``(B, C, H, W)``, or of one image, ``(C, H, W)``."""
        if self.images.dtype == torch.uint16:  # which torch 2.6 cannot index
            pixels = self.images.view(torch.int16)[indices].view(torch.uint16)
        else:
            pixels = self.images[indices]
        return pixels if self.preparation is None else self.preparation(pixels)

    def prepared(self, preparation: Preparation) -> "ImageArray":
        """These images with their pixels made alike. Shares the memory."""
        if self.images.dtype == preparation.dtype == torch.uint8 and self.channels == preparation.channels:
            return self
        array = ImageArray(self.images, self.labels, self.names, preparation)
        array.pairs = self if self.paired else None
        return array

    def fingerprint(self) -> str:
        """A hash of the pixels."""
        return _digest(self.images.contiguous().numpy())

    def subset(self, indices: NDArray[np.int64]) -> "ImageArray":
        """Some of the images, also in memory."""
        labels = None if self.labels is None else self.labels[indices]
        names = None if self.names is None else self.names[indices]
        return ImageArray(self.images[indices], labels, names, self.preparation)

    @classmethod
    def decoded(cls, files: Images) -> "tuple[ImageArray, list[Unreadable]]":
        """Decode images into memory, and list the unreadable ones.

        Raises:
            MixedSizesError: Two images differ in size.
            UserError: No image can be read.
        """
        images: list[Tensor] = []
        read: list[int] = []
        unreadable: list[Unreadable] = []
        for index in range(len(files)):
            try:
                image = files.read(index)
            except UserError:
                raise
            except Exception as error:
                unreadable.append(Unreadable.because(files.name(index), error))
                continue
            if images and image.shape != images[0].shape:
                raise MixedSizesError(
                    f"--data.in_memory needs images of the same size, but {files.name(index)} is {_size(image)} px and "
                    f"{files.name(read[0])} is {_size(images[0])} px; set --data.in_memory false."
                )
            images.append(image)
            read.append(index)
        if not images:
            raise UserError(f"none of {len(files)} files could be read as an image, e.g. {': '.join(unreadable[0])}")
        names = np.array([files.name(index) for index in read])
        array = cls(torch.stack(images), None if files.labels is None else files.labels[read], names)
        array.pairs = _Subset(files, np.array(read)) if files.paired else None
        return array, unreadable


class MixedSizesError(UserError):
    """Images that should form one array differ in size."""


def _size_and_time(path: str) -> tuple[int, int]:
    """Size and modification time of a file; -1 if it is gone."""
    try:
        file = os.stat(path)
        return file.st_size, file.st_mtime_ns
    except OSError:
        return -1, -1


def _digest(*parts: bytes | NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _checked(labels: Any, count: int) -> Labels | None:
    if labels is None:
        return None
    labels = as_labels(labels)
    if len(labels) != count:
        raise UserError(f"{count} images need labels of shape ({count},), not {labels.shape}.")
    return labels


def _size(image: Tensor) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"


def some_of(images: Images | None, samples: int | None) -> Images | None:
    """Evenly spread images.

    Args:
        images: The images, if any.
        samples: Their number. None means all.
    """
    if images is None or samples is None or samples >= len(images):
        return images
    return images.subset(spread(np.arange(len(images)), samples))


def fit_in_memory(images: Images) -> bool:
    """Whether images seem to be small, of the same size, and at most 1 GB together, judging by up to eight of them.

    Args:
        images: The images.
    """
    sizes = set()
    for index in spread(np.arange(len(images)), min(8, len(images))):
        with suppress(Exception):  # an unreadable image has no size
            image = images.open(int(index))
            sizes.add((image.height, image.width))
    if len(sizes) != 1:
        return False
    height, width = sizes.pop()
    size = len(images) * images.channels * height * width * images.dtype.itemsize
    return max(height, width) <= 96 and size <= 2**30
