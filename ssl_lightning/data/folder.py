"""Images from a folder, with or without labels."""

import os
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from ssl_lightning.cache import cache_file, write_arrays
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.images import ImageFiles, Images, Labels
from ssl_lightning.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_VALIDATION_FOLDERS = ("val", "valid", "validation", "test")


class ImageFolderData(SSLDataModule):
    """Any folder of images: class sub-folders, nested folders, or one flat folder without labels.

    If the folder has a sub-folder ``train``, training uses that and validation its neighbour ``val``, ``valid``,
    ``validation`` or ``test``. Otherwise a part of a labelled folder is held out for validation; without labels
    everything is trained on. Labels serve the probes alone.

    Args:
        root: The folder.
        labels: ``folders``: the class is the first folder below the root; ``none``: no labels; ``auto``: folders if
            every image lies exactly one folder deep and there are at least two such folders.
        val_fraction: Share of a labelled folder held out for validation if there is no validation folder.
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
        """Scan the folders once per machine; the other processes find the cached index."""
        for root in (self._train_root, *self._validation_roots()):
            with suppress(UserError):  # to be raised where it matters
                find_images(root)

    def load(self) -> None:
        """Find the images, label them, split off validation."""
        if not self.root.is_dir():
            what = "is a file, not a folder" if self.root.exists() else "does not exist"
            raise UserError(f"{self.root} {what}; give the folder of your images as data.root.")
        root = self._train_root
        found = find_images(root)
        classes = self._classes(root, found)
        train = ImageFiles(found.paths, _labels(root, found, classes), root)
        val = None
        for val_root in self._validation_roots():
            if val is None and (classes is None or any(path.is_dir() for path in val_root.iterdir())):
                found = find_images(val_root)
                val = ImageFiles(found.paths, _labels(val_root, found, classes), val_root)
        self.train_images, self.val_images = train, val
        if val is None:
            self.train_images, self.val_images = split(train, self.val_fraction)

    @property
    def _train_root(self) -> Path:
        return self.root / "train" if (self.root / "train").is_dir() else self.root

    def _validation_roots(self) -> list[Path]:
        """The neighbours of ``train`` for validation."""
        roots = [self.root / name for name in _VALIDATION_FOLDERS] if self._train_root != self.root else []
        return [root for root in roots if root.is_dir()]

    def _classes(self, root: Path, found: "FoundImages") -> list[str] | None:
        depths = [0 if folder == "" else folder.count(os.sep) + 1 for folder in found.folders]
        names = sorted({folder.split(os.sep)[0] for folder in found.folders if folder})
        if self.labels == "folders" and 0 in depths:
            raise UserError(f"labels='folders', but some images lie directly in {root}; move them into class folders.")
        classes = len(names) > 1 and set(depths) == {1}
        return names if self.labels == "folders" or (self.labels == "auto" and classes) else None


class FoundImages(NamedTuple):
    """The images below a folder."""

    paths: NDArray[np.bytes_]
    """``(N,)`` paths below the folder, sorted by folder, then by name."""
    folders: list[str]
    """The folders that hold images, below the folder; "" is the folder itself."""
    counts: NDArray[np.int64]
    """How many images each of them holds."""


def find_images(root: Path) -> FoundImages:
    """All image files below a folder, by their suffix; hidden files and folders are passed over.

    The result of a long scan is kept in ``$SSL_LIGHTNING_CACHE`` (by default ``~/.cache/ssl_lightning``), for as long
    as no folder changes.

    Args:
        root: The folder.

    Raises:
        UserError: There are none.
    """
    index = cache_file(f"folder-{root.resolve()}", ".npz")
    found = _cached(root, index)
    if found is None:
        start = time.time_ns()
        found, all_folders = _scan(root)
        if len(found.paths) >= _WORTH_CACHING:
            # A folder that changes while it is scanned may change again within one tick of the clock: never trusted.
            times = np.array([os.stat(root / folder).st_mtime_ns for folder in all_folders])
            times[times > start - 2 * 10**9] = -1
            write_arrays(
                index,
                paths=found.paths,
                counts=found.counts,
                folders=np.array([os.fsencode(folder) for folder in found.folders]),
                all_folders=np.array([os.fsencode(folder) for folder in all_folders]),
                times=times,
            )
    if len(found.paths) == 0:
        raise UserError(f"no images below {root}; looked for files ending in {', '.join(IMAGE_SUFFIXES)}.")
    return found


_WORTH_CACHING = 10_000
"""Images whose folders take longer to scan than to look up."""


def _cached(root: Path, index: Path) -> FoundImages | None:
    """The result of an earlier scan, if it still holds."""
    try:
        with index.open("rb") as file, np.load(file) as arrays:
            for folder, changed in zip(arrays["all_folders"], arrays["times"], strict=True):
                if os.stat(root / os.fsdecode(folder)).st_mtime_ns != changed:
                    return None
            folders = [os.fsdecode(folder) for folder in arrays["folders"]]
            return FoundImages(arrays["paths"], folders, arrays["counts"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or one of another version
        return None


def _scan(root: Path) -> tuple[FoundImages, list[str]]:
    """Look through all folders; also says which there are."""
    paths: list[bytes] = []
    folders: list[str] = []
    counts: list[int] = []
    all_folders: list[str] = []
    columns = TextColumn("Scanning {task.description}: {task.completed:,.0f} images"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(str(root), total=None)
        for path, children, files in os.walk(root, followlinks=True):
            children[:] = sorted(name for name in children if not name.startswith("."))
            folder = os.path.relpath(path, root)
            folder = "" if folder == "." else folder
            all_folders.append(folder)
            names = sorted(name for name in files if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES))
            if names:
                paths += [os.fsencode(os.path.join(folder, name)) for name in names]
                folders.append(folder)
                counts.append(len(names))
                bar.advance(task, len(names))
    return FoundImages(np.array(paths, dtype=np.bytes_), folders, np.array(counts, dtype=np.int64)), all_folders


def _labels(root: Path, found: FoundImages, classes: list[str] | None) -> Labels | None:
    if classes is None:
        return None
    number = {name: label for label, name in enumerate(classes)}
    names = [folder.split(os.sep)[0] for folder in found.folders]
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(f"{root} has classes that training has not: {', '.join(unknown[:5])}; remove or add them.")
    return np.repeat(np.array([number[name] for name in names]), found.counts)


def split(images: Images, val_fraction: float) -> tuple[Images, Images | None]:
    """Hold out a share of labelled images for validation; the same ones on every run, whatever the seed."""
    count = round(len(images) * val_fraction)
    if count == 0 or images.labels is None:
        return images, None
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(images))
    held_out, kept = np.sort(order[:count]), np.sort(order[count:])
    return images.subset(kept), images.subset(held_out)
