"""Choosing images by their features: near-duplicates, diverse subsets, balanced sizes of clusters."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 4096  # of similarities at once


@torch.no_grad()
def semantic_duplicates(embeddings: Tensor, epsilon: float) -> Tensor:
    """Which images are near-duplicates of an earlier image: those with a cosine similarity above 1 - epsilon.

    Compares with all earlier images, also with removed ones, as in the released code. Source: Abbas et al. 2023,
    SemDeDup, section 3.

    Args:
        embeddings: ``(N, D)``, any scale, the images to prefer first.
        epsilon: Between 0 and 2. A larger value removes more.

    Returns:
        ``(N,)`` bool, true for an image to remove.
    """
    unit = F.normalize(_wide(embeddings), dim=1)
    removed = [torch.zeros(0, dtype=torch.bool, device=unit.device)]
    for start in range(0, len(unit), _ROWS):
        rows = unit[start : start + _ROWS]
        near = rows @ unit[: start + len(rows)].T > 1 - epsilon  # (rows, start + rows)
        removed.append(near.tril(start - 1).any(dim=1))  # only earlier images count
    return torch.cat(removed)


@torch.no_grad()
def k_center(embeddings: Tensor, count: int, first: int | None = None) -> Tensor:
    """Choose diverse images greedily: each the farthest from its nearest image chosen before.

    The largest distance of any image to a chosen one is at most twice the smallest possible. Outliers are chosen
    early, so remove duplicates and damaged images before. Source: Gonzalez 1985; Sener & Savarese 2018.

    Args:
        embeddings: ``(N, D)``. Distances are Euclidean.
        count: Number of images to choose.
        first: Index of the first image. None takes the image nearest to the mean.

    Returns:
        ``(count,)`` indices in the order of choice. Of equally far images the first in the data is chosen.
    """
    points = _wide(embeddings)
    if first is None:
        first = int((points - points.mean(0)).norm(dim=1).argmin())
    chosen = [first]
    nearest = (points - points[first]).norm(dim=1)  # (N,)
    while len(chosen) < min(count, len(points)):
        nearest[chosen[-1]] = -1  # never twice, even among equal images
        farthest = int((nearest == nearest.max()).nonzero()[0])
        chosen.append(farthest)
        nearest = torch.minimum(nearest, (points - points[farthest]).norm(dim=1))
    return torch.tensor(chosen, device=points.device)


def balanced_sizes(sizes: Sequence[int], target: int, seed: int = 0) -> list[int]:
    """How many images to take of each cluster, so that clusters are as equal as their sizes allow.

    Each cluster gives ``min(size, c)`` for the largest c that does not pass the target; the remainder comes, one each,
    from random clusters larger than c. Source: Vo et al. 2024, Automatic Data Curation, section 3.3.

    Args:
        sizes: Number of images of each cluster.
        target: Number of images to take in all; all are taken if there are fewer.
        seed: For the random clusters.
    """
    sizes = [int(size) for size in sizes]
    limit = 0
    while limit < max(sizes, default=0) and sum(min(size, limit + 1) for size in sizes) <= target:
        limit += 1
    taken = [min(size, limit) for size in sizes]
    larger = [index for index, size in enumerate(sizes) if size > limit]
    order = torch.randperm(len(larger), generator=torch.Generator().manual_seed(seed)).tolist()
    for place in order[: max(0, target - sum(taken))]:
        taken[larger[place]] += 1
    return taken


def _wide(embeddings: Tensor) -> Tensor:
    return embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings
