"""Clusters of features: how well they agree with classes, and how far they lie apart."""

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.losses.precision import wide

_STARTS = 10
_SILHOUETTES = 5000
"""Largest number of images whose silhouette is computed: its time grows with their square."""


def kmeans(features: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Cluster of each image by k-means on unit features: the best of ten starts of k-means++.

    Args:
        features: ``(N, D)``, any scale.
        clusters: Number of clusters, at most N.
        seed: For the starts.

    Returns:
        ``(N,)`` whole numbers, on the CPU.
    """
    from sklearn.cluster import KMeans  # only here: help texts should not wait for it

    unit = F.normalize(wide(features), dim=1).cpu().numpy()
    with warnings.catch_warnings():  # fewer different points than clusters: collapsed features
        warnings.filterwarnings("ignore", module="sklearn")
        return torch.from_numpy(KMeans(clusters, n_init=_STARTS, random_state=seed).fit_predict(unit)).long()


def silhouette(features: Tensor, clusters: Tensor, seed: int = 0) -> float:
    """Mean silhouette of unit features, -1 to 1: how much nearer an image is to its own cluster than to the next.

    Source: Rousseeuw 1987. Of more than 5,000 images, random 5,000 count. A single cluster has a silhouette of 0.

    Args:
        features: ``(N, D)``, any scale.
        clusters: ``(N,)`` whole numbers.
        seed: For the choice of images.
    """
    from sklearn.metrics import silhouette_score

    if len(features) > _SILHOUETTES:
        chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:_SILHOUETTES]
        features, clusters = features[chosen.to(features.device)], clusters[chosen.to(clusters.device)]
    if not 1 < len(clusters.unique()) < len(clusters):
        return 0.0
    return float(silhouette_score(F.normalize(wide(features), dim=1).cpu().numpy(), clusters.cpu().numpy()))


def cluster_measures(features: Tensor, labels: Tensor, clusters: int, seed: int = 0) -> dict[str, float]:
    """What k-means says about features: ``cluster_accuracy``, ``nmi`` and ``silhouette``.

    All images are clustered; the first two compare the labeled ones with their classes, and are missing if there are
    none. ``nmi`` is the mutual information of clusters and classes, divided by the mean of their entropies.

    Args:
        features: ``(N, D)``, any scale, N at least 2.
        labels: ``(N,)`` classes; -1 is unknown.
        clusters: Number of clusters. N, if there are fewer images.
        seed: For k-means.
    """
    from sklearn.metrics import normalized_mutual_info_score

    known, labels = labels.cpu() >= 0, labels.cpu()
    if not features.isfinite().all():
        return dict.fromkeys(("cluster_accuracy", "nmi", "silhouette") if known.any() else ("silhouette",), math.nan)
    assigned = kmeans(features, min(clusters, len(features)), seed)
    measures = {}
    if known.any():
        measures["cluster_accuracy"] = clustering_accuracy(assigned[known], labels[known])
        measures["nmi"] = float(normalized_mutual_info_score(labels[known].numpy(), assigned[known].numpy()))
    return {**measures, "silhouette": silhouette(features, assigned, seed)}


def clustering_accuracy(clusters: Tensor, labels: Tensor) -> float:
    """Share of images whose cluster belongs to their class, under the best assignment of clusters to classes, 0 to 1.

    A class gets at most one cluster (Hungarian algorithm); images of further clusters count as wrong. Assignment and
    accuracy use the same images, as usual.

    Args:
        clusters: ``(N,)`` whole numbers.
        labels: ``(N,)`` whole numbers.
    """
    from scipy.optimize import linear_sum_assignment  # only here: help texts should not wait for it

    clusters, labels = (torch.as_tensor(values).cpu().unique(return_inverse=True)[1] for values in (clusters, labels))
    table = np.zeros((int(clusters.max()) + 1, int(labels.max()) + 1), np.int64)
    np.add.at(table, (clusters.numpy(), labels.numpy()), 1)
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels))
