"""Reduce images that are much larger than the views that training makes of them."""

import io
import math
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image

from ssl_lightning.data import rasters
from ssl_lightning.data.crops import resize
from ssl_lightning.data.decoding import open_image
from ssl_lightning.data.formats import install
from ssl_lightning.data.images import Images
from ssl_lightning.data.sampler import spread
from ssl_lightning.errors import UserError

_MUCH_LARGER = 2
"""Ratio of the images' shorter side to the views' side from which on it pays to reduce the images."""


def reduce_command(images: Images, view_size: int, root: str) -> str | None:
    """The command that reduces the images, if they are much larger than the views; None if they are not.

    Args:
        images: The images.
        view_size: Side in pixels of the largest views.
        root: Their folder.
    """
    sides = []
    for index in spread(np.arange(len(images)), min(8, len(images))):
        with suppress(Exception):  # an unreadable image has no size
            image = images.open(int(index))
            sides.append(min(image.height, image.width))
    if not sides or np.median(sides) < _MUCH_LARGER * view_size:
        return None
    size = 32 * math.ceil(view_size / 0.875 / 32)  # evaluation crops 7/8 of the shorter side
    return f"python -m ssl_lightning prepare --root {root} --output SMALLER --size {size}"


def reduced(data: bytes, size: int, quality: int) -> tuple[bytes, str]:
    """An image file with its shorter side reduced to a size, and the suffix of the result.

    8-bit images become JPEGs. Other depths and more channels are kept: 16-bit gray as PNG, the rest as TIFF. A file
    that is small enough and upright stays as it is, with the suffix "".

    Args:
        data: Content of the file.
        size: The shorter side in pixels; it is never enlarged.
        quality: Quality of JPEGs, from 1 to 100.

    Raises:
        Exception: The content is truncated or not an image. Its type depends on the format.
    """
    pixels, upright = _decoded(data)  # (H, W, C)
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if shorter <= size and upright:
        return data, ""
    if shorter > size:
        pixels = _resized(pixels, (round(height * size / shorter), round(width * size / shorter)))
    return _encoded(pixels, quality)


def _decoded(data: bytes) -> tuple[NDArray[Any], bool]:
    """All channels of an image in their own depth, upright, ``(H, W, C)``; and whether the file was upright."""
    upright = True
    with suppress(Exception), Image.open(io.BytesIO(data)) as image:  # else it is no file of Pillow's
        upright = image.getexif().get(ExifTags.Base.Orientation) not in range(2, 9)
    opened = open_image(data)
    has_bands = opened.bands is not None and rasters.is_tiff(data)  # else they are the transparency
    pixels = opened.bands() if has_bands and opened.bands is not None else opened.decode(opened.height)
    return pixels.permute(1, 2, 0).numpy(), upright


def _resized(pixels: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Pixels ``(H, W, C)`` with antialiasing, in their own depth."""
    if pixels.dtype == np.uint8:
        return resize(pixels, shape, "bicubic").permute(1, 2, 0).numpy()
    image = torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None]
    result = F.interpolate(image, shape, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    if np.issubdtype(pixels.dtype, np.integer):
        limits = np.iinfo(pixels.dtype)
        result = result.round().clip(limits.min, limits.max)
    return result.astype(pixels.dtype)


def _encoded(pixels: NDArray[Any], quality: int) -> tuple[bytes, str]:
    file, channels = io.BytesIO(), pixels.shape[2]
    is_gray = channels == 1 or (channels == 3 and (pixels == pixels[..., :1]).all())
    if pixels.dtype == np.uint8 and (is_gray or channels == 3):
        Image.fromarray(np.ascontiguousarray(pixels[..., 0] if is_gray else pixels)).save(file, "JPEG", quality=quality)
        return file.getvalue(), ".jpg"
    if channels == 1 and pixels.dtype == np.uint16:
        Image.fromarray(np.ascontiguousarray(pixels[..., 0])).save(file, "PNG")
        return file.getvalue(), ".png"
    try:
        import tifffile
    except ImportError as error:
        raise UserError(f"images of more than 8 bits or 3 channels need tifffile: {install('tiff')}.") from error
    pixels, layout = (pixels[..., 0], None) if channels == 1 else (pixels, "contig")
    tifffile.imwrite(file, pixels, compression="zlib", photometric="minisblack", planarconfig=layout)
    return file.getvalue(), ".tif"
