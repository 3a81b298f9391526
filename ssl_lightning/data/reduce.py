"""Reduce images that are much larger than the views that training makes of them."""

import io
import math
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from ssl_lightning.data.crops import resize
from ssl_lightning.data.decoding import open_image
from ssl_lightning.data.images import Images
from ssl_lightning.data.sampler import spread

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

    8-bit images become JPEGs. Other depths and more bands are kept: 16-bit gray as PNG, the rest as TIFF. A file that
    is small enough and upright stays as it is, with the suffix "".

    Args:
        data: Content of the file.
        size: The shorter side in pixels; it is never enlarged.
        quality: Quality of JPEGs, from 1 to 100.

    Raises:
        Exception: The content is truncated or not an image. Its type depends on the format.
    """
    pixels, upright = _decoded(data)  # (H, W) or (H, W, C)
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if shorter <= size and upright:
        return data, ""
    if shorter > size:
        pixels = _resized(pixels, (round(height * size / shorter), round(width * size / shorter)))
    return _encoded(pixels, quality)


def _decoded(data: bytes) -> tuple[NDArray[Any], bool]:
    """All bands of an image in their own depth, upright; and whether the file was upright."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = image.getexif().get(ExifTags.Base.Orientation) not in range(2, 9)
            if image.format == "JPEG" and image.mode != "L":
                opened = open_image(data)
                return opened.decode(opened.height).permute(1, 2, 0).numpy(), upright
            picture = ImageOps.exif_transpose(image)
            keeps_bands = image.format == "TIFF" and image.mode in ("RGBA", "CMYK")  # four bands, whatever their names
            if picture.mode == "1":
                picture = picture.convert("L")
            elif picture.mode not in ("L", "RGB", "F") and not picture.mode.startswith("I") and not keeps_bands:
                picture = picture.convert("RGB")
            pixels = np.array(picture)
            if image.format == "PNG" and pixels.dtype == np.int32:  # so do older versions of Pillow open 16 bits
                pixels = pixels.astype(np.uint16)
            return pixels, upright
    except Image.UnidentifiedImageError:
        if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise OSError("not an image that Pillow can read" if data else "the file is empty") from None
    return _decoded_tiff(data), True


def _decoded_tiff(data: bytes) -> NDArray[Any]:
    """The bands of a TIFF that Pillow cannot read, ``(H, W, C)``."""
    try:
        import tifffile
    except ImportError as error:
        raise OSError("this TIFF needs the library tifffile: pip install tifffile") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        pixels, axes = series.asarray(), series.axes
    rows, columns = axes.index("Y"), axes.index("X")
    pixels = np.moveaxis(pixels, (rows, columns), (0, 1))
    return pixels.reshape(*pixels.shape[:2], -1) if pixels.ndim > 2 else pixels


def _resized(pixels: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Pixels with antialiasing, in their own depth."""
    bands = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype == np.uint8:
        result = resize(bands, shape, "bicubic").permute(1, 2, 0).numpy()
    else:
        image = torch.from_numpy(bands.astype(np.float64)).permute(2, 0, 1)[None]
        result = F.interpolate(image, shape, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
        if np.issubdtype(pixels.dtype, np.integer):
            limits = np.iinfo(pixels.dtype)
            result = result.round().clip(limits.min, limits.max)
        result = result.astype(pixels.dtype)
    return result[..., 0] if pixels.ndim == 2 else result


def _encoded(pixels: NDArray[Any], quality: int) -> tuple[bytes, str]:
    file, bands = io.BytesIO(), 1 if pixels.ndim == 2 else pixels.shape[2]
    pixels = np.ascontiguousarray(pixels)
    if pixels.dtype == np.uint8 and bands in (1, 3):
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return file.getvalue(), ".jpg"
    if bands == 1 and pixels.dtype == np.uint16:
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue(), ".png"
    if (bands == 1 and pixels.dtype in (np.int32, np.float32)) or (bands == 4 and pixels.dtype == np.uint8):
        Image.fromarray(pixels).save(file, "TIFF", compression="tiff_deflate")
    else:
        import tifffile  # it has read them

        layout = None if bands == 1 else "contig"
        tifffile.imwrite(file, pixels, compression="zlib", photometric="minisblack", planarconfig=layout)
    return file.getvalue(), ".tif"
