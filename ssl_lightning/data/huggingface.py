"""Image data sets of Hugging Face: with random access, or as a stream."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.folder import split
from ssl_lightning.data.images import DatasetImages, Example, ImageStream
from ssl_lightning.errors import UserError

_VALIDATION_SPLITS = ("validation", "val", "valid", "test")


class HuggingFaceData(SSLDataModule):
    """A data set of the Hugging Face hub, or of local files, by the library ``datasets``.

    A stream is read in order and shuffled within a buffer, each process and worker its own part of the files; nothing
    is stored but the validation split, coded, in memory. Without a bank of training images the kNN probe is silent.

    Args:
        path: Name on the hub, or a format of local files: ``imagefolder``, ``parquet``, ``webdataset``, ...
        subset: Configuration of the data set.
        data_files: Local files or URLs of a format.
        data_dir: Folder of a format such as ``imagefolder``.
        split: Split to train on.
        val_split: Split to validate on; None takes ``validation``, ``val``, ``valid`` or ``test`` if there is one, else
            holds out ``val_fraction``.
        val_fraction: Share held out if there is no such split and there are labels.
        image_column: Column of the images; None finds it.
        label_column: Column of the labels; None finds it: one of class labels.
        streaming: Whether to read the training split as a stream.
        num_images: Images in a stream, if the data set does not tell.
        shuffle_buffer: Images among which a stream is shuffled.
        kwargs: See SSLDataModule.
    """

    def __init__(
        self,
        path: str,
        subset: str | None = None,
        data_files: str | list[str] | None = None,
        data_dir: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.1,
        image_column: str | None = None,
        label_column: str | None = None,
        streaming: bool = False,
        num_images: int | None = None,
        shuffle_buffer: int = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = {"path": path, "name": subset, "data_files": data_files, "data_dir": data_dir}
        self.train_split, self.val_split, self.val_fraction = split, val_split, val_fraction
        self.image_column, self.label_column = image_column, label_column
        self.streaming, self.num_images, self.shuffle_buffer = streaming, num_images, shuffle_buffer

    def prepare_data(self) -> None:
        """Download, once per machine, what is not streamed."""
        if not self.streaming:
            self._open(self.train_split)

    def load(self) -> None:
        """Open the splits and find their columns."""
        train = self._open(self.train_split)
        val_split = self.val_split or next((name for name in _VALIDATION_SPLITS if name in self._split_names()), None)
        val = None if val_split in (None, self.train_split) else self._open(val_split)
        image, label = self._columns(train)
        if self.streaming:
            splits = train.info.splits or {}
            length = self.num_images or getattr(splits.get(self.train_split), "num_examples", None)
            if not length:
                raise UserError("the stream does not tell how many images it has; give data.num_images.")
            length = min(length, self.train_samples or length)
            self.train_stream = HuggingFaceStream(train, length, image, label, self.shuffle_buffer, self._seed)
        else:
            self.train_images = self._images(train, image, label)
        self.val_images = None if val is None else self._images(val, image, label)
        if val is None and self.train_images is not None:
            self.train_images, self.val_images = split(self.train_images, self.val_fraction)

    def _open(self, name: str | None) -> Any:
        try:
            found = _library().load_dataset(**self.source, split=name, streaming=self.streaming)
        except (FileNotFoundError, ValueError, ConnectionError) as error:
            raise UserError(f"Hugging Face data set {self.source['path']!r}, split {name!r}: {error}") from error
        return found._resolve_features() if self.streaming and found.features is None else found

    def _split_names(self) -> list[str]:
        path, subset, files, folder = self.source.values()
        return list(_library().get_dataset_split_names(path, subset, data_files=files, data_dir=folder))

    def _columns(self, dataset: Any) -> tuple[str, str | None]:
        """Names of the columns of images and labels."""
        datasets, features = _library(), dataset.features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        numbers = [name for name, feature in features.items() if "int" in str(getattr(feature, "dtype", ""))]
        labels = classes + [name for name in ("label", "labels", "cls") if name in numbers]
        image = self.image_column or (images or [None])[0]
        label = self.label_column or (labels or [None])[0]
        if image not in features or (label is not None and label not in classes + numbers):
            raise UserError(
                f"data.image_column={image} is no column, or data.label_column={label} none of whole numbers; "
                f"the columns are {', '.join(features)}."
            )
        return image, label

    def _images(self, dataset: Any, image: str, label: str | None) -> DatasetImages:
        dataset = dataset.cast_column(image, _library().Image(decode=False))
        if self.streaming:  # validation: read once, and kept as it is coded
            dataset = list(dataset if self.val_samples is None else dataset.take(self.val_samples))
            found = [example[label] for example in dataset] if label is not None else []
        else:
            found = dataset[label] if label is not None else []
        labels = None if label is None else np.array([-1 if one is None else one for one in found])
        return DatasetImages(dataset, labels, image)


class HuggingFaceStream(ImageStream):
    """A stream of Hugging Face, shuffled within a buffer.

    Args:
        dataset: ``datasets.IterableDataset``.
        length: Number of its examples.
        image: Column of the images.
        label: Column of the labels.
        shuffle_buffer: Images among which it is shuffled.
        seed: Seed of the shuffling.
    """

    def __init__(
        self, dataset: Any, length: int, image: str, label: str | None, shuffle_buffer: int, seed: int
    ) -> None:
        feature = (dataset.features or {}).get(label)
        self.num_classes = getattr(feature, "num_classes", None)
        self.length, self.image, self.label = length, image, label
        self.files = dataset.num_shards
        dataset = dataset.cast_column(image, _library().Image(decode=False))
        self.dataset = dataset.shuffle(seed=seed, buffer_size=shuffle_buffer)

    def __len__(self) -> int:
        return self.length

    def max_workers(self, world_size: int) -> int:
        """As many as there are files for each process."""
        return max(1, self.files // world_size)

    def examples(self, epoch: int, rank: int, world_size: int) -> Iterator[Example]:
        """Each process reads its own files, or every so-manyth example where there are too few; so does each worker."""
        from datasets.distributed import split_dataset_by_node

        dataset = split_dataset_by_node(self.dataset, rank, world_size) if world_size > 1 else self.dataset
        dataset.set_epoch(epoch)
        worker = get_worker_info()
        part = f"epoch {epoch}, process {rank}, worker {0 if worker is None else worker.id}"
        for number, example in enumerate(dataset):
            image, label = example[self.image], example[self.label] if self.label is not None else None
            name = (image.get("path") if isinstance(image, dict) else None) or f"{part}, example {number}"
            yield Example(image, -1 if label is None else int(label), name)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "HuggingFaceData needs the library datasets; pip install 'ssl-lightning[huggingface]'."
        ) from error
    return datasets
