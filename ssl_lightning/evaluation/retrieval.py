"""Retrieval: whether the nearest images belong to the same class."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.evaluation.knn import SIMILARITIES_AT_ONCE


@torch.no_grad()
def retrieval(
    gallery: Tensor, gallery_labels: Tensor, queries: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Mean average precision of the whole ranking by cosine similarity, and recall at k.

    Recall at k is the fraction of queries with an image of their class among the k nearest (Jegou et al. 2011).

    Args:
        gallery: ``(N, D)``, any scale.
        gallery_labels: ``(N,)`` classes.
        queries: ``(M, D)``, any scale; none of them is in the gallery.
        labels: ``(M,)`` classes; each has an image in the gallery.
        ks: Values of k for recall at k.

    Returns:
        ``mAP`` and ``recall@k``, in [0, 1].
    """
    bank = F.normalize(gallery.float(), dim=1).T  # (D, N)
    ranks = torch.arange(1, bank.shape[1] + 1, dtype=torch.float64)  # on the CPU: a Mac's GPU has no float64
    precisions, firsts = [], []
    for rows in torch.arange(len(queries)).split(max(1, SIMILARITIES_AT_ONCE // 4 // bank.shape[1])):
        order = (F.normalize(queries[rows].float(), dim=1) @ bank).argsort(dim=1, descending=True)  # (m, N)
        relevant = (gallery_labels[order] == labels[rows, None]).cpu()
        precision = relevant.cumsum(1) / ranks
        precisions.append((precision * relevant).sum(1) / relevant.sum(1))
        firsts.append(relevant.int().argmax(1))
    first = torch.cat(firsts)
    recalls = {f"recall@{k}": float((first < k).double().mean()) for k in ks}
    return {"mAP": float(torch.cat(precisions).mean()), **recalls}
