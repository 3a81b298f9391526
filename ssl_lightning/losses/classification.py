"""Losses of pretext tasks whose classes are made from the images themselves."""

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

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))  # ln 4
        tensor(1.3863)
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()  # probabilities 3/4, 1/4 and 1/2, 1/2
        >>> cross_entropy(logits, torch.tensor([0, 1]))  # (ln 4/3 + ln 2) / 2
        tensor(0.4904)
    """
    return F.cross_entropy(logits, labels)


@full_precision
def beit(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy, mean over the masked patches of all processes, whose numbers of masked patches may differ.

    Source: Bao et al. 2022, BEiT, eq. 2.

    Args:
        logits: ``(M, K)`` of this process's M masked patches.
        tokens: ``(M,)`` visual tokens of the same patches.

    Example:
        >>> beit(torch.zeros(3, 8192), torch.tensor([5, 0, 8191]))  # equal logits: ln 8192
        tensor(9.0109)
    """
    count = reduced(torch.full((), float(len(tokens)), device=logits.device)) / world_size()
    return F.cross_entropy(logits, tokens, reduction="sum") / count


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is their label's.

    Args:
        logits: ``(B, K)``.
        labels: ``(B,)`` classes.

    Example:
        >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        tensor(0.5000)
    """
    return (logits.argmax(1) == labels).float().mean()
