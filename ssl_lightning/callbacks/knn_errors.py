"""The validation images that the kNN probe gets wrong, to look at on the page of a run."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from ssl_lightning.callbacks.features import PlainFeatures
from ssl_lightning.callbacks.tiles import names_of, tiled, tiles_of
from ssl_lightning.distributed import gather_uneven
from ssl_lightning.evaluation.knn import Votes

NEAREST = 5
"""Number of nearest training images to show for each error."""
_CLASSES = 12
"""Most classes in the table of confusions."""
_WORST = 60
_SHOWN = 200
"""Most errors to show: the worst of all, then the worst of each pair of classes in the table."""


class KNNErrors(NamedTuple):
    """What kNN gets wrong, on the CPU, the same on every process."""

    epoch: int
    """Epochs done."""
    total: int
    """Number of validation images with a label."""
    wrong: int
    """How many of them are wrong."""
    classes: Tensor
    """``(c,)`` all classes if there are few, else the classes that are confused the most often."""
    counts: Tensor
    """``(c, c)`` numbers of images, by label and by prediction."""
    indices: Tensor
    """``(E,)`` some of the wrong images. Those with the most votes for the wrong class come first."""
    labels: Tensor
    """``(E,)``."""
    predicted: Tensor
    """``(E,)``."""
    thousandths: Tensor
    """``(E,)`` of the votes were for the predicted class."""
    nearest: Tensor
    """``(E, n)`` indices of the nearest training images."""

    @classmethod
    def of(cls, votes: Votes, images: PlainFeatures, bank: PlainFeatures, epoch: int) -> "KNNErrors | None":
        """The errors over all processes; None if no image has a label. Every process must call it.

        Args:
            votes: The votes for the images of this process.
            images: The validation images of this process.
            bank: The training images that voted.
            epoch: Epochs done.
        """
        known = images.labels >= 0
        sure = (votes.share * 1000).round().long()  # so that no rounding error decides which is worse
        columns = torch.stack([images.indices, images.labels, votes.predicted, sure], dim=1)
        rows = gather_uneven(columns[known]).cpu()  # (M, 4)
        if len(rows) == 0:
            return None
        rows = rows[rows[:, 0].argsort()]
        wrong = rows[rows[:, 1] != rows[:, 2]]
        wrong = wrong[wrong[:, 3].argsort(descending=True, stable=True)]
        classes = _classes(rows[:, 1:3], wrong[:, 1:3])
        shown = wrong[_to_show(wrong[:, 1:3].tolist(), {*classes.tolist()})]
        # the nearest images are known to the process that had the image
        mine = torch.isin(images.indices, shown[:, 0].to(images.indices.device)) & known
        owners, order = gather_uneven(images.indices[mine]).cpu().sort()
        nearest = gather_uneven(bank.indices[votes.nearest[mine]]).cpu()[order]
        nearest = nearest[torch.searchsorted(owners, shown[:, 0].contiguous())]
        indices, labels, predicted, thousandths = shown.unbind(1)
        counts = _counts(rows[:, 1:3], classes)
        return cls(epoch, len(rows), len(wrong), classes, counts, indices, labels, predicted, thousandths, nearest)

    def page(self, trainer: L.Trainer, pl_module: L.LightningModule, data: Any) -> str | None:
        """The errors as JSON with small pictures; None if an image can no longer be read. Every process must call it.

        Args:
            trainer: Determines the device.
            pl_module: The method.
            data: The data module, with validation images.
        """
        images, order = self.indices.sort()
        neighbors = self.nearest.unique()
        own = tiles_of(trainer, pl_module, data, data.val_images, images)
        others = tiles_of(trainer, pl_module, data, data.train_images, neighbors)
        if (len(own), len(others)) != (len(images), len(neighbors)):
            return None
        labels = torch.as_tensor(data.train_images.labels)[neighbors]

        def named(label: int) -> str:
            return data.classes[label] if data.classes else str(label)

        columns = self.labels, self.predicted, self.thousandths
        nearest = torch.searchsorted(neighbors, self.nearest) + len(images)
        return json.dumps(
            {
                "epoch": self.epoch,
                "total": self.total,
                "wrong": self.wrong,
                "classes": [*map(named, self.classes.tolist())],
                "counts": self.counts.tolist(),
                "errors": [
                    {"label": named(label), "predicted": named(predicted), "share": share / 1000, "nearest": places}
                    for label, predicted, share, places in zip(
                        *(column.tolist() for column in columns), nearest.tolist(), strict=True
                    )
                ],
                "names": names_of(data.val_images, self.indices) + names_of(data.train_images, neighbors),
                "labels": [*map(named, [*self.labels.tolist(), *labels.tolist()])],
                **tiled(torch.cat([own[order.argsort()], others])),
            }
        )


def _classes(pairs: Tensor, confused: Tensor) -> Tensor:
    """The classes in the table, in ascending order.

    Args:
        pairs: ``(M, 2)`` labels and predictions.
        confused: Those that differ.
    """
    every = pairs.unique()
    if len(every) <= _CLASSES:
        return every
    distinct, counts = confused.unique(dim=0, return_counts=True)
    chosen: set[int] = set()
    for pair in distinct[counts.argsort(descending=True, stable=True)].tolist():
        if len(chosen | {*pair}) <= _CLASSES:
            chosen |= {*pair}
    return torch.tensor(sorted(chosen), dtype=torch.long)


def _counts(pairs: Tensor, classes: Tensor) -> Tensor:
    """Numbers ``(c, c)`` of images by label and by prediction."""
    size = len(classes)
    places = torch.searchsorted(classes, pairs[torch.isin(pairs, classes).all(dim=1)])
    return torch.bincount(places @ torch.tensor([size, 1]), minlength=size**2).view(size, size)


def _to_show(confusions: Sequence[Sequence[int]], classes: set[int]) -> list[int]:
    """Places of the errors to show, in ascending order.

    Args:
        confusions: Label and prediction of all errors, the worst first.
        classes: Those in the table.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    ranks = []  # within its pair of classes
    for place, pair in enumerate(map(tuple, confusions)):
        if classes.issuperset(pair):
            ranks.append((seen[pair], place))
            seen[pair] += 1
    shown = {*range(min(_WORST, len(confusions)))}
    for _, place in sorted(ranks):
        if len(shown) < _SHOWN:
            shown.add(place)
    return sorted(shown)
