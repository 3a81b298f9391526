"""Images in a folder, with or without labels."""

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
from ssl_lightning.data.images import ImageFiles, Images, Labels
from ssl_lightning.data.walk import walk
from ssl_lightning.errors import UserError

_VALIDATION_FOLDERS = ("val", "valid", "validation", "test")


class ImageFolderData(SSLDataModule):
    """Any folder of images: with a subfolder for each class, with nested folders, or flat without labels.

    If the folder has a subfolder ``train``, training uses it, and validation uses its sibling ``val``, ``valid``,
    ``validation`` or ``test``. Otherwise a part of a labeled folder is held out for validation; a folder without labels
    is for training only. Only probes and evaluation use labels.

    Args:
        root: The folder.
        labels: ``folders``: the first folder below the root is the class. ``none``: no labels. ``auto``: ``folders`` if
            every image lies exactly one folder deep and there are at least two such folders, else ``none``.
        val_fraction: Fraction of a labeled folder held out for validation if there is no validation folder.
        kwargs: See SSLDataModule.
    """

    def __init__(
        self,
        root: str,
        labels: Literal["auto", "folders", "none"] = "auto",
        val_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.labels, self.val_fraction = Path(root).expanduser(), labels, val_fraction

    def prepare_data(self) -> None:
        """Scan the folders, once per machine. The other processes read the cached index."""
        for root in (self._train_root, *self._validation_roots()):
            with suppress(UserError):  # load raises it again
                find_images(root)

    def load(self) -> None:
        """Find the images, label them, and hold out images for validation."""
        if not self.root.is_dir():
            what = "is a file, not a folder" if self.root.exists() else "does not exist"
            raise UserError(f"{self.root} {what}; give the folder of your images as --data.root.")
        root = self._train_root
        listing = find_images(root)
        if listing.others:
            rank_zero_info(f"{root}: {passed_over(listing.others)}")
        classes = self._classes(root, listing)
        train = ImageFiles(listing.paths, _labels(root, listing, classes), root)
        val = None
        for val_root in self._validation_roots():
            if val is None and (classes is None or any(path.is_dir() for path in val_root.iterdir())):
                listing = find_images(val_root)
                val = ImageFiles(listing.paths, _labels(val_root, listing, classes), val_root)
        self.train_images, self.val_images = train, val
        if val is None:
            self.train_images, self.val_images = split(train, self.val_fraction)

    @property
    def _train_root(self) -> Path:
        return self.root / "train" if (self.root / "train").is_dir() else self.root

    def _validation_roots(self) -> list[Path]:
        """The validation folders next to ``train``."""
        roots = [self.root / name for name in _VALIDATION_FOLDERS] if self._train_root != self.root else []
        return [root for root in roots if root.is_dir()]

    def _classes(self, root: Path, listing: "FolderListing") -> list[str] | None:
        """Names of the classes; None if there are no labels."""
        depths = [0 if folder == "" else folder.count(os.sep) + 1 for folder in listing.folders]
        names = sorted({folder.split(os.sep)[0] for folder in listing.folders if folder})
        if self.labels == "folders" and 0 in depths:
            raise UserError(
                f"--data.labels is folders, but some images lie directly in {root}; move them into class folders."
            )
        looks_labeled = len(names) > 1 and set(depths) == {1}
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


def _labels(root: Path, listing: FolderListing, classes: list[str] | None) -> Labels | None:
    if classes is None:
        return None
    label_by_name = {name: label for label, name in enumerate(classes)}
    names = [folder.split(os.sep)[0] for folder in listing.folders]
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(
            f"{root} has classes that the training images do not have: {', '.join(unknown[:5])}; remove them, or add "
            "training images."
        )
    return np.repeat(np.array([label_by_name[name] for name in names]), listing.counts)


def split(images: Images, val_fraction: float) -> tuple[Images, Images | None]:
    """Hold out a fraction of labeled images for validation: the same images in every run, for any seed."""
    count = round(len(images) * val_fraction)
    if count == 0 or images.labels is None:
        return images, None
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(images))
    held_out, rest = np.sort(order[:count]), np.sort(order[count:])
    return images.subset(rest), images.subset(held_out)
