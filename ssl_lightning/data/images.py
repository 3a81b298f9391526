"""Where images come from: files, data sets, arrays in memory and streams, or a source that a user writes."""

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.data.decoding import OpenedImage, open_example, open_image, opened_already
from ssl_lightning.data.labels import Labels, as_labels
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
    """

    labels: Labels | None = None
    channels: int = 3

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
        """Decode one image to uint8 ``(C, H, W)``."""
        image = self.open(index)
        return image.decode(image.height)

    def subset(self, indices: NDArray[np.int64]) -> "Images":
        """Some of the images."""
        return _Subset(self, indices)

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

    def open(self, index: int) -> OpenedImage:
        """Open the image of the example."""
        return open_example(self.dataset[int(index)][self.key])

    def fingerprint(self) -> str | None:
        """The fingerprint that Hugging Face data sets have."""
        return getattr(self.dataset, "_fingerprint", None)


class ImageArray(Images):
    """Images of the same size held in memory.

    Args:
        images: ``(N, C, H, W)``, uint8.
        labels: ``(N,)`` class of each image; -1 is unknown.
        names: ``(N,)`` name of each image. None means its index.
    """

    def __init__(
        self, images: NDArray[np.uint8] | Tensor, labels: Any = None, names: NDArray[np.str_] | None = None
    ) -> None:
        self.images = torch.as_tensor(images)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            kind = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise UserError(f"images must be uint8 of shape (N, C, H, W), not {kind}; convert them.")
        if self.images.shape[1] > 4 and self.images.shape[3] <= 4:
            raise UserError(
                f"images of shape {tuple(self.images.shape)} have their channels last; put them first with "
                "images.transpose(0, 3, 1, 2)."
            )
        self.channels = self.images.shape[1]
        self.labels, self.names = _checked(labels, len(self)), names

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Its name, or its index."""
        return f"image {index}" if self.names is None else str(self.names[index])

    def open(self, index: int) -> OpenedImage:
        """The image, which is already decoded."""
        return opened_already(self.images[index])

    def fingerprint(self) -> str:
        """A hash of the pixels."""
        return _digest(self.images.contiguous().numpy())

    def subset(self, indices: NDArray[np.int64]) -> "ImageArray":
        """Some of the images, also in memory."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageArray(self.images[indices], labels, None if self.names is None else self.names[indices])

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
        return cls(torch.stack(images), None if files.labels is None else files.labels[read], names), unreadable


class MixedSizesError(UserError):
    """Images that should form one array differ in size."""


class Example(NamedTuple):
    """An image of a stream."""

    image: Any
    """The image in any form that ``open_example`` takes."""
    label: int
    """Its class; -1 is unknown."""
    name: str
    """Its name in messages and listings."""


class ImageStream(ABC):
    """Images without random access. A new kind of stream writes ``__len__``, ``max_workers`` and ``examples``."""

    channels: int = 3
    num_classes: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of images in an epoch."""

    @abstractmethod
    def max_workers(self, world_size: int) -> int:
        """Number of worker processes that the part of each training process can be divided among."""

    @abstractmethod
    def examples(self, epoch: int, rank: int, world_size: int) -> Iterator[Example]:
        """The examples of an epoch that this process reads; in a worker, the examples that this worker reads."""


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
    return max(height, width) <= 96 and len(images) * images.channels * height * width <= 2**30
