"""CIFAR-10, CIFAR-100 and STL-10 as torchvision stores them, held in memory."""

from typing import Any

import numpy as np

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.images import ImageArray
from ssl_lightning.errors import UserError


class _TorchvisionData(SSLDataModule):
    """Training and validation split of a torchvision data set.

    Args:
        root: Folder that holds the data set, or receives it.
        download: Whether to download it if it is not there.
        kwargs: See SSLDataModule.
    """

    name: str
    splits: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})

    def __init__(self, root: str = "data", download: bool = False, image_size: int = 32, **kwargs: Any) -> None:
        super().__init__(image_size=image_size, **kwargs)
        self.root, self.download = root, download

    def prepare_data(self) -> None:
        """Download, once per machine, if asked to."""
        if self.download:
            for split in self.splits:
                self._open(split)

    def load(self) -> None:
        """Read both splits into memory."""
        self.train_images, self.val_images = (self._images_of(self._open(split)) for split in self.splits)

    def _open(self, split: dict[str, Any]) -> Any:
        import torchvision.datasets  # only here: reading help texts should not wait for it

        try:
            return getattr(torchvision.datasets, self.name)(self.root, download=self.download, **split)
        except RuntimeError as error:
            raise UserError(
                f"{self.name} is not in {self.root!r}; give its folder as data.root, or set data.download=true."
            ) from error

    def _images_of(self, dataset: Any) -> ImageArray:
        return ImageArray(dataset.data.transpose(0, 3, 1, 2), np.array(dataset.targets, dtype=np.int64))


class CIFAR10Data(_TorchvisionData):
    """CIFAR-10: 50,000 training and 10,000 validation images of 32 px, 10 classes (Krizhevsky 2009).

    Args:
        root: Folder that holds the data set, or receives it.
        download: Whether to download it if it is not there.
        image_size: Side of the views in pixels.
        kwargs: See SSLDataModule.
    """

    name = "CIFAR10"


class CIFAR100Data(_TorchvisionData):
    """CIFAR-100: 50,000 training and 10,000 validation images of 32 px, 100 classes (Krizhevsky 2009).

    Args:
        root: Folder that holds the data set, or receives it.
        download: Whether to download it if it is not there.
        image_size: Side of the views in pixels.
        kwargs: See SSLDataModule.
    """

    name = "CIFAR100"


class STL10Data(_TorchvisionData):
    """STL-10: 5,000 labelled and 100,000 unlabelled training images, 8,000 validation images of 96 px (Coates 2011).

    Training takes labelled and unlabelled images; the probes see the labelled ones.

    Args:
        root: Folder that holds the data set, or receives it.
        download: Whether to download it if it is not there.
        image_size: Side of the views in pixels.
        kwargs: See SSLDataModule.
    """

    name = "STL10"
    splits = ({"split": "train+unlabeled"}, {"split": "test"})

    def __init__(self, root: str = "data", download: bool = False, image_size: int = 96, **kwargs: Any) -> None:
        super().__init__(root, download, image_size, **kwargs)

    def _images_of(self, dataset: Any) -> ImageArray:
        return ImageArray(dataset.data, dataset.labels.astype(np.int64))
