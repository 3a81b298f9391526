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

    Example:
        >>> byol(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))  # 2 - 2 * 3/5
        tensor(0.8000)
    """
    return 2 + 2 * negative_cosine(predictions, targets)


@full_precision
def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Negative cosine similarity, mean over rows.

    Source: Chen & He 2021, SimSiam, eq. 1.

    Args:
        predictions: ``(B, D)``, any scale.
        targets: ``(B, D)``, any scale.

    Example:
        >>> negative_cosine(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(-0.8000)
    """
    return -(F.normalize(predictions, dim=1) * F.normalize(targets.detach(), dim=1)).sum(1).mean()


@full_precision
def distillation(predictions: Tensor, targets: Tensor, cosine_weight: float) -> Tensor:
    """Cosine distance and smooth L1 distance from the standardized features of a teacher, mean over rows.

    Source: the recommended mixture of AM-RADIO (Ranzinger et al. 2024) for spatial features, here for both terms.

    Args:
        predictions: ``(..., D)``, any scale.
        targets: ``(..., D)``, with a mean of 0 and a deviation of about 1.
        cosine_weight: Weight of 1 - cos; the smooth L1 distance (mean over D) has weight 1 minus it.

    Example:
        >>> predictions = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> targets = torch.tensor([[0.6, 0.8], [0.0, -1.0]])
        >>> distillation(predictions, targets, cosine_weight=0.9)  # 0.9 * 1.2 + 0.1 * 0.725
        tensor(1.1525)
    """
    targets = targets.detach()
    cosines = (F.normalize(predictions, dim=-1) * F.normalize(targets, dim=-1)).sum(-1)
    return cosine_weight * (1 - cosines).mean() + (1 - cosine_weight) * F.smooth_l1_loss(predictions, targets)


@full_precision
def ijepa(predictions: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 distance, mean over all entries: half the squared difference below 1, linear above.

    Source: the released code of Assran et al. 2023, I-JEPA; the paper has the squared distance instead.

    Args:
        predictions: Any shape.
        targets: Teacher's features, of the same shape.

    Example:
        >>> ijepa(torch.tensor([0.0, 0.0]), torch.tensor([0.5, 2.0]))  # (0.5 * 0.5**2 + 2 - 0.5) / 2
        tensor(0.8125)
    """
    return F.smooth_l1_loss(predictions, targets.detach())


@full_precision
def lejepa(embeddings: Tensor, global_views: int) -> Tensor:
    """Mean squared distance of all views from the mean of the global views, with gradients through both.

    Source: Balestriero & LeCun 2025, LeJEPA, algorithm 2.

    Args:
        embeddings: ``(V, B, D)``, global views first.
        global_views: Number of global views.

    Example:
        >>> embeddings = torch.tensor([[[0.0]], [[2.0]], [[4.0]]])  # 3 views of 1 image
        >>> lejepa(embeddings, global_views=2)  # distances from 1
        tensor(3.6667)
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
        normalize: Whether each target patch is normalized by its own mean and (unbiased) variance.

    Example:
        >>> images = torch.tensor([[1.0, 2.0], [3.0, 0.0]]).expand(1, 3, 2, 2)
        >>> mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
        >>> mae(torch.zeros(1, 4, 3), images, mask, patch_size=1, normalize=False)  # (1 + 9) / 2
        tensor(5.)
        >>> predictions, images = torch.zeros(1, 1, 768), torch.rand(1, 3, 16, 16)
        >>> mae(predictions, images, torch.ones(1, 1), patch_size=16, normalize=True)  # 767/768 for any image
        tensor(0.9987)
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

    Example:
        >>> mask = torch.tensor([[[True, False], [False, False]]])
        >>> simmim(torch.full((1, 3, 2, 2), 2.0), torch.zeros(1, 3, 2, 2), mask)
        tensor(2.0000)
    """
    errors = (predictions - images).abs() * mask[:, None]
    return errors.sum() / (mask.to(errors.dtype).sum() + 1e-5) / images.shape[1]


@full_precision
def vector_quantization(
    reconstructions: Tensor, images: Tensor, codes: Tensor, vectors: Tensor, commitment: float
) -> Tensor:
    """Squared errors of a reconstruction, of the vectors from the codes, and of the codes from the vectors.

    Source: van den Oord et al. 2017, VQ-VAE, eq. 3.

    Args:
        reconstructions: ``(B, 3, S, S)``.
        images: ``(B, 3, S, S)``.
        codes: ``(B, D, ...)`` of the encoder.
        vectors: ``(B, D, ...)`` nearest to the codes.
        commitment: Weight of the last error, whose gradient reaches the codes.

    Example:
        >>> reconstructions, images = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
        >>> codes, vectors = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]])
        >>> vector_quantization(reconstructions, images, codes, vectors, commitment=0.25)  # 1 + 1.25 * (1 + 9)
        tensor(13.5000)
    """
    distances = F.mse_loss(vectors, codes.detach()) + commitment * F.mse_loss(codes, vectors.detach())
    return F.mse_loss(reconstructions, images) + distances * codes.shape[1]  # summed over D, as in the paper
