"""The features of a part of the training images as a map whose points are images, for the page of a run."""

import json
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssl_lightning.callbacks.features import PlainFeatures, no_numbers, plain_features
from ssl_lightning.callbacks.knn_probe import KNNProbe
from ssl_lightning.distributed import gather_uneven
from ssl_lightning.drawing import data_uri, pixels_of

_TILE = 32
"""Side of a small picture in pixels."""
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


def tiles_of(trainer: L.Trainer, pl_module: L.LightningModule, data: Any, indices: Tensor) -> Tensor:
    """Small pictures ``(N, C, 32, 32)`` uint8 of training images, over all processes; unreadable images are missing.

    Args:
        trainer: Determines the device.
        pl_module: The method.
        data: The data module.
        indices: ``(N,)`` in ascending order, on the CPU.
    """
    transform = data.image_transform
    tiles = [torch.empty(0, data.train_images.channels, _TILE, _TILE, dtype=torch.uint8, device=pl_module.device)]
    places = [no_numbers(pl_module)]
    for batch in data.plain_loader(data.train_images.subset(indices.numpy())):
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        small = F.interpolate(batch.images.float(), (_TILE, _TILE), mode="bilinear", antialias=True)
        tiles.append(torch.stack([pixels_of(image, transform["mean"], transform["std"]) for image in small]))
        places.append(batch.indices)
    order = gather_uneven(torch.cat(places)).argsort()
    return gather_uneven(torch.cat(tiles))[order].cpu()


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
    images = data.train_images
    names = [images.path(int(index)) or images.name(int(index)) for index in plain.indices]
    scaled = (points - points.mean(0)) / max(float(points.std()), 1e-12)
    columns = int(np.ceil(np.sqrt(len(tiles))))
    return json.dumps(
        {
            "epoch": epoch,
            "axes": axes,
            "x": scaled[:, 0].round(3).tolist(),
            "y": scaled[:, 1].round(3).tolist(),
            "names": [name.encode(errors="replace").decode() for name in names],
            "labels": plain.labels.tolist() if is_labeled else None,
            "classes": data.classes,
            "clusters": clusters.tolist(),
            "neighbors": nearest.indices.tolist(),
            "similarities": [[round(value, 3) for value in row] for row in nearest.values.tolist()],
            "columns": columns,
            "tiles": data_uri(_sheet(tiles, columns), "JPEG"),
        }
    )


def _sheet(tiles: Tensor, columns: int) -> Image.Image:
    """All small pictures, row by row."""
    colors = tiles[:, :3] if tiles.shape[1] >= 3 else tiles[:, :1].expand(-1, 3, -1, -1)
    rows = -(-len(colors) // columns)
    whole = torch.zeros(rows * columns, 3, _TILE, _TILE, dtype=torch.uint8)
    whole[: len(colors)] = colors
    whole = whole.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray(whole.numpy())
