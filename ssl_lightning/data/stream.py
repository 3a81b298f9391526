"""Streams of images: sources without random access."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

from ssl_lightning.data.decoding import OpenedImage, open_example
from ssl_lightning.data.images import Images


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

    def first(self, count: int) -> Images:
        """The first images of the stream, the same on every process."""
        return StreamStart([*itertools.islice(self.examples(0, 0, 1), count)])


class StreamStart(Images):
    """Some examples of a stream, kept in memory."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def name(self, index: int) -> str:
        return self.examples[index].name

    def open(self, index: int) -> OpenedImage:
        return open_example(self.examples[index].image)
