"""Image data sets from Hugging Face, with random access or as a stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import get_worker_info

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.images import DatasetImages
from ssl_lightning.data.labels import as_labels
from ssl_lightning.data.splits import split, split_kinds
from ssl_lightning.data.stream import Example, ImageStream
from ssl_lightning.errors import UserError, printable


class HuggingFaceData(SSLDataModule):
    """A data set from the Hugging Face hub or from local files, read with the library ``datasets``.

    A stream is read in order and shuffled within a buffer. Each process and worker reads its own part of the files.
    Nothing is stored except the validation split, whose encoded images stay in memory. The kNN probe logs
    nothing for a stream, because it needs training images with random access.

    Args:
        path: Name on the hub, a folder that ``save_to_disk`` wrote, or a format of local files: ``imagefolder``,
            ``parquet``, ``webdataset``, ...
        subset: Configuration of the data set.
        data_files: Local files or URLs in this format.
        data_dir: Folder, for a format such as ``imagefolder``.
        split: Split to train on. If there is no ``train``, the split with a similar name, or the only one.
        val_split: Split to validate on. None means ``validation``, ``val``, ``valid`` or ``test``, in any spelling, if
            there is one, else ``val_fraction`` of the training split.
        val_fraction: Fraction of labeled training images held out if there is no validation split.
        image_column: Column of the images. None means the first column of type ``Image``.
        label_column: Column of the labels, whole numbers or words. None means the first column of type
            ``ClassLabel``, else a column named ``label``, ``labels`` or ``cls``, if there is one.
        streaming: Whether to read the training split as a stream.
        num_images: Number of images in the stream, if the data set does not state it.
        shuffle_buffer: Number of images in the buffer that a stream is shuffled in.
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
        """Download the data set, once per machine, unless it is a stream."""
        if not self.streaming:
            self._open(self._train_split())

    def load(self) -> None:
        """Open the splits and find their columns."""
        train_split = self._train_split()
        train = self._open(train_split)
        kinds = {} if self.val_split else split_kinds(self._split_names)
        others = [name for kind in ("val", "test") for name in kinds if kinds[name] == kind]
        val_split = self.val_split or next(iter(others), None)
        val = None if val_split in (None, train_split) else self._open(val_split)
        image, label = self._columns(train)
        if self.streaming:
            splits = train.info.splits or {}
            length = self.num_images or getattr(splits.get(train_split), "num_examples", None)
            if not length:
                raise UserError("the stream does not state how many images it has; set --data.num_images.")
            length = min(length, self.train_samples or length)
            self.train_stream = HuggingFaceStream(train, length, image, label, self.shuffle_buffer, self._seed)
        else:
            self.train_images = self._images(train, image, label)
        self.val_images = None if val is None else self._images(val, image, label)
        if val is None and self.train_images is not None:
            self.train_images, self.val_images = split(self.train_images, self.val_fraction)

    def _open(self, name: str) -> Any:
        with _one_line(f"Hugging Face data set {self.source['path']!r}, split {name!r}"):
            if (saved := self._saved) is None:
                dataset = _library().load_dataset(**self.source, split=name, streaming=self.streaming)
            else:
                dataset = saved[name]
                if self.streaming:
                    self.num_images = self.num_images or len(dataset)
                    dataset = dataset.to_iterable_dataset()
            return dataset._resolve_features() if self.streaming and dataset.features is None else dataset

    @cached_property
    def _saved(self) -> dict[str, Any] | None:
        """The splits in a folder that ``save_to_disk`` wrote; None if the path is no such folder."""
        folder = Path(str(self.source["path"])).expanduser()
        if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return None
        with _one_line(f"the Hugging Face data set in {folder}"):
            saved = _library().load_from_disk(str(folder))
        return saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}

    @cached_property
    def _split_names(self) -> list[str]:
        path, subset, files, folder = self.source.values()
        if self._saved is not None:
            return [*self._saved]
        with _one_line(f"Hugging Face data set {path!r}"):
            return list(_library().get_dataset_split_names(path, subset, data_files=files, data_dir=folder))

    def _train_split(self) -> str:
        """The split to train on: parts of splits such as ``train[:10%]`` stay as they are."""
        names = self._split_names
        if self.train_split in names or not self.train_split.isidentifier():
            return self.train_split
        kinds = split_kinds(names)
        similar = [name for name in names if kinds.get(name) == "train"] or (names if len(names) == 1 else [])
        if self.train_split != "train" or not similar:
            raise UserError(f"there is no split --data.split {self.train_split}; the splits are {', '.join(names)}.")
        rank_zero_info(f"There is no split train; training uses {similar[0]}. Set --data.split to choose another.")
        return similar[0]

    def _columns(self, dataset: Any) -> tuple[str, str | None]:
        """Names of the columns of images and labels."""
        datasets, features = _library(), dataset.features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        images += [name for name, feature in features.items() if getattr(feature, "dtype", "") == "binary"]
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        # a stream cannot number words that are still to come
        kinds = ("int",) if self.streaming else ("int", "bool", "string", "list")
        usable = [
            name
            for name, feature in features.items()
            if str(getattr(feature, "dtype", "list")).startswith(("u", *kinds)) and name not in images
        ]
        labels = classes + [name for name in ("label", "labels", "cls") if name in usable]
        image = self.image_column or (images or [None])[0]
        label = self.label_column or (labels or [None])[0]
        if image is None:
            raise UserError(f"no column holds images; choose one with --data.image_column: {', '.join(features)}.")
        if image not in features or (label is not None and label not in features):
            raise UserError(
                f"--data.image_column {image} or --data.label_column {label} is not a column; the columns are "
                f"{', '.join(features)}."
            )
        if self.streaming and label is not None and label not in classes + usable:
            raise UserError(
                f"--data.label_column {label} must hold whole numbers in a stream; set --data.streaming false."
            )
        return image, label

    def _images(self, dataset: Any, image: str, label: str | None) -> DatasetImages:
        dataset = _undecoded(dataset, image)
        if self.streaming:  # validation: read once, and kept in memory as encoded
            dataset = list(dataset if self.val_samples is None else dataset.take(self.val_samples))
            classes = [example[label] for example in dataset] if label is not None else []
        else:
            classes = dataset[label] if label is not None else []
        labels = None if label is None else as_labels(list(classes), "choose another --data.label_column")
        return DatasetImages(dataset, labels, image)


class HuggingFaceStream(ImageStream):
    """A Hugging Face stream, shuffled within a buffer.

    Args:
        dataset: A ``datasets.IterableDataset``.
        length: Number of its examples.
        image: Column of the images.
        label: Column of the labels. None if there are none.
        shuffle_buffer: Number of images in the buffer.
        seed: Seed of the shuffling.
    """

    def __init__(
        self, dataset: Any, length: int, image: str, label: str | None, shuffle_buffer: int, seed: int
    ) -> None:
        feature = (dataset.features or {}).get(label)
        self.num_classes = getattr(feature, "num_classes", None)
        self.length, self.image, self.label = length, image, label
        self.files, self.dtype = dataset.num_shards, _of_array(dataset, image)
        dataset = _undecoded(dataset, image)
        self.dataset = dataset.shuffle(seed=seed, buffer_size=shuffle_buffer)

    def __len__(self) -> int:
        return self.length

    def max_workers(self, world_size: int) -> int:
        """The number of files for each process."""
        return max(1, self.files // world_size)

    def examples(self, epoch: int, rank: int, world_size: int) -> Iterator[Example]:
        """The examples in the files of this process and worker; every n-th example if there are too few files."""
        from datasets.distributed import split_dataset_by_node

        dataset = split_dataset_by_node(self.dataset, rank, world_size) if world_size > 1 else self.dataset
        dataset.set_epoch(epoch)
        worker = get_worker_info()
        part = f"epoch {epoch}, process {rank}, worker {0 if worker is None else worker.id}"
        for number, example in enumerate(dataset):
            image, label = example[self.image], example[self.label] if self.label is not None else None
            image = image if self.dtype is None else image.astype(self.dtype)
            name = (image.get("path") if isinstance(image, dict) else None) or f"{part}, example {number}"
            yield Example(image, -1 if label is None else int(label), name)


def _of_array(dataset: Any, column: str) -> Any:
    """Type of the pixels of a column of arrays; None for a column of encoded images."""
    datasets, feature = _library(), (dataset.features or {}).get(column)
    return np.dtype(feature.dtype) if isinstance(feature, datasets.Array2D | datasets.Array3D) else None


def _undecoded(dataset: Any, column: str) -> Any:
    """A data set whose images stay encoded, or are arrays of numpy."""
    datasets = _library()
    if (dtype := _of_array(dataset, column)) is not None:
        if isinstance(dataset, datasets.IterableDataset):
            return dataset.with_format("numpy")
        return dataset.with_format("numpy", columns=[column], output_all_columns=True, dtype=dtype)
    with _one_line(f"--data.image_column {column} holds no images"):
        return dataset.cast_column(column, datasets.Image(decode=False))


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn any error of the library into one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the hub, the network, file formats, ...
        reason = printable((str(error).strip().splitlines() or [""])[0]) or type(error).__name__
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "script" in reason.lower():
            reason = "it is a script, which the library datasets no longer runs"
            remedy = "give its images as files: --data.path parquet --data.data_files FILES"
        elif kinds & {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "TimeoutError", "HfHubHTTPError"}:
            remedy = "without a network, give local files or a folder of save_to_disk as --data.path"
        else:
            remedy = "see --data.path, --data.data_files and --data.data_dir"
        raise UserError(f"{what}: {reason.rstrip('.')}; {remedy}.") from error


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "HuggingFaceData needs the library datasets; pip install 'ssl-lightning[huggingface]'."
        ) from error
    return datasets
