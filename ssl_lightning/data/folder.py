"""Images from a folder, with or without labels."""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.images import ImageFiles, Labels
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

    def load(self) -> None:
        """Scan the folder, label the images, split off validation."""
        if not self.root.is_dir():
            what = "is a file, not a folder" if self.root.exists() else "does not exist"
            raise UserError(f"{self.root} {what}; give the folder of your images as data.root.")
        train_root = self.root / "train" if (self.root / "train").is_dir() else self.root
        files = find_images(train_root)
        classes = self._classes(train_root, files)
        train = ImageFiles(files, _labels(train_root, files, classes))
        val = self._validation(classes) if train_root != self.root else None
        if val is None and train.labels is not None:
            train, val = _split(train, self.val_fraction)
        self.train_images, self.val_images = train, val

    def _validation(self, classes: list[str] | None) -> ImageFiles | None:
        """The neighbour of ``train`` for validation; with classes, one that has class folders too."""
        for name in _VALIDATION_FOLDERS:
            root = self.root / name
            if root.is_dir() and (classes is None or any(path.is_dir() for path in root.iterdir())):
                files = find_images(root)
                return ImageFiles(files, _labels(root, files, classes))
        return None

    def _classes(self, root: Path, files: list[Path]) -> list[str] | None:
        parts = [file.relative_to(root).parts for file in files]
        names = sorted({part[0] for part in parts if len(part) > 1})
        if self.labels == "folders" and any(len(part) == 1 for part in parts):
            raise UserError(f"labels='folders', but some images lie directly in {root}; move them into class folders.")
        found = len(names) > 1 and all(len(part) == 2 for part in parts)
        return names if self.labels == "folders" or (self.labels == "auto" and found) else None


def find_images(root: Path) -> list[Path]:
    """All image files below a folder, by their suffix, sorted; hidden files and folders are passed over.

    Args:
        root: The folder.

    Raises:
        UserError: There are none.
    """
    found: list[Path] = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES))
        found += [Path(folder, name) for name in names]
    if not found:
        raise UserError(f"no images below {root}; looked for files ending in {', '.join(IMAGE_SUFFIXES)}.")
    return found


def _labels(root: Path, files: list[Path], classes: list[str] | None) -> Labels | None:
    if classes is None:
        return None
    number = {name: label for label, name in enumerate(classes)}
    folders = [file.relative_to(root).parts[0] for file in files]
    if unknown := sorted(set(folders) - set(classes)):
        raise UserError(f"{root} has classes that training has not: {', '.join(unknown[:5])}; remove or add them.")
    return np.array([number[folder] for folder in folders])


def _split(files: ImageFiles, val_fraction: float) -> tuple[ImageFiles, ImageFiles | None]:
    """Hold out a share of the files; the same ones on every run, whatever the seed."""
    count = round(len(files) * val_fraction)
    if count == 0:
        return files, None
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(files))
    held_out, kept = np.sort(order[:count]), np.sort(order[count:])
    return files.subset(kept), files.subset(held_out)
