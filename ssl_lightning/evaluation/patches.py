"""What the features of patches hold: segmentation by nearest patches, and principal components as colors."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.knn import SIMILARITIES_AT_ONCE
from ssl_lightning.losses.precision import wide


@torch.no_grad()
def knn_segmentation(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    k: int = 10,
    distance: Literal["cosine", "l2"] = "cosine",
    ignored: int | Sequence[int] = 255,
) -> Tensor:
    """Label each pixel of a patch by the most frequent label at its place in the k nearest training patches.

    The predictions are finer than the grid of patches. Of equally frequent labels the smallest wins. The protocol
    standardizes all features by mean and deviation of the training patches before. Source: Darcet et al. 2025, CAPI,
    its released segmentation evaluation.

    Args:
        train_features: ``(N, D)``, a row per patch.
        train_labels: ``(N, P)`` whole numbers, the labels of a patch's P pixels. Patches whose most frequent label is
            ignored are left out.
        features: ``(M, D)``.
        k: Number of neighbors. All training patches vote if there are fewer.
        distance: ``cosine``: of the angle; ``l2``: Euclidean.
        ignored: A label that does not count, or several.

    Returns:
        ``(M, P)`` labels.

    Raises:
        UserError: No training patch is left.
    """
    most = train_labels.mode(dim=1).values  # (N,)
    kept = ~torch.isin(most, torch.as_tensor(ignored, dtype=most.dtype, device=most.device))
    bank, labels = wide(train_features)[kept], train_labels[kept]
    if len(bank) == 0:
        raise UserError("kNN segmentation needs a training patch whose most frequent label is not ignored.")
    queries, by_angle = wide(features).to(bank.dtype), distance == "cosine"
    if by_angle:
        bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    predictions = [labels.new_empty(0, labels.shape[1])]
    for chunk in queries.split(max(1, SIMILARITIES_AT_ONCE // len(bank))):
        distances = -chunk @ bank.T if by_angle else torch.cdist(chunk, bank)  # (m, N)
        nearest = distances.topk(min(k, len(bank)), dim=1, largest=False).indices  # (m, k)
        few = nearest.split(max(1, SIMILARITIES_AT_ONCE // (nearest.shape[1] * labels.shape[1])))  # k labels a pixel
        predictions += [labels[rows].mode(dim=1).values for rows in few]  # (m, P)
    return torch.cat(predictions)


@torch.no_grad()
def hummingbird(
    memory: Tensor, memory_labels: Tensor, features: Tensor, k: int = 30, temperature: float = 0.02
) -> Tensor:
    """Shares of the classes in each patch: the shares of its k nearest patches, by softmax(cosine / temperature).

    The shares of all patches, interpolated bilinearly to the image, give the label of a pixel by their maximum.
    Source: Balažević et al. 2023, Towards In-Context Scene Understanding; Pariza et al., open-hummingbird-eval.

    Args:
        memory: ``(N, D)`` features of training patches, any scale.
        memory_labels: ``(N, C)`` shares of the classes in each patch.
        features: ``(M, D)``, any scale.
        k: Number of neighbors. The whole memory counts if it is smaller.
        temperature: Divides the cosine similarities.

    Returns:
        ``(M, C)``.
    """
    bank = F.normalize(wide(memory), dim=1)  # (N, D)
    shares = [memory_labels.new_empty(0, memory_labels.shape[1], dtype=bank.dtype)]
    for chunk in F.normalize(wide(features), dim=1).to(bank.dtype).split(max(1, SIMILARITIES_AT_ONCE // len(bank))):
        similarities, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)  # (m, k)
        weights = (similarities / temperature).softmax(dim=1)
        shares.append((weights[:, :, None] * memory_labels[nearest].to(bank.dtype)).sum(dim=1))
    return torch.cat(shares)


@torch.no_grad()
def mean_iou(labels: Tensor, predictions: Tensor, ignored: int | Sequence[int] = 255) -> float:
    """Intersection over union, averaged over the classes that occur in the labels or the predictions, 0 to 1.

    As in CAPI's released evaluation, an ignored class that is predicted counts as a class without intersection.

    Args:
        labels: Whole numbers of any shape.
        predictions: Of the same shape.
        ignored: Pixels with this label, or these labels, are left out.

    Raises:
        UserError: All pixels are ignored.
    """
    counted = ~torch.isin(labels, torch.as_tensor(ignored, dtype=labels.dtype, device=labels.device))
    labels, predictions = labels[counted], predictions[counted]
    if len(labels) == 0:
        raise UserError("all pixels are ignored.")
    classes, index = torch.unique(torch.cat([labels, predictions.to(labels.dtype)]), return_inverse=True)
    truth, guess = index.split(len(labels))

    pairs = torch.bincount(truth * len(classes) + guess, minlength=len(classes) ** 2)
    return iou_of_counts(pairs.view(len(classes), -1))


def iou_of_counts(counts: Tensor) -> float:
    """Intersection over union, averaged over the classes that occur at all.

    Args:
        counts: ``(C, C)`` numbers of pixels, by their label and by their prediction.
    """
    counts = counts.cpu().double()  # a Mac's GPU has no float64
    both, either = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float((both / either)[either > 0].mean())


@torch.no_grad()
def patch_pca(features: Tensor, components: int = 3) -> Tensor:
    """The first principal components of patch features, each with deviation 1 and the skewness positive.

    Source: Darcet et al. 2025, CAPI, the released pictures. ``pca_colors`` makes colors of three components.

    Args:
        features: ``(N, D)``: the patches of a single image, or of several images to compare their colors. Above 50,000
            patches, evenly spread ones determine the components.
        components: Number of components. Components without variance are 0.

    Returns:
        ``(N, components)``.
    """
    features = wide(features)
    some = features[torch.linspace(0, len(features) - 1, _FITTED).long()] if len(features) > _FITTED else features
    mean = some.mean(0)
    exact = (some - mean).double()
    basis = torch.linalg.qr(exact.T).Q if len(exact) < exact.shape[1] else None  # far fewer directions to search
    reduced = exact if basis is None else exact @ basis  # (N, min(N, D))
    eigenvalues, axes = torch.linalg.eigh(reduced.T @ reduced / len(exact))  # ascending
    eigenvalues, axes = eigenvalues.flip(0)[:components], axes.flip(1)[:, :components]
    axes = axes if basis is None else basis @ axes  # (D, components)
    kept = eigenvalues > eigenvalues[:1] * 1e-12
    axes = axes * torch.where(kept, eigenvalues, torch.inf).rsqrt()
    axes = torch.where((exact @ axes).pow(3).mean(0) < 0, -axes, axes)
    values = (features - mean).double() @ axes  # (N, components)
    return F.pad(values, (0, components - values.shape[1])).to(features.dtype)


_FITTED = 50_000
"""Most patches that principal components are computed from."""


def pca_colors(components: Tensor) -> Tensor:
    """Colors between 0 and 1: from -2.3 deviations to 2.3, the first three components as red, green and blue.

    Args:
        components: ``(N, 3)`` of ``patch_pca``.
    """
    return ((components + 2.3) / 4.6).clamp(0, 1)
