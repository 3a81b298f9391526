"""Loss functions of the methods: pure functions of tensors, in float32 or wider, exact across processes."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.distributed import gather, rank


def _full_precision(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a loss outside autocast, with half-precision inputs widened: exp(1/0.05) overflows float16."""

    def widen(value: Any) -> Any:
        half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if half else value

    @functools.wraps(loss)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device.type, enabled=False):
            return loss(*map(widen, args), **{key: widen(value) for key, value in kwargs.items()})

    return wrapped


@_full_precision
def nt_xent(z0: Tensor, z1: Tensor, temperature: float, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Normalised temperature-scaled cross entropy: each row finds its positive among all 2N - 1 other rows.

    Negatives come from all processes, with the exact gradient (the result is this process's share: average over
    processes). Source: Chen et al. 2020, SimCLR, eq. 1; own code because lightly's masks rows with boolean indexing,
    which waits on the device, and builds the mask on the CPU when distributed.

    Args:
        z0: ``(B, D)`` projections of the first view, any scale.
        z1: ``(B, D)`` projections of the second view; row i of both is the same image.
        temperature: Divides the cosine similarities.
        reduction: ``mean`` over the 2N anchors as in the paper, or the ``sum`` of the means of both views as in the
            released code (twice the value).
    """
    z0, z1 = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
    all0, all1 = gather(z0), gather(z1)  # (N, D)
    own = torch.arange(len(z0), device=z0.device)
    target = own + rank() * len(z0)
    never = torch.full((), float("-inf"), dtype=z0.dtype, device=z0.device)

    def cross_entropy(anchors: Tensor, positives: Tensor, others: Tensor) -> Tensor:
        across = anchors @ positives.T / temperature  # (B, N)
        within = anchors @ others.T / temperature  # (B, N)
        within = within.index_put((own, target), never)  # an image is not its own negative
        return F.cross_entropy(torch.cat([across, within], dim=1), target)

    both = cross_entropy(z0, all1, all0) + cross_entropy(z1, all0, all1)
    return both / 2 if reduction == "mean" else both
