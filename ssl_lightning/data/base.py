"""SSLDataModule: views for training and plain images for evaluation, from any source of images."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray

from ssl_lightning.backbones.tokens import input_channels
from ssl_lightning.data.batches import PlainImages, RawViews
from ssl_lightning.data.datasets import StreamedViews, ViewDataset
from ssl_lightning.data.images import ImageArray, Images, MixedSizesError, Unreadable, fit_in_memory, some_of
from ssl_lightning.data.loader import Loader
from ssl_lightning.data.look import Alike, make_alike
from ssl_lightning.data.pairs import check_positives, pair
from ssl_lightning.data.pixels import Preparation
from ssl_lightning.data.plain import PlainLoaders
from ssl_lightning.data.prepared import PreparedImages
from ssl_lightning.data.preview import Preview, preview
from ssl_lightning.data.resolution import Resolution, Stages, length_in_epochs
from ssl_lightning.data.sampler import OrderedBatches, RepeatedBatches, ShuffledBatches
from ssl_lightning.data.splits import number_classes
from ssl_lightning.data.stream import ImageStream
from ssl_lightning.data.transforms import OwnViews, first_image
from ssl_lightning.data.unreadable import report_unreadable
from ssl_lightning.data.views import ViewSpec, adapted, resolve
from ssl_lightning.errors import UserError
from ssl_lightning.ranges import check_ranges
from ssl_lightning.runs import run_folder, unreadable_file

_TRANSFORM_KEYS = ("interpolation", "mean", "std")


class SSLDataModule(PlainLoaders):
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
        channels: Convert the images to gray (1) or to color (3). None keeps the channels of the files, but converts
            gray and color images to what the backbone takes.
        value_range: The values that become black and white in images of more than 8 bits, for all images alike.
            ``auto`` finds them in up to 256 images, or takes the range of the evaluated checkpoint.
        transform: Your own augmentation in place of ``views``: a class such as my_module.MyTransform or
            lightly.transforms.DINOTransform with its arguments, or in Python any callable. It takes a Pillow image (a
            tensor ``(C, H, W)`` unless there are 1 or 3 channels; albumentations get an array) and returns a list of
            views; one that returns a single view is called once per view. It runs in the workers and is slower: where
            we measured, lightly's transforms took 2.5 to 9 times as long as ``views`` of the same method. The random
            numbers of Python, numpy, torch and albumentations are seeded for each image.
        positives: Which images form positive pairs: ``folder``, another image of the same subfolder; ``next``, the next
            file of the same folder; or a regular expression, images whose names below the root share what its first
            group matches. The views of full size then show the image and its partner alternately, and so do local
            crops. None means both views of a pair show the same image.
        pair_distance: With ``next``, how many files ahead a partner may be; it is drawn from all of these.
        resolution: Smaller views in the first epochs, e.g. ``{scale: 0.5, until: 0.75}``: half the side for three
            quarters of the epochs. None means views of full size in all epochs. Evaluation always has the full size.
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
        channels: Literal[1, 3] | None = None,
        value_range: Literal["auto"] | tuple[float, float] = "auto",
        transform: Callable[[Any], Any] | None = None,
        positives: str | None = None,
        pair_distance: int = 1,
        resolution: Resolution | None = None,
    ) -> None:
        check_ranges("data", locals())
        super().__init__(num_workers, seed)
        if batch_size < 2:
            raise UserError(f"--data.batch_size={batch_size}: BatchNorm and contrastive losses need at least 2 images.")
        if views is not None and transform is not None:
            raise UserError("--data.transform makes the views itself; leave out --data.views, or set it to null.")
        if resolution is not None and transform is not None:
            raise UserError("--data.transform sets the size of its views itself; set --data.resolution to null.")
        self.resolution = Resolution(**resolution) if isinstance(resolution, dict) else resolution
        check_positives(positives, pair_distance)
        self.batch_size, self.views, self.transform = batch_size, views, transform
        self.positives, self.pair_distance = positives, pair_distance
        self._image_size, self._crop_fraction = image_size, crop_fraction
        self.train_samples, self.val_samples, self.in_memory = train_samples, val_samples, in_memory
        if value_range != "auto" and not float(value_range[0]) < float(value_range[1]):
            raise UserError(f"--data.value_range={value_range} must be two numbers, the smaller one first, or auto.")
        self.max_unreadable, self.channels, self.value_range = max_unreadable, channels, value_range
        self.backbone_channels: int | None = None
        """Number of channels that the backbone takes. None means the backbone of the trainer's method, if any."""
        self._alike: Alike | None = None
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
        self._pairs = ""
        self._own: OwnViews | None = None

    def load(self) -> None:
        """Set ``train_images``, and ``val_images`` if there are any: the only method a subclass must write.

        Images without random access go into ``train_stream`` instead. Only probes and evaluation use labels: leave them
        None if there are none, and -1 for single images without a label.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load() and set self.train_images there")

    def setup(self, stage: str | None = None) -> None:
        """Load the images, once for backbones of the same number of channels, and check them."""
        wanted = self._wanted_channels
        is_loaded = self.train_images is not None or self.train_stream is not None
        if is_loaded and (self._alike is None or wanted in (None, self._alike.preparation.channels)):
            return
        if self.trainer is not None:
            folder = run_folder(self.trainer) or self.trainer.default_root_dir
            self._run_folder = Path(self.trainer.strategy.broadcast(str(folder)))
        self._load(None)
        if self._train_size < 2:
            raise UserError(f"{type(self).__name__} has fewer than 2 images to train on; point it at more images.")
        classes = f"{self.num_classes} classes" if self.num_classes else "no labels"
        counts = f"{self._train_size:,} images to train on, {len(self.val_images or []):,} to validate on"
        rank_zero_info(f"{type(self).__name__}: {counts}, {classes}")

    def _load(self, alike: Alike | None) -> None:
        """Load the images and make them alike, as decided before, or as a look at them decides."""
        self.load()
        number_classes(self)
        self.train_images = some_of(self.train_images, self.train_samples)
        self.val_images = some_of(self.val_images, self.val_samples)
        if self.positives is not None:
            self._pairs = str(pair(self.train_images, self.positives, self.pair_distance))
            rank_zero_info(f"--data.positives {self._pairs}")
        images = self.train_images or (self.train_stream and self.train_stream.first(32)) or self.val_images
        try:
            if alike is None and images is not None and len(images) > 0:
                own_views, specs = not isinstance(self.views, str | None), self._own_specs
                if self.transform is not None:  # it normalizes by itself, and has no color operations of ours
                    own_views, specs = True, (ViewSpec(mean=(0.0,), std=(1.0,)),)
                wishes = self.channels, self.value_range, self._wanted_channels, self._checkpoint_transform
                alike = make_alike(images, specs, own_views, *wishes)
        except UserError:
            self.train_images = self.train_stream = self.val_images = None  # so that nothing goes on unprepared
            raise
        self._alike = alike
        self.train_images, self.val_images = self._prepared(self.train_images), self._prepared(self.val_images)

    def prepare_as(self, image_transform: dict[str, Any]) -> None:
        """Make the images alike as for the training of a checkpoint that was just loaded.

        Args:
            image_transform: How the checkpoint says that images are prepared.
        """
        if self._alike is None or self._alike == (alike := self._alike.as_in(image_transform, self.value_range)):
            return
        self._load(alike)

    def _prepared(self, images: Images | None) -> Images | None:
        if images is None or self._alike is None:
            return images
        if isinstance(images, ImageArray):
            return images.prepared(self._alike.preparation)
        images = PreparedImages(images, self._alike.preparation, self._alike.example)
        if not (self.in_memory or (self.in_memory is None and fit_in_memory(images))):
            return images
        rank_zero_info(f"Decoding {len(images):,} images into memory ...")
        try:
            array, unreadable = ImageArray.decoded(images)
        except MixedSizesError:
            if self.in_memory:
                raise
            return images
        self._report(unreadable, self._train_size + len(self.val_images or []))
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
        """The training views: the ones given, else the method's, else SimCLR's, for the channels of the images."""
        if self.transform is not None:
            return self._own_views(self.transform).specs
        if self._alike is None:
            return self._own_specs
        return adapted(self._own_specs, self._alike.preparation.channels, self._alike.statistics)

    @property
    def small_view_specs(self) -> tuple[ViewSpec, ...]:
        """The training views of the first epochs, if they are smaller; else none."""
        patch = getattr(getattr(self._module, "backbone", None), "patch_side", 1)
        return () if self.resolution is None else self.resolution.small(self.view_specs, patch)

    def _stages(self, batches: int) -> Stages | None:
        if self.resolution is None:
            return None
        epochs = math.inf if self.trainer is None else length_in_epochs(self.trainer, batches)
        return Stages(self.view_specs, self.small_view_specs, self.resolution.until * epochs, self.resolution.noise)

    @property
    def _own_specs(self) -> tuple[ViewSpec, ...]:
        patch = getattr(getattr(self._module, "backbone", None), "patch_side", 1)
        if self.views is not None:
            return resolve(self.views, self.image_size, patch)
        specs = resolve(getattr(self._module, "views", "simclr"), self.image_size, patch)
        checkpoint = self._checkpoint_transform
        transform = {key: checkpoint[key] for key in _TRANSFORM_KEYS if key in checkpoint}
        return tuple(replace(spec, **transform) for spec in specs)

    @property
    def image_transform(self) -> dict[str, Any]:
        """How plain images are prepared. Checkpoints keep it, so that evaluation prepares its images the same way."""
        spec = self._eval_spec
        transform = {key: getattr(spec, key) for key in _TRANSFORM_KEYS}
        return {"size": spec.size, "crop_fraction": self.crop_fraction, **transform, **self._preparation.facts}

    @property
    def facts(self) -> dict[str, Any]:
        """What checkpoints record about the data."""
        facts = {"data": type(self).__name__, "images": self._train_size, "classes": self.num_classes}
        if self.positives is not None:
            facts["pairs"] = self._pairs
        return facts if self._own is None else {**facts, "transform": self._own.name}

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
        workers, specs = self._workers(images), self.view_specs
        check_positives(self.positives, self.pair_distance, specs)
        if isinstance(images, ImageStream):
            parts = batch_size, self._seed, self._rank, world_size
            stages = self._stages(len(images) // (batch_size * world_size))
            stream = StreamedViews(images, specs, *parts, self._preparation, self._own, stages)
            return Loader(stream, stream, min(workers, images.max_workers(world_size)), position=self._position)
        batches = RepeatedBatches if getattr(self.trainer, "overfit_batches", 0) else ShuffledBatches
        order = batches(len(images), batch_size, self._seed, self._rank, world_size, images.order)
        dataset = ViewDataset(images, specs, self._seed, self._own, self._stages(len(order)))
        return Loader(dataset, order, workers, persistent=True, position=self._position)

    def views_dataloader(self, count: int, epochs: int) -> Loader:
        """The training views of some training images in each of several epochs, each once over all processes.

        Args:
            count: Number of images, evenly spread over the data set.
            epochs: Number of epochs.
        """
        images, specs = self._training_images, self.view_specs
        dataset = ViewDataset(images, specs, self._seed, self._own)
        order = OrderedBatches(self.plain_indices(count), self.batch_size, self._rank, self._world_size, epochs)
        return Loader(dataset, order, self._workers(images))

    def _workers(self, images: Images | ImageStream) -> int:
        quick = isinstance(images, ImageArray) and self.transform is None
        return 0 if self.num_workers is None and quick else self._loading_processes

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
        listing = self._run_folder / unreadable_file(self._rank)
        report_unreadable(self.unreadable, unreadable, total, listing, self.max_unreadable)

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

    def _own_views(self, transform: Callable[[Any], Any]) -> OwnViews:
        """What is known of the views of a transform after a first call, on the first image that can be read."""
        if self._own is None:
            wanted = getattr(self._module, "global_views", None) or 2
            self.setup()
            first = None if self.train_stream is None else self._prepared(self.train_stream.first(10))
            self._own = OwnViews(transform, first_image(first or self._training_images), wanted)
            rank_zero_info(str(self._own))
        return self._own

    @property
    def _checkpoint_transform(self) -> dict[str, Any]:
        """The ``image_transform`` of the checkpoint that is evaluated; empty in training."""
        return getattr(self._module, "image_transform", None) or {}

    @property
    def _preparation(self) -> Preparation:
        return Preparation() if self._alike is None else self._alike.preparation

    @property
    def _wanted_channels(self) -> int | None:
        return self.backbone_channels or input_channels(self._module)

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
