"""Data sets that make whole batches: random crops with their numbers for training, plain images for evaluation."""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ssl_lightning.data.augment import augment, normalize, resized_crop
from ssl_lightning.data.draw import NUMBERS_PER_VIEW, Augmentation, Draws, draw, uniforms
from ssl_lightning.data.images import (
    Example,
    ImageArray,
    Images,
    ImageStream,
    OpenedImage,
    Unreadable,
    open_example,
    opened_already,
)
from ssl_lightning.data.sampler import BatchKey
from ssl_lightning.data.views import ViewSpec
from ssl_lightning.errors import UserError
from ssl_lightning.seeding import generators_put_back


class Views(NamedTuple):
    """A training batch on the device."""

    views: list[Tensor]
    """One ``(B, 3, S, S)`` float tensor per view, in the order of the ViewSpecs."""
    labels: Tensor
    """``(B,)`` classes; -1 is unknown."""
    indices: Tensor
    """``(B,)`` indices of the images in the data set."""


class RawViews(NamedTuple):
    """A training batch as the workers send it, B images and V views."""

    images: Tensor | None
    """``(B, 3, H, W)`` uint8, where the device crops; else None."""
    crops: list[Tensor]
    """For each ViewSpec ``(count * B, 3, S, S)`` uint8 crops, or ``(count * B, 4)`` boxes where the device crops."""
    augmentations: list[Augmentation]
    """For each ViewSpec what was drawn for its ``count * B`` crops."""
    labels: Tensor
    indices: Tensor
    unreadable: list[Unreadable]

    def to(self, device: torch.device) -> "RawViews":
        """The batch with its pixels on a device; the numbers stay, and are sent where they are needed."""
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        crops = [crop.to(device, non_blocking=True) for crop in self.crops]
        labels, indices = self.labels.to(device, non_blocking=True), self.indices.to(device, non_blocking=True)
        return self._replace(images=images, crops=crops, labels=labels, indices=indices)

    def augmented(self, specs: Sequence[ViewSpec], dtype: torch.dtype = torch.float32) -> Views:
        """Crop if the workers did not, augment in float32, and split into views; on the device where the batch is."""
        views: list[Tensor] = []
        for spec, crops, numbers in zip(specs, self.crops, self.augmentations, strict=True):
            source = crops if self.images is None else self.images
            made = torch.empty(len(crops), source.shape[1], spec.size, spec.size, device=crops.device)
            for rows in _groups(made):
                some = crops[rows]
                if self.images is not None:
                    image = torch.arange(rows.start, rows.start + len(some), device=crops.device) % len(self.images)
                    some = resized_crop(self.images.index_select(0, image), some, spec.size, spec.interpolation)
                augment(some, numbers.of(rows), spec, out=made[rows])
            views += made.to(dtype).chunk(spec.count)
        return Views(views, self.labels, self.indices)


def _groups(images: Tensor) -> list[slice]:
    """The images that are worked on together: on the CPU a few, which stay in its cache, else all.

    Measured: images of 224 px one by one are 1.4 times as fast as six at a time; those of 96 px and less gain from
    sharing the cost of calling an operation.
    """
    together = len(images)
    if images.device.type == "cpu":
        together = 1 if images[0].numel() > 2**16 else _TOGETHER // images[0].numel()
    return [slice(start, start + together) for start in range(0, len(images), together)]


_TOGETHER = 2**20
"""Numbers of small images that the CPU works on together."""


class PlainImages(NamedTuple):
    """An evaluation batch: uint8 as the workers send it, float and normalised on the device."""

    images: Tensor
    """``(B, 3, S, S)``."""
    labels: Tensor
    """``(B,)`` classes; -1 is unknown."""
    indices: Tensor
    """``(B,)`` indices of the images in the data set."""
    unreadable: list[Unreadable]

    def normalized(self, spec: ViewSpec, dtype: torch.dtype = torch.float32) -> "PlainImages":
        """The batch as the backbone wants it, float with the mean and deviation of ``spec``."""
        return self._replace(images=normalize(self.images.float() / 255, spec).to(dtype))


class ViewMaker:
    """Draws the random numbers of the views of some images, and crops them.

    Args:
        specs: The views.
        seed: Seed of all random decisions.
    """

    def __init__(self, specs: Sequence[ViewSpec], seed: int) -> None:
        self.specs, self.seed = specs, seed
        self.needs_pixels = any(spec.rand_augment for spec in specs)

    def draw(
        self, epoch: int, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> tuple[list[np.ndarray], list[Augmentation]]:
        """Boxes and augmentation of each ViewSpec, rows ordered view by view.

        Args:
            epoch: Epoch.
            indices: ``(B,)`` indices of the images in the data set: the numbers depend on them.
            heights: ``(B,)`` heights of the images in pixels.
            widths: ``(B,)`` widths of the images in pixels.
        """
        boxes: list[np.ndarray] = []
        augmentations: list[Augmentation] = []
        view = 0
        for spec in self.specs:
            numbers = uniforms(self.seed, epoch, indices, np.arange(view, view + spec.count), NUMBERS_PER_VIEW)
            flat = numbers.reshape(spec.count * len(indices), NUMBERS_PER_VIEW)
            draws = draw(spec, flat, np.tile(heights, spec.count), np.tile(widths, spec.count))
            if spec.same_crop_as is not None:
                same = slice(spec.same_crop_as * len(indices), (spec.same_crop_as + spec.count) * len(indices))
                flips = np.concatenate([earlier.flip for earlier in augmentations])
                draws = Draws(np.concatenate(boxes)[same], draws.augmentation._replace(flip=flips[same]))
            boxes.append(draws.boxes)
            augmentations.append(draws.augmentation)
            view += spec.count
        return boxes, augmentations

    def crop(
        self, epoch: int, indices: np.ndarray, images: Sequence[OpenedImage]
    ) -> tuple[list[Tensor], list[Augmentation]]:
        """Crops of each ViewSpec, ``(count * B, C, S, S)`` uint8, and their augmentation; each image is decoded once.

        Args:
            epoch: Epoch.
            indices: ``(B,)`` indices of the images in the data set: the numbers depend on them.
            images: The B images.
        """
        heights, widths = np.array([(image.height, image.width) for image in images]).T
        boxes_of, augmentations = self.draw(epoch, indices, heights, widths)
        crops: list[Tensor] = []
        zipped = list(zip(self.specs, boxes_of, strict=True))
        bottoms = np.max([(boxes[:, 0] + boxes[:, 2]).reshape(-1, len(images)).max(0) for boxes in boxes_of], axis=0)
        for number, image in enumerate(images):
            pixels = image.decode(int(bottoms[number])).permute(1, 2, 0).numpy()  # (rows, W, C)
            if not crops:
                channels = pixels.shape[2]
                shapes = [(len(boxes), channels, spec.size, spec.size) for spec, boxes in zipped]
                crops = [torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last) for shape in shapes]
            first_view = 0
            for (spec, boxes), cropped in zip(zipped, crops, strict=True):
                for row in range(number, len(boxes), len(images)):
                    top, left, height, width = boxes[row].tolist()
                    crop = pixels[top : top + height, left : left + width]
                    cropped[row] = _resize(crop, (spec.size, spec.size), spec.interpolation)
                    if spec.rand_augment:
                        view = first_view + row // len(images)
                        cropped[row] = rand_augmented(cropped[row], spec, self.seed, epoch, int(indices[number]), view)
                first_view += spec.count
        return crops, augmentations


def rand_augmented(image: Tensor, spec: ViewSpec, *seed: int) -> Tensor:
    """Timm's RandAugment of an image ``(3, S, S)``, uint8, as a function of the seed alone.

    Args:
        image: The image.
        spec: Gives the settings, and the mean that fills what is turned in.
        seed: Numbers that the randomness depends on.
    """
    with generators_put_back():
        random.seed(str(seed))
        np.random.seed(random.getrandbits(32))  # noqa: NPY002 # timm draws from both
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
        return torch.from_numpy(np.array(_rand_augment(spec)(pixels))).permute(2, 0, 1)


@functools.cache
def _rand_augment(spec: ViewSpec) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    fill = tuple(round(255 * mean) for mean in (spec.mean * 3)[:3])
    settings = {"img_mean": fill, "translate_const": int(spec.size * 0.45), "interpolation": Image.Resampling.BICUBIC}
    try:
        transform = rand_augment_transform(spec.rand_augment, settings)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"view: rand_augment={spec.rand_augment!r}: {error}; see timm's documentation.") from error
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):  # may keep 0 bits, which newer Pillow refuses
            operation.level_fn = functools.partial(_at_least_one, operation.level_fn)
    return transform


def _at_least_one(level_fn: Any, level: float, settings: dict[str, Any]) -> tuple[int]:
    return (max(1, level_fn(level, settings)[0]),)


class ViewDataset(Dataset[RawViews]):
    """Random crops of images with all their random numbers, a batch at a time.

    Args:
        images: Where images come from.
        specs: The views.
        seed: Seed of all random decisions.
    """

    def __init__(self, images: Images, specs: Sequence[ViewSpec], seed: int) -> None:
        self.images, self.maker = images, ViewMaker(specs, seed)

    def __getitem__(self, key: BatchKey) -> RawViews:
        epoch, indices = key
        if isinstance(self.images, ImageArray) and not self.maker.needs_pixels:  # cropped on the device
            batch = self.images.images[torch.from_numpy(indices)]
            heights, widths = (np.full(len(indices), side) for side in batch.shape[-2:])
            boxes, augmentations = self.maker.draw(epoch, indices, heights, widths)
            crops = [torch.from_numpy(rows) for rows in boxes]
            return RawViews(batch, crops, augmentations, _labels(self.images, indices), torch.from_numpy(indices), [])
        try:
            return self._from_files(epoch, indices)
        except UserError:
            raise
        except Exception:  # a file breaks off: decode all before cropping, to see which
            return self._from_files(epoch, indices, to_the_end=True)

    def _from_files(self, epoch: int, indices: np.ndarray, to_the_end: bool = False) -> RawViews:
        """Read the files; another readable image of the data set stands in for one that cannot be read.

        Args:
            epoch: Epoch.
            indices: The images.
            to_the_end: Decode each first, to see whether it can be.
        """
        unreadable: list[Unreadable] = []
        opened = [self._first_readable(int(index), to_the_end, unreadable) for index in indices]
        crops, augmentations = self.maker.crop(epoch, indices, [image for image, _ in opened])
        read = np.array([index for _, index in opened])
        return RawViews(None, crops, augmentations, _labels(self.images, read), torch.from_numpy(read), unreadable)

    def _first_readable(self, index: int, to_the_end: bool, unreadable: list[Unreadable]) -> tuple[OpenedImage, int]:
        for step in range(len(self.images).bit_length() + 1):  # in leaps, past a whole folder or shard that is gone
            candidate = (index + 2**step - 1) % len(self.images)
            try:
                image = self.images.open(candidate)
                if to_the_end:
                    image.decode(image.height)
                return image, candidate
            except UserError:
                raise
            except Exception as error:
                unreadable.append(Unreadable.because(self.images.name(candidate), error))
        black = torch.zeros(self.images.channels, 8, 8, dtype=torch.uint8)
        return opened_already(black), index  # hopeless: the limit will stop the run


class StreamedViews(IterableDataset[RawViews]):
    """Random crops of a stream of images, a batch at a time; each process and worker reads its part of the stream.

    A part that ends early begins again. A resumed run passes over the batches that are done.

    Args:
        stream: Where images come from.
        specs: The views.
        batch_size: Images per batch and process.
        seed: Seed of all random decisions.
        rank: Index of this process.
        world_size: Number of processes.

    Attributes:
        epoch: Epoch of the next pass.
        start: Batches of the next pass that are already done.
    """

    def __init__(
        self,
        stream: ImageStream,
        specs: Sequence[ViewSpec],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.size, self.rank, self.world_size = len(stream), rank, world_size
        self.maker = ViewMaker(specs, seed)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[RawViews]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        done, todo = (len(range(number, batches, workers)) for batches in (self.start, len(self)))
        parts, part = self.world_size * workers, self.rank * workers + number
        unreadable: list[Unreadable] = []
        images = self.decoded(done * self.batch_size, unreadable)
        for batch in range(done, todo):
            indices = (batch * self.batch_size + np.arange(self.batch_size)) * parts + part
            opened, labels = zip(*itertools.islice(images, self.batch_size), strict=True)
            crops, augmentations = self.maker.crop(self.epoch, indices, opened)
            numbers = torch.from_numpy(indices)
            yield RawViews(None, crops, augmentations, torch.tensor(labels), numbers, unreadable.copy())
            unreadable.clear()

    def decoded(self, skip: int = 0, unreadable: list[Unreadable] | None = None) -> Iterator[tuple[OpenedImage, int]]:
        """The images of this worker's part with their classes, again and again.

        Args:
            skip: Examples to pass over at first.
            unreadable: Those that cannot be read are added here; the one before takes their place.
        """
        image, label, failed = None, -1, 0
        for example in itertools.islice(self._examples(), skip, None):
            try:
                opened = open_example(example.image)
                image, label, failed = opened_already(opened.decode(opened.height)), example.label, 0
            except Exception as error:
                failed += 1
                if failed > self.size:
                    reason = f"{type(error).__name__}: {error}"
                    raise UserError(f"no image of the stream can be read, e.g. {example.name}: {reason}") from error
                if unreadable is not None:
                    unreadable.append(Unreadable.because(example.name, error))
            if image is not None:
                yield image, label

    def _examples(self) -> Iterator[Example]:
        while True:
            example = None
            for example in self.stream.examples(self.epoch, self.rank, self.world_size):
                yield example
            if example is None:
                raise UserError(f"process {self.rank} finds no image in its part of the stream; use fewer processes.")


class PlainDataset(Dataset[PlainImages]):
    """Images with the deterministic transform of evaluation: resize, then central crop.

    Args:
        images: Where images come from.
        spec: Gives size and interpolation.
        crop_fraction: Share of the shorter side that the central crop keeps; 0.875 at 224 px is "resize to 256,
            crop 224".
    """

    def __init__(self, images: Images, spec: ViewSpec, crop_fraction: float) -> None:
        self.images, self.spec, self.crop_fraction = images, spec, crop_fraction

    def __getitem__(self, key: BatchKey) -> PlainImages:
        _, indices = key
        size = self.spec.size
        pixels, read, unreadable = [torch.empty(0, self.images.channels, size, size, dtype=torch.uint8)], [], []
        for index in map(int, indices):
            try:
                pixels.append(self._transform(self.images.read(index))[None])
                read.append(index)
            except UserError:
                raise
            except Exception as error:
                unreadable.append(Unreadable.because(self.images.name(index), error))
        kept = np.array(read, dtype=np.int64)
        return PlainImages(torch.cat(pixels), _labels(self.images, kept), torch.from_numpy(kept), unreadable)

    def _transform(self, image: Tensor) -> Tensor:
        """Resize of the shorter side, then CenterCrop."""
        size = self.spec.size
        short = round(size / self.crop_fraction)
        height, width = image.shape[1:]
        height, width = max(short, short * height // width), max(short, short * width // height)
        image = _resize(image.permute(1, 2, 0).numpy(), (height, width), self.spec.interpolation)
        top, left = round((height - size) / 2), round((width - size) / 2)
        return image[:, top : top + size, left : left + size]


def _resize(pixels: NDArray[np.uint8], shape: tuple[int, int], interpolation: str) -> Tensor:
    """Antialiased resize of ``(H, W, C)`` uint8 pixels to ``(C, *shape)``, fastest on pixels that lie together.

    Measured on one core, bicubic, 300x350 to 224x224 px: torch 0.45 ms, or 0.69 on a part of a larger image and 1.4
    channels first; Pillow 2. OpenCV has no antialiased bicubic.
    """
    image = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    return (image if pixels.shape[:2] == shape else F.interpolate(image, shape, mode=interpolation, antialias=True))[0]


def _labels(images: Images, indices: np.ndarray) -> Tensor:
    if images.labels is None:
        return torch.full((len(indices),), -1)
    return torch.from_numpy(images.labels[indices])
