"""Shared by linear classification and fine-tuning on images."""

import copy
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.features import check_size
from ssl_lightning.evaluation.lowshot import choose
from ssl_lightning.evaluation.sets import shared_classes
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
    """A ModuleList with the accuracies of each of the H classifiers."""

    def build(self, num_classes: int) -> int:
        """Build the parts that depend on the number of classes, and return the number of classifiers."""
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
            raise UserError(f"{type(self).__name__} needs labels, but the data has none; give data with labels.")
        self.metrics = nn.ModuleList(_accuracies(num_classes) for _ in range(self.build(num_classes)))

    @property
    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def on_fit_start(self) -> None:
        """Check that the backbone can take images of this size.

        Raises:
            UserError: The patches of a ViT do not divide the images.
        """
        check_size(self, self._data.image_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch ``(views, labels, ...)``."""
        loss = self.training_loss(batch[0][0], batch[1])
        self.log("train/loss", loss.detach(), batch_size=len(batch[1]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Classify plain images ``(images, labels, ...)``."""
        if len(batch[1]) == 0:  # none of the last images could be read
            return
        for metric, logits in zip(self.metrics, self(batch[0]), strict=True):
            metric.update(logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies over all processes, of the classifier with the best top-1."""
        results = [metric.compute() for metric in self.metrics]
        with torch.inference_mode(False):  # otherwise later training could not update them
            for metric in self.metrics:
                metric.reset()
        best = max(results, key=lambda result: result["top1"])
        self.log("val/top1", best["top1"], prog_bar=True)
        self.log("val/top5", best["top5"])
        self.accuracies = [float(result["top1"]) for result in results]

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        """The optimizer, with a schedule that advances after every batch."""
        return self.optim.configure(self, self.optimizer)


_Protocol = TypeVar("_Protocol")


def named_protocol(protocols: dict[str, _Protocol], name: str) -> _Protocol:
    """A protocol by its name.

    Args:
        protocols: The available protocols, by name.
        name: Name of the protocol.

    Raises:
        UserError: There is no protocol of that name.
    """
    if name not in protocols:
        raise UserError(f"unknown protocol {name!r}; choose from {', '.join(protocols)}.")
    return protocols[name]


def labelled_share(data: Any, fraction: float, seed: int) -> Any:
    """A copy of a data module that trains only on labeled images, or on a fraction of them, once it is set up.

    Args:
        data: An SSLDataModule; it is not changed.
        fraction: Fraction of each class.
        seed: Seed of the choice of images.
    """
    data = copy.copy(data)
    set_up, done = data.setup, False

    def setup(stage: str | None = None) -> None:
        nonlocal done
        set_up(stage)
        if done:
            return
        if data.train_images is None or data.train_images.labels is None:
            raise UserError("training needs labeled images with random access; give data with labels, and no stream.")
        if data.val_images is None or data.val_images.labels is None:
            raise UserError("there are no labeled test images.")
        labels, test_labels = (torch.from_numpy(images.labels) for images in (data.train_images, data.val_images))
        numbers = shared_classes(labels, test_labels, data.classes)
        shared = numbers[labels].numpy()
        chosen = choose(shared, fraction, seed) if fraction < 1 else np.flatnonzero(shared >= 0)
        data.train_images = data.train_images.with_labels(shared).subset(chosen)
        data.val_images, done = data.val_images.with_labels(numbers[test_labels].numpy()), True
        kept = (numbers[:-1] >= 0).nonzero().flatten().tolist()
        data.classes = [data.classes[label] if data.classes else str(label) for label in kept]

    data.setup = setup
    return data


def _accuracies(num_classes: int) -> MetricCollection:
    top1 = MulticlassAccuracy(num_classes, average="micro", ignore_index=-1)
    top5 = MulticlassAccuracy(num_classes, average="micro", ignore_index=-1, top_k=min(5, num_classes))
    return MetricCollection({"top1": top1, "top5": top5})
