"""Pictures of tensors, and where people look for them."""

from collections.abc import Sequence

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ssl_lightning.loggers import run_folder

CELL, _GAP, _HEADER = 144, 4, 14  # pixels


def picture_of(pixels: Tensor) -> Image.Image:
    """An image ``(C, H, W)`` uint8 of any number of channels: three as colours, else the first as gray.

    Args:
        pixels: The image.
    """
    array = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[..., 0]).convert("RGB")


def pixels_of(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels ``(C, S, S)`` uint8 of an image as it was before it was normalised.

    Args:
        image: ``(C, S, S)``.
        mean: What was subtracted, of 1.
        std: What divided, of 1.
    """
    offset, scale = (torch.tensor(tuple(one), device=image.device).view(-1, 1, 1) for one in (mean, std))
    return ((image.float() * scale + offset) * 255).round().clamp(0, 255).to(torch.uint8)


def fitted(picture: Image.Image, side: int = CELL) -> Image.Image:
    """The picture, its longer side as long as given.

    Args:
        picture: Any.
        side: In pixels.
    """
    scale = side / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))


def framed(picture: Image.Image, color: str) -> Image.Image:
    """The picture with a frame of two pixels.

    Args:
        picture: Any.
        color: In the words of Pillow.
    """
    return ImageOps.expand(picture, 2, color)


def heat(values: NDArray[np.float64], side: int = CELL) -> Image.Image:
    """Values ``(H, W)`` from dark (least) to bright (most), each a square.

    Args:
        values: Any scale.
        side: Of the picture, in pixels.
    """
    from matplotlib import colormaps

    low, high = values.min(), values.max()
    colors = colormaps["viridis"]((values - low) / max(high - low, 1e-12), bytes=True)[..., :3]
    scale = side / max(values.shape)
    size = round(values.shape[1] * scale), round(values.shape[0] * scale)
    return Image.fromarray(colors).resize(size, Image.Resampling.NEAREST)


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """A table of pictures.

    Args:
        rows: As many pictures each as there are titles.
        titles: Of the columns.
    """
    widths = [max(row[column].width for row in rows) for column in range(len(titles))]
    heights = [max(cell.height for cell in row) for row in rows]
    lefts = np.cumsum([_GAP, *(width + _GAP for width in widths)]).tolist()
    tops = np.cumsum([_HEADER, *(height + _GAP for height in heights)]).tolist()
    whole = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    draw = ImageDraw.Draw(whole)
    for left, title in zip(lefts, titles, strict=False):
        draw.text((left, 1), title, fill="black")
    for top, row in zip(tops, rows, strict=False):
        for left, cell in zip(lefts, row, strict=False):
            whole.paste(cell, (left, top))
    return whole


def show(trainer: L.Trainer, name: str, picture: Image.Image, file: str) -> None:
    """Put a picture into the run's folder, and into TensorBoard and Weights & Biases.

    Args:
        trainer: Its loggers say where.
        name: What the loggers call it.
        picture: To show.
        file: Path below the run's folder.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture])
    if (folder := run_folder(trainer)) is not None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
