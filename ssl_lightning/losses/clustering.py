"""Losses that assign images to prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.distributed import reduced, world_size
from ssl_lightning.losses.precision import full_precision


@full_precision
@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, uneven: bool = False) -> Tensor:
    """Assign the global batch to prototypes so that all prototypes are used about equally often (Sinkhorn-Knopp).

    Source: Caron et al. 2020, SwAV, section 3.1 and its released code.

    Args:
        scores: ``(B, K)``, this process's rows.
        epsilon: Smoothness: scores are divided by it.
        iterations: Number of normalizations, each over prototypes and then over rows.
        uneven: Whether processes may have different numbers of rows, or none.

    Returns:
        ``(B, K)``; each row sums to 1.

    Example:
        >>> scores = torch.tensor([[1.0, 0.0], [0.9, 0.3], [0.5, 0.4]])
        >>> sinkhorn(scores, epsilon=0.5, iterations=3)
        tensor([[0.7030, 0.2970],
                [0.5155, 0.4845],
                [0.2813, 0.7187]])
        >>> sinkhorn(scores, epsilon=0.5, iterations=3).sum(0)
        tensor([1.4998, 1.5002])
    """
    largest = scores.max() if len(scores) else scores.new_full((), float("-inf"))
    assignments = torch.exp((scores - reduced(largest, "max")) / epsilon)
    rows: int | Tensor = len(scores) * world_size()
    if uneven:
        rows = reduced(torch.full((), len(scores), device=scores.device))
    prototypes = scores.shape[1]
    assignments /= reduced(assignments.sum())
    for _ in range(iterations):
        assignments /= reduced(assignments.sum(0)) * prototypes
        assignments /= assignments.sum(1, keepdim=True) * rows
    return assignments * rows


@full_precision
@torch.no_grad()
def positionwise_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign patches to clusters so that, at each position, all clusters are used about equally often.

    Each position is normalized by itself over the global batch, and each cluster is shifted by its own maximum: with
    one shift for all, clusters far below the largest score would underflow. Source: Darcet et al. 2025, CAPI, section
    3.1 and its released code.

    Args:
        scores: ``(P, B, K)`` of P positions, this process's images.
        epsilon: Smoothness: scores are divided by it.
        iterations: Number of normalizations, each over images and then over clusters.

    Returns:
        ``(P, B, K)``; each row sums to 1.

    Example:
        >>> positionwise_sinkhorn(torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]), epsilon=1.0, iterations=3)
        tensor([[[0.7298, 0.2702],
                 [0.4984, 0.5016],
                 [0.2677, 0.7323]]])
    """
    scores = scores / epsilon
    assignments = (scores - reduced(scores.amax(1, keepdim=True), "max") + 50).exp()  # far above what is added below
    for _ in range(iterations):
        assignments = assignments / (reduced(assignments.sum(1, keepdim=True)) + 1e-8)
        assignments = assignments / (assignments.sum(2, keepdim=True) + 1e-8)
    return assignments


@full_precision
def capi(scores: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """Predict the assignment of each patch: mean cross entropy over all patches.

    It trains the clusters on the teacher's patches, and the student on the patches that it predicts. Source: Darcet et
    al. 2025, CAPI, section 3.

    Args:
        scores: ``(..., K)`` of the patches to the clusters.
        assignments: ``(..., K)`` of the same patches; each row sums to 1.
        temperature: Divides the scores.

    Example:
        >>> assignments = torch.tensor([[0.7, 0.3], [0.5, 0.5]])
        >>> capi(torch.tensor([[0.2, 0.0], [0.0, 0.0]]), assignments, temperature=0.1)  # (ln(1 + e^2) - 1.4 + ln 2) / 2
        tensor(0.7100)
    """
    return -(assignments.detach() * F.log_softmax(scores / temperature, dim=-1)).sum(-1).mean()


@full_precision
def cross_view(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Predict the distribution of each of the first views from every other view: mean over these pairs and images.

    Source: Caron et al. 2021, DINO, algorithm 1.

    Args:
        logits: ``(V, B, K)`` of all views.
        targets: ``(A, B, K)`` distributions of the first A views.
        temperature: Divides the logits.

    Example:
        >>> logits = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # 2 views of 1 image
        >>> targets = torch.tensor([[[1.0, 0.0]]])  # of the first view, which the second predicts: ln(1 + e)
        >>> cross_view(logits, targets, temperature=1.0)
        tensor(1.3133)
    """
    return -mean_over_pairs(F.log_softmax(logits / temperature, dim=-1), targets.detach())


def mean_over_pairs(views: Tensor, targets: Tensor) -> Tensor:
    """Product of the target of each of the first views and every other view: mean over these pairs and images.

    Summed over views first: the work of V + A views instead of V * A pairs.

    Args:
        views: ``(V, B, K)`` of all views.
        targets: ``(A, B, K)`` of the first A views.

    Example:
        >>> views = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]], [[0.0, 1.0]]])  # 3 views of 1 image
        >>> mean_over_pairs(views, views[:1])  # (0.6 + 0) / 2
        tensor(0.3000)
    """
    across = (targets.sum(0) * views.sum(0)).sum()
    within = (targets * views[: len(targets)]).sum()
    pairs = len(targets) * (len(views) - 1)
    return (across - within) / (pairs * targets.shape[1])


@full_precision
def swav(scores: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """Predict the assignment of each of the first crops from every other crop of the image.

    Source: Caron et al. 2020, SwAV, eq. 2 and section 3.2.

    Args:
        scores: ``(V, B, K)`` cosine similarities of all crops to the prototypes.
        assignments: ``(A, B, K)`` of the first A crops.
        temperature: Divides the scores.

    Example:
        >>> assignments = sinkhorn(torch.tensor([[1.0, 0.0], [0.9, 0.3], [0.5, 0.4]]), epsilon=0.5, iterations=3)
        >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
        >>> swav(scores.expand(2, 3, 2), assignments.expand(2, 3, 2), temperature=0.1)  # two equal crops of 3 images
        tensor(2.0548)
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
        teacher_temperature: Divides the teacher's centered logits.

    Example:
        >>> student = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]]])  # 3 crops of 1 image
        >>> teacher = torch.tensor([[[0.5, 0.3]], [[0.1, 0.2]]])  # the first 2 are global
        >>> dino(student, teacher, torch.zeros(2), student_temperature=0.1, teacher_temperature=0.04)
        tensor(5.1402)
    """
    targets = F.softmax((teacher.detach() - center) / teacher_temperature, dim=-1)
    return cross_view(student, targets, student_temperature)


@full_precision
def deepcluster_v2(scores: Tensor, clusters: Tensor, temperature: float) -> Tensor:
    """Predict the image's cluster in each set of prototypes from every crop.

    Source: Caron et al. 2020, SwAV, appendix on DeepCluster-v2 and its released code.

    Args:
        scores: ``(H, V, B, K)`` cosine similarities of all crops to the prototypes of H sets.
        clusters: ``(H, B)`` index of the image's prototype in each set.
        temperature: Divides the scores.

    Example:
        >>> scores = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])  # 1 set, 2 crops of 1 image, 2 prototypes
        >>> deepcluster_v2(scores, clusters=torch.tensor([[0]]), temperature=1.0)  # (ln(1 + 1/e) + ln 2) / 2
        tensor(0.5032)
    """
    targets = clusters[:, None].expand(scores.shape[:-1])  # (H, V, B)
    return F.cross_entropy((scores / temperature).flatten(0, 2), targets.flatten())


@full_precision
def ibot(student: Tensor, assignments: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Predict the teacher's distribution on masked patches: mean over the masked patches of an image, then over images.

    Source: Zhou et al. 2022, iBOT, eq. 2 and its released code.

    Args:
        student: ``(M, K)`` logits of the masked patches of all images.
        assignments: ``(M, K)`` distributions of the teacher on the same patches.
        counts: ``(M,)`` divisor of each patch: number of masked patches in its image, times number of images. Images
            without masked patches count as images.
        temperature: Divides the student's logits.

    Example:
        >>> student = torch.tensor([[0.1, 0.0], [0.2, 0.1], [0.1, 0.3]])
        >>> assignments = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
        >>> counts = torch.tensor([4, 4, 2])  # of 2 images, one has 2 masked patches and the other has 1
        >>> ibot(student, assignments, counts, temperature=0.1)
        tensor(0.7451)
    """
    errors = -(assignments.detach() * F.log_softmax(student / temperature, dim=-1)).sum(-1)  # (M,)
    return (errors / counts).sum()


@full_precision
@torch.no_grad()
def self_assignments(features: Tensor, teacher_features: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign each image to the images of the global batch by the similarity of their features, all used equally often.

    Source: Weng et al. 2025, ReSA, as in its released code.

    Args:
        features: ``(B, D)`` of the student's backbone, this process's rows; any scale.
        teacher_features: ``(N, D)`` of the teacher's backbone on the same view, of all processes; any scale.
        epsilon: Smoothness: cosine similarities are divided by it.
        iterations: Number of normalizations of ``sinkhorn``.

    Returns:
        ``(B, N)``; each row sums to 1.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-0.6, 0.8]])
        >>> self_assignments(features, features, epsilon=0.5, iterations=3)
        tensor([[0.6881, 0.2807, 0.0312],
                [0.2773, 0.5601, 0.1626],
                [0.0298, 0.1572, 0.8130]])
    """
    similarities = F.normalize(features, dim=1) @ F.normalize(teacher_features, dim=1).T
    return sinkhorn(similarities, epsilon, iterations)


@full_precision
def resa(embeddings: Tensor, teacher_embeddings: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """Let the similarities of a view's embeddings to the teacher's of another view follow one assignment.

    Mean over images and over the pairs of a view and another of the teacher's views. Source: Weng et al. 2025, ReSA,
    as in its released code.

    Args:
        embeddings: ``(V, B, E)`` of all views, this process's rows; any scale.
        teacher_embeddings: ``(G, N, E)`` of the first G views, of all processes; any scale.
        assignments: ``(B, N)``, the same for all pairs.
        temperature: Divides the cosine similarities.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-0.6, 0.8]])
        >>> embeddings = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [[0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]])
        >>> resa(embeddings, embeddings, self_assignments(features, features, epsilon=0.5, iterations=3), 0.4)
        tensor(0.9057)
        >>> resa(embeddings, embeddings, self_assignments(features, features, epsilon=0.05, iterations=3), 0.4)
        tensor(0.4486)
    """
    embeddings, teacher = F.normalize(embeddings, dim=-1), F.normalize(teacher_embeddings.detach(), dim=-1)
    errors = []
    for view, keys in enumerate(teacher):
        others = torch.cat([embeddings[:view], embeddings[view + 1 :]])  # (V - 1, B, E)
        predictions = F.log_softmax(others @ keys.T / temperature, dim=-1)  # (V - 1, B, N)
        errors.append(-(assignments.detach() * predictions).sum(-1).mean())
    return torch.stack(errors).mean()


def entropy(assignments: Tensor) -> Tensor:
    """Mean entropy of assignments, from 0 (one-hot) to ln K.

    Args:
        assignments: ``(B, K)``; each row sums to 1.

    Example:
        >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))  # (0 + ln 2) / 2
        tensor(0.3466)
    """
    return -torch.xlogy(assignments, assignments).sum(1).mean()


def share_in_use(assignments: Tensor) -> Tensor:
    """Number of prototypes that are the largest in at least one row, divided by the most that B rows can use.

    Args:
        assignments: ``(B, K)``.

    Example:
        >>> share_in_use(torch.tensor([[0.9, 0.1], [0.6, 0.4]]))  # only the first of two
        tensor(0.5000)
    """
    return assignments.argmax(1).unique().numel() / torch.tensor(float(min(assignments.shape)))
