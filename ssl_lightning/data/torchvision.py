"""Data sets of torchvision: those held in memory by their own class, all others by name."""

import difflib
import inspect
from typing import Any

import numpy as np

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.folder import split
from ssl_lightning.data.images import DatasetImages, ImageArray, Images
from ssl_lightning.errors import UserError


class TorchvisionData(SSLDataModule):
    """Any classification data set of torchvision, e.g. ``--data.name Flowers102``.

    Args:
        name: Name of the data set in ``torchvision.datasets``.
        root: Folder that holds the data set, or receives it.
        download: Whether to download it if it is not there.
        train_split: Arguments that choose the training split; None finds them: ``train: true`` or ``split: train``.
        val_split: Arguments that choose the validation split; None finds them: ``train: false``, or ``split: val``,
            ``valid`` or ``test``.
        val_fraction: Share held out if there is no validation split.
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
        """Download, once per machine, if asked to."""
        if self.download:
            self._open_both()

    def load(self) -> None:
        """Open both splits."""
        train, val = self._open_both()
        self.train_images, self.val_images = self._images_of(train), None if val is None else self._images_of(val)
        if val is None:
            self.train_images, self.val_images = split(self.train_images, self.val_fraction)

    def _open_both(self) -> tuple[Any, Any]:
        import torchvision.datasets  # only here: reading help texts should not wait for it

        kind = getattr(torchvision.datasets, self.dataset, None)
        if not callable(kind):
            near = difflib.get_close_matches(self.dataset, torchvision.datasets.__all__, n=3, cutoff=0.4)
            raise UserError(f"torchvision has no data set {self.dataset!r}; near are {', '.join(near) or 'none'}.")
        arguments = inspect.signature(kind).parameters
        train: dict[str, Any] = {}
        choices: list[dict[str, Any]] = []
        if "split" in arguments:
            train, choices = {"split": "train"}, [{"split": name} for name in ("val", "valid", "test")]
        elif "train" in arguments:
            train, choices = {"train": True}, [{"train": False}]
        train = train if self.train_split is None else self.train_split
        choices = choices if self.val_split is None else [self.val_split]
        found = self._open(kind, train)
        if found is None:
            raise UserError(f"{self.dataset} has no {train}; choose with data.train_split and data.val_split.")
        return found, next((val for choice in choices if (val := self._open(kind, choice)) is not None), None)

    def _open(self, kind: Any, split: dict[str, Any]) -> Any:
        """A split, or None if the data set knows no such split."""
        downloads = self.download and "download" in inspect.signature(kind).parameters
        options = {"download": True} if downloads else {}
        try:
            return kind(self.root, **split, **options)
        except (RuntimeError, FileNotFoundError) as error:
            raise UserError(
                f"{self.dataset} is not in {self.root!r}; give its folder as data.root, or set data.download=true."
            ) from error
        except (TypeError, ValueError):
            return None

    def _images_of(self, dataset: Any) -> Images:
        names = ("targets", "labels", "_labels", "y")
        found = next((np.asarray(getattr(dataset, name)) for name in names if hasattr(dataset, name)), None)
        labels = found.astype(np.int64) if found is not None and found.ndim == 1 else None
        pixels = np.asarray(getattr(dataset, "data", ()))
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
            return DatasetImages(dataset, labels)
        if pixels.ndim == 3:  # gray
            pixels = pixels[..., None].repeat(3, axis=3)
        return ImageArray(pixels if pixels.shape[1] == 3 else pixels.transpose(0, 3, 1, 2), labels)


class CIFAR10Data(TorchvisionData):
    """CIFAR-10: 50,000 training and 10,000 validation images of 32 px, 10 classes (Krizhevsky 2009).

    Args:
        root: Folder that holds the data set, or receives it.
        download: Whether to download it if it is not there.
        kwargs: See SSLDataModule; ``image_size`` is 32 by default.
    """

    default_image_size = 32

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__("CIFAR10", root, download, **kwargs)


class CIFAR100Data(TorchvisionData):
    """CIFAR-100: 50,000 training and 10,000 validation images of 32 px, 100 classes (Krizhevsky 2009).

    Args:
        root: Folder that holds the data set, or receives it.
        download: Whether to download it if it is not there.
        kwargs: See SSLDataModule; ``image_size`` is 32 by default.
    """

    default_image_size = 32

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__("CIFAR100", root, download, **kwargs)


class STL10Data(TorchvisionData):
    """STL-10: 5,000 labelled and 100,000 unlabelled training images, 8,000 validation images of 96 px (Coates 2011).

    Training takes labelled and unlabelled images; the probes see the labelled ones.

    Args:
        root: Folder that holds the data set, or receives it.
        download: Whether to download it if it is not there.
        kwargs: See SSLDataModule; ``image_size`` is 96 by default.
    """

    default_image_size = 96

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        train, val = {"split": "train+unlabeled"}, {"split": "test"}
        super().__init__("STL10", root, download, train, val, **kwargs)
