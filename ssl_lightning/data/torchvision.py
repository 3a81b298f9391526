"""Data sets of torchvision: any of them by name, CIFAR and STL-10 as classes of their own."""

import difflib
import inspect
from contextlib import suppress
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.progress import track

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.images import DatasetImages, ImageArray, Images
from ssl_lightning.data.labels import as_labels
from ssl_lightning.data.splits import split
from ssl_lightning.errors import UserError


class TorchvisionData(SSLDataModule):
    """Any classification data set of torchvision, e.g. ``--data.name Flowers102``.

    Args:
        name: Name of the data set in ``torchvision.datasets``.
        root: Folder of the data set, or to download it to.
        download: Whether to download the data set if it is missing.
        train_split: Arguments that select the training split. None means ``train: true`` or ``split: train``, whichever
            the data set has.
        val_split: Arguments that select the validation split. None means ``train: false``, or ``split: val``, ``valid``
            or ``test``, whichever the data set has.
        val_fraction: Fraction of labeled training images held out if there is no validation split.
        kwargs: See SSLDataModule.
    """

    def __init__(
        self,
        name: str,
        root: str = "data",
        download: bool = False,
        train_split: dict[str, Any] | None = None,
        val_split: dict[str, Any] | None = None,
        val_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.val_fraction = val_fraction
        self.dataset, self.root, self.download = name, root, download
        self.train_split, self.val_split = train_split, val_split

    def prepare_data(self) -> None:
        """Download the data set, once per machine, if ``download`` is set."""
        if self.download:
            self._open_both()

    def load(self) -> None:
        """Open both splits."""
        train, val = self._open_both()
        self.train_images, self.val_images = self._as_images(train), None if val is None else self._as_images(val)
        if val is None:
            self.train_images, self.val_images = split(self.train_images, self.val_fraction)

    def _open_both(self) -> tuple[Any, Any]:
        import torchvision.datasets  # only here: the command line starts without it

        kind = getattr(torchvision.datasets, self.dataset, None)
        if not callable(kind):
            near = difflib.get_close_matches(self.dataset, torchvision.datasets.__all__, n=3, cutoff=0.4)
            raise UserError(
                f"torchvision has no data set {self.dataset!r}; similar names: {', '.join(near) or 'none'}."
            )
        arguments = inspect.signature(kind).parameters
        train: dict[str, Any] = {}
        choices: list[dict[str, Any]] = []
        if "split" in arguments:
            train, choices = {"split": "train"}, [{"split": name} for name in ("val", "valid", "test")]
        elif "train" in arguments:
            train, choices = {"train": True}, [{"train": False}]
        train = train if self.train_split is None else self.train_split
        choices = choices if self.val_split is None else [self.val_split]
        train_set = self._open(kind, train)
        if train_set is None:
            raise UserError(
                f"{self.dataset} has no split {train}; choose the splits with --data.train_split and --data.val_split."
            )
        for choice in choices:
            try:
                val_set = self._open(kind, choice)
            except UserError:
                if self.val_split is not None:
                    raise
                rank_zero_info(f"{self.dataset} in {self.root!r} lacks the files of {choice}.")
                continue
            if val_set is not None:
                return train_set, val_set
        return train_set, None

    def _open(self, kind: Any, split: dict[str, Any]) -> Any:
        """A split, or None if the data set has no such split."""
        downloads = self.download and "download" in inspect.signature(kind).parameters
        options = {"download": True} if downloads else {}
        try:
            return kind(self.root, **split, **options)
        except (RuntimeError, FileNotFoundError) as error:
            raise UserError(
                f"{self.dataset} is not in {self.root!r}; give its folder as --data.root, or set --data.download=true."
            ) from error
        except (TypeError, ValueError):
            return None

    def _as_images(self, dataset: Any) -> Images:
        labels = _labels(dataset)
        pixels = np.asarray(getattr(dataset, "data", ()))
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
            return DatasetImages(dataset, labels)
        if pixels.ndim == 3:  # gray
            pixels = pixels[..., None].repeat(3, axis=3)
        return ImageArray(pixels if pixels.shape[1] == 3 else pixels.transpose(0, 3, 1, 2), labels)


def _labels(dataset: Any) -> Any:
    """The labels of a data set; None if it has none. Reads no image if the data set lists its labels."""
    size = len(dataset)
    for name in ("targets", "labels", "_labels", "y"):
        labels = getattr(dataset, name, None)
        if labels is not None and len(labels) == size and np.ndim(labels[0]) == 0:
            return as_labels(labels)
    for name in ("_samples", "samples", "index", "_flat_character_images"):  # pairs of an image and a class
        samples = getattr(dataset, name, None) or []
        pairs = len(samples) == size and all(isinstance(sample, tuple) and len(sample) == 2 for sample in samples)
        for place in (1, 0) if pairs else ():
            labels = [sample[place] for sample in samples]
            if all(label is None or isinstance(label, int | np.integer) for label in labels):
                return as_labels(labels)
    with suppress(Exception):  # anything may be at the place of the labels: captions, masks, other images
        first = as_labels([dataset[0][1]])
        if first.ndim > 1:
            return np.tile(first, (size, 1))
        if first.dtype.kind == "i":
            return as_labels([dataset[index][1] for index in track(range(size), "Reading labels", transient=True)])
    return None


class CIFAR10Data(TorchvisionData):
    """CIFAR-10: 50,000 training and 10,000 validation images of 32 px, 10 classes (Krizhevsky 2009).

    Args:
        root: Folder of the data set, or to download it to.
        download: Whether to download the data set if it is missing.
        kwargs: See SSLDataModule. By default ``image_size`` is 32.
    """

    default_image_size = 32

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__("CIFAR10", root, download, **kwargs)


class CIFAR100Data(TorchvisionData):
    """CIFAR-100: 50,000 training and 10,000 validation images of 32 px, 100 classes (Krizhevsky 2009).

    Args:
        root: Folder of the data set, or to download it to.
        download: Whether to download the data set if it is missing.
        kwargs: See SSLDataModule. By default ``image_size`` is 32.
    """

    default_image_size = 32

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__("CIFAR100", root, download, **kwargs)


class STL10Data(TorchvisionData):
    """STL-10: 5,000 labeled and 100,000 unlabeled training images, 8,000 validation images of 96 px (Coates 2011).

    Training uses labeled and unlabeled images, the probes only labeled ones.

    Args:
        root: Folder of the data set, or to download it to.
        download: Whether to download the data set if it is missing.
        kwargs: See SSLDataModule. By default ``image_size`` is 96.
    """

    default_image_size = 96

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        train, val = {"split": "train+unlabeled"}, {"split": "test"}
        super().__init__("STL10", root, download, train, val, **kwargs)
