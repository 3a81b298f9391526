"""An index of the images in a tar file, with their labels."""

import hashlib
import json
import os
import tarfile
import uuid
import zipfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray

from ssl_lightning.cache import cache_file, write_arrays
from ssl_lightning.data.formats import is_image, suffix_of, suffixes
from ssl_lightning.errors import UserError, printable


@dataclass(frozen=True)
class Shard:
    """A tar file, and the positions of its images."""

    url: str
    names: NDArray[np.bytes_]
    """``(N,)`` names of the images in the file."""
    offsets: NDArray[np.int64]
    """``(N,)`` position of the first byte of each image."""
    sizes: NDArray[np.int64]
    """``(N,)`` number of bytes of each image."""
    labels: NDArray[np.str_]
    """``(N,)`` class of each image as JSON; empty if it is unknown."""
    others: dict[str, int]
    """Number of other files for each suffix."""

    @classmethod
    def indexed(cls, url: str, copies: Path, skip: bool, label_key: str | None = None) -> "Shard":
        """Scan a tar file, or read the cached result of an earlier scan.

        Args:
            url: The tar file.
            copies: Folder for copies of files behind a URL.
            skip: Leave out the broken part with a warning, instead of raising an error.
            label_key: See ShardsData.

        Raises:
            UserError: The file is missing or truncated, and ``skip`` is not set.
        """
        try:
            path = local_copy(url, copies)
            status = path.stat()
            which = f"{url}-{status.st_size}-{status.st_mtime_ns}-{label_key}-{sorted(suffixes())}"
            index = cache_file(f"shard-{which}", ".npz")
            with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), index.open("rb") as file:
                arrays = np.load(file)
                others = dict(zip(arrays["other_suffixes"].tolist(), arrays["other_counts"].tolist(), strict=True))
                return cls(url, arrays["names"], arrays["offsets"], arrays["sizes"], arrays["labels"], others)
            shard, problem = cls._scanned(url, path, label_key)
        except OSError as error:
            shard, problem = cls(url, *_NO_IMAGES), f"{type(error).__name__}: {error}"
        if problem:
            if is_remote(url):
                _copy_of(url, copies).unlink(missing_ok=True)  # so that the next run copies it again
            if not skip:
                raise UserError(f"{printable(url)}: {problem}; replace the file, or set --data.broken_shards=skip.")
            rank_zero_warn(f"{printable(url)}: {problem}; using the {len(shard.names)} whole images in it.")
        else:
            write_arrays(
                index,
                names=shard.names,
                offsets=shard.offsets,
                sizes=shard.sizes,
                labels=shard.labels,
                other_suffixes=np.array([*map(printable, shard.others)], np.str_),
                other_counts=np.array([*shard.others.values()], np.int64),
            )
        return shard

    @classmethod
    def _scanned(cls, url: str, path: Path, label_key: str | None) -> tuple["Shard", str]:
        """The index of a tar file, and a description of what is wrong with the file, empty if nothing is."""
        rows: list[tuple[str, int, int]] = []  # name, offset and size of each image
        labels: dict[str, str] = {}
        others: Counter[str] = Counter()
        size, problem = path.stat().st_size, _compression(path)
        if problem:
            return cls(url, *_NO_IMAGES), problem
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    hidden = os.path.basename(member.name).startswith(".") or member.name.startswith("__MACOSX/")
                    if not member.isfile() or hidden:
                        continue
                    if member.offset_data + member.size > size:
                        break
                    suffix = suffix_of(member.name)
                    if is_image(member.name) and not member.issparse():
                        rows.append((member.name, member.offset_data, member.size))
                    elif suffix in (".cls", ".json"):
                        content = archive.extractfile(member)
                        assert content is not None
                        if label_key != "none":
                            labels.update(_label(member.name, content.read(), label_key))
                    else:
                        others[suffix] += 1
            with path.open("rb") as file:
                file.seek(archive.offset)
                if file.read(512) != bytes(512):  # tarfile takes an invalid header for the end
                    problem = f"truncated or damaged at byte {archive.offset:,} of {size:,}"
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:  # headers may hold any numbers
            problem = f"truncated or not a tar file ({printable(str(error))})"
        names, offsets, sizes = zip(*rows, strict=True) if rows else ((), (), ())
        classes = [labels.get(os.path.splitext(name)[0], labels.get(sample(name), "")) for name in names]
        encoded = np.array([os.fsencode(name) for name in names], np.bytes_)
        numbers = np.array(offsets, np.int64), np.array(sizes, np.int64)
        return cls(url, encoded, *numbers, np.array(classes, np.str_), dict(others)), problem


_NO_IMAGES: Any = (
    np.array([], np.bytes_),
    np.array([], np.int64),
    np.array([], np.int64),
    np.array([], np.str_),
    {},
)


def _compression(path: Path) -> str:
    """What to do about a compressed file; empty if it is none."""
    with path.open("rb") as file:
        start = file.read(6)
    name = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
    return f"is compressed ({name}), and images are read from their place in the file; unpack it first" if name else ""


_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard", b"PK": "zip"}


def sample(name: str) -> str:
    """``a/b.x.jpg`` as ``a/b``: files with the same name up to the first dot are parts of the same sample."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def image_key(name: str) -> str:
    """Which of the images of a sample a file is: ``left`` for ``a/b.left.jpg``; empty for ``a/b.jpg``.

    Args:
        name: Name of the file in the tar file.
    """
    return os.path.splitext(os.path.basename(name))[0].partition(".")[2]


def _label(name: str, content: bytes, label_key: str | None) -> dict[str, str]:
    """The class of a sample as JSON, under its name without the suffix; empty if there is none."""
    stem, suffix = os.path.splitext(name)
    text = content.decode(errors="replace").strip()
    try:
        label = json.loads(text)
    except (ValueError, RecursionError):
        label = text if suffix.lower() == ".cls" else None
    if suffix.lower() == ".json":
        for key in [label_key] if label_key else ["label", "cls"]:
            value = label
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                break
        label = value
    return {} if label is None or label == "" else {stem: json.dumps(label)}


def is_remote(url: str) -> bool:
    """Whether a path is a URL."""
    return "://" in url


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the file system is unknown, or needs a library that is missing
        raise UserError(f"{url}: {error}") from error


def local_copy(url: str, copies: Path) -> Path:
    """The path of a local file, or of the local copy of a file behind a URL. Makes the copy if there is none.

    Args:
        url: Path or URL.
        copies: Folder for copies.

    Raises:
        OSError: There is no such file, or it cannot be copied.
    """
    if not is_remote(url):
        return Path(url)
    copy = _copy_of(url, copies)
    if not copy.exists():
        filesystem, path = file_system(url)
        try:
            copies.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{copies}: {error.strerror}; set --data.copies to another folder.") from error
        partial = copy.with_name(f"{copy.name}.{uuid.uuid4().hex}")
        try:
            filesystem.get_file(path, str(partial))
            os.replace(partial, copy)
        except Exception as error:  # each file system raises its own
            raise OSError(f"cannot be copied: {type(error).__name__}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
    return copy


def _copy_of(url: str, copies: Path) -> Path:
    return copies / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{os.path.basename(url.partition('?')[0])}"
