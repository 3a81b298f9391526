"""Data sets that make whole batches: random crops with their random numbers for training, plain images otherwise."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ssl_lightning.data.batches import PlainImages, RawViews
from ssl_lightning.data.crops import ViewMaker, resize
from ssl_lightning.data.decoding import OpenedImage, open_example, opened_already
from ssl_lightning.data.images import ImageArray, Images, Unreadable
from ssl_lightning.data.look import LOOKED_AT
from ssl_lightning.data.pixels import Preparation
from ssl_lightning.data.prepared import prepared
from ssl_lightning.data.resolution import Stages
from ssl_lightning.data.sampler import BatchKey
from ssl_lightning.data.stream import Example, ImageStream
from ssl_lightning.data.transforms import OwnViewMaker, OwnViews
from ssl_lightning.data.views import ViewSpec
from ssl_lightning.errors import UserError


class ViewDataset(Dataset[RawViews]):
    """Random crops of images with random access, with their random numbers, a batch at a time.

    Args:
        images: The images. If they have partners, methods of several views get views of both.
        specs: The views.
        seed: Seed of all random decisions.
        own: A transform of one's own that makes the views. None means crops and augmentation as the specs say.
        stages: The views of each epoch, if their size changes.
    """

    def __init__(
        self,
        images: Images,
        specs: Sequence[ViewSpec],
        seed: int,
        own: OwnViews | None = None,
        stages: Stages | None = None,
    ) -> None:
        self.images, self.seed = images, seed
        self.maker = _maker(specs, seed, own, images.paired, stages)
        self.paired = bool(self.maker.sources.any())

    def __getitem__(self, key: BatchKey) -> RawViews:
        epoch, indices = key
        if isinstance(self.images, ImageArray) and isinstance(self.maker, ViewMaker) and not self.maker.needs_pixels:
            # the device crops
            partners = self.partners(epoch, indices, indices) if self.paired else []
            batch = self.images.batch(torch.tensor([*indices.tolist(), *partners]))
            if self.maker.stages.noise_at(epoch):
                arrays = batch.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
                noisy = [
                    self.maker.noisy(image, len(image), epoch, indices, number) for number, image in enumerate(arrays)
                ]
                batch = torch.from_numpy(np.stack(noisy)).permute(0, 3, 1, 2)
            heights, widths = (np.full(len(batch), side) for side in batch.shape[-2:])
            boxes, augmentations = self.maker.draw(epoch, indices, heights, widths)
            rows = self.maker.image_rows(len(indices))
            crops = [torch.from_numpy(np.column_stack(columns)) for columns in zip(rows, boxes, strict=True)]
            labels, sizes = _labels(self.images, indices), self.maker.sizes(epoch)
            return RawViews(batch, crops, augmentations, labels, torch.from_numpy(indices), [], sizes)
        try:
            return self._from_files(epoch, indices)
        except UserError:
            raise
        except Exception:  # a file is damaged further down: decode all files before cropping, to see which
            return self._from_files(epoch, indices, check_pixels=True)

    def _from_files(self, epoch: int, indices: NDArray[np.int64], check_pixels: bool = False) -> RawViews:
        """Read the files. A readable image of the data set replaces an unreadable one.

        Args:
            epoch: Epoch.
            indices: The images.
            check_pixels: Whether an image counts as readable only if all its pixels can be decoded.
        """
        unreadable: list[Unreadable] = []
        opened = [self.first_readable(int(index), check_pixels, unreadable) for index in indices]
        images, read = [image for image, _ in opened], np.array([index for _, index in opened])
        if self.paired:
            partners = self.partners(epoch, indices, read)
            images += [
                self.readable(partner, check_pixels, unreadable) or image
                for partner, image in zip(partners, images, strict=True)
            ]
        crops, augmentations = self.maker.crop(epoch, indices, images)
        labels, sizes = _labels(self.images, read), self.maker.sizes(epoch)
        return RawViews(None, crops, augmentations, labels, torch.from_numpy(read), unreadable, sizes)

    def first_readable(self, index: int, check_pixels: bool, unreadable: list[Unreadable]) -> tuple[OpenedImage, int]:
        """Open an image, or another one in its place if that fails. Returns the image and its index.

        Args:
            index: The image.
            check_pixels: Whether an image counts as readable only if all its pixels can be decoded.
            unreadable: List that unreadable images are added to.
        """
        count = len(self.images)  # in growing steps: a whole folder or shard may be gone; then all over the data set
        steps = ((index + 2**step - 1) % count for step in range(count.bit_length() + 1))
        for candidate in itertools.chain(steps, map(int, self.images.sample(LOOKED_AT))):
            if (image := self.readable(candidate, check_pixels, unreadable)) is not None:
                return image, candidate
        black = torch.zeros(self.images.channels, 8, 8, dtype=self.images.dtype)
        return opened_already(black), index  # the limit on unreadable images will stop the run

    def readable(self, index: int, check_pixels: bool, unreadable: list[Unreadable]) -> OpenedImage | None:
        """Open an image; None if that fails.

        Args:
            index: The image.
            check_pixels: Whether an image counts as readable only if all its pixels can be decoded.
            unreadable: List that an unreadable image is added to.
        """
        try:
            image = self.images.open(index)
            if check_pixels:
                image.decode(image.height)
            return image
        except UserError:
            raise
        except Exception as error:
            unreadable.append(Unreadable.because(self.images.name(index), error))
        return None

    def partners(self, epoch: int, asked: NDArray[np.int64], read: NDArray[np.int64]) -> list[int]:
        """The partners of a batch, each a function of only (seed, epoch, index).

        Args:
            epoch: Epoch.
            asked: ``(B,)`` indices in the order of the epoch, which determine the random numbers.
            read: ``(B,)`` indices of the images in their places, which differ where an image is unreadable.

        Raises:
            UserError: ``partner`` of a source returned something else than an index.
        """
        return [
            self._partner(epoch, number, index) for number, index in zip(asked.tolist(), read.tolist(), strict=True)
        ]

    def _partner(self, epoch: int, number: int, index: int) -> int:
        # the order of an epoch takes its numbers from the counters [n, 0, 0, 0]
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=[0, 0, number, 1]))
        partner = self.images.partner(index, random)
        if not isinstance(partner, int | np.integer) or not 0 <= partner < len(self.images):
            raise UserError(
                f"partner({index}) of {type(self.images).__name__} returned {partner!r}; it must return an index from "
                f"0 to {len(self.images) - 1}."
            )
        return int(partner)


class StreamedViews(IterableDataset[RawViews]):
    """Random crops of a stream of images, a batch at a time. Each process and worker reads its part of the stream.

    A part with fewer images than the others is repeated. A resumed run skips the batches that are done.

    Args:
        stream: The stream.
        specs: The views.
        batch_size: Images per batch and process.
        seed: Seed of all random decisions.
        rank: Index of this process.
        world_size: Number of processes.
        preparation: What is done to the pixels of each image.
        own: A transform of one's own that makes the views. None means crops and augmentation as the specs say.
        stages: The views of each epoch, if their size changes.

    Attributes:
        epoch: Epoch of the next pass.
        start: Number of batches to skip in the next pass, because a resumed run has done them.
    """

    def __init__(
        self,
        stream: ImageStream,
        specs: Sequence[ViewSpec],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        preparation: Preparation = Preparation(),
        own: OwnViews | None = None,
        stages: Stages | None = None,
    ) -> None:
        self.preparation = preparation
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.size, self.rank, self.world_size = len(stream), rank, world_size
        self.maker = _maker(specs, seed, own, stages=stages)
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
            numbers, sizes = torch.from_numpy(indices), self.maker.sizes(self.epoch)
            yield RawViews(None, crops, augmentations, torch.tensor(labels), numbers, unreadable.copy(), sizes)
            unreadable.clear()

    def decoded(self, skip: int = 0, unreadable: list[Unreadable] | None = None) -> Iterator[tuple[OpenedImage, int]]:
        """The images of this worker's part with their classes, endlessly repeated.

        Args:
            skip: Number of examples to skip at the start.
            unreadable: List that unreadable images are added to. The image before takes their place.
        """
        image, label, failed = None, -1, 0
        for example in itertools.islice(self._examples(), skip, None):
            try:
                opened = open_example(example.image)
                pixels = prepared(opened, self.preparation, opened.height, functools.partial(str, example.name))
                image, label, failed = opened_already(pixels), example.label, 0
            except UserError:
                raise
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
                raise UserError(f"process {self.rank} has no image in its part of the stream; use fewer processes.")


class PlainDataset(Dataset[PlainImages]):
    """Images with the deterministic transform of evaluation: resize, then central crop.

    Args:
        images: The images.
        spec: Its ``size`` and ``interpolation`` apply.
        crop_fraction: Fraction of the shorter side that the central crop keeps. 0.875 at 224 px is "resize to 256,
            crop 224".
    """

    def __init__(self, images: Images, spec: ViewSpec, crop_fraction: float) -> None:
        self.images, self.spec, self.crop_fraction = images, spec, crop_fraction

    def __getitem__(self, key: BatchKey) -> PlainImages:
        _, indices = key
        size = self.spec.size
        # starts with no image, so that there is something to concatenate if no image can be read
        pixels, read, unreadable = [torch.empty(0, self.images.channels, size, size, dtype=self.images.dtype)], [], []
        for index in map(int, indices):
            try:
                pixels.append(self._transform(self.images.read(index))[None])
                read.append(index)
            except UserError:
                raise
            except Exception as error:
                unreadable.append(Unreadable.because(self.images.name(index), error))
        readable = np.array(read, dtype=np.int64)
        return PlainImages(torch.cat(pixels), _labels(self.images, readable), torch.from_numpy(readable), unreadable)

    def _transform(self, image: Tensor) -> Tensor:
        """Resize the shorter side, then crop the center."""
        size = self.spec.size
        short = round(size / self.crop_fraction)
        height, width = image.shape[1:]
        height, width = max(short, short * height // width), max(short, short * width // height)
        image = resize(image.permute(1, 2, 0).numpy(), (height, width), self.spec.interpolation)
        top, left = round((height - size) / 2), round((width - size) / 2)
        return image[:, top : top + size, left : left + size]


def _maker(
    specs: Sequence[ViewSpec], seed: int, own: OwnViews | None, paired: bool = False, stages: Stages | None = None
) -> ViewMaker | OwnViewMaker:
    return ViewMaker(specs, seed, paired, stages) if own is None else OwnViewMaker(own, seed, paired)


def _labels(images: Images, indices: NDArray[np.int64]) -> Tensor:
    """Classes of some images; -1 is unknown."""
    if images.labels is None:
        return torch.full((len(indices),), -1)
    return torch.from_numpy(images.labels[indices])
