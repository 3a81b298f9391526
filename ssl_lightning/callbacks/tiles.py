"""What callbacks keep for the page of a run: files in its folder, and small pictures of images of the data."""

from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.callbacks.features import no_numbers
from ssl_lightning.checkpoints.files import replacing
from ssl_lightning.distributed import gather_uneven
from ssl_lightning.drawing import data_uri, picture_of, pixels_of
from ssl_lightning.runs import run_folder

TILE = 32
"""Side of a small picture in pixels."""


def tiles_of(trainer: L.Trainer, pl_module: L.LightningModule, data: Any, images: Any, indices: Tensor) -> Tensor:
    """Small pictures ``(N, C, 32, 32)`` uint8 of images, over all processes; unreadable images are missing.

    Args:
        trainer: Determines the device.
        pl_module: The method.
        data: The data module.
        images: Its training or validation images.
        indices: ``(N,)`` in ascending order, on the CPU.
    """
    transform = data.image_transform
    tiles = [torch.empty(0, images.channels, TILE, TILE, dtype=torch.uint8, device=pl_module.device)]
    places = [no_numbers(pl_module)]
    for batch in data.plain_loader(images.subset(indices.numpy())):
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        tiles.append(reduced_to_tiles(batch.images, transform["mean"], transform["std"]))
        places.append(batch.indices)
    order = gather_uneven(torch.cat(places)).argsort()
    return gather_uneven(torch.cat(tiles))[order].cpu()


def reduced_to_tiles(images: Tensor, mean: Any, std: Any) -> Tensor:
    """Small pictures ``(N, C, 32, 32)`` uint8 of normalized images.

    Args:
        images: ``(N, C, S, S)``.
        mean: Mean of each channel that was subtracted.
        std: Deviation of each channel that they were divided by.
    """
    small = F.interpolate(images.float(), (TILE, TILE), mode="bilinear", antialias=True)
    return torch.stack([pixels_of(image, mean, std) for image in small])


def tiled(tiles: Tensor) -> dict[str, Any]:
    """All small pictures as a single picture, row by row: its address, and the number of its columns.

    Args:
        tiles: ``(N, C, 32, 32)`` uint8.
    """
    columns = max(1, int(np.ceil(np.sqrt(len(tiles)))))
    colors = tiles[:, :3] if tiles.shape[1] >= 3 else tiles[:, :1].expand(-1, 3, -1, -1)
    rows = max(1, -(-len(colors) // columns))
    whole = torch.zeros(rows * columns, 3, TILE, TILE, dtype=torch.uint8)
    whole[: len(colors)] = colors
    whole = whole.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (3, H, W)
    return {"columns": columns, "tiles": data_uri(picture_of(whole), "JPEG")}


def names_of(images: Any, indices: Tensor) -> list[str]:
    """Paths of images below the root of the data, or their names.

    Args:
        images: The images.
        indices: ``(N,)``.
    """
    names = (images.path(index) or images.name(index) for index in indices.tolist())
    return [name.encode(errors="replace").decode() for name in names]


def keep_for_page(trainer: L.Trainer, name: str, content: str) -> None:
    """Write a file of the run folder, if there is one.

    Args:
        trainer: The trainer of the run, on its first process.
        name: Name of the file.
        content: What to write.
    """
    if (folder := run_folder(trainer)) is not None:
        with replacing(folder / name) as file:
            file.write(content.encode())
