"""Pictures of tensors, and where to show them."""

import base64
import io
from collections.abc import Sequence
from typing import Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ssl_lightning.runs import run_folder

CELL, _GAP, _HEADER = 144, 4, 14  # pixels


def picture_of(pixels: Tensor) -> Image.Image:
    """An image ``(C, H, W)`` with any number of channels: the first three in color, fewer than three in gray.

    Args:
        pixels: The image, uint8, or float from 0 to 255.
    """
    array = pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., :3].copy() if array.shape[2] > 2 else array[..., 0]).convert("RGB")


def pixels_of(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels ``(C, S, S)`` uint8 of an image before it was normalized.

    Args:
        image: The normalized image, ``(C, S, S)``.
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel, for pixels from 0 to 1.
    """
    offset, scale = (torch.tensor(tuple(values), device=image.device).view(-1, 1, 1) for values in (mean, std))
    return ((image.float() * scale + offset) * 255).round().clamp(0, 255).to(torch.uint8)


def are_blank(views: Tensor, std: Sequence[float]) -> Tensor:
    """Which views show nothing, ``(B,)``: the pixels of each channel, from 0 to 1, deviate by less than 0.02.

    Args:
        views: Normalized, ``(B, C, S, S)``.
        std: Standard deviation of each channel that they were divided by.
    """
    deviations = views.flatten(2).float().std(dim=2) * torch.tensor(tuple(std), device=views.device)
    return (deviations < _BLANK).all(dim=1)


_BLANK = 0.02


def fitted(picture: Image.Image, side: int = CELL) -> Image.Image:
    """The picture, resized so that its longer side has a given length.

    Args:
        picture: A picture of any size.
        side: Length in pixels.
    """
    scale = side / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))


def framed(picture: Image.Image, color: str) -> Image.Image:
    """The picture with a frame of two pixels.

    Args:
        picture: A picture of any size.
        color: A color that Pillow knows, e.g. ``#3cb44b``.
    """
    return ImageOps.expand(picture, 2, color)


def heat(values: NDArray[np.float64], side: int = CELL) -> Image.Image:
    """Values ``(H, W)`` as squares from dark (smallest) to bright (largest).

    Args:
        values: The values, on any scale.
        side: Length of the longer side of the picture in pixels.
    """
    from matplotlib import colormaps

    low, high = values.min(), values.max()
    colors = colormaps["viridis"]((values - low) / max(high - low, 1e-12), bytes=True)[..., :3]
    return squares(colors, side)


def squares(colors: NDArray[np.uint8], side: int = CELL) -> Image.Image:
    """Colors ``(H, W, 3)`` as squares.

    Args:
        colors: Red, green and blue.
        side: Length of the longer side of the picture in pixels.
    """
    scale = side / max(colors.shape[:2])
    size = max(1, round(colors.shape[1] * scale)), max(1, round(colors.shape[0] * scale))
    return Image.fromarray(colors).resize(size, Image.Resampling.NEAREST)


def data_uri(picture: Image.Image, kind: Literal["PNG", "JPEG"] = "PNG") -> str:
    """A picture as an address that holds it, for pages without other files.

    Args:
        picture: The picture.
        kind: PNG keeps all its pixels; JPEG is smaller.
    """
    file = io.BytesIO()
    picture.convert("RGB").save(file, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """A table of pictures.

    Args:
        rows: The pictures; each row has as many as there are titles.
        titles: Titles of the columns.
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
    """Save a picture in the run folder, and log it to TensorBoard and Weights & Biases.

    Args:
        trainer: The trainer, whose loggers get the picture.
        name: Name of the picture in the loggers.
        picture: The picture.
        file: Path inside the run folder.
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
