"""Which files are images, judging by their suffixes, and what to say about the other files."""

import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Mapping

from PIL import Image

from ssl_lightning.errors import printable

_NO_STILL_IMAGES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow registers and cannot decode by itself: documents, containers of data, and video."""

_TIFF = (".tif", ".tiff", ".btf", ".tf8")
"""Pillow reads most of them, tifffile the ones with many bands and the large ones. The last two suffixes are BigTIFF's,
which Pillow does not register."""

_EXTRAS = {"dicom": ("pydicom", (".dcm", ".dicom")), "heic": ("pillow_heif", (".heic", ".heics", ".heif", ".hif"))}
"""For each extra of this package its library, and the suffixes of the files that only this library reads."""


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the files that can be read here. They depend on what is installed."""
    Image.init()
    pillow = {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NO_STILL_IMAGES
    }
    extras = {
        suffix for module, names in _EXTRAS.values() if importlib.util.find_spec(module) is not None for suffix in names
    }
    return frozenset({*pillow, *_TIFF, ".npy", *extras})


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, with its dot; empty if there is none."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether a file is an image that can be read here, judging by its suffix in any case.

    Args:
        name: Name or path of the file.
    """
    return suffix_of(name) in suffixes()


def install(extra: str) -> str:
    """The command that installs an extra of this package, as messages state it."""
    return f'pip install "ssl_lightning[{extra}]"'


def passed_over(counts: Mapping[str, int]) -> str:
    """A line about files that are no images, e.g. ``passed over 12 files: 10 .txt, 2 .mp4``; empty if there are none.

    Images that a missing extra would read are named with the command that installs it.

    Args:
        counts: Number of files for each suffix, as ``suffix_of`` gives it.
    """
    total = sum(counts.values())
    if not total:
        return ""
    most = Counter(counts).most_common(_NAMED)
    parts = [f"{count:,} {printable(suffix) or 'without a suffix'}" for suffix, count in most]
    if len(counts) > _NAMED:
        parts.append(f"and others ending in {len(counts) - _NAMED} more suffixes")
    needed = [extra for extra, (_, names) in _EXTRAS.items() if set(names) & counts.keys()]
    advice = f"; to read {' and '.join(map(_described, needed))}" if needed else ""
    return f"passed over {total:,} file{'s' if total > 1 else ''}: {', '.join(parts)}{advice}"


_NAMED = 8
"""Number of suffixes that are named."""


def _described(extra: str) -> str:
    return f"{extra.upper()} images: {install(extra)}"
