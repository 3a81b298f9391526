"""Measures of features that need no labels: rank, spectrum, LiDAR, spread, alignment, uniformity."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.knn import SIMILARITIES_AT_ONCE
from ssl_lightning.losses.precision import wide


@torch.no_grad()
def rankme(features: Tensor, epsilon: float = 1e-7) -> float:
    """Effective rank: the exponential of the entropy of the singular values, from 1 (collapsed) to D.

    Source: Garrido et al. 2023, RankMe, eq. 1; the paper uses 25,600 images. Features are not centered.

    Args:
        features: ``(N, D)``, any scale, of whole images in eval mode.
        epsilon: Added to each singular value after dividing by their sum.
    """
    singular = torch.linalg.svdvals(_rows(features))
    shares = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny) + epsilon
    return float(torch.exp(-(shares * shares.log()).sum()))


@torch.no_grad()
def alpha_req(features: Tensor, first: int = 11, last: int = 100) -> float:
    """Decay of the spectrum: the alpha for which j ** -alpha fits the covariance's eigenvalues; near 1 is good.

    Far above 1, few directions carry most of the variance; below 1, the spectrum is flat. Source: Agrawal et al. 2022,
    alpha-ReQ; a linear fit of logarithms over some ranks, where rank j has the weight 1 / j.

    Args:
        features: ``(N, D)``, any scale.
        first: First rank of the fit.
        last: Last rank of the fit. The fit ends earlier if fewer eigenvalues are larger than rounding errors.

    Raises:
        UserError: There are fewer than two eigenvalues to fit.
    """
    features = _rows(features)
    eigenvalues = torch.linalg.svdvals(features - features.mean(0)).square()
    count = int((eigenvalues > eigenvalues[0] * torch.finfo(eigenvalues.dtype).eps).sum())
    if min(count, last) <= first:
        raise UserError(
            f"alpha_req fits ranks {first} to {last}, but features of shape {tuple(features.shape)} have {count} "
            "directions; use more images, or lower first."
        )
    ranks = torch.arange(first, min(count, last) + 1, dtype=features.dtype, device=features.device)
    x, y, weights = ranks.log(), eigenvalues[first - 1 : last][: len(ranks)].log(), 1 / ranks
    x, y = x - (weights * x).sum() / weights.sum(), y - (weights * y).sum() / weights.sum()
    return -float((weights * x * y).sum() / (weights * x * x).sum())


@torch.no_grad()
def lidar(embeddings: Tensor, delta: float = 1e-4, epsilon: float = 1e-8) -> float:
    """Effective number of directions in which images differ more than their own views do, 1 to min(D, n - 1).

    The exponential of the entropy of the eigenvalues of linear discriminant analysis with each image as a class.
    Source: Thilak et al. 2023, LiDAR, with the normalizers of stable-pretraining. Use at least 1,000 images and 10
    views.

    Args:
        embeddings: ``(n, q, D)``: of q views of each of n images, in eval mode.
        delta: Added to the diagonal of the covariance within images.
        epsilon: Added to each share of the eigenvalues.

    Raises:
        UserError: There are fewer than 2 images or 2 views.
    """
    if embeddings.ndim != 3 or min(embeddings.shape[:2]) < 2:
        raise UserError(f"embeddings must be (n, q, D), n and q at least 2, not {tuple(embeddings.shape)}.")
    embeddings = embeddings.double()
    count, views, width = embeddings.shape
    means = embeddings.mean(1)  # (n, D)
    apart, spread = means - means.mean(0), (embeddings - means[:, None]).flatten(0, 1)
    within = spread.T @ spread / (count * (views - 1)) + delta * torch.eye(width).to(spread)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), apart.T, upper=False)  # (D, n)
    eigenvalues = torch.linalg.svdvals(whitened).square()  # of the covariance between images, up to a factor
    shares = eigenvalues / eigenvalues.sum().clamp(min=torch.finfo(eigenvalues.dtype).tiny) + epsilon
    return float(torch.exp(-(shares * shares.log()).sum()))


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Mean over dimensions of the standard deviation of unit features: 0 is collapse, 1 / sqrt(D) the largest spread.

    Source: Chen & He 2021, SimSiam, section 4.1; unbiased as in lightly.

    Args:
        features: ``(N, D)``, any scale.
    """
    return float(F.normalize(_rows(features), dim=1).std(0).mean())


@torch.no_grad()
def alignment(features0: Tensor, features1: Tensor) -> float:
    """Mean squared distance of the unit features of two views of the same images, 0 to 4; small is good.

    Source: Wang & Isola 2020, Alignment and Uniformity, section 4.1.

    Args:
        features0: ``(N, D)``, any scale.
        features1: ``(N, D)``, any scale. Row i belongs to the same image as row i of ``features0``.
    """
    difference = F.normalize(_rows(features0), dim=1) - F.normalize(_rows(features1), dim=1)
    return float(difference.square().sum(1).mean())


@torch.no_grad()
def uniformity(features: Tensor, t: float = 2.0) -> float:
    """Logarithm of the mean of exp(-t * squared distance) over all pairs of unit features: 0 is collapse, low is good.

    Source: Wang & Isola 2020, Alignment and Uniformity, section 4.1.

    Args:
        features: ``(N, D)``, N at least 2, any scale.
        t: Scale of the squared distances.
    """
    features = F.normalize(_rows(features), dim=1)
    count = len(features)
    blocks = features.split(max(1, SIMILARITIES_AT_ONCE // count))
    totals = torch.stack([torch.exp(t * (2 * block @ features.T - 2)).sum() for block in blocks])
    # without the N pairs of an image with itself, each of which adds 1
    return math.log(float(totals.sum() - count) / (count * (count - 1)))


def feature_measures(features: Tensor) -> dict[str, float]:
    """``rankme``, ``feature_std``, ``uniformity``, and ``alpha_req`` unless there are too few directions to fit.

    Args:
        features: ``(N, D)``, any scale. Empty for fewer than 2 images.
    """
    if len(features) < 2:
        return {}
    measures = {"rankme": rankme(features), "feature_std": feature_std(features), "uniformity": uniformity(features)}
    try:
        return {**measures, "alpha_req": alpha_req(features)}
    except UserError:  # e.g. because the features have collapsed
        return measures


def _rows(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"features must be (N, D) with at least 2 rows, not {tuple(features.shape)}.")
    return wide(features)
