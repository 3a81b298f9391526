"""Positive pairs: which other image of the data set shows the same thing as an image."""

import os
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ssl_lightning.data.images import Images
from ssl_lightning.data.views import ViewSpec
from ssl_lightning.errors import UserError, listed


class Pairs:
    """Partners of images by their names, and for each image a random choice among them.

    Args:
        images: The images.
        positives: ``folder``, ``next`` or a regular expression, see ``--data.positives``.
        distance: How far ``next`` may go.

    Raises:
        UserError: The images have no names, or none of them has a partner.

    Attributes:
        single: Number of images without a partner.
    """

    def __init__(self, images: Images, positives: str, distance: int = 1) -> None:
        named = [images.path(index) for index in range(len(images))]
        if None in named:
            raise UserError(
                f"--data.positives {positives} needs images with file names, which this data set lacks; "
                "use ImageFolderData or ShardsData, or write partner() in a source of your own."
            )
        names = [str(name).replace(os.sep, "/") for name in named]
        self.positives, self.distance = positives, distance if positives == "next" else None
        keys = [_key(name, positives) for name in names]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        groups = np.array([numbers[key] for key in keys])
        order = np.arange(len(names))
        if positives == "next":
            order = np.array(sorted(order.tolist(), key=lambda index: _natural(names[index])))
        self.order = order[np.argsort(groups[order], kind="stable")]
        """``(N,)`` the images, group by group."""
        self.positions = np.empty(len(names), np.int64)
        """``(N,)`` where each image stands in ``order``."""
        self.positions[self.order] = np.arange(len(names))
        ends = np.cumsum(np.bincount(groups))
        self.starts, self.ends = np.concatenate([[0], ends])[groups], ends[groups]
        """``(N,)`` where the group of each image begins and ends in ``order``."""
        if None in numbers:  # images that belong to no group
            outside = groups == numbers[None]
            self.starts[outside], self.ends[outside] = self.positions[outside], self.positions[outside] + 1
        sizes = self.ends - (self.positions if positives == "next" else self.starts)
        self.single = int((sizes < 2).sum())
        if self.single == len(names):
            raise UserError(
                f"--data.positives {positives} finds no two images that belong together among {len(names):,}, such as "
                f"{listed(names[:2])}; give folder, next, or a regular expression whose first group they share."
            )

    def __str__(self) -> str:
        rule = self.positives if self.distance is None else f"{self.positives}, up to {self.distance} further"
        count = len(self.order)
        rest = "; the rest are paired with themselves" if self.single else ""
        return f"{rule}: {count - self.single:,} of {count:,} images have a partner{rest}"

    def partner(self, index: int, random: np.random.Generator) -> int:
        """A random partner of an image; the image itself if it has none.

        Args:
            index: The image.
            random: Where the random numbers come from.
        """
        position, start, end = self.positions[index], self.starts[index], self.ends[index]
        if self.distance is not None:
            start, end = position, min(end, position + 1 + self.distance)
        if end - start < 2:
            return index
        chosen = start + random.integers(end - start - 1)
        return int(self.order[chosen + (chosen >= position)])


def pair(images: Images | None, positives: str, distance: int) -> Pairs:
    """Give images their partners.

    Args:
        images: The images; None for a stream.
        positives: See ``Pairs``.
        distance: See ``Pairs``.

    Raises:
        UserError: There are no pairs.
    """
    if images is None:
        raise UserError(f"--data.positives {positives} needs images in any order, not a stream; leave it out.")
    images.pairs = pairs = Pairs(images, positives, distance)
    return pairs


def check_positives(positives: str | None, distance: int, specs: Sequence[ViewSpec] | None = None) -> None:
    """Reject options of pairs that cannot work for any images, or for these views.

    Args:
        positives: See ``Pairs``.
        distance: See ``Pairs``.
        specs: The views, if they are known.

    Raises:
        UserError: The expression is wrong, or has no group, the distance is less than 1, or there is a single view.
    """
    if positives is not None and specs is not None and not view_sources(specs).any():
        raise UserError(
            f"--data.positives {positives} needs two views of each image, but here is one; leave it out, or choose a "
            "--model of several views."
        )
    if distance < 1:
        raise UserError(f"--data.pair_distance {distance} must be at least 1, the next file.")
    if positives in (None, "folder", "next"):
        return
    hint = "give folder, next, or a regular expression with a group that two names share, e.g. '(.*)_camera'"
    try:
        groups = re.compile(str(positives)).groups
    except re.error as error:
        raise UserError(f"--data.positives {positives} is not a regular expression ({error}); {hint}.") from error
    if groups == 0:
        raise UserError(f"--data.positives {positives} has no group in parentheses; {hint}.")


def view_sources(specs: Sequence[ViewSpec]) -> NDArray[np.int64]:
    """Which image of a pair each view shows: 0 for the image, 1 for its partner.

    The views of full size alternate, and so do the smaller ones. A view that repeats a crop shows the same image.

    Args:
        specs: The views.
    """
    largest = max(spec.size for spec in specs if spec.same_crop_as is None)
    sources: list[int] = []
    counts = {True: 0, False: 0}
    for spec in specs:
        for view in range(spec.count):
            if spec.same_crop_as is not None:
                sources.append(sources[spec.same_crop_as + view])
                continue
            full_size = spec.size == largest
            sources.append(counts[full_size] % 2)
            counts[full_size] += 1
    return np.array(sources)


def _key(name: str, positives: str) -> str | None:
    """What the names of a group share; None if an image belongs to no group."""
    if positives in ("folder", "next"):
        folder = name.rpartition("/")[0]
        return folder or (None if positives == "folder" else "")  # images that lie directly in the root: no subfolder
    match = re.search(positives, name)
    return None if match is None else match[1]


def _natural(name: str) -> list[str | int]:
    """A name with its numbers as numbers: frame 2 comes before frame 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
