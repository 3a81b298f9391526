"""Images with masks or boxes, in the folder layouts of Pascal VOC and COCO."""

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

from ssl_lightning.data.images import ImageFiles
from ssl_lightning.data.loader import Loader
from ssl_lightning.data.pixels import Preparation
from ssl_lightning.data.prepared import PreparedImages
from ssl_lightning.data.process import DataModule
from ssl_lightning.data.randomness import uniforms
from ssl_lightning.data.sampler import BatchKey, OrderedBatches, ShuffledBatches
from ssl_lightning.errors import UserError

_IGNORED = 255
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_Object = tuple[Any, list[float], bool]
"""Its class, its box (x0, y0, x1, y1 in pixels), and whether training and evaluation ignore it."""


class DenseData(DataModule):
    """Base of data with masks or boxes: a subclass writes ``read``.

    Training crops and flips images at random; (seed, epoch, image) determine how. Validation sees each image exactly
    once, on any number of processes.

    Args:
        root: Folder of the data set.
        train_split: Split to train on.
        val_split: Split to validate on.
        batch_size: Images per batch and process.
        num_workers: Processes that load images. None means one per CPU core, at most 8.
        seed: Seed of all random decisions about the data. None means the seed of ``seed_everything``.
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
            split: Name of the split. The training split is read first.
            seed: Seed of the augmentation. None means no augmentation, for evaluation.
        """
        raise NotImplementedError(f"{type(self).__name__} must define read(split, seed)")

    @cached_property
    def splits(self) -> tuple["DenseImages", "DenseImages"]:
        """The training images and the validation images."""
        return self.read(self.train_split, self._seed), self.read(self.val_split, None)

    @property
    def num_classes(self) -> int:
        """Number of classes. Includes the background for masks, but not for boxes."""
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
                f"{len(train)} training images are too few for a batch of {self.batch_size} on each of "
                f"{self._world_size} processes; lower --data.batch_size."
            )
        return Loader(train, order, self._loading_processes, persistent=True, position=self._position)

    def val_dataloader(self) -> Loader:
        """The validation images, each once over all processes."""
        _, val = self.splits
        if len(val) < self._world_size:
            raise UserError(f"{len(val)} validation images are too few for {self._world_size} processes; use fewer.")
        order = OrderedBatches(np.arange(len(val)), self.batch_size, self._rank, self._world_size)
        return Loader(val, order, self._loading_processes)

    @cached_property
    def _plain_training_images(self) -> "DenseImages":
        return self.read(self.train_split, None)

    def predict_dataloader(self) -> list[Loader]:
        """The training images without augmentation, then the validation images, each once over all processes."""
        train, batch_size = self._plain_training_images, self.batch_size
        if len(train) < self._world_size:
            raise UserError(f"{len(train)} training images are too few for {self._world_size} processes; use fewer.")
        order = OrderedBatches(np.arange(len(train)), batch_size, self._rank, self._world_size)
        return [Loader(train, order, self._loading_processes), self.val_dataloader()]

    def _files(self, folder: str, names: list[str]) -> list[Path]:
        """Paths of files in a folder of the data set, all of which must exist."""
        paths = [self.root / folder / name for name in names]
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError(
                f"{missing[0]} does not exist ({len(missing)} of {len(paths)} are missing); --data.root must be "
                f"a folder as in the help of {type(self).__name__}."
            )
        return paths

    def _image_names(self, kind: str, split: str) -> list[str]:
        """Names of the images in a split of Pascal VOC."""
        (listing,) = self._files(f"ImageSets/{kind}", [f"{split}.txt"])
        names = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
        if not names:
            raise UserError(f"{listing} lists no image.")
        return names


class VOCSegmentationData(DenseData):
    """Data for semantic segmentation, in the folder layout of Pascal VOC.

    ``ImageSets/Segmentation/<split>.txt`` lists names, ``JPEGImages/<name>.jpg`` are the images, and
    ``SegmentationClass/<name>.png`` the masks: palette or gray images of class numbers, where 255 means ignore.

    Args:
        root: Folder that contains these folders, e.g. ``VOCdevkit/VOC2012``.
        num_classes: Number of classes, including the background.
        image_size: Side in pixels that random crops are resized to in training, and whole images in evaluation.
        min_crop: Smallest area of a random crop, as a fraction of the image.
        kwargs: See DenseData.
    """

    def __init__(
        self, root: str, num_classes: int = 21, image_size: int = 448, min_crop: float = 0.25, **kwargs: Any
    ) -> None:
        super().__init__(root, **kwargs)
        self._num_classes, self.image_size, self.min_crop = num_classes, image_size, min_crop

    def read(self, split: str, seed: int | None) -> "DenseImages":
        """Find images and masks."""
        names = self._image_names("Segmentation", split)
        masks = self._files("SegmentationClass", [f"{name}.png" for name in names])
        images = self._files("JPEGImages", [f"{name}.jpg" for name in names])
        return _MaskedImages(images, masks, self._num_classes, self.image_size, self.min_crop, seed)


class VOCDetectionData(DenseData):
    """Data for object detection, in the folder layout of Pascal VOC.

    ``ImageSets/Main/<split>.txt`` lists names, ``JPEGImages/<name>.jpg`` are the images, and
    ``Annotations/<name>.xml`` their boxes. Training and evaluation ignore difficult objects. Training leaves out images
    without any other object.

    Args:
        root: Folder that contains these folders, e.g. ``VOCdevkit/VOC2012``.
        classes: Names of the classes. None means all names in the training split, in alphabetical order as in VOC.
        kwargs: See DenseData.
    """

    def __init__(self, root: str, classes: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.classes = classes

    def read(self, split: str, seed: int | None) -> "DenseImages":
        """Find images and read annotations."""
        names = self._image_names("Main", split)
        files = self._files("Annotations", [f"{name}.xml" for name in names])
        objects_per_image = [_voc_objects(file) for file in files]
        if self.classes is None:
            self.classes = sorted({name for objects in objects_per_image for name, _, _ in objects})
        labels = {name: label for label, name in enumerate(self.classes, 1)}
        for file, objects in zip(files, objects_per_image, strict=True):
            if unknown := {name for name, _, _ in objects} - labels.keys():
                raise UserError(f"{file} has the class {min(unknown)!r}; --data.classes are {', '.join(labels)}.")
        images = self._files("JPEGImages", [f"{name}.jpg" for name in names])
        labeled = [[(labels[name], box, ignored) for name, box, ignored in objects] for objects in objects_per_image]
        return _BoxedImages(images, labeled, len(labels), seed)


class COCODetectionData(DenseData):
    """Data for object detection, in the folder layout of COCO.

    ``annotations/instances_<split>.json`` has the boxes of the images in the folder ``<split>``. Training and
    evaluation ignore crowds. Training leaves out images without any other object.

    Args:
        root: Folder that contains ``annotations`` and the folders of the splits.
        train_split: Split to train on.
        val_split: Split to validate on.
        kwargs: See DenseData.
    """

    def __init__(self, root: str, train_split: str = "train2017", val_split: str = "val2017", **kwargs: Any) -> None:
        super().__init__(root, train_split, val_split, **kwargs)
        self._labels: dict[int, int] = {}  # category id -> label, from 1 on, in the order of the ids

    def read(self, split: str, seed: int | None) -> "DenseImages":
        """Find images and read annotations."""
        (file,) = self._files("annotations", [f"instances_{split}.json"])
        objects_by_image: dict[int, list[_Object]] = defaultdict(list)
        try:
            instances = json.loads(file.read_bytes())
            images, categories = instances["images"], sorted(category["id"] for category in instances["categories"])
            self._labels = self._labels or {category: label for label, category in enumerate(categories, 1)}
            for annotation in instances["annotations"]:
                category = annotation["category_id"]
                if "bbox" not in annotation or category not in self._labels:
                    raise UserError(
                        f"{file}: annotation {annotation['id']} has no box, or its category is not in the split "
                        f"{self.train_split}."
                    )
                x, y, width, height = annotation["bbox"]
                box = [x, y, x + width, y + height]
                ignored = bool(annotation.get("iscrowd"))
                objects_by_image[annotation["image_id"]].append((self._labels[category], box, ignored))
            objects = [objects_by_image[image["id"]] for image in images]
            names = [image["file_name"] for image in images]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} does not hold COCO's instances ({type(error).__name__}: {error}).") from error
        return _BoxedImages(self._files(split, names), objects, len(self._labels), seed)


class DenseImages(Dataset[Any]):
    """Images and their targets, a batch at a time: a subclass writes ``pair``.

    Args:
        paths: The files.
        num_classes: Number of classes.
        seed: Seed of the augmentation, which depends only on the seed, the epoch and the image. None means no
            augmentation, for evaluation.
    """

    def __init__(self, paths: list[Path], num_classes: int, seed: int | None) -> None:
        self.files = PreparedImages(ImageFiles(paths), Preparation())
        self.num_classes, self.seed = num_classes, seed

    def __len__(self) -> int:
        return len(self.files)

    def pair(self, image: tv_tensors.Image, index: int) -> tuple[Tensor, Any]:
        """The image and its target. Both are augmented if there is a seed.

        Args:
            image: ``(3, H, W)``, uint8.
            index: Index of the image.
        """
        raise NotImplementedError(f"{type(self).__name__} must define pair(image, index)")

    def __getitem__(self, key: BatchKey) -> tuple[Any, Any]:
        epoch, indices = key
        with torch.random.fork_rng(devices=[]):
            images, targets = zip(*[self._seeded_pair(epoch, int(index)) for index in indices], strict=True)
        return list(images), list(targets)

    def _seeded_pair(self, epoch: int, index: int) -> tuple[Tensor, Any]:
        if self.seed is not None:  # torchvision's transforms draw from torch's global generator
            number = uniforms(self.seed, epoch, np.array([index]), np.arange(1), 1).item()
            torch.manual_seed(int(number * 2**32))
        try:
            image = tv_tensors.Image(self.files.read(index))
        except Exception as error:
            raise UserError(f"{self.files.name(index)} cannot be read ({error}); fix or remove it.") from error
        return self.pair(image, index)


class SquareImages(DenseImages):
    """Images as squares, each with a map that has a value for each pixel: a subclass writes ``target``.

    Args:
        paths: The files.
        num_classes: Number of classes; 0 if the maps hold no classes.
        size: Side in pixels of the squares.
        min_crop: Smallest area of a random crop, as a fraction of the image.
        seed: See DenseImages.
    """

    def __init__(self, paths: list[Path], num_classes: int, size: int, min_crop: float, seed: int | None) -> None:
        super().__init__(paths, num_classes, seed)
        crop, to_tensor = v2.RandomResizedCrop(size, scale=(min_crop, 1.0)), v2.ToPureTensor()
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip(), to_tensor])
        self.resize = v2.Compose([v2.Resize((size, size)), to_tensor])

    def target(self, index: int, shape: tuple[int, int]) -> Tensor:
        """The map of an image, ``(H, W)``.

        Args:
            index: Index of the image.
            shape: Height and width of the image.
        """
        raise NotImplementedError(f"{type(self).__name__} must define target(index, shape)")

    def pair(self, image: tv_tensors.Image, index: int) -> tuple[Tensor, Tensor]:
        """The image as a square. In training its map gets the same crop; in evaluation the map keeps its size."""
        height, width = image.shape[1:]
        target = self.target(index, (height, width))
        return (self.resize(image), target) if self.seed is None else self.augment(image, tv_tensors.Mask(target))

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Any]:
        """Images ``(B, 3, S, S)``, and maps: ``(B, S, S)`` in training, in evaluation a list of maps of any size."""
        images, targets = super().__getitem__(key)
        return torch.stack(images), targets if self.seed is None else torch.stack(targets)


class _MaskedImages(SquareImages):
    def __init__(
        self, paths: list[Path], masks: list[Path], num_classes: int, size: int, min_crop: float, seed: int | None
    ) -> None:
        super().__init__(paths, num_classes, size, min_crop, seed)
        self.masks = masks

    def target(self, index: int, shape: tuple[int, int]) -> Tensor:
        """The classes of the pixels."""
        with Image.open(self.masks[index]) as mask_file:
            classes = np.array(mask_file)
        if classes.shape != shape:
            raise UserError(
                f"{self.masks[index]} is of shape {classes.shape}, its image {shape}; a mask must be "
                "a palette or gray image of the size of its image."
            )
        if wrong := {*np.unique(classes).tolist()} - {*range(self.num_classes), _IGNORED}:
            raise UserError(f"{self.masks[index]} has class {max(wrong)}; --data.num_classes is {self.num_classes}.")
        return torch.from_numpy(classes.astype(np.uint8))


class _BoxedImages(DenseImages):
    def __init__(self, paths: list[Path], objects: list[list[_Object]], num_classes: int, seed: int | None) -> None:
        with_boxes = [index for index, boxed in enumerate(objects) if not all(ignored for _, _, ignored in boxed)]
        if not with_boxes:
            raise UserError(f"none of {len(paths)} images has a box, e.g. {paths[0]}; check the annotations.")
        used = [*range(len(paths))] if seed is None else with_boxes
        super().__init__([paths[index] for index in used], num_classes, seed)
        self.labels = [np.array([label for label, _, _ in objects[index]], dtype=np.int64) for index in used]
        self.boxes = [np.array([box for _, box, _ in objects[index]], dtype=np.float32) for index in used]
        self.ignored = [np.array([ignored for _, _, ignored in objects[index]], dtype=bool) for index in used]
        self.augment = v2.Compose([v2.RandomIoUCrop(), v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes()])
        self.to_tensor = v2.ToPureTensor()

    def pair(self, image: tv_tensors.Image, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The image and its objects in the form that torchvision's detectors take."""
        boxes = torch.from_numpy(self.boxes[index]).reshape(-1, 4)
        labels, ignored = torch.from_numpy(self.labels[index]), torch.from_numpy(self.ignored[index])
        if self.seed is None:
            return self.to_tensor(image, {"boxes": boxes, "labels": labels, "iscrowd": ignored.long()})
        counted = tv_tensors.BoundingBoxes(boxes[~ignored], format="XYXY", canvas_size=image.shape[-2:])
        return self.to_tensor(self.augment(image, {"boxes": counted, "labels": labels[~ignored]}))


def _voc_objects(file: Path) -> list[_Object]:
    """Class name, box, and whether it is difficult, of each object in an annotation file of Pascal VOC."""
    try:
        return [
            (
                str(element.findtext("name")),
                # VOC counts pixels from 1, and the last pixel belongs to the box
                [float(element.findtext(f"bndbox/{side}", "")) - side.endswith("min") for side in _SIDES],
                element.findtext("difficult") == "1",
            )
            for element in ElementTree.parse(file).getroot().iter("object")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{file} has an object without a box, or is no annotation ({error}); fix it.") from error
