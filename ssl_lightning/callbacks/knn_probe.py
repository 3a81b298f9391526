"""k-nearest-neighbor accuracy of the features while the method trains."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ssl_lightning.callbacks.features import PlainFeatures, in_eval_mode, no_features, no_numbers, plain_features
from ssl_lightning.callbacks.progress import planned_epochs
from ssl_lightning.distributed import gather_uneven
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation import knn_predict


class KNNProbe(L.Callback):
    """Weighted kNN accuracy on images without augmentation, in eval mode, each image once over all processes.

    Logs ``val/knn_top1``; logs nothing if the data has no labels. A method may name ``references`` to compare with;
    their accuracy is measured once, before the first step, and logged along. For ``Distillation`` these are
    ``val/start_knn_top1`` (the student before training) and ``val/teacher_knn_top1``.

    Args:
        k: Number of neighbors that vote.
        temperature: A neighbor votes with exp(cosine similarity / temperature).
        every_n_epochs: Run every this many epochs, and after the last one.
        max_samples: Largest number of training images to search, evenly spread. None means all. Limits the cost.
    """

    def __init__(
        self, k: int = 20, temperature: float = 0.07, every_n_epochs: int = 1, max_samples: int | None = 50_000
    ) -> None:
        if k < 1 or every_n_epochs < 1:
            raise UserError(f"--knn_probe.k={k} and --knn_probe.every_n_epochs={every_n_epochs} must be at least 1.")
        self.k, self.temperature = k, temperature
        self.every_n_epochs, self.max_samples = every_n_epochs, max_samples
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._wanted = False
        self._references: dict[str, float] = {}
        self.bank: tuple[int, PlainFeatures] | None = None
        """The step at which the bank was computed last, and a part of it, to look at."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check whether the data has labels."""
        self.num_classes = getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        if self.num_classes is None:
            rank_zero_info("KNNProbe: the data has no labels, so there is no kNN accuracy.")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure the accuracy of what the method is compared with, before the first step."""
        if self.num_classes is None or trainer.global_step > 0 or not trainer.enable_validation:
            return
        self._references = {}
        references: dict[str, Any] = getattr(pl_module, "references", {})
        trainer.strategy.on_validation_start()  # which gathers what is sharded
        with in_eval_mode(pl_module), torch.no_grad():
            for name, reference in references.items():
                if (accuracy := self._accuracy(trainer, pl_module, reference)) is not None:
                    self._references[name] = accuracy
        trainer.strategy.on_validation_end()

    def _accuracy(self, trainer: L.Trainer, pl_module: Any, reference: Any) -> float | None:
        """The accuracy of another network; None if there is nothing to search."""
        bank, bank_labels = self._bank(trainer, pl_module, reference)
        data: Any = getattr(trainer, "datamodule", None)
        images = plain_features(trainer, pl_module, data.val_dataloader(), reference)
        known = images.labels >= 0
        if len(bank) == 0 or not known.any():
            return None
        assert self.num_classes is not None
        features = images.features[known]
        predicted = knn_predict(bank, bank_labels, features, self.num_classes, self.k, self.temperature)
        return float((predicted == images.labels[known]).float().mean())

    def state_dict(self) -> dict[str, Any]:
        """What was measured before the first step."""
        return {"references": self._references} if self._references else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._references = state_dict.get("references", {})

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide whether to run after this epoch."""
        epoch = trainer.current_epoch + 1
        fits = trainer.state.fn == TrainerFn.FITTING
        due = not fits or epoch % self.every_n_epochs == 0 or epoch == planned_epochs(trainer)
        self._wanted = self.num_classes is not None and not trainer.sanity_checking and due
        self._features, self._labels = [no_features(pl_module)], [no_numbers(pl_module)]

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the features of a validation batch."""
        if self._wanted:
            self._features.append(outputs.float())
            self._labels.append(batch[1])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Build the bank, classify, and log the accuracy over all processes."""
        if not self._wanted:
            return
        bank, bank_labels = self._bank(trainer, pl_module)
        if len(bank) == 0:  # a stream has no bank
            return
        features, labels = torch.cat(self._features), torch.cat(self._labels)
        assert self.num_classes is not None
        predicted = knn_predict(bank, bank_labels, features, self.num_classes, self.k, self.temperature)
        counts = torch.stack([((predicted == labels) & (labels >= 0)).sum(), (labels >= 0).sum()])
        correct, total = gather_uneven(counts[None]).sum(0)
        if total > 0:
            pl_module.log("val/knn_top1", correct / total, prog_bar=True)
            for name, accuracy in self._references.items():
                pl_module.log(f"val/{name}_knn_top1", accuracy)
        self._features, self._labels = [], []

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _bank(self, trainer: L.Trainer, pl_module: L.LightningModule, reference: Any = None) -> tuple[Tensor, Tensor]:
        """Features and labels of the training set, the same on every process."""
        data: Any = getattr(trainer, "datamodule", None)
        bank = plain_features(trainer, pl_module, data.train_labelled_dataloader(self.max_samples), reference)
        if reference is None:
            self.bank = trainer.global_step, bank.some(_SHOWN)
        return bank[:2]


_SHOWN = 2048
"""Number of images of the bank that are kept to look at."""
