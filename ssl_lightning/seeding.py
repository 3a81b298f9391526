"""Random numbers that depend only on the seed and the step, not on what was drawn before."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ssl_lightning.backbones.drop_path import DropPath
from ssl_lightning.backbones.token_dropout import TokenDropout


class StepRandomness:
    """The random numbers of a training step: a function of the seed, the step and the batch only.

    They are the same on every process and after a resume. Masks and drop path are drawn for the global batch, of which
    each process takes its rows; the masks of dropout repeat on every process.

    Attributes:
        seed: Seed of the training; None before its start.
        drop_paths: Layers of stochastic depth that must know how many images a batch has.
        token_dropouts: Layers that drop patches, likewise; they draw from ``generator``.
        generator: Generator on the CPU from which masks are drawn; None outside a step.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.drop_paths: Sequence[DropPath] = ()
        self.token_dropouts: Sequence[TokenDropout] = ()
        self.generator: torch.Generator | None = None

    @contextmanager
    def of_batch(self, step: int, batch_idx: int, images: int) -> Iterator[None]:
        """Seed ``generator`` and torch's own generators.

        Args:
            step: Optimizer steps done.
            batch_idx: Number of the batch in the epoch.
            images: Images of this process in the batch.
        """
        place = (self.seed or 0, step, batch_idx)
        self.generator = torch.Generator().manual_seed(seed_of(*place))
        torch.manual_seed(seed_of(*place, 1))
        for drop_path in self.drop_paths:
            drop_path.batch_size = images
        for token_dropout in self.token_dropouts:
            token_dropout.batch_size, token_dropout.generator = images, self.generator
        try:
            yield
        finally:
            self.generator = None
            for token_dropout in self.token_dropouts:
                token_dropout.generator = None


def seed_of(*numbers: int) -> int:
    """A single seed from several numbers.

    Args:
        numbers: They determine the seed.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def generators_put_back() -> Iterator[None]:
    """Restore Python's and numpy's global generators afterwards; inside, timm may be seeded and draw."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the global generators of Python, of numpy and of torch on the CPU, and restore them afterwards.

    Args:
        numbers: They determine the seed.
    """
    seed, state = seed_of(*numbers), torch.get_rng_state()
    with generators_put_back():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(state)
