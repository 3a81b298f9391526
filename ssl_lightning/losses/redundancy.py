"""Losses that make the dimensions of a projection tell different things."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.batch_norm import SyncBatchNorm
from ssl_lightning.distributed import gather, summed, world_size
from ssl_lightning.losses.precision import full_precision


@full_precision
def barlow_twins(z0: Tensor, z1: Tensor, lambd: float) -> Tensor:
    """Make the cross-correlation of two views over the global batch the identity.

    Exact across processes; in the released code the gradient of several is divided by their number. Source: Zbontar et
    al. 2021, Barlow Twins, eq. 1 and 2.

    Args:
        z0: ``(B, D)`` projections of the first view.
        z1: ``(B, D)`` projections of the second view; row i of both is the same image.
        lambd: Weight of the correlations of different dimensions.
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
    """Keep the views of an image together, the deviation of each dimension up, and dimensions uncorrelated.

    Variance and covariance are those of the global batch, with the exact gradient. Source: Bardes et al. 2022, VICReg,
    eq. 1 to 6.

    Args:
        z0: ``(B, D)`` projections of the first view.
        z1: ``(B, D)`` projections of the second view; row i of both is the same image.
        invariance: Weight of the squared distance of the views.
        variance: Weight of what is missing to a deviation of 1.
        covariance: Weight of the squared covariances of different dimensions.
        variance_of_views: Whether the variance term is the ``mean`` of both views as in the released code, or their
            ``sum`` as in the paper.
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
    centred = z - z.mean(0)
    products = centred @ centred.T if rows < dimensions else centred.T @ centred  # the squares of both sum to the same
    covariances = products.square().sum() / (rows - 1) ** 2
    return (covariances - torch.var(z, 0).square().sum()) / dimensions
