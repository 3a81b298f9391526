"""What linear classification and fine-tuning on images share."""

import copy
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.features import check_size, labels_of
from ssl_lightning.evaluation.lowshot import choose
from ssl_lightning.optim import Optim


class SupervisedModule(L.LightningModule):
    """Trains on the first view and the label of an image, and logs ``val/top1`` and ``val/top5``.

    A subclass writes ``build``, ``forward`` (logits ``(H, B, C)`` of H classifiers; the best is reported),
    ``training_loss`` and ``optimizer``.
    """

    views: Any
    """Augmentation: the name of a preset. The data module reads it."""

    image_transform: dict[str, Any]
    """How images are prepared. The data module reads it."""

    optim: Optim

    metrics: Any
    """``(H,)`` accuracies of the classifiers: a ModuleList, whose elements have no type of their own."""

    def build(self, num_classes: int) -> int:
        """Build what depends on the number of classes, and say how many classifiers there are."""
        raise NotImplementedError

    def training_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            images: ``(B, 3, S, S)``.
            labels: ``(B,)`` classes; -1 is unknown.
        """
        raise NotImplementedError

    def optimizer(self, global_batch: int) -> torch.optim.Optimizer:
        """Build the optimizer.

        Args:
            global_batch: Images per step over all processes and accumulated batches.
        """
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Build the classifiers and the metrics for the classes of the data."""
        if hasattr(self, "metrics"):
            return
        num_classes = getattr(self._data, "num_classes", None)
        if num_classes is None:
            raise UserError(f"{type(self).__name__} needs labels, and the data has none.")
        self.metrics = nn.ModuleList(_accuracies(num_classes) for _ in range(self.build(num_classes)))

    @property
    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def on_fit_start(self) -> None:
        """See whether the backbone can take the images.

        Raises:
            UserError: The patches of a ViT do not divide them.
        """
        check_size(self, self._data.image_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch ``(views, labels, ...)``."""
        loss = self.training_loss(batch[0][0], batch[1])
        self.log("train/loss", loss.detach(), batch_size=len(batch[1]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Classify plain images ``(images, labels, ...)``."""
        if len(batch[1]) == 0:  # the last images cannot be read
            return
        for metric, logits in zip(self.metrics, self(batch[0]), strict=True):
            metric.update(logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies over all processes, of the classifier with the best top-1."""
        found = [metric.compute() for metric in self.metrics]
        with torch.inference_mode(False):  # else a later training could not go on with them
            for metric in self.metrics:
                metric.reset()
        best = max(found, key=lambda one: one["top1"])
        self.log("val/top1", best["top1"], prog_bar=True)
        self.log("val/top5", best["top5"])
        self.accuracies = [float(one["top1"]) for one in found]

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        """The optimizer, its schedule stepped per batch."""
        return self.optim.configure(self, self.optimizer)


_Protocol = TypeVar("_Protocol")


def named_protocol(protocols: dict[str, _Protocol], name: str) -> _Protocol:
    """A protocol by its name.

    Args:
        protocols: The protocols there are.
        name: Key of one.

    Raises:
        UserError: There is none of that name.
    """
    if name not in protocols:
        raise UserError(f"unknown protocol {name!r}; choose from {', '.join(protocols)}.")
    return protocols[name]


def labelled_share(data: Any, fraction: float, seed: int) -> Any:
    """A data module that trains on labelled images alone, once a trainer has set it up.

    Args:
        data: An SSLDataModule; it stays as it is.
        fraction: Share of each class.
        seed: Seed of the choice.
    """
    data = copy.copy(data)
    set_up, done = data.setup, False

    def setup(stage: str | None = None) -> None:
        nonlocal done
        set_up(stage)
        if done:
            return
        if data.train_images is None or data.train_images.labels is None:
            raise UserError("training needs labelled images with random access; give data with labels, no stream.")
        labels = data.train_images.labels
        chosen = choose(labels, fraction, seed) if fraction < 1 else np.flatnonzero(labels >= 0)
        data.train_images, done = data.train_images.subset(chosen), True
        labels_of(data)

    data.setup = setup
    return data


def _accuracies(num_classes: int) -> MetricCollection:
    top1 = MulticlassAccuracy(num_classes, average="micro", ignore_index=-1)
    top5 = MulticlassAccuracy(num_classes, average="micro", ignore_index=-1, top_k=min(5, num_classes))
    return MetricCollection({"top1": top1, "top5": top5})
