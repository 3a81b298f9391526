"""Images with masks or boxes, in the folders of Pascal VOC and COCO."""

import json
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ssl_lightning.data.base import DataModule, Loader
from ssl_lightning.data.draw import uniforms
from ssl_lightning.data.images import ImageFiles
from ssl_lightning.data.sampler import BatchKey, OrderedBatches, ShuffledBatches
from ssl_lightning.errors import UserError

_IGNORED = 255
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_Object = tuple[Any, list[float], bool]
"""Its class, its box (x0, y0, x1, y1 in pixels), and whether it counts neither in training nor in evaluation."""


class DenseData(DataModule):
    """Base of data with masks or boxes: subclasses write ``read``.

    Training crops and flips at random, by (seed, epoch, image) alone. Validation sees each image once, whatever the
    number of processes.

    Args:
        root: Folder of the data set.
        train_split: Split to train on.
        val_split: Split to validate on.
        batch_size: Images per batch and process.
        num_workers: Processes that load images; None is one per processor, at most 8.
        seed: Seed of all random decisions about the data; None takes that of ``seed_everything``.
    """

    def __init__(
        self,
        root: str,
        train_split: str = "train",
        val_split: str = "val",
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_workers, seed)
        self.root, self.batch_size = Path(root).expanduser(), batch_size
        self.train_split, self.val_split = train_split, val_split

    def read(self, split: str, seed: int | None) -> "DenseImages":
        """The images of a split.

        Args:
            split: Its name; that of training is read first.
            seed: Seed of their augmentation; None is for evaluation.
        """
        raise NotImplementedError(f"{type(self).__name__} must define read(split, seed)")

    @cached_property
    def splits(self) -> tuple["DenseImages", "DenseImages"]:
        """The images of training and of validation."""
        return self.read(self.train_split, self._seed), self.read(self.val_split, None)

    @property
    def num_classes(self) -> int:
        """Number of classes: of masks with the background, of boxes without."""
        return self.splits[0].num_classes

    def setup(self, stage: str | None = None) -> None:
        """Read both splits."""
        train, val = self.splits
        rank_zero_info(f"{type(self).__name__}: {len(train):,} images to train on, {len(val):,} to validate on")

    def train_dataloader(self) -> Loader:
        """Shuffled batches."""
        train, _ = self.splits
        order = ShuffledBatches(len(train), self.batch_size, self._seed, self._rank, self._world_size)
        if len(order) == 0:
            raise UserError(
                f"{len(train)} images to train on make no batch of {self.batch_size} for each of {self._world_size} "
                "processes; lower data.batch_size."
            )
        return Loader(train, order, self._loading_processes, persistent=True, position=self._position)

    def val_dataloader(self) -> Loader:
        """Each image of the validation split once over all processes."""
        _, val = self.splits
        if len(val) < self._world_size:
            raise UserError(f"{len(val)} images to validate on are too few; use fewer processes.")
        order = OrderedBatches(np.arange(len(val)), self.batch_size, self._rank, self._world_size)
        return Loader(val, order, self._loading_processes)

    def _files(self, folder: str, names: list[str]) -> list[Path]:
        """Files of the data set, which must be there."""
        paths = [self.root / folder / name for name in names]
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError(
                f"{missing[0]} does not exist, as {len(missing)} of {len(paths)} such files; data.root must be a "
                f"folder as the help of {type(self).__name__} says."
            )
        return paths

    def _listed(self, kind: str, split: str) -> list[str]:
        """Names of the images in a split of Pascal VOC."""
        (listing,) = self._files(f"ImageSets/{kind}", [f"{split}.txt"])
        names = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
        if not names:
            raise UserError(f"{listing} names no image.")
        return names


class VOCSegmentationData(DenseData):
    """Semantic segmentation in the folders of Pascal VOC.

    ``ImageSets/Segmentation/<split>.txt`` lists names, ``JPEGImages/<name>.jpg`` are the images, and
    ``SegmentationClass/<name>.png`` the masks: palette or gray images of class numbers, 255 where it does not count.

    Args:
        root: The folder that holds them, e.g. ``VOCdevkit/VOC2012``.
        num_classes: Number of classes, background included.
        image_size: Side of the images in pixels: of random crops in training, of the whole image in evaluation.
        min_crop: Smallest share of the image's area that a random crop keeps.
        kwargs: See DenseData.
    """

    def __init__(
        self, root: str, num_classes: int = 21, image_size: int = 448, min_crop: float = 0.25, **kwargs: Any
    ) -> None:
        super().__init__(root, **kwargs)
        self._num_classes, self.image_size, self.min_crop = num_classes, image_size, min_crop

    def read(self, split: str, seed: int | None) -> "DenseImages":
        """Find images and masks."""
        names = self._listed("Segmentation", split)
        masks = self._files("SegmentationClass", [f"{name}.png" for name in names])
        images = self._files("JPEGImages", [f"{name}.jpg" for name in names])
        return _MaskedImages(images, masks, self._num_classes, self.image_size, self.min_crop, seed)


class VOCDetectionData(DenseData):
    """Object detection in the folders of Pascal VOC.

    ``ImageSets/Main/<split>.txt`` lists names, ``JPEGImages/<name>.jpg`` are the images, and
    ``Annotations/<name>.xml`` their boxes. Difficult objects count neither in training nor in evaluation; images
    without others are not trained on.

    Args:
        root: The folder that holds them, e.g. ``VOCdevkit/VOC2012``.
        classes: Names of the classes; None takes those of the training split in alphabetical order, as VOC's are.
        kwargs: See DenseData.
    """

    def __init__(self, root: str, classes: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.classes = classes

    def read(self, split: str, seed: int | None) -> "DenseImages":
        """Find images and read annotations."""
        names = self._listed("Main", split)
        files = self._files("Annotations", [f"{name}.xml" for name in names])
        found = [_voc_objects(file) for file in files]
        if self.classes is None:
            self.classes = sorted({name for objects in found for name, _, _ in objects})
        labels = {name: label for label, name in enumerate(self.classes, 1)}
        for file, objects in zip(files, found, strict=True):
            if unknown := {name for name, _, _ in objects} - labels.keys():
                raise UserError(f"{file} has the class {min(unknown)!r}; data.classes are {', '.join(labels)}.")
        images = self._files("JPEGImages", [f"{name}.jpg" for name in names])
        labelled = [[(labels[name], box, ignored) for name, box, ignored in objects] for objects in found]
        return _BoxedImages(images, labelled, len(labels), seed)


class COCODetectionData(DenseData):
    """Object detection in the folders of COCO.

    ``annotations/instances_<split>.json`` has the boxes of the images in the folder ``<split>``. Crowds count neither
    in training nor in evaluation; images without other objects are not trained on.

    Args:
        root: The folder that holds ``annotations`` and the splits.
        train_split: Split to train on.
        val_split: Split to validate on.
        kwargs: See DenseData.
    """

    def __init__(self, root: str, train_split: str = "train2017", val_split: str = "val2017", **kwargs: Any) -> None:
        super().__init__(root, train_split, val_split, **kwargs)
        self._labels: dict[int, int] = {}  # of each category: from 1 on, in the order of their ids

    def read(self, split: str, seed: int | None) -> "DenseImages":
        """Find images and read annotations."""
        (file,) = self._files("annotations", [f"instances_{split}.json"])
        found: dict[int, list[_Object]] = defaultdict(list)
        try:
            told = json.loads(file.read_bytes())
            images, categories = told["images"], sorted(one["id"] for one in told["categories"])
            self._labels = self._labels or {category: label for label, category in enumerate(categories, 1)}
            for one in told["annotations"]:
                if "bbox" not in one or one["category_id"] not in self._labels:
                    raise UserError(
                        f"{file}: annotation {one['id']} has no box, or a category that {self.train_split} has not."
                    )
                x, y, width, height = one["bbox"]
                box = [x, y, x + width, y + height]
                found[one["image_id"]].append((self._labels[one["category_id"]], box, bool(one.get("iscrowd"))))
            objects, names = [found[image["id"]] for image in images], [image["file_name"] for image in images]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} does not hold COCO's instances ({type(error).__name__}: {error}).") from error
        return _BoxedImages(self._files(split, names), objects, len(self._labels), seed)


class DenseImages(Dataset[Any]):
    """Images and what is to be seen in them, a batch at a time; subclasses write ``pair``.

    Args:
        paths: The files.
        num_classes: Number of classes.
        seed: Seed of the augmentation: it depends on this, the epoch and the image alone. None is for evaluation.
    """

    def __init__(self, paths: list[Path], num_classes: int, seed: int | None) -> None:
        self.files, self.num_classes, self.seed = ImageFiles(paths), num_classes, seed

    def __len__(self) -> int:
        return len(self.files)

    def pair(self, image: tv_tensors.Image, index: int) -> tuple[Tensor, Any]:
        """The image and its target, augmented if there is a seed.

        Args:
            image: ``(3, H, W)``, uint8.
            index: Its number.
        """
        raise NotImplementedError(f"{type(self).__name__} must define pair(image, index)")

    def __getitem__(self, key: BatchKey) -> tuple[Any, Any]:
        epoch, indices = key
        with torch.random.fork_rng(devices=[]):
            images, targets = zip(*[self._drawn(epoch, int(index)) for index in indices], strict=True)
        return list(images), list(targets)

    def _drawn(self, epoch: int, index: int) -> tuple[Tensor, Any]:
        if self.seed is not None:  # torchvision draws from torch's generator
            number = uniforms(self.seed, epoch, np.array([index]), np.arange(1), 1).item()
            torch.manual_seed(int(number * 2**32))
        try:
            image = tv_tensors.Image(self.files.read(index))
        except Exception as error:
            raise UserError(f"{self.files.name(index)} cannot be read ({error}); mend it.") from error
        return self.pair(image, index)


class _MaskedImages(DenseImages):
    def __init__(
        self, paths: list[Path], masks: list[Path], num_classes: int, size: int, min_crop: float, seed: int | None
    ) -> None:
        super().__init__(paths, num_classes, seed)
        self.masks = masks
        crop, pure = v2.RandomResizedCrop(size, scale=(min_crop, 1.0)), v2.ToPureTensor()
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip(), pure])
        self.resize = v2.Compose([v2.Resize((size, size)), pure])

    def pair(self, image: tv_tensors.Image, index: int) -> tuple[Tensor, Tensor]:
        """The image as a square; its mask is cropped alike in training, and as it is in evaluation."""
        with Image.open(self.masks[index]) as opened:
            classes = np.array(opened)
        if classes.shape != image.shape[1:]:
            raise UserError(
                f"{self.masks[index]} is of shape {classes.shape}, its image {tuple(image.shape[1:])}; masks are "
                "palette or gray images as large as theirs."
            )
        if wrong := {*np.unique(classes).tolist()} - {*range(self.num_classes), _IGNORED}:
            raise UserError(f"{self.masks[index]} has class {max(wrong)}; data.num_classes is {self.num_classes}.")
        mask = torch.from_numpy(classes.astype(np.uint8))
        return (self.resize(image), mask) if self.seed is None else self.augment(image, tv_tensors.Mask(mask))

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Any]:
        """Images ``(B, 3, S, S)``, and masks: ``(B, S, S)`` in training, a list of any sizes in evaluation."""
        images, masks = super().__getitem__(key)
        return torch.stack(images), masks if self.seed is None else torch.stack(masks)


class _BoxedImages(DenseImages):
    def __init__(self, paths: list[Path], objects: list[list[_Object]], num_classes: int, seed: int | None) -> None:
        kept = [number for number, some in enumerate(objects) if not all(ignored for _, _, ignored in some)]
        if not kept:
            raise UserError(f"none of {len(paths)} images has a box, e.g. {paths[0]}; look at the annotations.")
        kept = [*range(len(paths))] if seed is None else kept
        super().__init__([paths[number] for number in kept], num_classes, seed)
        self.labels = [np.array([label for label, _, _ in objects[number]], dtype=np.int64) for number in kept]
        self.boxes = [np.array([box for _, box, _ in objects[number]], dtype=np.float32) for number in kept]
        self.ignored = [np.array([ignored for _, _, ignored in objects[number]], dtype=bool) for number in kept]
        self.augment = v2.Compose([v2.RandomIoUCrop(), v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes()])
        self.plain = v2.ToPureTensor()

    def pair(self, image: tv_tensors.Image, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The image and its objects as torchvision's detectors take them."""
        boxes = torch.from_numpy(self.boxes[index]).reshape(-1, 4)
        labels, ignored = torch.from_numpy(self.labels[index]), torch.from_numpy(self.ignored[index])
        if self.seed is None:
            return self.plain(image, {"boxes": boxes, "labels": labels, "iscrowd": ignored.long()})
        kept = tv_tensors.BoundingBoxes(boxes[~ignored], format="XYXY", canvas_size=image.shape[-2:])
        return self.plain(self.augment(image, {"boxes": kept, "labels": labels[~ignored]}))


def _voc_objects(file: Path) -> list[_Object]:
    """Class name, box and difficulty of each object in an annotation of Pascal VOC."""
    try:
        return [
            (
                str(one.findtext("name")),
                # pixels are counted from 1, and the last one belongs to the box
                [float(one.findtext(f"bndbox/{side}", "")) - side.endswith("min") for side in _SIDES],
                one.findtext("difficult") == "1",
            )
            for one in ElementTree.parse(file).getroot().iter("object")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{file} has an object without a box, or is no annotation ({error}); mend it.") from error
