"""Losses that spread features, or keep them as they were."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.distributed import gather, rank, summed, world_size
from ssl_lightning.losses.precision import full_precision


@full_precision
def koleo(features: Tensor) -> Tensor:
    """Push each unit vector away from its nearest neighbor (Kozachenko-Leonenko estimate of the entropy, negated).

    Source: Sablayrolles et al. 2019, Spreading vectors for similarity search, as in DINOv2's released code.

    Args:
        features: ``(B, D)``, any scale; of one view of each image.

    Example:
        >>> koleo(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))  # nearest at 0.765: -ln 0.765
        tensor(0.2674)
    """
    features = F.normalize(features, eps=1e-8, dim=1)
    with torch.no_grad():
        nearest = (features @ features.T).fill_diagonal_(-1).argmax(1)  # (B,)
    distances = F.pairwise_distance(features, features[nearest], eps=1e-8)  # (B,)
    return -(distances + 1e-8).log().mean()


@full_precision
def sigreg(embeddings: Tensor, directions: Tensor, knots: int = 17, limit: float = 5.0) -> Tensor:
    """Distance of the embeddings' distribution from an isotropic Gaussian, measured along random directions.

    This is the Epps-Pulley test of each projection: the squared difference between its characteristic function and the
    standard normal's, weighted by exp(-t^2 / 2), integrated by the trapezoidal rule, times the number of embeddings.
    The result is the mean over directions. It covers all processes, with the exact gradient. Source: Balestriero &
    LeCun 2025, LeJEPA, section 4.

    Args:
        embeddings: ``(B, D)`` of one view, this process's rows.
        directions: ``(D, S)``, any scale, the same on all processes.
        knots: Points of the integral, an odd number.
        limit: The integral runs from ``-limit`` to ``limit``.

    Example:
        >>> collapsed = torch.zeros(4, 2)
        >>> sigreg(collapsed, directions=torch.eye(2))  # 4 sqrt(2 pi) (1 - sqrt(2) + 1 / sqrt(3))
        tensor(1.6357)
        >>> spread = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> sigreg(spread, directions=torch.eye(2))
        tensor(0.4374)
    """
    t = torch.linspace(0, limit, knots // 2 + 1, dtype=embeddings.dtype, device=embeddings.device)
    gaussian = torch.exp(-t.square() / 2)  # (T,)
    weights = torch.full_like(t, 2 * limit / (knots // 2))  # doubled, as the negative half is the same
    weights[0], weights[-1] = weights[0] / 2, weights[-1] / 2
    angles = (embeddings @ F.normalize(directions.to(embeddings.dtype), dim=0))[:, :, None] * t  # (B, S, T)
    means = summed(torch.stack([angles.cos(), angles.sin()]).mean(1)) / world_size()  # (2, S, T)
    errors = (means[0] - gaussian).square() + means[1].square()  # (S, T)
    return (errors @ (weights * gaussian)).mean() * len(embeddings) * world_size()


@full_precision
def gram(student: Tensor, anchor: Tensor) -> Tensor:
    """Keep the cosine similarities of all pairs of patches of an image: mean squared difference.

    Source: Siméoni et al. 2025, DINOv3, eq. 2. As in the released code, the squared Frobenius norm is divided by the
    number of entries.

    Args:
        student: ``(B, N, D)`` patch features.
        anchor: ``(B, N, E)`` of the same patches, from an earlier teacher.

    Example:
        >>> student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # cosines 1, 0, 0, 1
        >>> anchor = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])  # cosines 1, 1, 1, 1
        >>> gram(student, anchor)
        tensor(0.5000)
    """
    student, anchor = F.normalize(student, dim=-1), F.normalize(anchor.detach(), dim=-1)
    return (student @ student.mT - anchor @ anchor.mT).square().mean()  # of (B, N, N)


@full_precision
def visreg(embeddings: Tensor, directions: Tensor) -> Tensor:
    """Distance of the embeddings' distribution from an isotropic Gaussian: in scale, in shape, and in its center.

    For each view, over the images of all processes, with the exact gradient: the squared difference of each
    dimension's standard deviation from 1; the squared differences of the sorted projections of the standardized
    embeddings from the quantiles of the normal distribution, where no gradient passes through the deviation; and the
    squared mean of each dimension. Each part is a mean, and so is the result over views. Unlike with ``sigreg``, the
    gradient does not vanish when all embeddings are nearly the same. Source: Wu et al. 2026, VISReg, eq. 1 to 8.

    Args:
        embeddings: ``(V, B, D)`` of all views, this process's rows.
        directions: ``(D, K)``, any scale, the same on all processes; each process sorts along its share of them.

    Example:
        >>> visreg(torch.tensor([[[-1.0], [0.0], [1.0]]]), directions=torch.ones(1, 1))  # 0.0337 + 0.2019
        tensor(0.2355)
        >>> visreg(torch.zeros(1, 8, 4), directions=torch.eye(4))  # collapsed: 1 + 0.5699
        tensor(1.5699)
    """
    everyone = gather(embeddings.transpose(0, 1)).transpose(0, 1)  # (V, W * B, D)
    images, slices = everyone.shape[1], directions.shape[1]
    centers = everyone.mean(1, keepdim=True)
    spread = everyone - centers
    # vector_norm: its gradient at 0 is 0, that of a square root is not finite
    deviations = torch.linalg.vector_norm(spread, dim=1, keepdim=True) / math.sqrt(images) + 1e-6  # (V, 1, D)
    own = F.normalize(directions.to(spread.dtype), dim=0).tensor_split(world_size(), dim=1)[rank()]  # (D, K / W)
    projections = (own.mT @ (spread / deviations.detach()).mT).sort().values  # (V, K / W, W * B)
    quantiles = _normal_quantiles(images, spread.dtype, spread.device)  # (W * B,)
    errors = (projections - quantiles).square().mean((0, 2)).sum()
    return summed(errors) / slices + (deviations - 1).square().mean() + centers.square().mean()


@functools.lru_cache(maxsize=16)
def _normal_quantiles(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Quantiles of the normal distribution at i / (count + 1); computed on the CPU, as not all devices can."""
    with torch.inference_mode(False):  # what validation asks for first is used in training, too
        shares = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") / (count + 1)
        return torch.special.ndtri(shares).to(dtype).to(device)
