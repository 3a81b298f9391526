"""Training and validation images: known by the names of folders and splits, or held out."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from ssl_lightning.data.images import Images
from ssl_lightning.data.labels import as_labels, known, numbered

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


def split(images: Images, val_fraction: float) -> tuple[Images, Images | None]:
    """Hold out a fraction of the labeled images of each class for validation: the same images for any seed.

    A class with two images or more has at least one on each side, so small classes may give more than the fraction.

    Args:
        images: The images.
        val_fraction: The fraction.
    """
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
