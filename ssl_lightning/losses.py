"""Loss functions of the methods: pure functions of tensors, in float32 or wider, exact across processes.

What a paper stops the gradient at (keys, targets, assignments, the teacher) is detached here. Own code beside
lightly's: its losses carry state that is not saved (memory bank, centre), and wait on the device for indices.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssl_lightning.distributed import gather, rank, reduced, world_size
from ssl_lightning.heads import patchify


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
def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int | None = None,
) -> Tensor:
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
        chunk: Anchors per block of the logits: only one block is held at a time, and computed again for the gradient.
            None holds all ``(2B, 2N)`` of them.
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
        return F.cross_entropy(torch.cat([across, within], dim=1), target, reduction="sum")

    first = _mean_in_blocks(cross_entropy, chunk, z0, target, all1, all0)
    both = first + _mean_in_blocks(cross_entropy, chunk, z1, target, all0, all1)
    return both / 2 if reduction == "mean" else both


def _mean_in_blocks(
    summed: Callable[..., Tensor], chunk: int | None, anchors: Tensor, target: Tensor, *candidates: Tensor
) -> Tensor:
    """Mean of a loss over anchors that never holds the logits of more than one block of them.

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


@_full_precision
def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Each query finds its key among the negatives of a queue.

    Source: He et al. 2020, MoCo, eq. 1.

    Args:
        queries: ``(B, D)``, any scale.
        keys: ``(B, D)``, any scale; row i is the positive of query i.
        negatives: ``(K, D)`` with rows of unit norm.
        temperature: Divides the cosine similarities.
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys.detach(), dim=1)
    positive = (queries * keys).sum(1, keepdim=True)  # (B, 1)
    logits = torch.cat([positive, queries @ negatives.detach().T], dim=1) / temperature  # (B, 1 + K)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


@_full_precision
def moco_v3(queries: Tensor, keys: Tensor, temperature: float, chunk: int | None = None) -> Tensor:
    """Each query finds its key among those of the global batch: one direction, times 2 * temperature.

    Source: Chen et al. 2021, MoCo v3, algorithm 1.

    Args:
        queries: ``(B, D)`` of one view, any scale.
        keys: ``(B, D)`` of the other view, any scale; row i is the positive of query i.
        temperature: Divides the cosine similarities.
        chunk: Queries per block of the logits, as in ``nt_xent``.
    """
    queries, keys = F.normalize(queries, dim=1), gather(F.normalize(keys.detach(), dim=1))
    target = torch.arange(len(queries), device=queries.device) + rank() * len(queries)

    def cross_entropy(queries: Tensor, target: Tensor, keys: Tensor) -> Tensor:
        return F.cross_entropy(queries @ keys.T / temperature, target, reduction="sum")  # of (C, N)

    return 2 * temperature * _mean_in_blocks(cross_entropy, chunk, queries, target, keys)


@_full_precision
def byol(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of unit vectors, 2 - 2 cos: one direction, mean over rows.

    Source: Grill et al. 2020, BYOL, eq. 2.

    Args:
        predictions: ``(B, D)`` of the online network, any scale.
        targets: ``(B, D)`` of the teacher on the other view, any scale.
    """
    return 2 + 2 * negative_cosine(predictions, targets)


@_full_precision
def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Negative cosine similarity, mean over rows.

    Source: Chen & He 2021, SimSiam, eq. 1.

    Args:
        predictions: ``(B, D)``, any scale.
        targets: ``(B, D)``, any scale.
    """
    return -(F.normalize(predictions, dim=1) * F.normalize(targets.detach(), dim=1)).sum(1).mean()


@_full_precision
@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign the global batch to prototypes, all of them about equally often (Sinkhorn-Knopp).

    Source: Caron et al. 2020, SwAV, section 3.1 and its released code.

    Args:
        scores: ``(B, K)``, this process's rows.
        epsilon: Smoothness: scores are divided by it.
        iterations: Normalisations over prototypes and rows.

    Returns:
        ``(B, K)``; each row sums to 1.
    """
    assignments = torch.exp((scores - reduced(scores.max(), "max")) / epsilon)
    rows, prototypes = len(scores) * world_size(), scores.shape[1]
    assignments /= reduced(assignments.sum())
    for _ in range(iterations):
        assignments /= reduced(assignments.sum(0)) * prototypes
        assignments /= assignments.sum(1, keepdim=True) * rows
    return assignments * rows


@_full_precision
def swav(scores: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """Predict the assignment of each of the first crops from every other crop of the image.

    Source: Caron et al. 2020, SwAV, eq. 2 and section 3.2.

    Args:
        scores: ``(V, B, K)`` cosine similarities of all crops to the prototypes.
        assignments: ``(A, B, K)`` of the first A crops.
        temperature: Divides the scores.
    """
    return _cross_views(F.log_softmax(scores / temperature, dim=-1), assignments.detach())


@_full_precision
def dino(
    student: Tensor, teacher: Tensor, center: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Predict the teacher's distribution on each global crop from every other crop of the image.

    Source: Caron et al. 2021, DINO, eq. 3 and algorithm 1.

    Args:
        student: ``(V, B, K)`` logits of all crops.
        teacher: ``(G, B, K)`` logits of the global crops, which come first.
        center: ``(K,)`` subtracted from the teacher's logits.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's centred logits.
    """
    targets = F.softmax((teacher.detach() - center) / teacher_temperature, dim=-1)
    return _cross_views(F.log_softmax(student / student_temperature, dim=-1), targets)


def _cross_views(log_predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over all pairs of a target and another view.

    Summed over views first: the work of all V * A pairs for that of V + A.

    Args:
        log_predictions: ``(V, B, K)``.
        targets: ``(A, B, K)`` of the first A views.
    """
    across = (targets.sum(0) * log_predictions.sum(0)).sum()
    within = (targets * log_predictions[: len(targets)]).sum()
    pairs = len(targets) * (len(log_predictions) - 1)
    return (within - across) / (pairs * targets.shape[1])


@_full_precision
def mae(predictions: Tensor, images: Tensor, mask: Tensor, patch_size: int, normalize: bool) -> Tensor:
    """Mean squared error of the pixels of masked patches.

    Source: He et al. 2022, MAE, section 3 and its released code.

    Args:
        predictions: ``(B, N, P*P*3)``.
        images: ``(B, 3, S, S)``.
        mask: ``(B, N)``, 1 where the patch was masked.
        patch_size: Side P of the patches in pixels.
        normalize: Whether each target patch is normalised by its own mean and (unbiased) variance.
    """
    targets = patchify(images, patch_size)
    if normalize:
        variance, mean = torch.var_mean(targets, dim=-1, keepdim=True)
        targets = (targets - mean) / (variance + 1e-6).sqrt()
    errors = (predictions - targets).square().mean(-1)  # (B, N)
    return (errors * mask).sum() / mask.sum()


def entropy(assignments: Tensor) -> Tensor:
    """Mean entropy of assignments, from 0 (one-hot) to ln K.

    Args:
        assignments: ``(B, K)``, rows summing to 1.
    """
    return -torch.xlogy(assignments, assignments).sum(1).mean()


def share_in_use(assignments: Tensor) -> Tensor:
    """Share of the prototypes that are the first of some row, of as many as there can be.

    Args:
        assignments: ``(B, K)``.
    """
    return assignments.argmax(1).unique().numel() / torch.tensor(float(min(assignments.shape)))
