"""Losses of pretext tasks: the classes are made of the images themselves."""

import torch.nn.functional as F
from torch import Tensor

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


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the rows whose largest logit is that of their class.

    Args:
        logits: ``(B, K)``.
        labels: ``(B,)`` classes.
    """
    return (logits.argmax(1) == labels).float().mean()
