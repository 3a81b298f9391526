"""Training and validation images: known by the names of folders and splits, or held out."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_lightning.data.images import Images
from ssl_lightning.data.labels import as_labels, known, numbered
from ssl_lightning.errors import UserError

_WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "val": (
        "val",
        "valid",
        "validation",
        "validate",
        "validating",
        "dev",
        "devel",
        "development",
        "eval",
        "evaluation",
    ),
    "test": ("test", "testing", "tst", "tests"),
}
"""What splits are called, the usual name first."""

_COMPANIONS = {"data", "dataset", "set", "split", "folder", "dir", "image", "images", "img", "imgs", "photo", "photos"}
_COMPANIONS |= {"picture", "pictures", "jpg", "jpgs", "jpeg", "jpegs", "png", "pngs", "raw", "full", "all"}
"""Words that leave the meaning of a split's name as it is: ``train_images``."""


_NO_IMAGES = {"mask", "masks", "label", "labels", "annotation", "annotations", "gt"}
"""Words of folders that accompany a split: ``train_masks``."""


def split_kind(name: str) -> str | None:
    """Whether a name means ``train``, ``val`` or ``test``, in any case and spelling; None if it means no split.

    Args:
        name: Such as ``Training``, ``train_images``, ``TestSet`` or ``val2017``.
    """
    kind, rest = _read(name)
    return kind if all(word in _COMPANIONS or word.isdigit() for word in rest) else None


def split_kinds(names: Iterable[str]) -> dict[str, str]:
    """Which of the names of siblings mean ``train``, ``val`` or ``test``, the usual names first.

    Names with further words count if they come in pairs: ``seg_train`` next to ``seg_test``, but no ``train_station``.

    Args:
        names: The names.
    """
    read = {name: _read(name) for name in names}
    kinds = {}
    for name, (kind, rest) in read.items():
        pairs = {other for other, other_rest in read.values() if other_rest == rest} - {kind, None}
        if kind is not None and (split_kind(name) is not None or pairs):
            kinds[name] = kind
    return dict(sorted(kinds.items(), key=lambda item: (_rank(item[0], item[1]), len(item[0]), item[0])))


def _read(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The kind of the only word in a name that means a split, and its other words."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_a-zA-Z]+", name)]
    plain = [_without_companion(word) for word in words]
    kinds = {place: kind for kind, names in _WORDS.items() for place, word in enumerate(plain) if word in names}
    if len(kinds) != 1 or _NO_IMAGES & {*words}:
        return None, tuple(words)
    ((place, kind),) = kinds.items()
    return kind, (*words[:place], *words[place + 1 :])


def _without_companion(word: str) -> str:
    """``testset`` as ``test``."""
    companion = next((end for end in ("dataset", "images", "imgs", "img", "data", "set") if word.endswith(end)), "")
    return word.removesuffix(companion)


def _rank(name: str, kind: str) -> int:
    words = [word for kinds in _WORDS.values() for word in kinds]
    return words.index(name.lower()) if name.lower() in words else len(words) + [*_WORDS].index(kind)


class Part(NamedTuple):
    """What a folder is for."""

    kind: str
    """``train``, ``val`` or ``test``; ``other`` for a folder next to the folder of the training images."""
    name: str
    """Name of the folder that says so; empty if no name does."""
    path: tuple[str, ...]
    """The folder without this name, and without the folders that all images lie in."""


def divide(folders: list[str], root: Path) -> list[Part]:
    """Find out by their names which folders are for training, and which for validation and tests.

    The folders of the splits may lie in the root, in the only folder of the root, or in each folder: ``cat/train``.

    Args:
        folders: The folders with images, relative to the root; "" is the root itself.
        root: The root.
    """
    paths = [tuple(folder.split(os.sep)) if folder else () for folder in folders]
    first = 0
    while len({path[: first + 1] for path in paths}) == 1 and len(paths[0]) > first and not split_kind(paths[0][first]):
        first += 1
    siblings = [entry.name for entry in os.scandir(root.joinpath(*paths[0][:first])) if entry.is_dir()]
    for level in range(first, max(map(len, paths))):
        names: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for path in paths:
            names[path[:level]].update(path[level : level + 1])
        if level == first:  # training images that are missing are not replaced by test images
            names[paths[0][:first]].update(name for name in siblings if split_kind(name) == "train")
        kinds = {parent: _chosen(split_kinds(children)) for parent, children in names.items()}
        if level == first and (top := kinds[paths[0][:first]]) and "train" not in top.values():
            others = any(not {*path[level : level + 1]} & top.keys() for path in paths)
            if not others and len({*top.values()}) == 1:  # nothing but test images: these are the data
                break
            if not others:
                kinds[paths[0][:first]] = {name: "train" if kind == "val" else kind for name, kind in top.items()}
            return _parts(paths, kinds, level, first)
        if any("train" in kind.values() and (level == first or len(kind) > 1) for kind in kinds.values()):
            return _parts(paths, kinds, level, first)
    return [Part("train", "", path) for path in paths]


def _chosen(kinds: dict[str, str]) -> dict[str, str]:
    """Several names for the training images: only the most usual counts."""
    train = next((name for name, kind in kinds.items() if kind == "train"), None)
    return {name: "other" if kind == "train" and name != train else kind for name, kind in kinds.items()}


def _parts(
    paths: list[tuple[str, ...]], kinds: dict[tuple[str, ...], dict[str, str]], level: int, first: int
) -> list[Part]:
    parts = []
    for path in paths:
        named, name = kinds.get(path[:level], {}), "".join(path[level : level + 1])
        if name in named:
            parts.append(Part(named[name], name, path[first:level] + path[level + 1 :]))
        elif "train" in named.values():
            parts.append(Part("other", name, path))
        else:
            parts.append(Part("train", "", path[first:]))
    for name in {part.name for part in parts}:  # train/train/cat, as some archives unpack
        if name and all(part.path[:1] == (name,) for part in parts if part.name == name):
            parts = [part._replace(path=part.path[1:]) if part.name == name else part for part in parts]
    return parts


def by_use(parts: list[Part]) -> list[str]:
    """The names of the folders for validation and tests, those to use first at the beginning.

    Args:
        parts: What ``divide`` returns.
    """
    names = {part.name: part.kind for part in parts if part.kind in ("val", "test")}
    return sorted(names, key=lambda name: (names[name] == "test", _rank(name, names[name]), len(name), name))


def split(images: Images, val_fraction: float) -> tuple[Images, Images | None]:
    """Hold out a fraction of the labeled images of each class for validation: the same images for any seed.

    A class with two images or more has at least one on each side, so small classes may give more than the fraction.

    Args:
        images: The images.
        val_fraction: The fraction.

    Raises:
        UserError: The fraction is none.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"--data.val_fraction {val_fraction}: give a number from 0, for none, to below 1.")
    labels = None if images.labels is None else as_labels(images.labels)
    labeled = np.arange(0) if labels is None else np.flatnonzero(known(labels))
    count = round(len(labeled) * val_fraction)
    if count == 0 or labels is None:
        return images, None
    order = np.random.Generator(np.random.Philox(key=0)).permutation(labeled)
    _, classes, sizes = np.unique(labels[order], return_inverse=True, return_counts=True)
    held_out = order[_rank_in_class(classes, sizes) < _shares(sizes, val_fraction, count)[classes]]
    if len(held_out) == 0:  # each class has a single image
        held_out = order[:count]
    return images.subset(np.setdiff1d(np.arange(len(images)), held_out)), images.subset(np.sort(held_out))


def _rank_in_class(classes: Any, sizes: Any) -> Any:
    """``(N,)`` how many images of the same class come before each image."""
    by_class = np.argsort(classes, kind="stable")
    ranks = np.empty(len(classes), dtype=np.int64)
    ranks[by_class] = np.arange(len(classes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return ranks


def _shares(sizes: Any, fraction: float, count: int) -> Any:
    """How many images of each class to hold out, ``count`` in all if each class can have one on both sides."""
    exact = sizes * fraction
    shares = np.clip(np.floor(exact).astype(np.int64), 1, None).clip(max=sizes - 1)
    by_need = np.argsort(shares - exact, kind="stable")
    for place in by_need[: max(0, count - int(shares.sum()))]:  # rounding leaves less than one for each class
        shares[place] = min(shares[place] + 1, sizes[place] - 1)
    return shares


def number_classes(data: Any) -> None:
    """Number the classes of a data module's training and validation images from 0 on.

    Args:
        data: An SSLDataModule that has loaded its images.
    """
    train, val = data.train_images, data.val_images
    if train is None:  # a stream numbers its classes
        return
    labels, val_labels = (
        None if images is None or images.labels is None else as_labels(images.labels) for images in (train, val)
    )
    labels, val_labels, data.classes = numbered(labels, val_labels, data.classes)
    data.train_images = train.with_labels(labels)
    data.val_images = None if val is None else val.with_labels(val_labels)
