"""Which images of a data module are evaluated, and what is cached of them."""

import functools
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ssl_lightning.cache import cache_file, write_arrays
from ssl_lightning.errors import UserError, listed


class PlainSets(L.LightningDataModule):
    """All training and validation images of a data module as plain images, without those whose features are cached.

    Args:
        data: The data module.
        key: Identifies the features in the cache, together with the images. None means that no features are cached.
    """

    def __init__(self, data: L.LightningDataModule, key: str | None) -> None:
        super().__init__()
        self.data: Any = data
        self.key = key

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Look for cached features. The first process decides for all processes which features are missing."""
        trainer = self.trainer
        assert trainer is not None
        self.data.trainer = trainer
        self.data.setup(stage)
        self.sets = self.find_sets()
        self.files = [self._file(images, indices) if trainer.is_global_zero else None for images, indices in self.sets]
        self.known = [_read(file) for file in self.files]
        wanted = [number for number, known in enumerate(self.known) if known is None and self.wants(number)]
        self.wanted: list[int] = trainer.strategy.broadcast(wanted)

    def find_sets(self) -> list[tuple[Any, np.ndarray]]:
        """The sets of images, and the indices of the images to take.

        Raises:
            UserError: The data is a stream.
        """
        if self.data.train_images is None:
            raise UserError("images are needed in a fixed order; give --data with random access, and no stream.")
        sets = [images for images in (self.data.train_images, self.data.val_images) if images is not None]
        return [(images, np.arange(len(images))) for images in sets]

    def wants(self, number: int) -> bool:
        """Whether the features of a set are wanted."""
        return True

    def _file(self, images: Any, indices: np.ndarray) -> Path | None:
        if self.key is None or (fingerprint := images.fingerprint()) is None:
            return None
        transform = sorted(self.data.image_transform.items())
        which = hashlib.sha256(indices.tobytes()).hexdigest()
        return cache_file(f"features {self.key} {transform} {fingerprint} {which}", ".npz")

    def predict_dataloader(self) -> list[Any]:
        """Plain images, each once over all processes."""
        loaders = self.loaders()
        return [loaders[number]() for number in self.wanted]

    def loaders(self) -> list[Callable[[], Any]]:
        """What makes the loader of each set."""
        whole = self.data.predict_dataloader()
        return [functools.partial(whole.__getitem__, number) for number in range(len(self.sets))]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalize on the device."""
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def features_of(self, number: int, computed: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Features and indices of a set: known, or computed now and kept for the next time."""
        features, indices = self.known[number] or computed.get(number) or (torch.empty(0), torch.empty(0).long())
        if (file := self.files[number]) is not None and number in computed:
            write_arrays(file, features=features.numpy(), indices=indices.numpy())
        return features, indices


class LabeledImages(PlainSets):
    """The labeled images only.

    Args:
        data: The data module.
        key: As for ``PlainSets``.
        max_samples: Largest number of training images. None means all.
        test_only: Whether to skip the training images.
    """

    def __init__(self, data: L.LightningDataModule, key: str | None, max_samples: int | None, test_only: bool) -> None:
        super().__init__(data, key)
        self.max_samples, self.test_only = max_samples, test_only

    def find_sets(self) -> list[tuple[Any, np.ndarray]]:
        """Training and validation images with labels, and the numbers of the classes that both have."""
        data = self.data
        if data.train_images is None or data.num_classes is None:
            raise UserError(
                "an evaluation needs labeled images with random access; give data with labels, and no stream."
            )
        if data.val_images is None or data.val_images.labels is None:
            raise UserError("an evaluation needs validation images with labels; give data with a validation split.")
        sets = [(data.train_images, data.labelled(self.max_samples))]
        sets.append((data.val_images, np.flatnonzero(data.val_images.labels >= 0)))
        labels, test_labels = (torch.from_numpy(images.labels[indices]) for images, indices in sets)
        self.numbers = shared_classes(labels, test_labels, data.classes, say=not self.test_only)
        return sets

    def wants(self, number: int) -> bool:
        """Not the training images, if only the test images are wanted."""
        return not (self.test_only and number == 0)

    def loaders(self) -> list[Callable[[], Any]]:
        """Of a bounded number of training images, and of the validation images."""
        return [lambda: self.data.train_labelled_dataloader(self.max_samples), self.data.val_dataloader]


class SomeImages(PlainSets):
    """Images with or without labels: the validation images, or some training images.

    Args:
        data: The data module.
        key: As for ``PlainSets``.
        max_samples: Largest number of training images, evenly spread.
        held_out: Whether to take the validation images, if there are any.
    """

    def __init__(self, data: L.LightningDataModule, key: str | None, max_samples: int, held_out: bool) -> None:
        super().__init__(data, key)
        self.max_samples, self.held_out = max_samples, held_out

    def find_sets(self) -> list[tuple[Any, np.ndarray]]:
        """The only set."""
        sets = super().find_sets()
        self.is_validation = self.held_out and len(sets) > 1
        return sets[1:] if self.is_validation else [(self.data.train_images, self.data.plain_indices(self.max_samples))]

    def loaders(self) -> list[Callable[[], Any]]:
        """Of the only set."""
        return [
            self.data.val_dataloader if self.is_validation else lambda: self.data.plain_dataloader(self.max_samples)
        ]


class SomeViews(PlainSets):
    """Full-size views of some training images, augmented as in training.

    Args:
        data: The data module. Its views must not come from a stream.
        key: As for ``PlainSets``.
        count: Number of images, evenly spread.
        num_views: Number of full-size views of each image.
    """

    def __init__(self, data: L.LightningDataModule, key: str | None, count: int, num_views: int) -> None:
        super().__init__(data, key)
        self.count, self.num_views = count, num_views

    def find_sets(self) -> list[tuple[Any, np.ndarray]]:
        """The only set."""
        super().find_sets()
        specs = self.data.view_specs
        self.per_epoch = sum(spec.count for spec in specs if spec.size == max(spec.size for spec in specs))
        self.epochs = -(-self.num_views // self.per_epoch)
        # what a function of one's own does can change under the same name
        self.key = None if self.data.transform else f"{self.key} {specs} {self.epochs} {self.data.seed}"
        return [(self.data.train_images, self.data.plain_indices(self.count))]

    def loaders(self) -> list[Callable[[], Any]]:
        """Of the only set."""
        return [lambda: self.data.views_dataloader(self.count, self.epochs)]


def _read(file: Path | None) -> tuple[Tensor, Tensor] | None:
    try:
        if file is not None:
            with np.load(file) as arrays:
                return torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["indices"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # the file is missing or damaged
        pass
    return None


def shared_classes(labels: Tensor, test_labels: Tensor, names: list[str] | None, say: bool = True) -> Tensor:
    """Number the classes that both training and test images have, and say which ones are left out.

    Args:
        labels: ``(N,)`` classes of the training images; -1 is unknown.
        test_labels: ``(M,)`` classes of the test images.
        names: Names of the classes. None means their numbers.
        say: Whether to say which classes are left out.

    Returns:
        ``(C + 1,)`` new number of each of the C classes. -1 is left out, and the last element is for unknown classes.

    Raises:
        UserError: Fewer than two classes are in both sets.
    """
    train, test = (set(part[part >= 0].tolist()) for part in (labels, test_labels))
    if not train or not test:
        raise UserError(f"there are no labeled {'test' if train else 'training'} images.")
    shared = sorted(train & test)
    if len(shared) < 2:
        raise UserError(
            f"training images have {len(train)} classes and test images {len(test)}, but {len(shared)} of them in "
            "common; an evaluation needs at least 2, so give both the same classes."
        )
    if say and (missing := sorted(train ^ test)):
        listing = listed([names[label] if names else str(label) for label in missing])
        rank_zero_info(f"Evaluating {len(shared)} classes. Left out, as only one of both sets has images: {listing}")
    numbers = torch.full((max(train | test) + 2,), -1)
    numbers[shared] = torch.arange(len(shared))
    return numbers
