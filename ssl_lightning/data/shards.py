"""Images in tar files, in the layout of WebDataset."""

import copy
import glob
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from ssl_lightning.cache import cache_folder
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.formats import passed_over
from ssl_lightning.data.images import Images, OpenedImage, open_image
from ssl_lightning.data.labels import as_labels
from ssl_lightning.data.sampler import spread
from ssl_lightning.data.splits import split
from ssl_lightning.data.tars import Shard, file_system, image_key, is_remote, local_copy, sample
from ssl_lightning.errors import UserError, listed, printable


class ShardsData(SSLDataModule):
    """Tar files of images: ``0001.jpg``, with its class, if any, in ``0001.cls`` or as ``label`` in ``0001.json``.

    A class is a whole number or a word.

    The tar files are indexed once, at first use. From then on any image can be read directly, so the order of the
    images does not depend on the number of processes and workers, or on where a run was interrupted. Each epoch
    shuffles the files, then the images of a few files at a time, so that reading stays local. A file behind a URL is
    copied to a folder when it is first needed.

    Args:
        urls: The tar files to train on: paths, folders, globs, URLs of any file system that fsspec supports, and ranges
            such as ``train-{000..146}.tar``.
        val_urls: The tar files to validate on. None holds out ``val_fraction`` of the training images.
        val_fraction: Fraction of labeled training images held out if there are no ``val_urls``.
        shuffle_shards: Number of tar files whose images are shuffled together.
        broken_shards: What to do about a tar file that is missing or truncated: ``stop`` the run, or ``skip`` and list
            its images.
        copies: Folder for copies of files behind a URL. None means a folder in ``$SSL_LIGHTNING_CACHE``.
        image_key: Which of several images of a sample to use: ``left`` for ``0001.left.jpg`` next to
            ``0001.right.jpg``. ``all`` uses each as an image by itself. None means the first.
        label_key: Where a ``.json`` holds the class, with a dot for each level: ``annotation.species``. None means
            ``label``, else ``cls``. ``none`` means no labels.
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
        image_key: str | None = None,
        label_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_key, self.label_key = image_key, label_key
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
        skip = self.broken_shards == "skip"
        shards = [Shard.indexed(url, self.copies, skip, self.label_key) for url in progress]
        others = sum((Counter(shard.others) for shard in shards), Counter[str]())
        if others:
            rank_zero_info(f"{printable(str(urls))}: {passed_over(others)}")
        images = ShardImages(shards, self.copies, self.shuffle_shards, skip)
        if len(images) == 0:
            raise UserError(f"no images in {printable(str(urls))}; give tar files with images as --data.urls.")
        if self.label_key not in (None, "none") and images.labels is None:
            raise UserError(
                f"no image in {printable(str(urls))} has a .json with a class at --data.label_key {self.label_key}; "
                "give another key, or none."
            )
        return self._of_the_key(images)

    def _of_the_key(self, images: "ShardImages") -> "ShardImages":
        """One image of each sample, if the samples have several."""
        keys = [image_key(os.fsdecode(name)) for name in images.names]
        kinds = Counter(keys)
        if self.image_key not in (None, "all"):
            chosen = [key in (self.image_key, os.path.splitext(self.image_key or "")[0]) for key in keys]
            if not any(chosen):
                names = listed([key or "without a key" for key, _ in kinds.most_common()])
                raise UserError(f"no image has the key --data.image_key {self.image_key}; the keys are {names}.")
            return images.subset(np.flatnonzero(chosen))
        samples = len({sample(os.fsdecode(name)) for name in images.names})
        # The same few keys in most samples: several images of a sample. Otherwise dots in names, e.g. 2021.05.03.jpg.
        several = 1 < len(kinds) <= samples and len(keys) >= 0.5 * len(kinds) * samples and samples < len(keys)
        if self.image_key == "all" or not several:
            return images
        first = min(kinds)
        rank_zero_info(
            f"The samples have several images: {listed(sorted(key or 'without a key' for key in kinds))}. Using "
            f"{first or 'the images without a key'}; set --data.image_key to another of them, or to all."
        )
        return images.subset(np.flatnonzero([key == first for key in keys]))


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
            if is_remote(pattern):
                filesystem, path = file_system(pattern)
                protocol = pattern.split("://")[0]
                names = sorted(filesystem.glob(path)) if set(path) & set("*[") else [path]  # ? may begin a query
                matches = [name if "://" in name else f"{protocol}://{name}" for name in names]
            else:
                pattern = os.path.join(pattern, "*.tar") if os.path.isdir(pattern) else pattern
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


def _classes(labels: NDArray[np.str_]) -> NDArray[Any] | None:
    """The labels that JSON stands for; None if none is known."""
    texts, positions = np.unique(labels, return_inverse=True)
    if not (texts != "").any():
        return None
    values = np.empty(len(texts), dtype=object)
    values[:] = [json.loads(text) if text else None for text in texts.tolist()]
    remedy = "choose what holds the class with --data.label_key, or set it to none for no labels"
    return as_labels(values[positions], remedy)


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
        self.labels = _classes(labels)
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

    def sample(self, count: int) -> NDArray[np.int64]:
        """Evenly spread images of at most eight tar files, each of which may have to be copied first."""
        starts = np.concatenate([[0], self.ends[:-1]])
        shards = np.flatnonzero(starts < self.ends)  # a broken tar file has no images
        shards = spread(shards, min(8, len(shards)))
        images = np.concatenate([np.arange(starts[shard], self.ends[shard]) for shard in shards])
        return spread(images, min(count, len(images)))

    def _shard_index(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def name(self, index: int) -> str:
        """The tar file, and the name in the tar file."""
        return f"{self.urls[self._shard_index(index)]}/{os.fsdecode(self.names[index])}"

    def path(self, index: int) -> str:
        """The name in the tar file."""
        return os.fsdecode(self.names[index])

    def open(self, index: int) -> OpenedImage:
        """Read the image from its tar file."""
        shard, size = self._shard_index(index), int(self.sizes[index])
        try:
            data = _read(self._file(shard), size, int(self.offsets[index]))
        except OSError as error:
            raise self._broken(shard, f"{type(error).__name__}: {error}") from error
        if len(data) < size:
            raise self._broken(shard, "truncated")
        return open_image(data)

    def _broken(self, shard: int, problem: str) -> Exception:
        if self.skip:
            return OSError(problem)
        return UserError(
            f"{printable(self.urls[shard])}: {problem}; replace the file, or set --data.broken_shards=skip."
        )

    def _file(self, shard: int) -> int:
        """The descriptor of an open tar file. If too many are open, the one opened first is closed."""
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            binary = getattr(os, "O_BINARY", 0)  # Windows changes line ends otherwise
            self._files[shard] = os.open(local_copy(self.urls[shard], self.copies), os.O_RDONLY | binary)
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


def _read(file: int, size: int, offset: int) -> bytes:
    """Bytes of an open file."""
    if hasattr(os, "pread"):  # forked workers share the position in the file
        return os.pread(file, size, offset)
    os.lseek(file, offset, os.SEEK_SET)  # Windows has no pread, and forks no workers
    return os.read(file, size)


_OPEN_FILES = 64
