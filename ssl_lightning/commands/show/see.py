"""Images, and what a backbone gives for each of their places."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor

from ssl_lightning.backbones.maps import fitting_side, map_and_attention
from ssl_lightning.backbones.tokens import input_channels, only_size
from ssl_lightning.checkpoints import Pretrained
from ssl_lightning.data.crops import resize
from ssl_lightning.data.formats import is_image
from ssl_lightning.data.images import ImageFiles
from ssl_lightning.data.look import look_at, number_of_channels, statistics
from ssl_lightning.data.pixels import Preparation
from ssl_lightning.data.prepared import PreparedImages
from ssl_lightning.data.sampler import spread
from ssl_lightning.data.walk import walk
from ssl_lightning.drawing import picture_of
from ssl_lightning.errors import UserError, printable

_LONGEST = 3
"""Longest side in shorter sides; of a longer image the middle is shown."""
_MOST_PATCHES = 5000
"""Most patches of an image whose attention is computed: its memory grows with their square."""


class Seen(NamedTuple):
    """An image, and what a backbone gives for each of its places."""

    name: str
    picture: Image.Image
    """As the backbone sees it."""
    features: Tensor
    """``(D, rows, columns)``, float32."""
    attention: Tensor | None
    """``(heads, rows, columns)``."""


def find(images: Sequence[str]) -> list[Path]:
    """The image files that words of a command line name, each once.

    Args:
        images: Files, folders or patterns.

    Raises:
        UserError: A word names no image.
    """
    files: dict[Path, None] = {}
    for word in images:
        path = Path(word).expanduser()
        if path.is_dir():
            found = sorted(path / folder / name for folder, names in walk(path) for name in names if is_image(name))
        elif path.exists():
            found = [path]
        else:
            matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
            found = [match for match in matches if match.is_file() and is_image(match.name)]
        if not found:
            what = (
                "is a folder without images" if path.is_dir() else "is no image file, folder or pattern of image files"
            )
            raise UserError(f"IMAGES {printable(word)} {what}; give, for example, photos/ or 'photos/*.jpg'.")
        files |= dict.fromkeys(found)
    return list(files)


def see(pretrained: Pretrained, files: Sequence[Path], image_size: int | None, num_images: int) -> list[Seen]:
    """Look at images with a backbone.

    Args:
        pretrained: The backbone.
        files: The images.
        image_size: Shorter side in pixels. None means the size that the backbone was trained with.
        num_images: Largest number of images.

    Raises:
        UserError: No image can be read, or the backbone does not take them.
    """
    backbone, transform = pretrained.backbone.eval(), pretrained.image_transform
    side = _side(backbone, transform["size"], image_size)
    images, mean, std = _prepared(pretrained, files, num_images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone.to(device)
    seen: list[Seen] = []
    for index in range(len(images)):
        try:
            pixels = images.read(index)
        except UserError:
            raise
        except Exception as error:  # its type depends on the format
            rank_zero_warn(f"{printable(images.name(index))} cannot be read and is left out: {printable(str(error))}")
            continue
        for shape in (shapes := _shapes(pixels, side, backbone)):
            whole = _resized(pixels, shape, transform["interpolation"])  # (C, H, W), 0 to 255
            batch = ((whole.float() / 255 - mean) / std)[None].to(device)
            try:
                features, attention = _look(pretrained, batch)
            except UserError:
                if shape == shapes[-1]:
                    raise
                continue
            seen.append(Seen(printable(images.name(index)), picture_of(whole), features, attention))
            break
    if not seen:
        raise UserError(f"none of {len(images)} images can be read; give other IMAGES.")
    return seen


@torch.no_grad()
def _look(pretrained: Pretrained, batch: Tensor) -> tuple[Tensor, Tensor | None]:
    height, width = batch.shape[2:]
    patch = getattr(pretrained.backbone, "patch_side", None)
    few = patch is None or (height // patch) * (width // patch) <= _MOST_PATCHES
    try:
        features, attention = map_and_attention(pretrained.backbone, batch, attention=few)
    except UserError:
        raise
    except Exception as error:  # whatever a network raises that does not take this size
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"backbone {pretrained.name!r} does not take images of {width}x{height} px ({type(error).__name__}: "
            f"{reason}); set --image_size."
        ) from error
    return features[0].float().cpu(), None if attention is None else attention[0].float().cpu()


def _side(backbone: torch.nn.Module, usual: int, wanted: int | None) -> int:
    """Shorter side of the images in pixels.

    Raises:
        UserError: The wanted side does not suit the backbone.
    """
    if wanted is None:
        return fitting_side(backbone, usual)
    patch, only = getattr(backbone, "patch_side", 1), only_size(backbone)
    if only not in (None, wanted):
        raise UserError(f"--image_size {wanted}: this backbone takes only images of {only} px; leave the option out.")
    if wanted % patch:
        near = max(1, round(wanted / patch)) * patch
        raise UserError(
            f"--image_size {wanted}: the backbone's patches of {patch} px do not divide it; use {near}, for example."
        )
    return wanted


def _prepared(pretrained: Pretrained, files: Sequence[Path], count: int) -> tuple[PreparedImages, Tensor, Tensor]:
    """Images with the channels of the backbone, and the mean and deviation ``(C, 1, 1)`` of their channels."""
    transform, wanted = pretrained.image_transform, input_channels(pretrained.backbone)
    if len(files) > count:
        rank_zero_info(f"{count} of {len(files):,} images, evenly spread; --num_images shows more")
        files = [files[number] for number in spread(np.arange(len(files)), count)]
    images = ImageFiles(files)
    look = look_at(images, may_differ=True)
    if not look.example:
        raise _unreadable(images)
    channels = number_of_channels(look, wanted if wanted in (1, 3) else None, wanted, trains=False)
    bounds = look.value_range
    if bounds is not None:
        low, high = transform.get("value_range", bounds)
        bounds = float(low), float(high)
    preparation = Preparation(channels, bounds, bounds is not None)
    mean, std = transform["mean"], transform["std"]
    if len(mean) != channels:
        mean, std = statistics(images, preparation)
    as_column = [torch.tensor(tuple(values), dtype=torch.float32).view(-1, 1, 1) for values in (mean, std)]
    return PreparedImages(images, preparation), as_column[0], as_column[1]


def _unreadable(images: ImageFiles) -> UserError:
    reason = "unreadable"
    try:
        images.read(0)
    except Exception as error:
        reason = str(error)
    return UserError(
        f"none of {len(images)} images can be read, e.g. {printable(images.name(0))}: {printable(reason)}; give other "
        "IMAGES."
    )


def _shapes(pixels: Tensor, side: int, backbone: torch.nn.Module) -> list[tuple[int, int]]:
    """Heights and widths of an image to try: whole, with sides that patches divide; then square."""
    if only_size(backbone) is not None:
        return [(side, side)]
    height, width = pixels.shape[1:]
    patch = getattr(backbone, "patch_side", 1)
    longer = round(min(_LONGEST, max(height, width) / min(height, width)) * side / patch) * patch
    return [(side, longer) if width >= height else (longer, side), (side, side)]


def _resized(pixels: Tensor, shape: tuple[int, int], interpolation: str) -> Tensor:
    """The largest central part of an image of the proportions of a shape, resized to it."""
    height, width = pixels.shape[1:]
    scale = min(height / shape[0], width / shape[1])
    rows, columns = min(height, max(1, round(shape[0] * scale))), min(width, max(1, round(shape[1] * scale)))
    top, left = (height - rows) // 2, (width - columns) // 2
    part: Any = pixels[:, top : top + rows, left : left + columns].permute(1, 2, 0).numpy()
    return resize(part, shape, interpolation)
