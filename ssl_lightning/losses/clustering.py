"""Losses that assign images to prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.distributed import reduced, world_size
from ssl_lightning.losses.precision import full_precision


@full_precision
@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, uneven: bool = False) -> Tensor:
    """Assign the global batch to prototypes, all of them about equally often (Sinkhorn-Knopp).

    Source: Caron et al. 2020, SwAV, section 3.1 and its released code.

    Args:
        scores: ``(B, K)``, this process's rows.
        epsilon: Smoothness: scores are divided by it.
        iterations: Normalisations over prototypes and rows.
        uneven: Whether processes may have different numbers of rows, or none.

    Returns:
        ``(B, K)``; each row sums to 1.
    """
    largest = scores.max() if len(scores) else scores.new_tensor(float("-inf"))
    assignments = torch.exp((scores - reduced(largest, "max")) / epsilon)
    rows: int | Tensor = len(scores) * world_size()
    if uneven:
        rows = reduced(torch.tensor(len(scores), device=scores.device))
    prototypes = scores.shape[1]
    assignments /= reduced(assignments.sum())
    for _ in range(iterations):
        assignments /= reduced(assignments.sum(0)) * prototypes
        assignments /= assignments.sum(1, keepdim=True) * rows
    return assignments * rows


@full_precision
def cross_view(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Predict the distribution of each of the first views from every other view: mean over these pairs and images.

    Summed over views first: the work of V + A views instead of V * A pairs. Source: Caron et al. 2021, DINO,
    algorithm 1.

    Args:
        logits: ``(V, B, K)`` of all views.
        targets: ``(A, B, K)`` distributions of the first A views.
        temperature: Divides the logits.
    """
    predictions, targets = F.log_softmax(logits / temperature, dim=-1), targets.detach()
    across = (targets.sum(0) * predictions.sum(0)).sum()
    within = (targets * predictions[: len(targets)]).sum()
    pairs = len(targets) * (len(predictions) - 1)
    return (within - across) / (pairs * targets.shape[1])


@full_precision
def swav(scores: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """Predict the assignment of each of the first crops from every other crop of the image.

    Source: Caron et al. 2020, SwAV, eq. 2 and section 3.2.

    Args:
        scores: ``(V, B, K)`` cosine similarities of all crops to the prototypes.
        assignments: ``(A, B, K)`` of the first A crops.
        temperature: Divides the scores.
    """
    return cross_view(scores, assignments, temperature)


@full_precision
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
    return cross_view(student, targets, student_temperature)


@full_precision
def deepcluster_v2(scores: Tensor, clusters: Tensor, temperature: float) -> Tensor:
    """Predict the image's cluster in each set from every crop.

    Source: Caron et al. 2020, SwAV, appendix on DeepCluster-v2 and its released code.

    Args:
        scores: ``(H, V, B, K)`` cosine similarities of all crops to the prototypes of H sets.
        clusters: ``(H, B)`` index of the image's prototype in each set.
        temperature: Divides the scores.
    """
    targets = clusters[:, None].expand(scores.shape[:-1])  # (H, V, B)
    return F.cross_entropy((scores / temperature).flatten(0, 2), targets.flatten())


@full_precision
def ibot(student: Tensor, assignments: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Predict the teacher's distribution on masked patches: mean over the masked patches of an image, then over images.

    Source: Zhou et al. 2022, iBOT, eq. 2 and its released code.

    Args:
        student: ``(M, K)`` logits of the masked patches of all images.
        assignments: ``(M, K)``, the teacher's distributions on the same patches.
        counts: ``(M,)``, what each patch is divided by: masked patches of its image * images. Images without masked
            patches count as images.
        temperature: Divides the student's logits.
    """
    errors = -(assignments.detach() * F.log_softmax(student / temperature, dim=-1)).sum(-1)  # (M,)
    return (errors / counts).sum()


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
