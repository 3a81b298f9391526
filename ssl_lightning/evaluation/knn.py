"""Weighted k-nearest-neighbor classification."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.errors import UserError

SIMILARITIES_AT_ONCE = 2**26  # 256 MB in float32


@torch.no_grad()
def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Classify by the k nearest training features, each voting with exp(cosine similarity / temperature).

    Source: Wu et al. 2018, Instance Discrimination, section 3.4; defaults as in DINO. Computed in at least float32.

    Args:
        train_features: ``(N, D)``, any scale.
        train_labels: ``(N,)`` classes from 0 to num_classes - 1.
        features: ``(M, D)``, any scale.
        num_classes: Number of classes.
        k: Number of neighbors. All training features vote if there are fewer.
        temperature: Divides the cosine similarities.

    Returns:
        ``(M,)`` predicted classes.

    Raises:
        UserError: There are no training features.
    """
    return knn_grid(train_features, train_labels, features, num_classes, [k], [temperature])[k, temperature]


@torch.no_grad()
def knn_grid(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    num_classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> dict[tuple[int, float], Tensor]:
    """``knn_predict`` for each k and temperature, with a single search for neighbors.

    Args:
        train_features: As for ``knn_predict``.
        train_labels: As for ``knn_predict``.
        features: As for ``knn_predict``.
        num_classes: Number of classes.
        ks: Values of k.
        temperatures: Values of the temperature.

    Returns:
        ``(M,)`` predicted classes for each pair of k and temperature.

    Raises:
        UserError: There are no training features.
    """
    predictions: dict[tuple[int, float], list[Tensor]] = {
        pair: [train_labels.new_empty(0)] for pair in itertools.product(ks, temperatures)
    }
    for _, votes_of in _votes(train_features, train_labels, features, num_classes, ks, temperatures):
        for pair, votes in votes_of.items():
            predictions[pair].append(votes.argmax(dim=1))
    return {pair: torch.cat(parts) for pair, parts in predictions.items()}


class Votes(NamedTuple):
    """What the nearest training features vote for."""

    predicted: Tensor
    """``(M,)`` classes, as ``knn_predict`` returns them."""
    share: Tensor
    """``(M,)`` share of the votes for that class, from 0 to 1."""
    nearest: Tensor
    """``(M, n)`` places of the nearest training features, the nearest first."""


@torch.no_grad()
def knn_votes(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    num_classes: int,
    k: int,
    temperature: float,
    num_nearest: int,
) -> Votes:
    """``knn_predict``, with how sure each prediction is and the nearest training features.

    Args:
        train_features: As for ``knn_predict``.
        train_labels: As for ``knn_predict``.
        features: As for ``knn_predict``.
        num_classes: Number of classes.
        k: Number of neighbors.
        temperature: Divides the cosine similarities.
        num_nearest: Number of nearest training features to return; at most those that vote.

    Raises:
        UserError: There are no training features.
    """
    empty = train_labels.new_empty(0)
    parts = [Votes(empty, features.new_empty(0), empty.view(0, min(k, num_nearest, len(train_labels))))]
    for neighbors, votes_of in _votes(train_features, train_labels, features, num_classes, [k], [temperature]):
        (votes,) = votes_of.values()
        most, predicted = votes.max(dim=1)
        parts.append(Votes(predicted, most / votes.sum(dim=1), neighbors[:, :num_nearest]))
    return Votes(*map(torch.cat, zip(*parts, strict=True)))


def _votes(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    num_classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> Iterator[tuple[Tensor, dict[tuple[int, float], Tensor]]]:
    """For some features at a time: the nearest places ``(m, k)``, and votes ``(m, C)`` for each k and temperature."""
    if len(train_features) == 0:
        raise UserError("kNN needs at least one labeled training image; there are none.")
    wide = torch.promote_types(train_features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        bank = F.normalize(train_features.to(wide), dim=1).T  # (D, N)
        queries = F.normalize(features.to(wide), dim=1)  # (M, D)
        for chunk in queries.split(max(1, SIMILARITIES_AT_ONCE // bank.shape[1])):
            similarities, neighbors = (chunk @ bank).topk(min(max(ks), bank.shape[1]), dim=1)  # (m, k), nearest first
            votes_of = {}
            for k, temperature in itertools.product(ks, temperatures):
                # relative to the nearest, because exp(1 / temperature) may overflow; the result of the vote is the same
                weights = ((similarities[:, :k] - similarities[:, :1]) / temperature).exp()
                votes = weights.new_zeros(len(chunk), num_classes)
                votes_of[k, temperature] = votes.scatter_add_(1, train_labels[neighbors[:, :k]], weights)
            yield neighbors, votes_of
