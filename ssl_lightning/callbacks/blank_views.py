"""Training views that show nothing: counted in a batch, and kept to look at on the page of a run."""

import json
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ssl_lightning.callbacks.tiles import TILE, keep_for_page, names_of, reduced_to_tiles
from ssl_lightning.distributed import gather_uneven, reduced
from ssl_lightning.drawing import are_blank, data_uri, picture_of
from ssl_lightning.runs import BLANK_FILE, run_folder

_SHOWN = 24


def count_blank_views(trainer: L.Trainer, views: Sequence[Tensor], indices: Tensor) -> float | None:
    """The share of blank views over all processes; None if it is unknown how the views were normalized.

    The first process keeps some of them in the run folder. Every process must call it.

    Args:
        trainer: With a data module, and a logger that has a folder.
        views: The views of a batch, each ``(B, C, S, S)``.
        indices: ``(B,)`` indices of the images in the data set.
    """
    data: Any = getattr(trainer, "datamodule", None)
    specs = [spec for spec in getattr(data, "view_specs", ()) for _ in range(spec.count)]
    if not specs or len(specs) != len(views):
        return None
    blank = torch.stack([are_blank(view, spec.std) for view, spec in zip(views, specs, strict=True)])  # (V, B)
    found = blank.sum()
    count, total = reduced(torch.stack([found, torch.full_like(found, blank.numel())])).tolist()
    numbers, rows = blank.nonzero().unbind(1)
    keys = torch.stack([indices[rows], numbers, rows], dim=1)
    mine = keys[(keys[:, 0] * len(views) + keys[:, 1]).argsort()][:_SHOWN]
    parts = [torch.empty(0, views[0].shape[1], TILE, TILE, dtype=torch.uint8, device=indices.device)]
    for _, number, row in mine.tolist():
        spec, view = specs[number], views[number][row : row + 1]
        parts.append(reduced_to_tiles(view, spec.mean, spec.std))
    shown, tiles = gather_uneven(mine[:, :2]), gather_uneven(torch.cat(parts))
    order = (shown[:, 0] * len(views) + shown[:, 1]).argsort()[:_SHOWN]
    if trainer.is_global_zero and run_folder(trainer) is not None:
        shown, tiles = shown[order].cpu(), tiles[order].cpu()
        images = getattr(data, "train_images", None)
        numbered = shown[:, 0]
        names = [f"image {index}" for index in numbered.tolist()] if images is None else names_of(images, numbered)
        content = {
            "epoch": trainer.current_epoch + 1,
            "count": count,
            "total": total,
            "views": [
                {"name": name, "view": number + 1, "picture": data_uri(picture_of(tile))}
                for name, number, tile in zip(names, shown[:, 1].tolist(), tiles, strict=True)
            ],
        }
        keep_for_page(trainer, BLANK_FILE, json.dumps(content))
    return count / total
