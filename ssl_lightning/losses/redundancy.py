"""Losses that make the dimensions of a projection carry different information."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.batch_norm import SyncBatchNorm
from ssl_lightning.distributed import gather, summed, world_size
from ssl_lightning.losses.clustering import mean_over_pairs
from ssl_lightning.losses.precision import full_precision


@full_precision
def barlow_twins(z0: Tensor, z1: Tensor, lambd: float) -> Tensor:
    """Make the cross-correlation matrix of two views over the global batch the identity.

    Exact across processes; the released code divides the gradient by the number of processes. Source: Zbontar et al.
    2021, Barlow Twins, eq. 1 and 2.

    Args:
        z0: ``(B, D)`` projections of the first view.
        z1: ``(B, D)`` projections of the second view; row i of both is the same image.
        lambd: Weight of the correlations of different dimensions.

    Example:
        >>> z0 = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 4.0]])
        >>> z1 = torch.tensor([[2.0, 1.0], [2.0, 3.0], [5.0, 2.0]])
        >>> barlow_twins(z0, z1, lambd=0.0051)  # correlations 0.866, 0.5 and 0.866, -0.5
        tensor(2.2730)
    """
    batch_norm = SyncBatchNorm(z0.shape[1], affine=False, track_running_stats=False)
    correlation = summed(batch_norm(z0).T @ batch_norm(z1)) / (len(z0) * world_size())  # (D, D)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()  # holds no second (D, D)
    return (diagonal - 1).square().sum() + lambd * off_diagonal


@full_precision
def vicreg(
    z0: Tensor,
    z1: Tensor,
    invariance: float,
    variance: float,
    covariance: float,
    variance_of_views: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Keep the views of an image close, the standard deviation of each dimension large, and dimensions uncorrelated.

    Variance and covariance are taken over the global batch, with the exact gradient. Source: Bardes et al. 2022,
    VICReg, eq. 1 to 6.

    Args:
        z0: ``(B, D)`` projections of the first view.
        z1: ``(B, D)`` projections of the second view; row i of both is the same image.
        invariance: Weight of the squared distance between the views.
        variance: Weight of the variance term: how far each dimension's standard deviation falls short of 1.
        covariance: Weight of the squared covariances of different dimensions.
        variance_of_views: Whether the variance term is the ``mean`` over both views, as in the released code, or their
            ``sum``, as in the paper.

    Example:
        >>> z0 = 0.2 * torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 4.0]])
        >>> z1 = 0.2 * torch.tensor([[2.0, 1.0], [2.0, 3.0], [5.0, 2.0]])
        >>> vicreg(z0, z1, invariance=25, variance=25, covariance=1)
        tensor(19.2540)
        >>> vicreg(z0, z1, invariance=25, variance=25, covariance=1, variance_of_views="sum")
        tensor(35.8349)
    """
    all0, all1 = gather(z0), gather(z1)  # (N, D)
    hinges = _missing_deviation(all0) + _missing_deviation(all1)
    if variance_of_views == "mean":
        hinges = hinges / 2
    covariances = _squared_covariances(all0) + _squared_covariances(all1)
    return invariance * F.mse_loss(z0, z1) + variance * hinges + covariance * covariances


def _missing_deviation(z: Tensor) -> Tensor:
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def _squared_covariances(z: Tensor) -> Tensor:
    """Sum of the squared covariances of different dimensions, divided by the number of dimensions."""
    rows, dimensions = z.shape
    centered = z - z.mean(0)
    # the squares of both products have the same sum
    products = centered @ centered.T if rows < dimensions else centered.T @ centered
    covariances = products.square().sum() / (rows - 1) ** 2
    return (covariances - torch.var(z, 0).square().sum()) / dimensions


@full_precision
def coding_rate(features: Tensor, epsilon: float) -> Tensor:
    """Volume that the features fill: half the log-determinant of 1 plus their scaled second moments, in nats.

    It covers the global batch, with the exact gradient. Nothing is centered. Source: Wu et al. 2025, SimDINO, as in its
    released code with ``reduce_cov``.

    Args:
        features: ``(B, D)`` of one view, this process's rows; any scale.
        epsilon: Precision of the code: the larger, the less small directions count.

    Example:
        >>> coding_rate(torch.eye(2), epsilon=0.5)  # ln 3
        tensor(1.0986)
        >>> coding_rate(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), epsilon=0.5)  # all the same: ln(5) / 2
        tensor(0.8047)
    """
    return _rate(F.normalize(features, dim=1), epsilon)


def _rate(rows: Tensor, epsilon: float) -> Tensor:
    images, dimensions = len(rows) * world_size(), rows.shape[1]
    moments = summed(rows.T @ rows) * (dimensions / (images * epsilon))  # (D, D)
    shifted = moments + torch.eye(dimensions, dtype=rows.dtype, device=rows.device)
    return torch.linalg.cholesky_ex(shifted).L.diagonal().log().sum()  # _ex does not wait for the device


@full_precision
def compression(student: Tensor, teacher: Tensor) -> Tensor:
    """How close the views of an image are: mean cosine of each global crop of the teacher and every other crop.

    Args:
        student: ``(V, B, D)`` of all crops; any scale.
        teacher: ``(G, B, D)`` of the global crops, which come first; any scale.

    Example:
        >>> compression(torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]]]), torch.tensor([[[1.0, 0.0]]]))
        tensor(0.6000)
    """
    return mean_over_pairs(F.normalize(student, dim=-1), F.normalize(teacher.detach(), dim=-1))


@full_precision
def expansion(student: Tensor, teacher: Tensor, epsilon: float, smooth: bool = True) -> Tensor:
    """Coding rate of the global crops, mean over crops, times (D + N) / (D N) for N images.

    Args:
        student: ``(V, B, D)`` of all crops; any scale.
        teacher: ``(G, B, D)`` of the global crops, which come first; any scale.
        epsilon: As for ``coding_rate``.
        smooth: Whether the rate is taken of the mean of student and teacher, instead of the student.

    Example:
        >>> expansion(torch.eye(2)[None], torch.eye(2)[None], epsilon=0.5)  # ln 3, times 1
        tensor(1.0986)
    """
    rows = F.normalize(student[: len(teacher)], dim=-1)
    if smooth:
        rows = (rows + F.normalize(teacher.detach(), dim=-1)) / 2  # its norm stays below 1
    images, dimensions = rows.shape[1] * world_size(), rows.shape[2]
    return (dimensions + images) / (dimensions * images) * torch.stack([_rate(crop, epsilon) for crop in rows]).mean()


def collapsed_expansion(images: int, dimensions: int, epsilon: float) -> float:
    """The expansion if all outputs are the same.

    Args:
        images: Images N of the global batch.
        dimensions: Width D of the outputs.
        epsilon: As for ``coding_rate``.

    Example:
        >>> round(collapsed_expansion(128, 64, 0.05), 4)
        0.0839
    """
    return (dimensions + images) / (dimensions * images) * math.log1p(dimensions / epsilon) / 2


@full_precision
def simdino(student: Tensor, teacher: Tensor, epsilon: float, coefficient: float = 1.0, smooth: bool = True) -> Tensor:
    """Keep the views of an image close and the coding rate of the batch high.

    The coding rate covers the global batch, with the exact gradient; the released code's default takes the second
    moments of each process, but divides by the images of all. Source: Wu et al. 2025, SimDINO.

    Args:
        student: ``(V, B, D)`` of all crops; any scale.
        teacher: ``(G, B, D)`` of the global crops, which come first; any scale.
        epsilon: As for ``coding_rate``.
        coefficient: Weight of the ``compression``; the ``expansion`` has weight 1.
        smooth: As for ``expansion``.

    Example:
        >>> apart, same = torch.eye(2).expand(2, 2, 2), torch.ones(2, 2, 2)
        >>> simdino(apart, apart, epsilon=0.5), simdino(same, same, epsilon=0.5)  # -1 - ln 3, -1 - ln(5) / 2
        (tensor(-2.0986), tensor(-1.8047))
    """
    return -coefficient * compression(student, teacher) - expansion(student, teacher, epsilon, smooth)


@full_precision
def simdino_patches(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    """Negative cosine of masked patches: mean over the masked patches of an image, then over images.

    Source: Wu et al. 2025, SimDINOv2.

    Args:
        student: ``(M, D)`` of the masked patches of all images; any scale.
        teacher: ``(M, D)`` of the same patches; any scale.
        counts: ``(M,)`` divisor of each patch, as for ``ibot``.

    Example:
        >>> student = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> counts = torch.tensor([4, 4, 2])  # of 2 images, one has 2 masked patches and the other has 1
        >>> simdino_patches(student, torch.tensor([[1.0, 0.0]] * 3), counts)  # -(1 + 0.6) / 4 - 0 / 2
        tensor(-0.4000)
    """
    return -((F.normalize(student, dim=-1) * F.normalize(teacher.detach(), dim=-1)).sum(-1) / counts).sum()
