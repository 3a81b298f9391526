"""Computing losses and measures in full precision."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def full_precision(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a loss to run outside autocast, with half-precision inputs in float32: exp(1/0.05) overflows float16.

    Args:
        loss: Any function of tensors.

    Example:
        >>> @full_precision
        ... def exponential(scores, epsilon):
        ...     return (scores / epsilon).exp()
        >>> exponential(torch.ones(2, dtype=torch.float16), epsilon=0.05)
        tensor([4.8517e+08, 4.8517e+08])
    """

    def widen(value: Any) -> Any:
        half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if half else value

    @functools.wraps(loss)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device.type, enabled=False):
            return loss(*map(widen, args), **{key: widen(value) for key, value in kwargs.items()})

    return wrapped


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float32, or as it is if its numbers are as wide.

    Args:
        tensor: Any numbers.
    """
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
