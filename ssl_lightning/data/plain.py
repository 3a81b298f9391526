"""PlainLoaders: loaders of plain images, for probes and evaluation."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_lightning.data.datasets import PlainDataset
from ssl_lightning.data.images import Images
from ssl_lightning.data.loader import Loader
from ssl_lightning.data.process import DataModule
from ssl_lightning.data.sampler import OrderedBatches, spread
from ssl_lightning.data.stream import ImageStream
from ssl_lightning.data.views import ViewSpec


class PlainLoaders(DataModule):
    """The part of SSLDataModule that gives images without augmentation.

    Args:
        num_workers: Processes that load images. None means one per CPU core, at most 8.
        seed: Seed of all random decisions about the data. None means the seed of ``seed_everything``.
    """

    batch_size: int
    train_images: Images | None
    train_stream: ImageStream | None
    val_images: Images | None
    already_predicted: Callable[[], dict[str, NDArray[np.int64]]]

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Load the images, once."""

    @property
    @abstractmethod
    def crop_fraction(self) -> float:
        """Fraction of the shorter side that the central crop of evaluation keeps."""

    @property
    @abstractmethod
    def _eval_spec(self) -> ViewSpec: ...

    @property
    @abstractmethod
    def _training_images(self) -> Images: ...

    @abstractmethod
    def _workers(self, images: Images | ImageStream) -> int: ...

    def train_labelled_dataloader(self, max_samples: int | None = None) -> Loader | list[Any]:
        """The labeled training images as plain images, each once over all processes: the bank of a kNN probe.

        Empty for a stream.

        Args:
            max_samples: Take this many images, evenly spread over the data set. None takes all.
        """
        self.setup()
        if self.train_stream is not None:
            return []
        return self._plain_loader(self._training_images, self.labelled(max_samples))

    def labelled(self, max_samples: int | None = None) -> NDArray[np.int64]:
        """Indices of the labeled training images.

        Args:
            max_samples: See ``train_labelled_dataloader``.
        """
        labels = self._training_images.labels
        indices = np.arange(0) if labels is None else np.flatnonzero(labels >= 0)
        return indices if max_samples is None or len(indices) <= max_samples else spread(indices, max_samples)

    def plain_dataloader(self, count: int | None = None) -> Loader | list[Any]:
        """Some training images as plain images, with or without labels, each once over all processes.

        Empty for a stream.

        Args:
            count: Number of images, evenly spread over the data set. None means 1/32 of them, at least 64 and at most
                2,048.
        """
        self.setup()
        if self.train_stream is not None:
            return []
        return self._plain_loader(self._training_images, self.plain_indices(count))

    def plain_indices(self, count: int | None = None) -> NDArray[np.int64]:
        """Indices of some training images, evenly spread.

        Args:
            count: See ``plain_dataloader``.
        """
        size = len(self._training_images)
        count = min(size, max(64, min(2048, size // 32)) if count is None else count)
        return spread(np.arange(size), count)

    def val_dataloader(self) -> Loader | list[Any]:
        """The validation images as plain images, each once over all processes; empty if there are none."""
        self.setup()
        return [] if self.val_images is None else self._plain_loader(self.val_images, np.arange(len(self.val_images)))

    def test_dataloader(self) -> Loader | list[Any]:
        """The same images as ``val_dataloader``: training never sees them."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[Loader]:
        """Plain images in order, each once over all processes: the training images, then any validation images.

        Leaves out the images that ``already_predicted`` returns.
        """
        self.setup()
        sources, done = {"train": self.train_images, "val": self.val_images}, self.already_predicted()
        return [
            self._plain_loader(images, np.delete(np.arange(len(images)), done.get(name, [])))
            for name, images in sources.items()
            if images is not None
        ]

    def plain_loader(self, images: Images) -> Loader:
        """Other images, prepared as plain images.

        Args:
            images: Of the same channels and type of pixels as the training images.
        """
        return self._plain_loader(images, np.arange(len(images)))

    def _plain_loader(self, images: Images, indices: NDArray[np.int64]) -> Loader:
        dataset = PlainDataset(images, self._eval_spec, self.crop_fraction)
        order = OrderedBatches(indices, self.batch_size, self._rank, self._world_size)
        return Loader(dataset, order, self._workers(images))
