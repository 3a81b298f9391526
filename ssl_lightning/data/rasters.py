"""Image files that Pillow reads not at all, or not in full: arrays, TIFF with bands, DICOM, HEIC, deep color PNG."""

import functools
import io
import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.data.formats import install
from ssl_lightning.errors import UserError


def pixels_of_array(array: NDArray[Any]) -> Tensor:
    """An array ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` of any real dtype as ``(C, H, W)``.

    The channels are the shorter one of the first and the last dimension.

    Raises:
        ValueError: It is no image.
    """
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim not in (2, 3) or array.dtype.kind not in "biuf" or 0 in array.shape:
        raise ValueError(f"an array of shape {array.shape} and dtype {array.dtype} is not an image")
    if array.ndim == 2:
        array = array[None]
    elif array.shape[2] < array.shape[0]:
        array = array.transpose(2, 0, 1)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):  # half precision holds 11 bits
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def is_array(data: bytes) -> bool:
    """Whether this is the content of a ``.npy`` file."""
    return data.startswith(b"\x93NUMPY")


def read_array(data: bytes) -> Tensor:
    """The pixels of a ``.npy`` file, ``(C, H, W)``."""
    return pixels_of_array(np.load(io.BytesIO(data), allow_pickle=False))


def is_tiff(data: bytes) -> bool:
    """Whether this is the content of a TIFF file, BigTIFF included."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_tiff(data: bytes, reason: str = "Pillow cannot decode it") -> Tensor:
    """The bands of a TIFF file, ``(C, H, W)``: of its first image, or all channels of a stack that names them.

    Args:
        data: Content of the file.
        reason: Why Pillow does not read it.

    Raises:
        UserError: tifffile is missing.
    """
    try:
        import tifffile
    except ImportError as error:
        raise UserError(f"the images hold a TIFF file that needs tifffile ({reason}): {install('tiff')}.") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if not file.series:
            raise ValueError(f"a TIFF file without an image ({reason})")
        series = file.series[0]
        axes = series.axes
        if "S" not in axes and "C" not in axes:  # pages: an array of a single image, or a stack of images
            whole = series.kind == "shaped" and series.ndim <= 3 and min(series.shape[0], series.shape[-1]) <= 32
            return pixels_of_array(series.asarray() if whole else series.pages[0].asarray())
        array = series.asarray()
        band = "S" if "S" in axes else "C"
        for axis in [letter for letter in axes if letter not in ("Y", "X", band)]:  # time, depth: the first
            array = array.take(0, axes.index(axis))
            axes = axes.replace(axis, "")
        array = np.moveaxis(array, axes.index(band), 0)
        return pixels_of_array(array[0]) if len(array) == 1 else _bands(array)


def _bands(array: NDArray[Any]) -> Tensor:
    """Bands ``(C, H, W)``, however many: not to be taken for channels that come last."""
    return torch.cat([pixels_of_array(band) for band in array])


def is_dicom(data: bytes) -> bool:
    """Whether this is the content of a DICOM file."""
    return data[128:132] == b"DICM"


def read_dicom(data: bytes) -> Tensor:
    """The first frame of a DICOM file in its physical unit, ``(C, H, W)``; inverted where black is stored as white.

    Raises:
        UserError: pydicom is missing.
    """
    try:
        import pydicom
    except ImportError as error:
        raise UserError(f"the images hold DICOM files, which need pydicom: {install('dicom')}.") from error
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    dataset = pydicom.dcmread(io.BytesIO(data))
    array = pixel_array(dataset, index=0)
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        array = apply_color_lut(array, dataset)
    if array.ndim == 3:
        return _bands(np.moveaxis(array, -1, 0))
    if kind == "MONOCHROME1":
        array = (-1 if array.dtype.kind == "i" else 2 ** int(dataset.BitsStored) - 1) - array
    rescaling = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
    scaled = "ModalityLUTSequence" in dataset or rescaling != (1, 0)
    return pixels_of_array(apply_modality_lut(array, dataset).astype(np.float32) if scaled else array)


def is_heic(data: bytes) -> bool:
    """Whether this is the content of a HEIC file; AVIF, which has the same container, is not."""
    brands = data[8 : max(16, min(int.from_bytes(data[:4], "big"), 256))]
    return data[4:8] == b"ftyp" and b"avi" not in brands and any(brand in brands for brand in _HEIC_BRANDS)


_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@functools.cache
def let_pillow_read_heic() -> None:
    """Add HEIC to the formats that Pillow opens.

    Raises:
        UserError: pillow-heif is missing.
    """
    try:
        import pillow_heif
    except ImportError as error:
        raise UserError(f"the images hold HEIC files, which need pillow-heif: {install('heic')}.") from error
    pillow_heif.register_heif_opener()


def is_deep_color_png(data: bytes) -> bool:
    """Whether this is a PNG of 16 bits with several channels, of which Pillow drops the lower 8 bits."""
    return data.startswith(b"\x89PNG") and data[24:25] == b"\x10" and data[25:26] in (b"\x02", b"\x04", b"\x06")


def read_deep_color_png(data: bytes) -> Tensor:
    """Gray or color of a PNG with 16 bits, ``(C, H, W)``, without its transparency."""
    from torchvision.io import ImageReadMode, decode_png

    pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return pixels[: len(pixels) - 1] if len(pixels) in (2, 4) else pixels


def is_deep_color_ppm(data: bytes) -> bool:
    """Whether this is a PPM of more than 8 bits, of which Pillow drops the lower ones."""
    header = _PPM.match(data)
    return header is not None and int(header[3]) > 255


def read_deep_color_ppm(data: bytes) -> Tensor:
    """The pixels of a PPM with more than 8 bits, ``(3, H, W)``."""
    header = _PPM.match(data)
    assert header is not None
    width, height = int(header[1]), int(header[2])
    values = np.frombuffer(data, ">u2", count=height * width * 3, offset=header.end())
    return _bands(np.moveaxis(values.reshape(height, width, 3), -1, 0))


_PPM = re.compile(rb"P6(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s")
