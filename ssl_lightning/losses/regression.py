"""Losses that predict features or pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.heads import patchify
from ssl_lightning.losses.precision import full_precision


@full_precision
def byol(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of unit vectors, 2 - 2 cos: one direction, mean over rows.

    Source: Grill et al. 2020, BYOL, eq. 2.

    Args:
        predictions: ``(B, D)`` of the online network, any scale.
        targets: ``(B, D)`` of the teacher on the other view, any scale.
    """
    return 2 + 2 * negative_cosine(predictions, targets)


@full_precision
def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Negative cosine similarity, mean over rows.

    Source: Chen & He 2021, SimSiam, eq. 1.

    Args:
        predictions: ``(B, D)``, any scale.
        targets: ``(B, D)``, any scale.
    """
    return -(F.normalize(predictions, dim=1) * F.normalize(targets.detach(), dim=1)).sum(1).mean()


@full_precision
def ijepa(predictions: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 distance, mean over all entries: half the square below 1, then linear.

    Source: Assran et al. 2023, I-JEPA, whose released code has it in place of the paper's squared distance.

    Args:
        predictions: Any shape.
        targets: The same shape, of the teacher.
    """
    return F.smooth_l1_loss(predictions, targets.detach())


@full_precision
def lejepa(embeddings: Tensor, global_views: int) -> Tensor:
    """Mean squared distance of all views from the centre of the global ones, gradients flowing through both.

    Source: Balestriero & LeCun 2025, LeJEPA, algorithm 2.

    Args:
        embeddings: ``(V, B, D)``, global views first.
        global_views: Number of global views.
    """
    return (embeddings - embeddings[:global_views].mean(0)).square().mean()


@full_precision
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


@full_precision
def simmim(predictions: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error of the masked pixels.

    Source: Xie et al. 2022, SimMIM, eq. 1 and its released code.

    Args:
        predictions: ``(B, 3, S, S)``.
        images: ``(B, 3, S, S)``.
        mask: ``(B, S, S)``, true where masked.
    """
    errors = (predictions - images).abs() * mask[:, None]
    return errors.sum() / (mask.to(errors.dtype).sum() + 1e-5) / images.shape[1]


@full_precision
def vector_quantization(
    reconstructions: Tensor, images: Tensor, codes: Tensor, vectors: Tensor, commitment: float
) -> Tensor:
    """Squared error of a reconstruction, of the vectors from the codes, and of the codes from the vectors.

    Source: van den Oord et al. 2017, VQ-VAE, eq. 3.

    Args:
        reconstructions: ``(B, 3, S, S)``.
        images: ``(B, 3, S, S)``.
        codes: ``(B, D, ...)`` of the encoder.
        vectors: ``(B, D, ...)``, the nearest to them.
        commitment: Weight of the last.
    """
    distances = F.mse_loss(vectors, codes.detach()) + commitment * F.mse_loss(codes, vectors.detach())
    return F.mse_loss(reconstructions, images) + distances * codes.shape[1]  # summed over D, as in the paper
