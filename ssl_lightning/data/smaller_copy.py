"""A smaller copy of a folder of images: each decoded once, reduced, and written to tar files or to a folder alike."""

import io
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset

from ssl_lightning.checkpoints.files import replacing
from ssl_lightning.data.datasets import ViewDataset
from ssl_lightning.data.folder import ImageFolderData
from ssl_lightning.data.images import ImageFiles, Images, Unreadable
from ssl_lightning.data.reduce import reduced
from ssl_lightning.data.sampler import spread
from ssl_lightning.data.shards import ShardsData
from ssl_lightning.data.views import preset
from ssl_lightning.errors import UserError
from ssl_lightning.machine import processors, single_thread

_IMAGES_PER_SHARD = 1000
_SETTINGS, _UNREADABLE = "prepare.json", "unreadable.txt"


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` wrote, and what it gains."""

    output: Path
    images: int
    unreadable: int
    bytes_before: int
    bytes_after: int
    view_size: int
    rate_before: float
    rate_after: float
    data: str
    """The options that train on the result."""

    def __str__(self) -> str:
        listed = f"; {self.unreadable:,} unreadable, see {self.output / _UNREADABLE}" if self.unreadable else ""
        return "\n".join(
            [
                f"{self.output}: {self.images:,} images in {_size(self.bytes_after)} instead of "
                f"{_size(self.bytes_before)}{listed}",
                f"a worker prepares {self.rate_before:,.1f} images per second from the originals and "
                f"{self.rate_after:,.1f} from these, {self.rate_after / self.rate_before:.1f} times as many "
                f"(two views of {self.view_size} px, one processor)",
                f"train with {self.data}",
            ]
        )


class _Part(NamedTuple):
    """Training or validation images."""

    name: str
    images: ImageFiles
    keys: list[str]
    """Unique names without suffixes, for the results."""


def prepare(
    root: str,
    output: str,
    size: int = 256,
    format: Literal["shards", "folder"] = "shards",  # noqa: A002 # as it is typed
    quality: int = 92,
    num_workers: int | None = None,
) -> Prepared:
    """Reduce a folder of large images once, so that training need not decode them in every epoch.

    8-bit images become JPEGs; other depths and more bands are kept, as PNG or TIFF. Images that are small enough are
    copied. Started again after an interruption, the command goes on where it stopped.

    Args:
        root: Folder of images, with or without classes and ``train`` and ``val``, as ImageFolderData takes it.
        output: Folder to write to: a new one, or the one of an interrupted run.
        size: Length in pixels that the shorter side of larger images is reduced to, with antialiasing. 256 suits views
            of 224 px.
        format: ``shards`` writes tar files of 1,000 images in random order, with labels, for ShardsData. ``folder``
            writes files in the same subfolders, for ImageFolderData.
        quality: Quality of the JPEGs, from 1 to 100.
        num_workers: Processes that reduce images. None means one per processor.

    Raises:
        UserError: The folder holds no readable images, or the output belongs to something else.
    """
    if size < 1 or not 1 <= quality <= 100:
        raise UserError(f"--size {size} must be at least 1, and --quality {quality} from 1 to 100.")
    source, target = Path(root).expanduser(), Path(output).expanduser()
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--output {output} lies in --root {root}, so its images would count twice; choose another.")
    parts = _parts(source, by_name=format == "folder")
    _claim(target, {"root": str(source.resolve()), "size": size, "format": format, "quality": quality}, parts)
    workers = processors() if num_workers is None else num_workers
    unreadable = _listed(target)
    total = sum(len(part.images) for part in parts)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Reducing", total=total)
        for part in parts:
            write = _write_shards if format == "shards" else _write_files
            for done in write(part, source, target, _Reducer(part.images, size, quality), workers, unreadable):
                bar.advance(task, done)
    _list(target, unreadable)
    if len(unreadable) >= total:
        name, reason = next(iter(unreadable.items()))
        raise UserError(f"none of {total:,} images below --root {root} can be read, e.g. {name}: {reason}")
    results, options = _results(target, format, [part.name for part in parts])
    view_size = max(1, round(0.875 * size))
    files = [path for path in target.rglob("*") if path.is_file()]
    return Prepared(
        output=target,
        images=total - len(unreadable),
        unreadable=len(unreadable),
        bytes_before=sum(_bytes(Path(part.images.name(n))) for part in parts for n in range(len(part.images))),
        bytes_after=sum(map(_bytes, files)),
        view_size=view_size,
        rate_before=_rate(parts[0].images, view_size),
        rate_after=_rate(results, view_size),
        data=options,
    )


def _parts(root: Path, by_name: bool) -> list[_Part]:
    data = ImageFolderData(str(root), val_fraction=0.0)
    data.load()
    parts = []
    for name, images in (("train", data.train_images), ("val", data.val_images)):
        if isinstance(images, ImageFiles):
            parts.append(_Part(name, images, _keys([images.path(n) for n in range(len(images))], dots=by_name)))
    return parts


def _keys(paths: Sequence[str], dots: bool) -> list[str]:
    """Paths without suffixes; with them where two would be equal, and without dots unless these are allowed."""
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = Counter(stem.lower() for stem in stems)
    keys = [stem if counts[stem.lower()] == 1 else path for stem, path in zip(stems, paths, strict=True)]
    if dots:
        return keys
    # the key of a member of a tar file ends at the first dot of its name
    taken: set[str] = set()
    for number, key in enumerate(keys):
        folder, name = os.path.split(key)
        key = os.path.join(folder, name.replace(".", "_")).replace(os.sep, "/")
        while key in taken:
            key += "_"
        taken.add(key)
        keys[number] = key
    return keys


def _claim(target: Path, settings: dict[str, Any], parts: Sequence[_Part]) -> None:
    """Make the output folder, or check that an interrupted run with the same images and settings made it."""
    digest = sha256()
    for part in parts:
        digest.update(part.images.paths.tobytes())
    settings = {**settings, "images": {part.name: len(part.images) for part in parts}, "names": digest.hexdigest()}
    file = target / _SETTINGS
    if file.is_file():
        before = json.loads(file.read_text())
        if changed := [key for key in settings if before.get(key) != settings[key]]:
            raise UserError(f"--output {target} was made with another {' and '.join(changed)}; choose an empty folder.")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output {target} is not empty; choose a new folder.")
    else:
        target.mkdir(parents=True, exist_ok=True)
        with replacing(file) as opened:
            opened.write(json.dumps(settings, indent=1).encode())


class _Reducer(Dataset[Any]):
    """Reduces the images of a part; an unreadable image gives the reason instead."""

    def __init__(self, images: ImageFiles, size: int, quality: int) -> None:
        self.images, self.size, self.quality = images, size, quality

    def __getitem__(self, index: int) -> tuple[int, bytes, str] | tuple[int, None, str]:
        name = self.images.name(index)
        try:
            data, suffix = reduced(Path(name).read_bytes(), self.size, self.quality)
            return index, data, suffix or os.path.splitext(name)[1].lower()
        except UserError:
            raise
        except Exception as error:
            return index, None, Unreadable.because(name, error).reason

    def over(self, indices: Sequence[int], workers: int) -> Iterator[tuple[int, bytes | None, str]]:
        """Reduce some of the images, in order.

        Args:
            indices: The images.
            workers: Number of processes.
        """
        order: Any = list(indices)
        loader = DataLoader(self, sampler=order, batch_size=None, collate_fn=_unchanged, num_workers=workers)
        try:
            yield from loader
        except UserError as error:  # from a worker it comes with a traceback
            raise UserError(str(error).rsplit(f"{UserError.__name__}: ")[-1].strip()) from None


def _unchanged(example: Any) -> Any:
    return example


def _write_files(
    part: _Part, root: Path, target: Path, reducer: _Reducer, workers: int, unreadable: dict[str, str]
) -> Iterator[int]:
    """Write the images that are not there yet. Yields how many are done since the last time."""
    folder = target / os.path.relpath(part.images.root, root)
    todo = []
    for index, key in enumerate(part.keys):
        suffixes = {".jpg", ".png", ".tif", os.path.splitext(part.images.path(index))[1].lower()}
        if not any((folder / f"{key}{suffix}").exists() for suffix in suffixes):
            todo.append(index)
    yield len(part.keys) - len(todo)
    for index, data, suffix in reducer.over(todo, workers):
        if data is None:
            unreadable[part.images.name(index)] = suffix
        else:
            file = folder / f"{part.keys[index]}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as opened:
                opened.write(data)
        yield 1


def _write_shards(
    part: _Part, _root: Path, target: Path, reducer: _Reducer, workers: int, unreadable: dict[str, str]
) -> Iterator[int]:
    """Write the tar files that are not there yet. Yields how many images are done since the last time.

    The images are in random order, because training shuffles only the images of a few files together.
    """
    count = len(part.keys)
    order = np.random.Generator(np.random.Philox(key=0)).permutation(count)
    shards = {
        target / f"{part.name}-{number:06}.tar": order[first : first + _IMAGES_PER_SHARD].tolist()
        for number, first in enumerate(range(0, count, _IMAGES_PER_SHARD))
    }
    left = {shard: indices for shard, indices in shards.items() if not shard.exists()}
    yield count - sum(map(len, left.values()))
    results = reducer.over([index for indices in left.values() for index in indices], workers)
    for shard, indices in left.items():
        with replacing(shard) as file, tarfile.open(fileobj=file, mode="w") as archive:
            for _ in indices:
                index, data, suffix = next(results)
                if data is None:
                    unreadable[part.images.name(index)] = suffix
                else:
                    _add(archive, f"{part.keys[index]}{suffix}", data)
                    if part.images.labels is not None and part.images.labels[index] >= 0:
                        _add(archive, f"{part.keys[index]}.cls", str(part.images.labels[index]).encode())
                yield 1
        _list(target, unreadable)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _listed(target: Path) -> dict[str, str]:
    """The unreadable files of the part of the work that is done, with their reasons."""
    file = target / _UNREADABLE
    lines = file.read_text(errors="surrogateescape").splitlines() if file.is_file() else []
    return dict(line.split("\t", 1) for line in lines if "\t" in line)


def _list(target: Path, unreadable: dict[str, str]) -> None:
    if unreadable:
        text = "".join(f"{name}\t{' '.join(reason.split())}\n" for name, reason in sorted(unreadable.items()))
        with replacing(target / _UNREADABLE) as file:
            file.write(text.encode(errors="surrogateescape"))


def _results(target: Path, kind: str, names: Sequence[str]) -> tuple[Images, str]:
    """The reduced training images, and the options that train on them."""
    data: ShardsData | ImageFolderData
    if kind == "folder":
        data, options = ImageFolderData(str(target), val_fraction=0.0), f"ImageFolderData --data.root {target}"
    else:
        data = ShardsData(str(target / "train-*.tar"), val_fraction=0.0)
        options = f"ShardsData --data.urls '{target}/train-*.tar'"
        options += f" --data.val_urls '{target}/val-*.tar'" if "val" in names else ""
    data.load()
    assert data.train_images is not None
    return data.train_images, f"--data {options}"


def _rate(images: Images, view_size: int) -> float:
    """How many images per second a worker prepares for training, on a sample."""
    dataset = ViewDataset(images, preset("simclr", view_size), seed=0)
    sample = spread(np.arange(len(images)), min(32, len(images)))
    with single_thread():
        dataset[0, sample[:2]]
        start = time.perf_counter()
        dataset[1, sample]
        return len(sample) / (time.perf_counter() - start)


def _bytes(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
