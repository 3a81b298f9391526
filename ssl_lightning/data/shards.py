"""Images in tar files, in the layout of WebDataset."""

import copy
import glob
import hashlib
import json
import os
import re
import tarfile
import uuid
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from ssl_lightning.cache import cache_file, cache_folder, write_arrays
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.formats import is_image
from ssl_lightning.data.images import Images, OpenedImage, open_image
from ssl_lightning.data.splits import split
from ssl_lightning.errors import UserError


class ShardsData(SSLDataModule):
    """Tar files of images: ``0001.jpg``, with its class, if any, in ``0001.cls`` or as ``label`` in ``0001.json``.

    The tar files are indexed once, at first use. From then on any image can be read directly, so the order of the
    images does not depend on the number of processes and workers, or on where a run was interrupted. Each epoch
    shuffles the files, then the images of a few files at a time, so that reading stays local. A file behind a URL is
    copied to a folder when it is first needed.

    Args:
        urls: The tar files to train on: paths, globs, URLs of any file system that fsspec supports, and ranges such as
            ``train-{000..146}.tar``.
        val_urls: The tar files to validate on. None holds out ``val_fraction`` of the training images.
        val_fraction: Fraction of labeled training images held out if there are no ``val_urls``.
        shuffle_shards: Number of tar files whose images are shuffled together.
        broken_shards: What to do about a tar file that is missing or truncated: ``stop`` the run, or ``skip`` and list
            its images.
        copies: Folder for copies of files behind a URL. None means a folder in ``$SSL_LIGHTNING_CACHE``.
        kwargs: See SSLDataModule.
    """

    def __init__(
        self,
        urls: str | list[str],
        val_urls: str | list[str] | None = None,
        val_fraction: float = 0.1,
        shuffle_shards: int = 8,
        broken_shards: Literal["stop", "skip"] = "stop",
        copies: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.urls, self.val_urls, self.val_fraction = urls, val_urls, val_fraction
        self.shuffle_shards, self.broken_shards = shuffle_shards, broken_shards
        self.copies = cache_folder() / "shards" if copies is None else Path(copies)

    def prepare_data(self) -> None:
        """Index the tar files, once per machine. The other processes read the cached index."""
        self._open(self.urls)
        if self.val_urls is not None:
            self._open(self.val_urls)

    def load(self) -> None:
        """Open the tar files, and hold out images for validation."""
        train = self._open(self.urls)
        if self.val_urls is not None:
            self.train_images, self.val_images = train, self._open(self.val_urls)
        else:
            self.train_images, self.val_images = split(train, self.val_fraction)

    def _open(self, urls: str | list[str]) -> "ShardImages":
        progress = track(find_shards(urls), "Indexing shards", console=Console(stderr=True), transient=True)
        shards = [Shard.indexed(url, self.copies, self.broken_shards == "skip") for url in progress]
        return ShardImages(shards, self.copies, self.shuffle_shards, self.broken_shards == "skip")


def find_shards(urls: str | list[str]) -> list[str]:
    """List the tar files that paths, globs, ranges (``{000..146}``) and URLs stand for, in order.

    Args:
        urls: One pattern or several.

    Raises:
        UserError: A pattern matches nothing.
    """
    shards: list[str] = []
    for url in [urls] if isinstance(urls, str) else urls:
        for pattern in _expanded(os.path.expanduser(url)):
            if _is_remote(pattern):
                filesystem, path = _filesystem(pattern)
                protocol = pattern.split("://")[0]
                names = sorted(filesystem.glob(path)) if set(path) & set("*[") else [path]  # ? may begin a query
                matches = [name if "://" in name else f"{protocol}://{name}" for name in names]
            else:
                matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            if not matches:
                raise UserError(f"no tar file matches {pattern}; give paths, globs or URLs as --data.urls.")
            shards += matches
    return shards


def _expanded(url: str) -> list[str]:
    """``a{08..10}.tar`` as ``a08.tar``, ``a09.tar``, ``a10.tar``."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if match is None:
        return [url]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    before, after = url[: match.start()], _expanded(url[match.end() :])
    return [before + number + rest for number in numbers for rest in after]


def _is_remote(url: str) -> bool:
    return "://" in url


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the file system is unknown, or needs a library that is missing
        raise UserError(f"{url}: {error}") from error


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
    labels: NDArray[np.int64]
    """``(N,)`` class of each image; -1 is unknown."""

    @classmethod
    def indexed(cls, url: str, copies: Path, skip: bool) -> "Shard":
        """Scan a tar file, or read the cached result of an earlier scan.

        Args:
            url: The tar file.
            copies: Folder for copies of files behind a URL.
            skip: Leave out the broken part with a warning, instead of raising an error.

        Raises:
            UserError: The file is missing or truncated, and ``skip`` is not set.
        """
        try:
            path = local_copy(url, copies)
            status = path.stat()
            index = cache_file(f"shard-{url}-{status.st_size}-{status.st_mtime_ns}", ".npz")
            with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), index.open("rb") as file:
                arrays = np.load(file)
                return cls(url, arrays["names"], arrays["offsets"], arrays["sizes"], arrays["labels"])
            shard, problem = cls._scanned(url, path)
        except OSError as error:
            shard, problem = cls(url, *_NO_IMAGES), f"{type(error).__name__}: {error}"
        if problem:
            if _is_remote(url):
                _copy_of(url, copies).unlink(missing_ok=True)  # so that the next run copies it again
            if not skip:
                raise UserError(f"{url}: {problem}; replace the file, or set --data.broken_shards=skip.")
            rank_zero_warn(f"{url}: {problem}; using the {len(shard.names)} whole images in it.")
        else:
            write_arrays(index, names=shard.names, offsets=shard.offsets, sizes=shard.sizes, labels=shard.labels)
        return shard

    @classmethod
    def _scanned(cls, url: str, path: Path) -> tuple["Shard", str]:
        """The index of a tar file, and a description of what is wrong with the file, empty if nothing is."""
        rows: list[tuple[str, int, int]] = []  # name, offset and size of each image
        labels: dict[str, int] = {}
        size, problem = path.stat().st_size, ""
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    if member.offset_data + member.size > size:
                        break
                    key, extension = _key_and_extension(member.name)
                    if extension in ("cls", "json"):
                        content = archive.extractfile(member)
                        assert content is not None
                        labels.update(_label(key, extension, content.read()))
                    elif is_image(f"x.{extension}"):
                        rows.append((member.name, member.offset_data, member.size))
            with path.open("rb") as file:
                file.seek(archive.offset)
                if file.read(512) != bytes(512):  # tarfile takes an invalid header for the end
                    problem = f"truncated or damaged at byte {archive.offset:,} of {size:,}"
        except tarfile.TarError as error:
            problem = f"truncated or not a tar file ({error})"
        names, offsets, sizes = zip(*rows, strict=True) if rows else ((), (), ())
        classes = [labels.get(_key_and_extension(name)[0], -1) for name in names]
        arrays = np.array(offsets, np.int64), np.array(sizes, np.int64), np.array(classes, np.int64)
        return cls(url, np.array([os.fsencode(name) for name in names], np.bytes_), *arrays), problem


_NO_IMAGES = np.array([], np.bytes_), np.array([], np.int64), np.array([], np.int64), np.array([], np.int64)


def _key_and_extension(name: str) -> tuple[str, str]:
    """``a/b.x.jpg`` as ``a/b`` and ``x.jpg``: members with the same key are parts of the same example."""
    folder, base = os.path.split(name)
    stem, _, extension = base.partition(".")
    return os.path.join(folder, stem), extension.lower()


def _label(key: str, extension: str, content: bytes) -> dict[str, int]:
    """The class of an example under its key; empty if the content has none."""
    with suppress(ValueError, TypeError):
        label = json.loads(content)
        if extension == "json":
            label = label.get("label", label.get("cls")) if isinstance(label, dict) else None
        return {key: int(label)}
    return {}


def local_copy(url: str, copies: Path) -> Path:
    """The path of a local file, or of the local copy of a file behind a URL. Makes the copy if there is none.

    Args:
        url: Path or URL.
        copies: Folder for copies.

    Raises:
        OSError: There is no such file, or it cannot be copied.
    """
    if not _is_remote(url):
        return Path(url)
    copy = _copy_of(url, copies)
    if not copy.exists():
        filesystem, path = _filesystem(url)
        copies.mkdir(parents=True, exist_ok=True)
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


class ShardImages(Images):
    """The images of tar files.

    Args:
        shards: The tar files.
        copies: Folder for copies of files behind a URL.
        shuffle_shards: Tar files whose images are shuffled together.
        skip: Whether an image in a missing or truncated tar file counts as unreadable, instead of stopping the run.
    """

    def __init__(self, shards: list[Shard], copies: Path, shuffle_shards: int = 8, skip: bool = False) -> None:
        self.urls, self.copies = [shard.url for shard in shards], copies
        self.shuffle_shards, self.skip = shuffle_shards, skip
        self.ends = np.cumsum([len(shard.names) for shard in shards])
        self.names, self.offsets, self.sizes, labels = (
            np.concatenate([getattr(shard, name) for shard in shards])
            for name in ("names", "offsets", "sizes", "labels")
        )
        self.labels = labels if (labels >= 0).any() else None
        self._files: dict[int, int] = {}  # shard -> descriptor, for open tar files

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def subset(self, indices: NDArray[np.int64]) -> "ShardImages":
        """Some of the images, in ascending order."""
        part = copy.copy(self)
        part.names, part.offsets, part.sizes = self.names[indices], self.offsets[indices], self.sizes[indices]
        part.labels = None if self.labels is None else self.labels[indices]
        part.ends, part._files = np.searchsorted(indices, self.ends), {}
        return part

    def _shard_index(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def name(self, index: int) -> str:
        """The tar file, and the name in the tar file."""
        return f"{self.urls[self._shard_index(index)]}/{os.fsdecode(self.names[index])}"

    def open(self, index: int) -> OpenedImage:
        """Read the image from its tar file."""
        shard, size = self._shard_index(index), int(self.sizes[index])
        try:
            data = os.pread(self._file(shard), size, int(self.offsets[index]))
        except OSError as error:
            raise self._broken(shard, f"{type(error).__name__}: {error}") from error
        if len(data) < size:
            raise self._broken(shard, "truncated")
        return open_image(data)

    def _broken(self, shard: int, problem: str) -> Exception:
        if self.skip:
            return OSError(problem)
        return UserError(f"{self.urls[shard]}: {problem}; replace the file, or set --data.broken_shards=skip.")

    def _file(self, shard: int) -> int:
        """The descriptor of an open tar file. If too many are open, the one opened first is closed."""
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(local_copy(self.urls[shard], self.copies), os.O_RDONLY)
        return self._files[shard]

    def order(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Tar files in random order, and the images of each group of ``shuffle_shards`` files in random order."""
        shards = random.permutation(len(self.urls))
        starts = np.concatenate([[0], self.ends[:-1]])
        windows = [shards[first : first + self.shuffle_shards] for first in range(0, len(shards), self.shuffle_shards)]
        return np.concatenate(
            [
                random.permutation(np.concatenate([np.arange(starts[shard], self.ends[shard]) for shard in window]))
                for window in windows
            ]
        )


_OPEN_FILES = 64
