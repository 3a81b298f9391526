"""Images in a folder, with or without labels."""

import csv
import os
import time
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from ssl_lightning.cache import cache_file, write_arrays
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.formats import is_image, passed_over, suffix_of, suffixes
from ssl_lightning.data.images import ImageFiles
from ssl_lightning.data.splits import Part, by_use, divide, split, split_kind
from ssl_lightning.data.walk import walk
from ssl_lightning.errors import UserError, listed, printable


class ImageFolderData(SSLDataModule):
    """Any folder of images: with a subfolder for each class, with nested folders, or flat without labels.

    If the folder has a subfolder ``train``, training uses it, and validation uses its sibling ``val``, ``valid``,
    ``validation`` or ``test``, in any case and spelling (``Training``, ``test_images``, ...). Otherwise a part of a
    labeled folder is held out for validation; a folder without labels is for training only. Only probes and evaluation
    use labels.

    Args:
        root: The folder.
        labels: ``folders``: the first folder below the root is the class. ``none``: no labels. ``auto``: ``folders`` if
            every image lies exactly one folder deep and there are at least two such folders, else ``none``.
        val_fraction: Fraction of each class held out for validation if there is no validation folder.
        splits: Whether folders named like splits (train, val, test, ...) divide the images. False trains on all images.
        files: CSV file that names the images to use in its column ``path``, below the root or absolute; rows whose
            column ``kept`` is 0 are left out. ``curate`` writes such files. None uses all images.
        kwargs: See SSLDataModule.
    """

    def __init__(
        self,
        root: str,
        labels: Literal["auto", "folders", "none"] = "auto",
        val_fraction: float = 0.1,
        splits: bool = True,
        files: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.labels, self.val_fraction = Path(root).expanduser(), labels, val_fraction
        self.splits, self.files = splits, files

    def prepare_data(self) -> None:
        """Scan the folders, once per machine. The other processes read the cached index."""
        with suppress(UserError, OSError):  # load raises it again
            find_images(self.root)

    def load(self) -> None:
        """Find the images, label them, and hold out images for validation."""
        if not self.root.is_dir():
            what = "is a file, not a folder" if self.root.exists() else "does not exist"
            raise UserError(f"{self.root} {what}; give the folder of your images as --data.root.")
        listing = find_images(self.root)
        if self.files is not None:
            listing = _chosen(listing, self.root, Path(self.files).expanduser())
        if listing.others:
            rank_zero_info(f"{printable(str(self.root))}: {passed_over(listing.others)}")
        whole = [Part("train", "", tuple(folder.split(os.sep)) if folder else ()) for folder in listing.folders]
        parts = divide(listing.folders, self.root) if self.splits else whole
        training = [part.kind == "train" for part in parts]
        if not any(training):
            raise UserError(
                f"no training images below {self.root}, only {listed(sorted({part.name for part in parts}))}; give the "
                "folder of your images as --data.root, or set --data.splits false to train on all of them."
            )
        classes = self._classes([part.path for part in parts if part.kind == "train"])
        self.classes = classes
        train = self._images(listing, parts, training, classes)
        val, used = None, ""
        for name in by_use(parts):
            candidate = self._images(listing, parts, [part.name == name for part in parts], classes)
            if val is None and (classes is None or (candidate.labels is not None and candidate.labels.max() >= 0)):
                val, used = candidate, name
        self._say_what_is_left_out(listing, parts, used, classes)
        self.train_images, self.val_images = train, val
        if val is None:
            self.train_images, self.val_images = split(train, self.val_fraction)

    def _images(
        self, listing: "FolderListing", parts: list[Part], wanted: list[bool], classes: list[str] | None
    ) -> ImageFiles:
        """The images of some of the folders."""
        rows = np.repeat(wanted, listing.counts)
        labels = None
        if classes is not None:
            numbers = {name: number for number, name in enumerate(classes)}
            labels = np.repeat([numbers.get("".join(part.path[:1]), -1) for part in parts], listing.counts)[rows]
        return ImageFiles(listing.paths[rows], labels, self.root)

    def _say_what_is_left_out(
        self, listing: "FolderListing", parts: list[Part], used: str, classes: list[str] | None
    ) -> None:
        unused: Counter[str] = Counter()
        unlabeled: Counter[str] = Counter()
        for part, count in zip(parts, listing.counts.tolist(), strict=True):
            if part.kind != "train" and part.name != used:
                unused[part.name or "the folder itself"] += count
            elif part.name == used and used and classes is not None and not {*part.path[:1]} & {*classes}:
                unlabeled[part.path[0] if part.path else "no class"] += count
        root = printable(str(self.root))
        training = sorted({part.name for part in parts if part.kind == "train"} - {""})
        if unused or (used and not all(split_kind(name) == "train" for name in training or [""])):
            source = f"validation uses {printable(used)}" if used else "no folder is for validation"
            if not used and classes and by_use(parts):
                source = f"{listed(by_use(parts))} has no folder of its classes, so a part of it is for validation"
            left_out = listed([f"{name} ({count:,} images)" for name, count in unused.items()])
            rank_zero_info(
                f"{root}: training uses {listed(training) or 'the other folders'}; {source}"
                f"{f'. Left out: {left_out}' if unused else ''}. Set --data.splits false to train on all folders."
            )
        if unlabeled:
            names = listed([f"{name} ({count:,} images)" for name, count in unlabeled.items()])
            rank_zero_info(f"{root}: {printable(used)} has classes without training images, unlabeled here: {names}.")

    def _classes(self, paths: list[tuple[str, ...]]) -> list[str] | None:
        """Names of the classes, given the folders of the training images; None if there are no labels."""
        depths = {len(path) for path in paths}
        names = sorted({path[0] for path in paths if path})
        if self.labels == "folders" and 0 in depths:
            raise UserError(
                f"--data.labels is folders, but some images lie directly in {self.root} or in its folder of training "
                "images; move them into class folders."
            )
        looks_labeled = len(names) > 1 and depths == {1}
        if self.labels == "auto" and len(names) > 1 and depths == {0, 1}:
            rank_zero_info(
                f"{printable(str(self.root))}: no labels, because some images lie next to the folders {listed(names)}; "
                "move them into a folder of a class to use the folders as labels."
            )
        return names if self.labels == "folders" or (self.labels == "auto" and looks_labeled) else None


class FolderListing(NamedTuple):
    """The images below a folder."""

    paths: NDArray[np.bytes_]
    """``(N,)`` paths relative to the folder, sorted by folder, then by name."""
    folders: list[str]
    """The folders that contain images, relative to the folder; "" is the folder itself."""
    counts: NDArray[np.int64]
    """Number of images in each of these folders."""
    others: dict[str, int]
    """Number of other files for each suffix."""


def find_images(root: Path) -> FolderListing:
    """List all image files below a folder, by their suffix, without hidden files and folders. Each real file once.

    The result of a long scan is cached in ``$SSL_LIGHTNING_CACHE`` (by default ``~/.cache/ssl_lightning``). It holds
    until a folder changes.

    Args:
        root: The folder.

    Raises:
        UserError: There are no images.
    """
    index = cache_file(f"folder-{root.resolve()}-{sorted(suffixes())}", ".npz")
    listing = _cached(root, index)
    if listing is None:
        start = time.time_ns()
        listing, all_folders = _scan(root)
        if len(listing.paths) >= _WORTH_CACHING:
            # A folder changed during the scan may change again without a new time stamp: store -1, so it never matches.
            times = np.array([os.stat(root / folder).st_mtime_ns for folder in all_folders])
            times[times > start - 2 * 10**9] = -1
            write_arrays(
                index,
                paths=listing.paths,
                counts=listing.counts,
                folders=np.array([os.fsencode(folder) for folder in listing.folders]),
                all_folders=np.array([os.fsencode(folder) for folder in all_folders]),
                times=times,
                other_suffixes=np.array([os.fsencode(suffix) for suffix in listing.others], dtype=np.bytes_),
                other_counts=np.array([*listing.others.values()], dtype=np.int64),
            )
    if len(listing.paths) == 0:
        others = passed_over(listing.others)
        raise UserError(
            f"no images below {root}{others and f': {others}'}; give the folder of your images as --data.root."
        )
    return listing


def _chosen(listing: FolderListing, root: Path, file: Path) -> FolderListing:
    """The images that a CSV file names.

    Raises:
        UserError: The file cannot be read, names no image, or names files that are not there.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, csv.Error) as error:
        raise UserError(f"--data.files {file} cannot be read: {error}.") from error
    if not rows or "path" not in rows[0]:
        raise UserError(f"--data.files {file} needs a header with a column path, and a row for each image.")
    paths = [row["path"] for row in rows if (row.get("kept") or "1").strip().lower() not in ("0", "0.0", "false")]
    below = [os.path.relpath(path, root) if os.path.isabs(path) else os.path.normpath(path) for path in paths]
    wanted = np.array(sorted({os.fsencode(path) for path in below}) or [b""], dtype=np.bytes_)
    if len(missing := wanted[~np.isin(wanted, listing.paths)]):
        raise UserError(
            f"--data.files {file} names {len(missing):,} files that are no images below {root}, the first is "
            f"{printable(os.fsdecode(missing[0])) or 'none at all'}."
        )
    rows_kept = np.isin(listing.paths, wanted)
    counts = np.bincount(
        np.repeat(np.arange(len(listing.counts)), listing.counts)[rows_kept], minlength=len(listing.counts)
    )
    folders = [folder for folder, count in zip(listing.folders, counts, strict=True) if count]
    return FolderListing(listing.paths[rows_kept], folders, counts[counts > 0], listing.others)


_WORTH_CACHING = 10_000
"""Number of images from which on a scan takes longer than reading its cached result."""


def _cached(root: Path, index: Path) -> FolderListing | None:
    """The result of an earlier scan, if no folder has changed since."""
    try:
        with index.open("rb") as file, np.load(file) as arrays:
            for folder, time_then in zip(arrays["all_folders"], arrays["times"], strict=True):
                if os.stat(root / os.fsdecode(folder)).st_mtime_ns != time_then:
                    return None
            folders = [os.fsdecode(folder) for folder in arrays["folders"]]
            suffixes_of_others = map(os.fsdecode, arrays["other_suffixes"])
            others = dict(zip(suffixes_of_others, arrays["other_counts"].tolist(), strict=True))
            return FolderListing(arrays["paths"], folders, arrays["counts"], others)
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
    ):  # no index, a damaged index, or an index of another version
        return None


def _scan(root: Path) -> tuple[FolderListing, list[str]]:
    """Walk through all folders. Returns the images, and all folders with and without images."""
    names_by_folder: dict[str, list[str]] = {}
    others: Counter[str] = Counter()
    columns = TextColumn("Scanning {task.description}: {task.completed:,.0f} images"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(str(root), total=None)
        for folder, files in walk(root):
            images = [name for name in files if is_image(name)]
            others.update(suffix_of(name) for name in files if not is_image(name))
            names_by_folder.setdefault(folder, []).extend(images)
            bar.advance(task, len(images))
    folders = sorted(
        (folder for folder, names in names_by_folder.items() if names), key=lambda name: name.split(os.sep)
    )
    paths = [os.fsencode(os.path.join(folder, name)) for folder in folders for name in sorted(names_by_folder[folder])]
    counts = np.array([len(names_by_folder[folder]) for folder in folders], dtype=np.int64)
    return FolderListing(np.array(paths, dtype=np.bytes_), folders, counts, dict(others)), [*names_by_folder]
