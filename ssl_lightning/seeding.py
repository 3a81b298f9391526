"""Libraries that draw from Python's and numpy's global generators, kept from disturbing others."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def generators_put_back() -> Iterator[None]:
    """Put Python's and numpy's global generators back afterwards; inside, timm may be seeded and draw."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
