"""SSLDataModule: views for training and plain images for evaluation, from any source of images."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray

from ssl_lightning.data.batches import PlainImages, RawViews
from ssl_lightning.data.datasets import PlainDataset, StreamedViews, ViewDataset
from ssl_lightning.data.images import ImageArray, Images, ImageStream, MixedSizesError, Unreadable, fit_in_memory
from ssl_lightning.data.loader import Loader
from ssl_lightning.data.preview import Preview, preview
from ssl_lightning.data.sampler import OrderedBatches, ShuffledBatches, spread
from ssl_lightning.data.splits import number_classes
from ssl_lightning.data.views import ViewSpec, resolve
from ssl_lightning.errors import UserError
from ssl_lightning.runs import run_folder, unreadable_file

_TRANSFORM_KEYS = ("interpolation", "mean", "std")


class DataModule(L.LightningDataModule):
    """Base of every data module: gives loaders the seed, the process, and the position in the training.

    Args:
        num_workers: Processes that load images. None means one per CPU core, at most 8.
        seed: Seed of all random decisions about the data. None means the seed of ``seed_everything``.
    """

    def __init__(self, num_workers: int | None = None, seed: int | None = None) -> None:
        super().__init__()
        self.num_workers, self.seed = num_workers, seed

    @property
    def _loading_processes(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(8, cores)

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _position(self) -> tuple[int, int] | None:
        """During training: the epoch and how many of its batches are done, also after a resume."""
        trainer: Any = self.trainer  # its class does not declare overfit_batches
        if trainer is None or not trainer.training:
            return None
        epoch = 0 if trainer.overfit_batches else trainer.current_epoch  # overfitting repeats the same batches
        return epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready


class SSLDataModule(DataModule):
    """Base of all image data: a subclass sets ``train_images`` and ``val_images`` in ``load``.

    Workers decode and crop the images and draw the random numbers. The device augments each batch after its transfer.

    Args:
        batch_size: Images per batch and process, not counting views.
        views: The training views: the name of a preset (simclr, byol, dino, ...) or a list of views. None means the
            views of the method.
        image_size: Side in pixels of evaluation images and of a preset's largest views. None means the image size of
            the evaluated checkpoint, else the default of the data class (224 unless it says otherwise).
        crop_fraction: Fraction of the shorter side that the central crop of evaluation keeps. None means the fraction
            of the checkpoint that is evaluated, else 0.875 ("resize 256, crop 224"), or 1 for ``image_size`` up to 96.
        train_samples: Number of images to train on, evenly spread over the data set. None means all.
        val_samples: Number of images to validate on, evenly spread over the data set. None means all.
        in_memory: Decode all images into memory at the start; they must have the same size. None does so for images
            of at most 96 px that fit into 1 GB.
        num_workers: Processes that load images. None means one per CPU core, at most 8, and none for images in memory.
        seed: Seed of all random decisions about the data. None means the seed of ``seed_everything``.
        max_unreadable: Fraction of the images that may be unreadable. Such images are skipped and listed; a larger
            fraction stops the run.
    """

    default_image_size: int = 224

    def __init__(
        self,
        batch_size: int = 64,
        views: str | list[ViewSpec] | None = None,
        image_size: int | None = None,
        crop_fraction: float | None = None,
        train_samples: int | None = None,
        val_samples: int | None = None,
        in_memory: bool | None = None,
        num_workers: int | None = None,
        seed: int | None = None,
        max_unreadable: float = 0.01,
    ) -> None:
        super().__init__(num_workers, seed)
        if batch_size < 2:
            raise UserError(f"--data.batch_size={batch_size}: BatchNorm and contrastive losses need at least 2 images.")
        self.batch_size, self.views = batch_size, views
        self._image_size, self._crop_fraction = image_size, crop_fraction
        self.train_samples, self.val_samples, self.in_memory = train_samples, val_samples, in_memory
        self.max_unreadable = max_unreadable
        self.train_images: Images | None = None
        self.train_stream: ImageStream | None = None
        self.val_images: Images | None = None
        self.classes: list[str] | None = None
        """Names of the classes. ``load`` sets them if the numbers of the labels do not say them."""
        self.unreadable: dict[str, str] = {}
        """Name of each unreadable image so far, and the reason."""
        self.already_predicted: Callable[[], dict[str, NDArray[np.int64]]] = dict
        """Returns the indices of the ``train`` and ``val`` images that ``predict`` leaves out."""
        self._run_folder = Path()

    def load(self) -> None:
        """Set ``train_images``, and ``val_images`` if there are any: the only method a subclass must write.

        Images without random access go into ``train_stream`` instead. Only probes and evaluation use labels: leave them
        None if there are none, and -1 for single images without a label.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load() and set self.train_images there")

    def setup(self, stage: str | None = None) -> None:
        """Load the images, once, and check them."""
        if self.train_images is not None or self.train_stream is not None:
            return
        if self.trainer is not None:
            folder = run_folder(self.trainer) or self.trainer.default_root_dir
            self._run_folder = Path(self.trainer.strategy.broadcast(str(folder)))
        self.load()
        number_classes(self)
        train, val = (
            self._prepared(self.train_images, self.train_samples),
            self._prepared(self.val_images, self.val_samples),
        )
        self.train_images, self.val_images = train, val
        if self._train_size < 2:
            raise UserError(f"{type(self).__name__} has fewer than 2 images to train on; point it at more images.")
        classes = f"{self.num_classes} classes" if self.num_classes else "no labels"
        counts = f"{self._train_size:,} images to train on, {len(val or []):,} to validate on"
        rank_zero_info(f"{type(self).__name__}: {counts}, {classes}")

    def _prepared(self, images: Images | None, samples: int | None) -> Images | None:
        if images is None:
            return None
        if samples is not None and samples < len(images):
            images = images.subset(spread(np.arange(len(images)), samples))
        if isinstance(images, ImageArray) or not (self.in_memory or (self.in_memory is None and fit_in_memory(images))):
            return images
        rank_zero_info(f"Decoding {len(images):,} images into memory ...")
        try:
            array, unreadable = ImageArray.decoded(images)
        except MixedSizesError:
            if self.in_memory:
                raise
            return images
        self._report(unreadable, len(images))
        return array

    @property
    def num_classes(self) -> int | None:
        """Number of classes in the labels; None if the training images have no labels."""
        if self.train_stream is not None:
            return self.train_stream.num_classes
        labels = None if self.train_images is None else self.train_images.labels
        if labels is None or labels.max(initial=-1) < 0:
            return None
        return len(self.classes) if self.classes else int(labels.max()) + 1

    @property
    def image_size(self) -> int:
        """Side in pixels of evaluation images and of a preset's largest views."""
        return self._image_size or self._checkpoint_transform.get("size") or self.default_image_size

    @property
    def crop_fraction(self) -> float:
        """Fraction of the shorter side that the central crop of evaluation keeps."""
        default = self._checkpoint_transform.get("crop_fraction") or (0.875 if self.image_size > 96 else 1.0)
        return default if self._crop_fraction is None else self._crop_fraction

    @property
    def view_specs(self) -> tuple[ViewSpec, ...]:
        """The training views: the ones given, else the method's, else SimCLR's."""
        if self.views is not None:
            return resolve(self.views, self.image_size)
        specs = resolve(getattr(self._module, "views", "simclr"), self.image_size)
        checkpoint = self._checkpoint_transform
        transform = {key: checkpoint[key] for key in _TRANSFORM_KEYS if key in checkpoint}
        return tuple(replace(spec, **transform) for spec in specs)

    @property
    def image_transform(self) -> dict[str, Any]:
        """How plain images are prepared. Checkpoints keep it, so that evaluation prepares its images the same way."""
        spec = self._eval_spec
        return {"size": spec.size, "crop_fraction": self.crop_fraction} | {
            key: getattr(spec, key) for key in _TRANSFORM_KEYS
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What checkpoints record about the data."""
        return {"data": type(self).__name__, "images": self._train_size, "classes": self.num_classes}

    # Loaders

    def train_dataloader(self) -> Loader:
        """Batches of training views: ``RawViews`` from the workers, ``Views`` once they are on the device."""
        self.setup()
        world_size = self._world_size
        batch_size = min(self.batch_size, self._train_size // world_size)
        if batch_size < 2:
            raise UserError(f"{self._train_size} images are too few for {world_size} processes; use fewer devices.")
        if batch_size < self.batch_size:
            rank_zero_warn(
                f"batch_size={self.batch_size} is larger than the {self._train_size} training images"
                f"{f' on {world_size} processes' if world_size > 1 else ''}; using {batch_size}. "
                "Set --data.batch_size to choose."
            )
            self.batch_size = batch_size
        images = self.train_stream or self._training_images
        for spec in self.view_specs:
            spec.check_channels(images.channels)
        workers = self._workers(images)
        if isinstance(images, ImageStream):
            stream = StreamedViews(images, self.view_specs, batch_size, self._seed, self._rank, world_size)
            return Loader(stream, stream, min(workers, images.max_workers(world_size)), position=self._position)
        order = ShuffledBatches(len(images), batch_size, self._seed, self._rank, world_size, images.order)
        dataset = ViewDataset(images, self.view_specs, self._seed)
        return Loader(dataset, order, workers, persistent=True, position=self._position)

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
        size = len(self._training_images)
        count = min(size, max(64, min(2048, size // 32)) if count is None else count)
        return self._plain_loader(self._training_images, spread(np.arange(size), count))

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

    def _plain_loader(self, images: Images, indices: NDArray[np.int64]) -> Loader:
        dataset = PlainDataset(images, self._eval_spec, self.crop_fraction)
        order = OrderedBatches(indices, self.batch_size, self._rank, self._world_size)
        return Loader(dataset, order, self._workers(images))

    def _workers(self, images: Images | ImageStream) -> int:
        return 0 if self.num_workers is None and isinstance(images, ImageArray) else self._loading_processes

    def preview(self, num_rows: int = 8, num_images: int = 256) -> Preview:
        """Make the first training views exactly as training does, and return a picture and a few numbers.

        Args:
            num_rows: Images in the picture.
            num_images: Images to compute the numbers on.
        """
        return preview(self.train_dataloader(), self.view_specs, num_rows, num_images)

    # On the device

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment views and normalize plain images. Batches of any other loader stay as they are."""
        if isinstance(batch, RawViews):
            self._report(batch.unreadable, self._images_seen())
            return batch.augmented(self.view_specs, self._dtype)
        if isinstance(batch, PlainImages):
            self._report(batch.unreadable, self._images_seen())
            return batch.normalized(self._eval_spec, self._dtype)
        return batch

    def _report(self, unreadable: list[Unreadable], total: int) -> None:
        """Count and list unreadable images, and stop the run if they are too many.

        Args:
            unreadable: The unreadable images of a batch.
            total: Number of different images that this process has seen by the end of the epoch.
        """
        new = {name: reason for name, reason in unreadable if name not in self.unreadable}
        if not new:
            return
        self.unreadable.update(new)
        listing = self._run_folder / unreadable_file(self._rank)
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(
            "".join(f"{name}\t{reason}\n" for name, reason in sorted(self.unreadable.items())), encoding="utf-8"
        )
        share = len(self.unreadable) / total
        rank_zero_warn(f"{len(self.unreadable)} of {total} images are unreadable and skipped; see {listing}")
        if share > self.max_unreadable:
            raise UserError(
                f"{share:.1%} of the images are unreadable, more than --data.max_unreadable={self.max_unreadable:.1%}; "
                f"fix or remove the files listed in {listing}, or raise the limit."
            )

    def _images_seen(self) -> int:
        """About how many different images this process has seen by the end of this epoch.

        In the first epoch it sees only its own part of the data.
        """
        total = self._train_size + len(self.val_images or [])
        epochs = 1 if self.trainer is None else self.trainer.current_epoch + 1
        if self.train_stream is not None:  # whether two images of a stream are the same is unknown
            return math.ceil(total * epochs / self._world_size)
        return math.ceil(total * min(1.0, epochs / self._world_size))

    # The run

    @property
    def _module(self) -> Any:
        return getattr(self.trainer, "lightning_module", None)

    @property
    def _checkpoint_transform(self) -> dict[str, Any]:
        """The ``image_transform`` of the checkpoint that is evaluated; empty in training."""
        return getattr(self._module, "image_transform", None) or {}

    @property
    def _train_size(self) -> int:
        return len(self.train_stream or self.train_images or [])

    @property
    def _training_images(self) -> Images:
        self.setup()
        assert self.train_images is not None
        return self.train_images

    @property
    def _eval_spec(self) -> ViewSpec:
        """Plain images get the size, interpolation, mean and standard deviation of the largest crops."""
        return max((spec for spec in self.view_specs if spec.same_crop_as is None), key=lambda spec: spec.size)

    @property
    def _dtype(self) -> torch.dtype:
        """Type of the method's weights: float32 unless ``--trainer.precision`` is 64-true or the like."""
        dtype = getattr(self._module, "dtype", torch.float32)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32
