"""Images with random access: files that are decoded when needed, an array in memory, or a source of one's own."""

import functools
import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ssl_lightning.errors import UserError

Labels = NDArray[np.int64]


class Unreadable(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str

    @classmethod
    def because(cls, name: str, error: Exception) -> "Unreadable":
        """The image of that name, and what reading it raised."""
        return cls(name, f"{type(error).__name__}: {error}")


class OpenedImage(NamedTuple):
    """An image whose size is known before its pixels.

    So a worker crops an image as soon as it is decoded, while it is in the cache: measured 12 % faster than decoding
    the whole batch first.
    """

    height: int
    width: int
    decode: Callable[[int], Tensor]
    """Gives the pixels of so many rows from the top, or of more: uint8 ``(3, rows, W)``, laid out channels last, as the
    resize wants it."""


class Images(ABC):
    """Images with random access: a source of its own writes ``__len__``, ``name`` and ``open``.

    Attributes:
        labels: ``(N,)`` class of each image; -1 is unknown.
        channels: Number of channels of each image.
    """

    labels: Labels | None = None
    channels: int = 3

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in a message."""

    @abstractmethod
    def open(self, index: int) -> OpenedImage:
        """Read one image, and find its size.

        Raises:
            UserError: Nothing can be read on; stops the run.
            Exception: The image is missing or broken; another one stands in for it.
        """

    def read(self, index: int) -> Tensor:
        """Decode one image to uint8 ``(C, H, W)``."""
        image = self.open(index)
        return image.decode(image.height)

    def subset(self, indices: NDArray[np.int64]) -> "Images":
        """Some of the images."""
        return _Subset(self, indices)

    def fingerprint(self) -> str | None:
        """What tells these images, not their labels, from others; None where that is not known."""
        return None

    def order(self, random: np.random.Generator) -> NDArray[np.int64]:
        """The order of an epoch: a random permutation."""
        return random.permutation(len(self))


class _Subset(Images):
    def __init__(self, images: Images, indices: NDArray[np.int64]) -> None:
        self.images, self.indices = images, indices
        self.labels = None if images.labels is None else images.labels[indices]
        self.channels = images.channels

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.images.name(int(self.indices[index]))

    def open(self, index: int) -> OpenedImage:
        return self.images.open(int(self.indices[index]))

    def fingerprint(self) -> str | None:
        whole = self.images.fingerprint()
        return whole and _digest(whole.encode(), self.indices)


class ImageFiles(Images):
    """Image files.

    Args:
        paths: The files.
        labels: ``(N,)`` class of each file; -1 is unknown.
        root: Folder that the paths start from.
    """

    def __init__(
        self, paths: Sequence[Path] | NDArray[np.bytes_], labels: Labels | None = None, root: Path = Path()
    ) -> None:
        # one block of memory, which the workers share
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
        """Of the paths, sizes and times of the files."""
        return _digest(self.paths, np.array([_state(self.name(index)) for index in range(len(self))]))


class DatasetImages(Images):
    """A data set of pairs or dictionaries that hold a PIL image, as those of torchvision and Hugging Face do.

    Args:
        dataset: Has a length, and an image for each index.
        labels: ``(N,)`` class of each image; -1 is unknown.
        key: Where an example keeps its image.
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
        """Get the example."""
        return open_example(self.dataset[int(index)][self.key])

    def fingerprint(self) -> str | None:
        """That of Hugging Face's data sets."""
        return getattr(self.dataset, "_fingerprint", None)


class ImageArray(Images):
    """Images of one size held in memory.

    Args:
        images: ``(N, C, H, W)``, uint8.
        labels: ``(N,)`` class of each image; -1 is unknown.
        names: ``(N,)`` what to call each image; None is its number.
    """

    def __init__(
        self, images: NDArray[np.uint8] | Tensor, labels: Labels | None = None, names: NDArray[np.str_] | None = None
    ) -> None:
        self.images = torch.as_tensor(images)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            kind = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise UserError(f"images must be uint8 of shape (N, C, H, W), not {kind}; convert them.")
        if self.images.shape[1] > 4 and self.images.shape[3] <= 4:
            raise UserError(
                f"images of shape {tuple(self.images.shape)} have their channels last; images.transpose(0, 3, 1, 2) "
                "puts them first."
            )
        self.channels = self.images.shape[1]
        self.labels, self.names = _checked(labels, len(self)), names

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Its name, or its number."""
        return f"image {index}" if self.names is None else str(self.names[index])

    def open(self, index: int) -> OpenedImage:
        """One of the images."""
        return opened_already(self.images[index])

    def fingerprint(self) -> str:
        """Of the pixels."""
        return _digest(self.images.contiguous().numpy())

    def subset(self, indices: NDArray[np.int64]) -> "ImageArray":
        """Some of the images, in memory too."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageArray(self.images[indices], labels, None if self.names is None else self.names[indices])

    @classmethod
    def decoded(cls, files: Images) -> "tuple[ImageArray, list[Unreadable]]":
        """Decode images into memory, and list those that cannot be read.

        Raises:
            MixedSizesError: Two images differ in size.
            UserError: None can be read.
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
                    f"data.in_memory needs images of one size, but {files.name(index)} is {_size(image)} px and "
                    f"{files.name(read[0])} {_size(images[0])} px; leave it off."
                )
            images.append(image)
            read.append(index)
        if not images:
            raise UserError(f"none of {len(files)} files could be read as an image, e.g. {': '.join(unreadable[0])}")
        names = np.array([files.name(index) for index in read])
        return cls(torch.stack(images), None if files.labels is None else files.labels[read], names), unreadable


class MixedSizesError(UserError):
    """Images that should form one array are not of one size."""


class Example(NamedTuple):
    """One image of a stream."""

    image: Any
    """What ``open_example`` takes."""
    label: int
    """Its class; -1 is unknown."""
    name: str
    """What to call it in a message."""


class ImageStream(ABC):
    """Images that come in order only: a stream of its own writes ``__len__`` and ``examples``."""

    channels: int = 3
    num_classes: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of images in an epoch."""

    @abstractmethod
    def max_workers(self, world_size: int) -> int:
        """Number of worker processes into which the part of each process can be divided."""

    @abstractmethod
    def examples(self, epoch: int, rank: int, world_size: int) -> Iterator[Example]:
        """The part of an epoch that one process reads; in a worker of a DataLoader, that worker's part of it."""


def _state(path: str) -> tuple[int, int]:
    """Size and time of a file; -1 of one that is gone."""
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


def _checked(labels: Labels | None, count: int) -> Labels | None:
    if labels is None:
        return None
    labels = np.asarray(labels, dtype=np.int64)
    if labels.shape != (count,):
        raise UserError(f"{count} images need labels of shape ({count},), not {labels.shape}.")
    return labels


def _size(image: Tensor) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"


def open_image(data: bytes) -> OpenedImage:
    """Look at the content of an image file of any mode Pillow knows; it becomes RGB, upright by its Exif tag.

    Palette, CMYK and transparent images are converted, transparency dropped; 16-bit gray is scaled to 8 bits. Plain
    JPEGs alone wait until they are decoded.

    Args:
        data: Content of the file.

    Raises:
        Exception: The content is truncated or no image; which one depends on its format.
    """
    jpeg = _plain_jpeg(data)
    if jpeg is None:
        with Image.open(io.BytesIO(data)) as image:
            return open_pil_image(image)
    return OpenedImage(jpeg.height, jpeg.width, functools.partial(_decode_jpeg, data, jpeg))


def opened_already(pixels: Tensor) -> OpenedImage:
    """An image ``(C, H, W)`` that is decoded."""
    return OpenedImage(pixels.shape[1], pixels.shape[2], lambda _: pixels)


def open_example(image: Any) -> OpenedImage:
    """What data sets call an image: one of Pillow, the content of a file, or Hugging Face's ``{bytes, path}``."""
    if isinstance(image, dict):
        if image.get("bytes") is None:
            with fsspec.open(image["path"], "rb") as file:  # also in an archive, or behind a URL
                return open_image(file.read())
        image = image["bytes"]
    return open_image(image) if isinstance(image, bytes) else open_pil_image(image)


def open_pil_image(image: Image.Image) -> OpenedImage:
    """An image of Pillow, as RGB and upright."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow clips 16-bit gray when it converts
        wide = np.asarray(image).astype(np.float64)
        image = Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8))
    return opened_already(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


class _Jpeg(NamedTuple):
    """What is known of a JPEG before it is decoded."""

    height: int
    width: int
    height_field: int
    """Byte that its height starts at; 0 if not all rows need be there before the first can be decoded."""
    block: int
    """Rows that are coded together."""


def _plain_jpeg(data: bytes) -> _Jpeg | None:
    """Look at a JPEG that libjpeg-turbo decodes just as Pillow does; None for any other file."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    field = block = components = 0
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF and data[position + 1] != _START_OF_SCAN:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == _APP1:  # Exif or XMP: it may have to be turned
            with Image.open(io.BytesIO(data)) as image:
                if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
                    return None
        elif marker in _SEQUENTIAL:
            field, components = position + 5, data[position + 9]
            block = 8 * max(data[position + 11 + 3 * number] & 15 for number in range(components))
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace in ("CMYK", "YCCK"):  # Pillow knows how Adobe inverts them
        return None
    whole = b"\xff\xd9" in data[-1024:] and data[position + 4 : position + 5] == bytes([components])  # in one scan
    return _Jpeg(height, width, field if whole else 0, block)


_SEQUENTIAL, _START_OF_SCAN, _APP1 = (0xC0, 0xC1), 0xDA, 0xE1


def _decode_jpeg(data: bytes, jpeg: _Jpeg, rows: int) -> Tensor:
    """Decode so many rows with libjpeg-turbo; the rows below cost as much as those above.

    Measured on one core, 500x375 photos: simplejpeg 1.75 ms, OpenCV 1.8, torchvision 1.9, Pillow 2.6, all with equal
    pixels; simplejpeg 1.0 for the upper half. Faster upsampling, or scaling while decoding, changes them.
    """
    needed = (rows // jpeg.block + 2) * jpeg.block if jpeg.block else jpeg.height  # upsampling looks one row further
    try:
        if jpeg.height_field and needed < jpeg.height:
            head, tail = data[: jpeg.height_field], data[jpeg.height_field + 2 :]
            pixels = simplejpeg.decode_jpeg(head + needed.to_bytes(2, "big") + tail, "RGB", strict=False)
        else:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # damaged: Pillow forgives more
        with Image.open(io.BytesIO(data)) as image:
            return open_pil_image(image).decode(rows)
    return torch.from_numpy(pixels).permute(2, 0, 1)
