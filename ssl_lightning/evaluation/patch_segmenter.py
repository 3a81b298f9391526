"""Segmentation from the features of patches: a memory of training patches labels the pixels of other images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.distributed import reduced
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.patch_features import PatchMemory, check_splits, linear_layer, patches_of, standard
from ssl_lightning.evaluation.patches import hummingbird, iou_of_counts, knn_segmentation

_IGNORED = 255
_CLASSES = 256  # of masks of 8 bits


@dataclass(frozen=True)
class PatchProtocol:
    """How patches are labeled.

    Args:
        method: ``hummingbird``: the nearest patches vote with the shares of their classes, and the votes are
            interpolated to the mask; ``capi``: the nearest patches vote for each pixel of a patch; ``linear``: a linear
            classifier, whose outputs are interpolated to the mask.
        k: Number of nearest patches. None is 30 for ``hummingbird``; ``capi`` chooses among 1, 3, 10 and 30.
        distance: Only for ``capi``: ``cosine`` or ``l2``. None chooses.
        temperature: Only for ``hummingbird``: divides the cosine similarities.
        memory_size: Largest number of training patches, of rare classes first, the same from each image. None takes
            all.
        ignored: Labels that do not count.
        seed: For the choice of patches, and of the images on which ``capi`` chooses.
    """

    method: Literal["hummingbird", "capi", "linear"] = "hummingbird"
    k: int | None = None
    distance: Literal["cosine", "l2"] | None = None
    temperature: float = 0.02
    memory_size: int | None = 200_000
    ignored: Sequence[int] = (_IGNORED,)
    seed: int = 0

    def __post_init__(self) -> None:
        if any(not 0 <= label < _CLASSES for label in self.ignored):
            raise UserError(f"--ignored {[*self.ignored]}: labels lie between 0 and {_CLASSES - 1}.")
        if (self.k is not None and self.k < 1) or (self.memory_size is not None and self.memory_size < 1):
            raise UserError(f"--k {self.k} and --memory_size {self.memory_size} must be at least 1.")
        if self.temperature <= 0:
            raise UserError(f"--temperature {self.temperature} must be above 0.")


class PatchSegmenter:
    """Labels the pixels of images by a memory of training patches, on any number of processes.

    Call ``remember`` with all training images, then ``score`` with all validation images, then ``measures``.

    Args:
        protocol: How patches are labeled.
        num_classes: Number of classes.
        num_images: Number of training images over all processes.
    """

    def __init__(self, protocol: PatchProtocol, num_classes: int, num_images: int) -> None:
        self.protocol, self.num_classes = protocol, num_classes
        self.chosen: dict[str, Any] = {}
        """The k and the distance that ``capi`` has chosen."""
        self.memory = PatchMemory(protocol.memory_size, num_images)
        self._predict: Callable[[Tensor], Tensor] | None = None
        self._counts: Tensor | None = None

    def remember(self, maps: Tensor, masks: Sequence[Tensor], side: int) -> None:
        """Add the patches of the next training images of this process, or the rarest of them, to the memory.

        Args:
            maps: ``(B, D, rows, columns)`` features.
            masks: The mask ``(H, W)`` of each image.
            side: Side of a patch in pixels.
        """
        rows, columns = maps.shape[2:]
        kept = self.memory.room(rows * columns)
        for features, mask in zip(patches_of(maps), masks, strict=True):
            labels = _pixels(mask, rows, columns, side)  # (rows * columns, P)
            if kept < len(labels):
                rare = _rare(labels, kept, self.protocol.seed, self.memory.index)
                features, labels = features[rare], labels[rare]
            self.memory.add(features, labels)

    def _fit(self) -> Callable[[Tensor], Tensor]:
        """Complete the memory with the patches of all processes, and learn from it."""
        features, labels, images = self.memory.complete()
        protocol = self.protocol
        if protocol.method == "hummingbird":
            background = [label for label in protocol.ignored if label >= self.num_classes]  # as in the release
            labels = torch.where(torch.isin(labels, labels.new_tensor(background)), 0, labels)
            shares = self._shares(labels)
            return lambda queries: hummingbird(features, shares, queries, protocol.k or 30, protocol.temperature)
        if protocol.method == "linear":
            shares = self._shares(labels)
            shares[:, [label for label in protocol.ignored if label < self.num_classes]] = 0
            return linear_layer(features, shares)
        mean, scale = standard(features)
        bank = (features - mean) / scale
        k, distance = self._best_setting(bank, labels, images)
        self.chosen = {"k": k, "distance": distance}
        return lambda queries: knn_segmentation(
            bank, labels, (queries - mean) / scale, k, distance, [*protocol.ignored]
        )

    def score(self, maps: Tensor, masks: Sequence[Tensor], side: int) -> None:
        """Label the pixels of validation images, and count how many are right.

        Args:
            maps: ``(B, D, rows, columns)`` features.
            masks: The mask ``(H, W)`` of each image.
            side: Side of a patch in pixels.
        """
        if self._predict is None:
            self._predict = self._fit()
        rows, columns = maps.shape[2:]
        answers = self._predict(patches_of(maps).flatten(0, 1)).unflatten(0, (len(maps), -1))  # (B, N, C or P)
        for answer, mask in zip(answers, masks, strict=True):
            if self.protocol.method == "capi":
                self._count(_pixels(mask, rows, columns, side), answer)
            else:
                grid = answer.mT.unflatten(1, (rows, columns))[None]  # (1, C, rows, columns)
                self._count(mask, F.interpolate(grid, mask.shape, mode="bilinear")[0].argmax(0))

    def _count(self, truth: Tensor, predicted: Tensor) -> None:
        counts = _counted(truth, predicted)
        self._counts = counts if self._counts is None else self._counts + counts

    def measures(self) -> dict[str, float]:
        """``miou`` and ``pixel_accuracy`` over all processes.

        Raises:
            UserError: All pixels are ignored.
        """
        assert self._counts is not None
        counts = self._without_ignored(reduced(self._counts))
        if not counts.any():
            raise UserError("no pixel of the validation masks counts: all have a label that is ignored.")
        return {"miou": iou_of_counts(counts), "pixel_accuracy": float(counts.trace() / counts.sum())}

    def _without_ignored(self, counts: Tensor) -> Tensor:
        counts = counts.cpu().clone()
        counts[[*self.protocol.ignored]] = 0
        return counts

    def _shares(self, labels: Tensor) -> Tensor:
        """Share of each class in each patch ``(N, C)``."""
        return torch.stack([(labels == label).float().mean(1) for label in range(self.num_classes)], dim=1)

    def _best_setting(self, bank: Tensor, labels: Tensor, images: Tensor) -> tuple[int, Any]:
        """The k and the distance that label the patches of a tenth of the training images best."""
        ks = [self.protocol.k] if self.protocol.k else [1, 3, 10, 30]
        distances = [self.protocol.distance] if self.protocol.distance else ["cosine", "l2"]
        settings = [(k, distance) for distance in distances for k in ks]
        if len(settings) == 1 or self.memory.num_images < 2:
            return settings[0]
        random = np.random.Generator(np.random.Philox(key=self.protocol.seed))
        left_out = random.permutation(self.memory.num_images)[: max(1, self.memory.num_images // 10)]
        held_out = torch.isin(images, torch.from_numpy(left_out).to(images))
        train, test, ignored = ~held_out, held_out, [*self.protocol.ignored]

        def miou(setting: tuple[int, Any]) -> float:
            predicted = knn_segmentation(bank[train], labels[train], bank[test], *setting, ignored)
            counts = self._without_ignored(_counted(labels[test], predicted))
            return iou_of_counts(counts) if counts.any() else 0.0

        return max(settings, key=miou)


def segmenter_of(protocol: PatchProtocol, data: Any) -> PatchSegmenter:
    """A segmenter for images with masks, with an empty memory.

    Args:
        protocol: How patches are labeled.
        data: A DenseData.

    Raises:
        UserError: Validation images are training images, too.
    """
    check_splits(data)
    return PatchSegmenter(protocol, data.num_classes, len(data.splits[0]))


def _pixels(mask: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Labels ``(rows * columns, P)`` of the pixels of each patch, of a mask that is resized as its image was."""
    resized = F.interpolate(mask[None, None].float(), (rows * side, columns * side), mode="nearest-exact")
    return F.unfold(resized, side, stride=side)[0].mT.to(torch.uint8)


def _rare(labels: Tensor, count: int, seed: int, image: int) -> Tensor:
    """The patches with the smallest random number times how many patches of the image have their classes."""
    holds = torch.stack([(labels == label).any(1) for label in labels.unique()], dim=1)  # (N, classes)
    frequent = (holds * holds.sum(0)).sum(1)
    numbers = np.random.Generator(np.random.Philox(key=[seed, image])).random(len(labels), dtype=np.float32)
    return (torch.from_numpy(numbers).to(labels.device) * frequent).argsort(stable=True)[:count].sort().values


def _counted(truth: Tensor, predicted: Tensor) -> Tensor:
    """Numbers of pixels by their label and by their prediction ``(256, 256)``."""
    pairs = truth.long() * _CLASSES + predicted.long()
    return torch.bincount(pairs.flatten(), minlength=_CLASSES**2).view(_CLASSES, _CLASSES)
