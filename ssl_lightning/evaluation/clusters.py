"""How well clusters of features agree with classes."""

import numpy as np
import torch
from torch import Tensor


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
