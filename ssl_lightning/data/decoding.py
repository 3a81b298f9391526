"""Decoding: image files of any kind to pixels, with the size of an image known before its pixels."""

import functools
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec
import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ssl_lightning.data import rasters

for _name in ("PIL.TiffImagePlugin", "tifffile"):  # what they complain about is read all the same, or listed
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class OpenedImage(NamedTuple):
    """An image whose size is known before its pixels.

    This lets a worker draw all crops first, and crop each image right after decoding it, while its pixels are in the
    processor's cache: measured 12 % faster than decoding the whole batch first.
    """

    height: int
    width: int
    decode: Callable[[int], Tensor]
    """Given a number of rows, returns the pixels of at least that many rows from the top: ``(C, rows, W)`` of any real
    dtype. The resize is fastest on uint8 in channels-last memory layout."""
    is_photo: bool = False
    """Whether it is an ordinary 8-bit image, whose ``decode`` gives RGB, and which may as well be wanted in gray."""
    bands: Callable[[], Tensor] | None = None
    """Returns all channels of a photo that has more than RGB has, e.g. its transparency."""


def open_image(data: bytes) -> OpenedImage:
    """Open an image file of any kind. An animation gives its first frame.

    An ordinary 8-bit image becomes RGB, rotated as its Exif tag says: palette, CMYK and transparent images are
    converted, and transparency is dropped. Any other image keeps its channels and values.
    A plain JPEG is decoded only when its pixels are asked for, any other file at once.

    Args:
        data: Content of the file.

    Raises:
        UserError: An extra of this package is needed to read it.
        Exception: The content is truncated or not an image. Its type depends on the format.
    """
    jpeg = _plain_jpeg(data)
    if jpeg is not None:
        return OpenedImage(jpeg.height, jpeg.width, functools.partial(_decode_jpeg, data, jpeg), is_photo=True)
    if rasters.is_array(data):
        return opened_already(rasters.read_array(data))
    if rasters.is_dicom(data):
        return opened_already(rasters.read_dicom(data))
    if rasters.is_deep_color_png(data):
        return opened_already(rasters.read_deep_color_png(data))
    if rasters.is_deep_color_ppm(data):
        return opened_already(rasters.read_deep_color_ppm(data))
    if rasters.is_heic(data):
        rasters.let_pillow_read_heic()
    with _without_limit():
        return _open_tiff(data) if rasters.is_tiff(data) else _open_with_pillow(data)


@contextmanager
def _without_limit() -> Iterator[None]:
    """Let Pillow read images of any size: its limit is for files of strangers, these are the user's own."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _open_with_pillow(data: bytes) -> OpenedImage:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return open_pil_image(image)
    except UnidentifiedImageError:  # its message holds an address in memory
        raise OSError("not an image that can be read" if data else "the file is empty") from None


def _open_tiff(data: bytes) -> OpenedImage:
    """Open a TIFF file with Pillow if that loses nothing, else with tifffile."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            tags: Any = image.tag_v2
            bits, samples = tags.get(_BITS_PER_SAMPLE, (8,)), tags.get(_SAMPLES_PER_PIXEL, 1)
            description = str(tags.get(_DESCRIPTION, ""))
            is_stack = getattr(image, "n_frames", 1) > 1 and any(mark in description for mark in _OF_STACKS)
            is_signed = max(bits) <= 8 and 2 in tags.get(_SAMPLE_FORMAT, ())
            if not (is_stack or is_signed or (samples > 1 and max(bits) > 8)):
                opened = open_pil_image(image)
                more = samples > len(image.getbands()) or image.mode == "RGBX"
                return opened._replace(bands=functools.partial(rasters.read_tiff, data)) if more else opened
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        reason = "not known to Pillow" if isinstance(error, UnidentifiedImageError) else str(error)[:80]
        return opened_already(rasters.read_tiff(data, reason))
    return opened_already(rasters.read_tiff(data, "of several bands, or signed"))


_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _DESCRIPTION, _SAMPLE_FORMAT = 258, 277, 270, 339
_OF_STACKS = ('{"shape": [', "channels=", "<OME")
"""What the descriptions of files contain whose pages may be bands: of tifffile, ImageJ and OME."""


def opened_already(pixels: Tensor) -> OpenedImage:
    """An image ``(C, H, W)`` that is already decoded."""
    return OpenedImage(pixels.shape[1], pixels.shape[2], lambda _: pixels)


def open_example(image: Any) -> OpenedImage:
    """Open what a data set calls an image.

    A Pillow image, the bytes of a file, an array or a tensor, or Hugging Face's ``{bytes, path}``.
    """
    if isinstance(image, dict):
        if image.get("bytes") is None:
            with fsspec.open(image["path"], "rb") as file:  # also in an archive, or behind a URL
                return open_image(file.read())
        image = image["bytes"]
    if isinstance(image, Tensor):
        return opened_already(image if image.ndim == 3 else rasters.pixels_of_array(image.numpy()))
    if isinstance(image, np.ndarray):
        return opened_already(rasters.pixels_of_array(image))
    return open_image(image) if isinstance(image, bytes) else open_pil_image(image)


def open_pil_image(image: Image.Image) -> OpenedImage:
    """A Pillow image, rotated as its Exif tag says: an 8-bit image as RGB, gray of more bits with its own values."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return opened_already(rasters.pixels_of_array(np.asarray(image)))
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    bands = functools.partial(_all_bands, image) if image.mode == "RGBA" else None
    return opened_already(pixels)._replace(is_photo=True, bands=bands)


def _all_bands(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class _Jpeg(NamedTuple):
    """What the header of a JPEG says."""

    height: int
    width: int
    height_field: int
    """Position in the file of the two bytes with the height; 0 if the file cannot be decoded from the top only."""
    margin: int
    """Number of rows below the last needed row that the upsampling of its colors reads."""


def _plain_jpeg(data: bytes) -> _Jpeg | None:
    """The header of a JPEG that libjpeg-turbo decodes exactly as Pillow does; None for any other file."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    field = margin = components = 0
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF and data[position + 1] != _START_OF_SCAN:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == _APP1:  # Exif or XMP: it may have to be rotated
            with Image.open(io.BytesIO(data)) as image:
                if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
                    return None
        elif marker in _SEQUENTIAL:
            field, components = position + 5, data[position + 9]
            margin = 2 * max(data[position + 11 + 3 * number] & 15 for number in range(components))
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace in ("CMYK", "YCCK"):  # Pillow knows how Adobe inverts them
        return None
    # Complete, and with all components in one scan: then the rows are stored from top to bottom.
    top_down = b"\xff\xd9" in data[-1024:] and data[position + 4 : position + 5] == bytes([components])
    return _Jpeg(height, width, field if top_down else 0, margin)


_SEQUENTIAL, _START_OF_SCAN, _APP1 = (0xC0, 0xC1), 0xDA, 0xE1


def _decode_jpeg(data: bytes, jpeg: _Jpeg, rows: int) -> Tensor:
    """Decode at least ``rows`` rows from the top with libjpeg-turbo: rows that no crop needs take as long as others.

    Measured on one core, 500x375 photos: simplejpeg 1.75 ms, OpenCV 1.8, torchvision 1.9, Pillow 2.6, all with equal
    pixels; simplejpeg 1.0 for the upper half. Faster upsampling, or scaling while decoding, changes the pixels.
    """
    needed = rows + jpeg.margin
    try:
        if jpeg.height_field and needed < jpeg.height:
            head, tail = data[: jpeg.height_field], data[jpeg.height_field + 2 :]
            pixels = simplejpeg.decode_jpeg(head + needed.to_bytes(2, "big") + tail, "RGB", strict=False)
        else:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # damaged: Pillow tolerates more
        return _open_with_pillow(data).decode(rows)
    return torch.from_numpy(pixels).permute(2, 0, 1)
