"""Losses that make the dimensions of a projection carry different information."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.batch_norm import SyncBatchNorm
from ssl_lightning.distributed import gather, summed, world_size
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
