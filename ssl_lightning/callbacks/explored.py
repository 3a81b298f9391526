"""The features of a part of the training images as a map whose points are images, for the page of a run."""

import json
from typing import Any

import lightning as L
import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.callbacks.features import PlainFeatures, plain_features
from ssl_lightning.callbacks.knn_probe import KNNProbe
from ssl_lightning.callbacks.tiles import names_of, tiled

_NEIGHBORS = 8
_CLUSTERS = 10
_FEWEST = 512


def bank_of(trainer: L.Trainer, pl_module: L.LightningModule, data: Any, count: int | None) -> PlainFeatures:
    """Features of training images, the same on every process: the bank of the kNN probe if it has just run.

    Args:
        trainer: With its callbacks.
        pl_module: The method, in eval mode.
        data: The data module.
        count: Number of images. None means as many as the probe keeps; without it 1/32 of them, from 512 to 2,048.
    """
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, KNNProbe) and callback.bank is not None and callback.bank[0] == trainer.global_step:
            bank = callback.bank[1]
            if count is None or count <= len(bank.indices):
                return bank.some(count or len(bank.indices))
    if count is None:
        count = min(2048, max(_FEWEST, len(getattr(data, "train_images", None) or []) // 32))
    return plain_features(trainer, pl_module, data.plain_dataloader(count))


def explored(
    plain: PlainFeatures, tiles: Tensor, points: NDArray[np.float64], axes: tuple[str, str], data: Any, epoch: int
) -> str:
    """The map as JSON: for each image its point, name, class, cluster and nearest images, and all small pictures.

    Args:
        plain: The features.
        tiles: Their small pictures.
        points: ``(N, 2)``.
        axes: Names of the two directions.
        data: The data module, which knows names.
        epoch: Epochs done.
    """
    from sklearn.cluster import KMeans

    unit = F.normalize(plain.features.double(), dim=1)
    similarities = unit @ unit.T
    similarities.fill_diagonal_(-2)  # an image is not its own neighbor
    nearest = similarities.topk(min(_NEIGHBORS, len(unit) - 1), dim=1)
    is_labeled = bool((plain.labels >= 0).any())
    count = min(len(plain.labels.unique()) if is_labeled else _CLUSTERS, len(unit))
    clusters = KMeans(count, n_init=1, random_state=0).fit_predict(unit.float().numpy())
    scaled = (points - points.mean(0)) / max(float(points.std()), 1e-12)
    return json.dumps(
        {
            "epoch": epoch,
            "axes": axes,
            "x": scaled[:, 0].round(3).tolist(),
            "y": scaled[:, 1].round(3).tolist(),
            "names": names_of(data.train_images, plain.indices),
            "labels": plain.labels.tolist() if is_labeled else None,
            "classes": data.classes,
            "clusters": clusters.tolist(),
            "neighbors": nearest.indices.tolist(),
            "similarities": [[round(value, 3) for value in row] for row in nearest.values.tolist()],
            **tiled(tiles),
        }
    )
