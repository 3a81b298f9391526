"""Images in tar files, as WebDataset lays them out."""

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
from ssl_lightning.data.folder import IMAGE_SUFFIXES, split
from ssl_lightning.data.images import Images, OpenedImage, open_image
from ssl_lightning.errors import UserError


class ShardsData(SSLDataModule):
    """Tar files of images: ``0001.jpg`` with its class in ``0001.cls`` or in ``0001.json`` under ``label``, if any.

    At first use the tar files are indexed, once; then any image is read directly, so that the order depends neither on
    the number of processes and workers nor on where a run was interrupted. Each epoch the files are shuffled, and the
    images within a few of them at a time: reading stays local. Files behind a URL are copied to a folder when they are
    first needed.

    Args:
        urls: The tar files to train on: paths, globs, URLs of any file system that fsspec knows, and ranges such as
            ``train-{000..146}.tar``.
        val_urls: The tar files to validate on; None holds out ``val_fraction``.
        val_fraction: Share held out if there are no ``val_urls`` and there are labels.
        shuffle_shards: Tar files whose images are shuffled together.
        broken_shards: What to do about a tar file that is missing or truncated: ``stop``, or ``skip`` and list its
            images.
        copies: Folder for copies of files behind a URL; None is in the cache folder.
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
        """Index the tar files once per machine; the other processes find the index in the cache."""
        self._open(self.urls)
        if self.val_urls is not None:
            self._open(self.val_urls)

    def load(self) -> None:
        """Open the tar files, and split off validation."""
        train = self._open(self.urls)
        if self.val_urls is not None:
            self.train_images, self.val_images = train, self._open(self.val_urls)
        else:
            self.train_images, self.val_images = split(train, self.val_fraction)

    def _open(self, urls: str | list[str]) -> "ShardImages":
        found = find_shards(urls)
        progress = track(found, "Indexing shards", console=Console(stderr=True), transient=True)
        shards = [Shard.indexed(url, self.copies, self.broken_shards == "skip") for url in progress]
        return ShardImages(shards, self.copies, self.shuffle_shards, self.broken_shards == "skip")


def find_shards(urls: str | list[str]) -> list[str]:
    """Tar files behind paths, globs, ranges (``{000..146}``) and URLs, in order.

    Args:
        urls: One or several of them.

    Raises:
        UserError: One of them matches nothing.
    """
    found: list[str] = []
    for url in [urls] if isinstance(urls, str) else urls:
        for pattern in _ranged(os.path.expanduser(url)):
            if _is_remote(pattern):
                filesystem, path = _filesystem(pattern)
                protocol = pattern.split("://")[0]
                names = sorted(filesystem.glob(path)) if set(path) & set("*[") else [path]  # ? may begin a query
                matches = [name if "://" in name else f"{protocol}://{name}" for name in names]
            else:
                matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            if not matches:
                raise UserError(f"no tar file matches {pattern}; give paths, globs or URLs as data.urls.")
            found += matches
    return found


def _ranged(url: str) -> list[str]:
    """``a{08..10}.tar`` as ``a08.tar``, ``a09.tar``, ``a10.tar``."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if match is None:
        return [url]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [one for number in numbers for one in _ranged(url[: match.start()] + number + url[match.end() :])]


def _is_remote(url: str) -> bool:
    return "://" in url


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # of a file system that needs a library of its own
        raise UserError(f"{url}: {error}") from error


@dataclass(frozen=True)
class Shard:
    """A tar file, and where its images are."""

    url: str
    names: NDArray[np.bytes_]
    """``(N,)`` names of the images in the file."""
    offsets: NDArray[np.int64]
    """``(N,)`` first byte of each."""
    sizes: NDArray[np.int64]
    """``(N,)`` bytes of each."""
    labels: NDArray[np.int64]
    """``(N,)`` class of each; -1 is unknown."""

    @classmethod
    def indexed(cls, url: str, copies: Path, skip: bool) -> "Shard":
        """Look a tar file through, or look up what was found earlier.

        Args:
            url: The tar file.
            copies: Folder for copies of files behind a URL.
            skip: Leave out what is broken, and say so, rather than stop.

        Raises:
            UserError: The file is missing or truncated.
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
            shard, problem = cls(url, *_NOTHING), f"{type(error).__name__}: {error}"
        if problem:
            if _is_remote(url):
                _copy_of(url, copies).unlink(missing_ok=True)  # to look again next time
            if not skip:
                raise UserError(f"{url}: {problem}; mend it, or set data.broken_shards=skip.")
            rank_zero_warn(f"{url}: {problem}; using its {len(shard.names)} whole images.")
        else:
            write_arrays(index, names=shard.names, offsets=shard.offsets, sizes=shard.sizes, labels=shard.labels)
        return shard

    @classmethod
    def _scanned(cls, url: str, path: Path) -> tuple["Shard", str]:
        """The index of a tar file, and what is wrong with it, if anything."""
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
                    elif f".{extension}" in IMAGE_SUFFIXES:
                        rows.append((member.name, member.offset_data, member.size))
            with path.open("rb") as file:
                file.seek(archive.offset)
                if file.read(512) != bytes(512):  # tarfile takes what is no header for the end
                    problem = f"truncated or damaged at byte {archive.offset:,} of {size:,}"
        except tarfile.TarError as error:
            problem = f"truncated or no tar file ({error})"
        names, offsets, sizes = zip(*rows, strict=True) if rows else ((), (), ())
        found = [labels.get(_key_and_extension(name)[0], -1) for name in names]
        arrays = np.array(offsets, np.int64), np.array(sizes, np.int64), np.array(found, np.int64)
        return cls(url, np.array([os.fsencode(name) for name in names], np.bytes_), *arrays), problem


_NOTHING = np.array([], np.bytes_), np.array([], np.int64), np.array([], np.int64), np.array([], np.int64)


def _key_and_extension(name: str) -> tuple[str, str]:
    """``a/b.x.jpg`` as ``a/b`` and ``x.jpg``: members with one key are parts of one example."""
    folder, base = os.path.split(name)
    stem, _, extension = base.partition(".")
    return os.path.join(folder, stem), extension.lower()


def _label(key: str, extension: str, content: bytes) -> dict[str, int]:
    with suppress(ValueError, TypeError):
        found = json.loads(content)
        if extension == "json":
            found = found.get("label", found.get("cls")) if isinstance(found, dict) else None
        return {key: int(found)}
    return {}


def local_copy(url: str, copies: Path) -> Path:
    """The file itself, or a copy of a file behind a URL, made when it is first needed.

    Args:
        url: A path or a URL.
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
        except Exception as error:  # each file system has its own
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
        skip: Whether an image of a missing or truncated tar file counts as unreadable, rather than stopping the run.
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
        self._files: dict[int, int] = {}  # open tar files

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

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def name(self, index: int) -> str:
        """The tar file and the name in it."""
        return f"{self.urls[self._shard_of(index)]}/{os.fsdecode(self.names[index])}"

    def open(self, index: int) -> OpenedImage:
        """Read the image out of its tar file."""
        shard, size = self._shard_of(index), int(self.sizes[index])
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
        return UserError(f"{self.urls[shard]}: {problem}; mend it, or set data.broken_shards=skip.")

    def _file(self, shard: int) -> int:
        """Descriptor of an open tar file; the one opened first is closed when there are many."""
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(local_copy(self.urls[shard], self.copies), os.O_RDONLY)
        return self._files[shard]

    def order(self, random: np.random.Generator) -> NDArray[np.int64]:
        """A random order of the tar files; the images of a few of them at a time in a random order."""
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
