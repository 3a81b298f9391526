"""A linear classifier that learns next to the method, to monitor its features."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from ssl_lightning.distributed import gather


class LinearProbe(L.Callback):
    """Linear classifier that learns from the features of the training step, and gives no gradient to the method.

    BatchNorm without affine parameters normalizes the features, as in MAE's protocol, so that the same learning rate
    works for features of any scale. Logs ``val/linear_top1`` and ``val/linear_top5``; logs nothing if the data has no
    labels. For a method that trains on parts of images, the
    backbone runs again on whole images at every few steps.

    Args:
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
    """

    def __init__(self, lr: float = 3e-3, weight_decay: float = 0.0) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.head: nn.Sequential | None = None
        self._trained = False

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Build the classifier, if the data has labels."""
        num_classes = getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        if num_classes is None:
            rank_zero_info("LinearProbe: the data has no labels, so there is no linear accuracy.")
            return
        if self.head is not None and self.head[1].out_features == num_classes:
            return
        device = trainer.strategy.root_device
        linear = nn.utils.skip_init(nn.Linear, int(pl_module.embed_dim), num_classes)
        # not random, so that the method's random numbers do not change
        nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.BatchNorm1d(linear.in_features, affine=False), linear).to(device)
        self.optimizer = torch.optim.AdamW(linear.parameters(), self.lr, weight_decay=self.weight_decay, fused=True)
        self.top1 = MulticlassAccuracy(num_classes, average="micro", ignore_index=-1).to(device)
        self.top5 = MulticlassAccuracy(num_classes, average="micro", ignore_index=-1, top_k=min(5, num_classes))
        self.top5.to(device)
        self.labelled = SumMetric().to(device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a step on the features of this batch, gathered so that every process takes the same step."""
        features = outputs.get("features") if isinstance(outputs, dict) else None
        if self.head is None or features is None:
            return
        labels: Tensor = batch[1]
        # several views: all features of the first view, then all of the second, ...
        labels = labels.repeat(len(features) // len(labels))
        features, labels = gather(features.float()), gather(labels)
        with torch.autocast(features.device.type, enabled=False), torch.enable_grad():
            losses = F.cross_entropy(self.head.train()(features), labels, ignore_index=-1, reduction="sum")
            loss = losses / (labels >= 0).sum().clamp(min=1)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self._trained = True

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Classify the features of a validation batch."""
        if self.head is None or not self._trained:
            return
        labels = batch[1]
        if len(labels) == 0:  # none of the last images could be read
            return
        with torch.autocast(outputs.device.type, enabled=False):
            logits = self.head.eval()(outputs.float())
        self.labelled.update((labels >= 0).sum())
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the accuracies over all processes."""
        if self.head is None or not self._trained:
            return
        if self.labelled.compute() > 0:
            pl_module.log("val/linear_top1", self.top1.compute(), prog_bar=True)
            pl_module.log("val/linear_top5", self.top5.compute())
        with torch.inference_mode(False):  # otherwise later training could not update them
            for metric in (self.labelled, self.top1, self.top5):
                metric.reset()

    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def state_dict(self) -> dict[str, Any]:
        """Classifier and optimizer."""
        if self.head is None or not self._trained:
            return {}
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore classifier and optimizer."""
        if self.head is not None and state_dict:
            self.head.load_state_dict(state_dict["head"])
            self.optimizer.load_state_dict(state_dict["optimizer"])
            self._trained = True
