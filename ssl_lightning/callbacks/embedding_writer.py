"""Writes the embeddings of all images to files, each computed once."""

import functools
import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray

from ssl_lightning.checkpoints import Pretrained, replacing
from ssl_lightning.errors import UserError

Format = Literal["npz", "parquet"]

_SETS = ("train", "val")


class Embeddings(NamedTuple):
    """What ``EmbeddingWriter`` wrote, in the order of the data: the training set, then the validation set."""

    embeddings: NDArray[np.float32]
    """``(N, D)``."""
    labels: NDArray[np.int64]
    """``(N,)`` classes; -1 is unknown."""
    paths: NDArray[np.str_]
    """``(N,)`` paths of the files, or the names that the data gives its images."""
    sets: NDArray[np.str_]
    """``(N,)`` ``train`` or ``val``."""
    indices: NDArray[np.int64]
    """``(N,)`` indices of the images in their set. Unreadable images are missing."""


class EmbeddingWriter(BasePredictionWriter):
    """Writes the embeddings that ``predict`` computes, with labels and paths; ``read_embeddings`` reads them.

    An interrupted run continues when it is started again, on any number of processes: embeddings that are already in
    files are not computed again. The folder records which weights and images its embeddings come from.

    Args:
        output: Folder that all processes can access. On the command line, None turns the callback off.
        format: Format of the files: ``npz`` (numpy), or ``parquet`` with a list of float32 for each image.
        images_per_file: Largest number of images in a file. A killed process loses at most this many embeddings.
    """

    def __init__(self, output: str | None = None, format: Format = "npz", images_per_file: int = 4096) -> None:  # noqa: A002
        super().__init__("batch")
        if format not in get_args(Format):
            raise UserError(
                f"EmbeddingWriter: there is no format {format!r}; set --embedding_writer.format to npz or parquet."
            )
        if images_per_file < 1:
            raise UserError(f"--embedding_writer.images_per_file={images_per_file} must be at least 1.")
        self.output, self.format, self.images_per_file = output, format, images_per_file
        self._images: dict[str, Any] = {}
        self._waiting: dict[str, list[tuple[NDArray[Any], ...]]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that images have an order and names, and leave out images whose embeddings exist.

        Raises:
            UserError: No folder or data module was given, the data is a stream, or the format needs a missing package.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if self.output is None:
            raise UserError("EmbeddingWriter needs a folder to write to; set --embedding_writer.output.")
        if not hasattr(data, "already_predicted"):
            raise UserError("EmbeddingWriter needs images with names; give predict a data module of this package.")
        if data.train_stream is not None:
            raise UserError(
                "the images of a stream come in no fixed order; give EmbeddingWriter data with random access, e.g. set "
                "--data.streaming=false."
            )
        if self.format == "parquet" and find_spec("pyarrow") is None:
            raise UserError("the format parquet needs pyarrow: pip install 'ssl_lightning[parquet]'.")
        self._images = {name: getattr(data, f"{name}_images") for name in _SETS}
        self._images = {name: images for name, images in self._images.items() if images is not None}
        self._waiting = {name: [] for name in self._images}
        data.already_predicted = functools.partial(self._done, trainer, pl_module)
        trainer.predict_loop.return_predictions = False
        warnings.filterwarnings("ignore", "Couldn't infer the batch indices")  # each batch has its own indices

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Later predictions include all images again."""
        if stage == "predict":
            data: Any = getattr(trainer, "datamodule", None)
            data.already_predicted = dict

    def _done(self, trainer: L.Trainer, pl_module: Any) -> dict[str, NDArray[np.int64]]:
        """Indices of the images whose embeddings exist, for each set. Called once the weights are loaded.

        Raises:
            UserError: The folder holds embeddings of other weights or images.
        """
        kwargs = {key: value for key, value in pl_module.hparams["backbone_kwargs"].items() if key != "pretrained"}
        weights = Pretrained(pl_module.evaluated_backbone, pl_module.hparams["backbone"], kwargs, {}).hash
        indices: Any = None
        if trainer.is_global_zero:  # the first process decides for all
            try:
                data: Any = getattr(trainer, "datamodule", None)
                indices = self._opened(weights, int(pl_module.embed_dim), data.image_transform)
            except UserError as error:
                indices = error
        indices = trainer.strategy.broadcast(indices)
        if isinstance(indices, UserError):
            raise indices
        done, total = sum(map(len, indices.values())), sum(map(len, self._images.values()))
        rank_zero_info(f"Embeddings: {self.output}" + (f", {done:,} of {total:,} are already there" if done else ""))
        return indices

    def _opened(self, weights: str, embed_dim: int, image_transform: dict[str, Any]) -> dict[str, NDArray[np.int64]]:
        folder = Path(str(self.output))
        metadata = {
            "weights": weights,
            "images": {name: len(images) for name, images in self._images.items()},
            "data": _fingerprint(self._images),
            "image_transform": image_transform,
            "format": self.format,
            "embed_dim": embed_dim,
        }
        metadata = json.loads(json.dumps(metadata))  # as the file will return it, e.g. lists for tuples
        file = folder / _METADATA
        if file.exists():
            earlier = _metadata(folder)
            if differing := [key for key in metadata if earlier.get(key) != metadata[key]]:
                key = differing[0]
                raise UserError(
                    f"{folder} holds embeddings of other {' and '.join(differing)}: {key} was "
                    f"{earlier.get(key)}, is now {metadata[key]}; choose another --embedding_writer.output."
                )
        elif any(folder.glob(f"*.{self.format}")):
            raise UserError(
                f"{folder} has files, but no {file.name} to describe them; choose another --embedding_writer.output."
            )
        with _writing(file) as opened:
            opened.write(json.dumps(metadata, indent=2).encode())
        for unfinished in folder.glob("*.part"):  # left by a killed process
            unfinished.unlink(missing_ok=True)
        return {
            name: np.concatenate([np.empty(0, np.int64), *(_read(file, "indices") for file in _files(folder, name))])
            for name in self._images
        }

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the embeddings of a batch until they fill a file."""
        name = list(self._images)[dataloader_idx]
        rows = (prediction.float(), batch.labels, batch.indices)
        self._waiting[name].append(tuple(part.cpu().numpy() for part in rows))
        if sum(len(indices) for _, _, indices in self._waiting[name]) >= self.images_per_file:
            self._write(name, self.images_per_file)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the remaining embeddings."""
        for name in self._images:
            self._write(name, 1)

    def _write(self, name: str, least: int) -> None:
        """Write waiting embeddings to files, while at least ``least`` of them are left."""
        if not self._waiting[name]:
            return
        embeddings, labels, indices = map(np.concatenate, zip(*self._waiting[name], strict=True))
        first = 0
        while len(indices) - first >= least:
            rows = slice(first, first + self.images_per_file)
            paths = np.array([self._images[name].name(int(index)) for index in indices[rows]])
            written = Embeddings(embeddings[rows], labels[rows], paths, np.full(len(paths), name), indices[rows])
            with _writing(Path(str(self.output), f"{name}-{indices[first]:09}.{self.format}")) as file:
                _write_npz(file, written) if self.format == "npz" else _write_parquet(file, written)
            first += len(paths)
        self._waiting[name] = [(embeddings[first:], labels[first:], indices[first:])] if first < len(indices) else []


def read_embeddings(folder: str | Path) -> Embeddings:
    """What ``EmbeddingWriter`` wrote to a folder, in the order of the data.

    Args:
        folder: The ``output`` of the ``EmbeddingWriter``.

    Raises:
        UserError: There are no embeddings.
    """
    folder = Path(folder)
    metadata = _metadata(folder)
    nothing = np.empty((0, metadata["embed_dim"]), np.float32), np.empty(0, np.int64), np.empty(0, np.str_)
    parts = [Embeddings(*nothing, nothing[2], nothing[1])]
    for name in metadata["images"]:
        files = [Embeddings(*(_read(file, key) for key in Embeddings._fields)) for file in _files(folder, name)]
        if files:
            columns = [np.concatenate(column) for column in zip(*files, strict=True)]
            order = columns[-1].argsort()
            parts.append(Embeddings(*(column[order] for column in columns)))
    return Embeddings(*map(np.concatenate, zip(*parts, strict=True)))


_METADATA = "embeddings.json"
"""File that records which weights and images the embeddings in a folder come from."""


def _metadata(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _METADATA).read_text())
    except OSError as error:
        raise UserError(
            f"{folder} holds no embeddings: {error}; give the folder that an EmbeddingWriter wrote to."
        ) from error


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(file for file in folder.glob(f"{name}-*") if file.suffix[1:] in get_args(Format))


def _fingerprint(sets: dict[str, Any]) -> str:
    """A hash that identifies the images: of their names and labels, and of the pixels of a few."""
    digest = hashlib.sha256()
    for images in sets.values():
        for index in range(len(images)):
            digest.update(images.name(index).encode(errors="surrogateescape") + b"\0")
        if images.labels is not None:
            digest.update(images.labels.tobytes())
        for eighth in range(8):
            with suppress(Exception):  # an unreadable image is left out of the hash
                digest.update(images.read(eighth * len(images) // 8).numpy().tobytes())
    return digest.hexdigest()[:16]


# Files


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error}); free space, or choose another --embedding_writer.output. Started "
            "again, predict continues after the files that exist."
        ) from error


def _write_npz(file: IO[bytes], written: Embeddings) -> None:
    np.savez(file, **written._asdict())


def _write_parquet(file: IO[bytes], written: Embeddings) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows, width = written.embeddings.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * width)
    columns = {
        "embeddings": pa.ListArray.from_arrays(offsets, pa.array(written.embeddings.reshape(-1))),
        "labels": pa.array(written.labels),
        "paths": pa.array([path.encode(errors="backslashreplace").decode() for path in written.paths]),  # any bytes
        "sets": pa.array(written.sets),
        "indices": pa.array(written.indices),
    }
    parquet.write_table(pa.table(columns), file)


def _read(file: Path, key: str) -> NDArray[Any]:
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return arrays[key]
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("parquet files need pyarrow: pip install 'ssl_lightning[parquet]'.") from error
    column = parquet.read_table(file, columns=[key])[key].combine_chunks()
    if key == "embeddings":
        return column.values.to_numpy().reshape(len(column), -1)
    return np.array(column.to_pylist()) if key in ("paths", "sets") else column.to_numpy()
