"""Losses of pretext tasks: the classes are made of the images themselves."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.distributed import reduced, world_size
from ssl_lightning.losses.precision import full_precision


@full_precision
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, mean over rows.

    Sources: Gidaris et al. 2018, RotNet, eq. 2; Noroozi & Favaro 2016, Jigsaw.

    Args:
        logits: ``(B, K)``.
        labels: ``(B,)`` classes.
    """
    return F.cross_entropy(logits, labels)


@full_precision
def beit(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy, mean over the masked patches of all processes, which may have different numbers of them.

    Source: Bao et al. 2022, BEiT, eq. 2.

    Args:
        logits: ``(M, K)`` of this process's M masked patches.
        tokens: ``(M,)``.
    """
    count = reduced(torch.full((), float(len(tokens)), device=logits.device)) / world_size()
    return F.cross_entropy(logits, tokens, reduction="sum") / count


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the rows whose largest logit is that of their class.

    Args:
        logits: ``(B, K)``.
        labels: ``(B,)`` classes.
    """
    return (logits.argmax(1) == labels).float().mean()
