"""Losses that distinguish an image from other images."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssl_lightning.distributed import gather, rank, reduced, world_size
from ssl_lightning.losses.precision import full_precision


@full_precision
def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int | None = None,
    decoupled: bool = False,
) -> Tensor:
    """Normalized temperature-scaled cross entropy: each row identifies its positive among all 2N - 1 other rows.

    Negatives come from all processes, with the exact gradient (the result is this process's share: average over
    processes). Source: Chen et al. 2020, SimCLR, eq. 1. Own code because lightly's loss masks rows with boolean
    indexing, which waits for the device, and builds the mask on the CPU when distributed.

    Args:
        z0: ``(B, D)`` projections of the first view, any scale.
        z1: ``(B, D)`` projections of the second view; row i of both is the same image.
        temperature: Divides the cosine similarities.
        reduction: ``mean`` over the 2N anchors, as in the paper; or ``sum`` of the means of both views, as in the
            released code (twice the value).
        chunk: Anchors per block of logits. Only one block is in memory at a time, and it is computed again for the
            gradient. None keeps all ``(2B, 2N)`` logits.
        decoupled: Leave the positive out of the denominator (Yeh et al. 2022, Decoupled Contrastive Learning, eq. 6):
            easy positives in a small batch then keep their gradient.

    Example:
        >>> z0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> z1 = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
        >>> nt_xent(z0, z1, temperature=0.5)
        tensor(0.6680)
        >>> nt_xent(z0, z1, temperature=0.5, reduction="sum")
        tensor(1.3361)
        >>> nt_xent(torch.ones(4, 3), torch.ones(4, 3), temperature=0.5)  # collapsed: ln 7
        tensor(1.9459)
        >>> nt_xent(torch.ones(4, 3), torch.ones(4, 3), temperature=0.5, decoupled=True)  # ln 6
        tensor(1.7918)
    """
    z0, z1 = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
    all0, all1 = gather(z0), gather(z1)  # (N, D)
    target = torch.arange(len(z0), device=z0.device) + rank() * len(z0)
    never = torch.full((), float("-inf"), dtype=z0.dtype, device=z0.device)

    def cross_entropy(anchors: Tensor, target: Tensor, positives: Tensor, others: Tensor) -> Tensor:
        across = anchors @ positives.T / temperature  # (C, N)
        within = anchors @ others.T / temperature  # (C, N)
        own = torch.arange(len(anchors), device=anchors.device)
        within = within.index_put((own, target), never)  # an image is not its own negative
        if decoupled:
            negatives = torch.cat([across.index_put((own, target), never), within], dim=1)
            return (negatives.logsumexp(1) - across[own, target]).sum()
        return F.cross_entropy(torch.cat([across, within], dim=1), target, reduction="sum")

    first = _mean_in_blocks(cross_entropy, chunk, z0, target, all1, all0)
    both = first + _mean_in_blocks(cross_entropy, chunk, z1, target, all0, all1)
    return both / 2 if reduction == "mean" else both


def _mean_in_blocks(
    summed: Callable[..., Tensor], chunk: int | None, anchors: Tensor, target: Tensor, *candidates: Tensor
) -> Tensor:
    """Mean of a loss over anchors, with the logits of only one block of anchors in memory at a time.

    Args:
        summed: The loss of some anchors with their targets and all candidates, summed.
        chunk: Anchors per block; None takes all at once and keeps their logits for the gradient.
        anchors: ``(B, D)``.
        target: ``(B,)``.
        candidates: ``(N, D)`` each.
    """
    if chunk is None:
        return summed(anchors, target, *candidates) / len(anchors)
    total = anchors.new_zeros(())
    for block in zip(anchors.split(chunk), target.split(chunk), strict=True):
        total = total + checkpoint(summed, *block, *candidates, use_reentrant=False, preserve_rng_state=False)
    return total / len(anchors)


@full_precision
def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Each query identifies its key among the negatives of a queue.

    Source: He et al. 2020, MoCo, eq. 1.

    Args:
        queries: ``(B, D)``, any scale.
        keys: ``(B, D)``, any scale; row i is the positive of query i.
        negatives: ``(K, D)`` with rows of unit norm.
        temperature: Divides the cosine similarities.

    Example:
        >>> queries, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
        >>> negatives = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> info_nce(queries, keys, negatives, temperature=0.2)  # cosines 0.6, 0, -1
        tensor(0.0489)
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys.detach(), dim=1)
    positive = (queries * keys).sum(1, keepdim=True)  # (B, 1)
    logits = torch.cat([positive, queries @ negatives.detach().T], dim=1) / temperature  # (B, 1 + K)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


@full_precision
def moco_v3(queries: Tensor, keys: Tensor, temperature: float, chunk: int | None = None) -> Tensor:
    """Each query identifies its key among the keys of the global batch: one direction, times 2 * temperature.

    Source: Chen et al. 2021, MoCo v3, algorithm 1.

    Args:
        queries: ``(B, D)`` of one view, any scale.
        keys: ``(B, D)`` of the other view, any scale; row i is the positive of query i.
        temperature: Divides the cosine similarities.
        chunk: Queries per block of the logits, as in ``nt_xent``.

    Example:
        >>> queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> keys = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
        >>> moco_v3(queries, keys, temperature=0.2)
        tensor(0.2628)
        >>> moco_v3(queries, keys, temperature=1.0)
        tensor(1.0186)
    """
    queries, keys = F.normalize(queries, dim=1), gather(F.normalize(keys.detach(), dim=1))
    target = torch.arange(len(queries), device=queries.device) + rank() * len(queries)

    def cross_entropy(queries: Tensor, target: Tensor, keys: Tensor) -> Tensor:
        return F.cross_entropy(queries @ keys.T / temperature, target, reduction="sum")  # of (C, N)

    return 2 * temperature * _mean_in_blocks(cross_entropy, chunk, queries, target, keys)


@full_precision
def nnclr(neighbors: Tensor, predictions: Tensor, temperature: float) -> Tensor:
    """Each neighbor of one view identifies the prediction of its image's other view in the global batch: one direction.

    Predictions come from all processes, with the exact gradient. Source: Dwibedi et al. 2021, NNCLR, eq. 4 and
    algorithm 1.

    Args:
        neighbors: ``(B, D)`` nearest neighbors of one view, any scale.
        predictions: ``(B, D)`` of the other view, any scale; row i belongs to neighbor i.
        temperature: Divides the cosine similarities.

    Example:
        >>> neighbors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> predictions = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
        >>> nnclr(neighbors, predictions, temperature=1.0)  # cosines 0.6, -0.8 and 0.8, 0.6
        tensor(0.5093)
    """
    neighbors, predictions = F.normalize(neighbors.detach(), dim=1), gather(F.normalize(predictions, dim=1))
    target = torch.arange(len(neighbors), device=neighbors.device) + rank() * len(neighbors)
    return F.cross_entropy(neighbors @ predictions.T / temperature, target)


@full_precision
def instance_discrimination(features: Tensor, memory: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Each feature identifies the row of its image among all rows of a memory.

    Source: Wu et al. 2018, NPID, eq. 2.

    Args:
        features: ``(B, D)`` of unit norm.
        memory: ``(M, D)``, one row for each image.
        indices: ``(B,)`` rows of the images.
        temperature: Divides the cosine similarities.

    Example:
        >>> memory = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> features, indices = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> instance_discrimination(features, memory, indices, temperature=1.0)  # ln(1 + 1/e)
        tensor(0.3133)
    """
    return F.cross_entropy(features @ memory.detach().T / temperature, indices)


@full_precision
def nce(features: Tensor, memory: Tensor, candidates: Tensor, temperature: float, normalizer: Tensor) -> Tensor:
    """Each feature distinguishes the row of its image from drawn rows: summed over rows, mean over features.

    Source: Wu et al. 2018, NPID, eq. 4 to 7, and its released code.

    Args:
        features: ``(B, D)`` of unit norm.
        memory: ``(M, D)``, one row for each image.
        candidates: ``(B, 1 + K)`` indices of rows: the image's own, then K drawn ones.
        temperature: Divides the cosine similarities.
        normalizer: Z, a scalar, see ``nce_normalizer``.

    Example:
        >>> memory = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]])
        >>> features, candidates = torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1, 2]])
        >>> nce(features, memory, candidates, temperature=1.442695, normalizer=torch.tensor(4.0))  # exp(1/1.442695) = 2
        tensor(1.5041)
    """
    return nce_of(_unnormalized(features, memory, candidates, temperature) / normalizer, len(memory))


@full_precision
def nce_of(probabilities: Tensor, images: int) -> Tensor:
    """Noise-contrastive estimation with uniform noise, mean over rows.

    Args:
        probabilities: ``(B, 1 + K)``: of the image itself, then of K drawn ones.
        images: Number of images that the noise is drawn from.

    Example:
        >>> nce_of(torch.tensor([[0.5, 0.25, 0.25]]), images=4)  # -ln 1/2 - 2 ln 2/3
        tensor(1.5041)
    """
    noise = (probabilities.shape[1] - 1) / images  # K / M
    of_data = probabilities[:, 0] / (probabilities[:, 0] + noise + 1e-7)
    of_noise = noise / (probabilities[:, 1:] + noise + 1e-7)
    return -(of_data.log() + of_noise.log().sum(1)).mean()


@full_precision
@torch.no_grad()
def nce_normalizer(features: Tensor, memory: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """Estimate Z, for which the probabilities of all images sum to 1, from the global batch.

    Source: Wu et al. 2018, NPID, eq. 8.

    Args:
        features: ``(B, D)`` of unit norm.
        memory: ``(M, D)``, one row for each image.
        candidates: ``(B, 1 + K)`` indices of rows.
        temperature: Divides the cosine similarities.

    Example:
        >>> memory = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]])
        >>> features, candidates = torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1, 2]])
        >>> nce_normalizer(features, memory, candidates, temperature=1.442695)  # 4 images * mean of 2, 1, 1
        tensor(5.3333)
    """
    mean = _unnormalized(features, memory, candidates, temperature).mean()
    return reduced(mean) / world_size() * len(memory)


def _unnormalized(features: Tensor, memory: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    rows = memory.detach()[candidates]  # (B, 1 + K, D)
    return (torch.einsum("bd,bkd->bk", features, rows) / temperature).exp()
