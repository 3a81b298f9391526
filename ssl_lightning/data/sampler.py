"""The order of the data: batches fixed by (seed, epoch), for any number of processes and after any interruption."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler, SequentialSampler

BatchKey = tuple[int, NDArray[np.int64]]
"""Epoch and image indices of a batch: what a data set needs to make it."""


class ShuffledBatches(Sampler[BatchKey]):
    """A permutation of the data for each epoch, cut into global batches, of which each process takes its part.

    An epoch ends with the last full global batch. Keys carry the epoch because persistent workers do not know it.

    Args:
        size: Number of images.
        batch_size: Images per batch and process.
        seed: Seed of the permutations.
        rank: Index of this process.
        world_size: Number of processes.
        order: Makes the order of an epoch from a generator. None means a random permutation.

    Attributes:
        epoch: Epoch of the next pass.
        start: Number of batches to skip in the next pass, because a resumed run has done them.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        order: Callable[[np.random.Generator], NDArray[np.int64]] | None = None,
    ) -> None:
        self.order = order or (lambda random: random.permutation(size))
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[BatchKey]:
        return self._batches()

    def _batches(self, order_of: int | None = None) -> Iterator[BatchKey]:
        order_of = self.epoch if order_of is None else order_of  # not before the first batch is asked for
        order = self.order(np.random.Generator(np.random.Philox(key=[self.seed, order_of])))
        epoch, start, self.start = self.epoch, self.start, 0
        for batch in range(start, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield epoch, order[first : first + self.batch_size]


class RepeatedBatches(ShuffledBatches, SequentialSampler):  # Lightning changes no SequentialSampler
    """The batches of the first epoch in every epoch, with other views: for ``trainer.overfit_batches``."""

    def __iter__(self) -> Iterator[Any]:
        return self._batches(0)


class OrderedBatches(SequentialSampler):
    """The given images once each, in order, divided among the processes without repeats.

    Args:
        indices: The images to visit.
        batch_size: Images per batch and process.
        rank: Index of this process.
        world_size: Number of processes.
        epochs: Number of times that each batch comes, each with the random numbers of another epoch.
    """

    def __init__(
        self, indices: NDArray[np.int64], batch_size: int, rank: int = 0, world_size: int = 1, epochs: int = 1
    ) -> None:
        self.indices, self.batch_size, self.epochs = indices[rank::world_size], batch_size, epochs

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size) * self.epochs

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self.indices), self.batch_size):
            for epoch in range(self.epochs):
                yield epoch, self.indices[first : first + self.batch_size]


def spread(indices: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """``count`` of the indices, evenly spread.

    Args:
        indices: ``(N,)``, with N at least ``count``.
        count: How many to take.
    """
    return indices[np.arange(count) * len(indices) // count]
