"""k-nearest-neighbor accuracy of the features while the method trains."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ssl_lightning.callbacks.features import PlainFeatures, in_eval_mode, no_features, no_numbers, plain_features
from ssl_lightning.callbacks.interval import EveryEpochs, Interval, counted_data
from ssl_lightning.callbacks.knn_errors import NEAREST, KNNErrors
from ssl_lightning.callbacks.progress import is_nth_or_last
from ssl_lightning.distributed import gather_uneven, reduced
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation import knn_predict
from ssl_lightning.evaluation.clusters import cluster_measures
from ssl_lightning.evaluation.knn import knn_votes

_WATCHING = 0.01
"""Share of the training that validation and kNN may take with ``auto``."""
_CLUSTERED = 10_000
"""Largest number of validation images to cluster."""


class KNNProbe(L.Callback):
    """Weighted kNN accuracy on images without augmentation, in eval mode, each image once over all processes.

    Logs ``val/knn_top1``; logs nothing if the data has no labels. A method may name ``references`` to compare with;
    their accuracy is measured once, before the first step, and logged along. For ``Distillation`` these are
    ``val/start_knn_top1`` (the student before training) and ``val/teacher_knn_top1``.

    Now and then it clusters the same validation features, at most 10,000, into as many clusters as there are classes,
    and logs ``val/cluster_accuracy``, ``val/nmi`` and ``val/silhouette``, as ``evaluate clusters`` measures them.

    Args:
        k: Number of neighbors that vote.
        temperature: A neighbor votes with exp(cosine similarity / temperature).
        every_n_epochs: Run every this many epochs, and after the last one. ``auto`` runs after the first and the last
            epoch, and in between so often that it takes at most 1 % of the training, validation included: other epochs
            have no validation. It counts images instead of measuring time, and says what it chose.
        max_samples: Largest number of training images to search, evenly spread. None means all. Limits the cost.
        clusters_every_n_epochs: Cluster every this many epochs, if kNN runs then, and after the last one. None never
            does.
    """

    def __init__(
        self,
        k: int = 20,
        temperature: float = 0.07,
        every_n_epochs: EveryEpochs = "auto",
        max_samples: int | None = 50_000,
        clusters_every_n_epochs: int | None = 10,
    ) -> None:
        self.interval = Interval(every_n_epochs, "--knn_probe.every_n_epochs", _WATCHING)
        if k < 1 or (clusters_every_n_epochs is not None and clusters_every_n_epochs < 1):
            raise UserError(
                f"--knn_probe.k={k} and --knn_probe.clusters_every_n_epochs={clusters_every_n_epochs} must be at least "
                "1."
            )
        self.k, self.temperature, self.max_samples = k, temperature, max_samples
        self.clusters_every_n_epochs = clusters_every_n_epochs
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._indices: list[Tensor] = []
        self._wanted = self._clusters = False
        self._counted = False  # whether a batch did not say which images of the data module it holds
        self._validated_every: int | None = None
        self._references: dict[str, float] = {}
        self.bank: tuple[int, PlainFeatures] | None = None
        """The step at which the bank was computed last, and a part of it, to look at."""
        self.errors: KNNErrors | None = None
        """What it got wrong last in a training, for the page of the run."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check whether the data has labels."""
        self.num_classes = getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        if self.num_classes is None:
            rank_zero_info("KNNProbe: the data has no labels, so there is no kNN accuracy.")

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Plan in which epochs to run, and to validate; a run may resume within an epoch."""
        self._validated_every = trainer.check_val_every_n_epoch
        if (data := counted_data(trainer)) is not None:
            bank = 0 if self.num_classes is None else len(data.labelled(self.max_samples))
            self.interval.plan(trainer, bank + len(data.val_images or []), self._validated_every or 1)
        self._plan_validation(trainer)

    def _plan_validation(self, trainer: Any) -> None:
        """With ``auto``, validate only in the epochs in which kNN runs."""
        if self.interval.is_auto and self._validated_every is not None:
            never = trainer.current_epoch + 2
            trainer.check_val_every_n_epoch = self._validated_every if self.interval.is_due(trainer) else never

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure the accuracy of what the method is compared with, before the first step."""
        self._plan_validation(trainer)
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

    def on_train_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Leave the trainer as it was."""
        trainer.check_val_every_n_epoch = self._validated_every

    def _accuracy(self, trainer: L.Trainer, pl_module: Any, reference: Any) -> float | None:
        """The accuracy of another network; None if there is nothing to search."""
        bank, bank_labels, _ = self._bank(trainer, pl_module, reference)
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
        fits = trainer.state.fn == TrainerFn.FITTING
        due = not fits or self.interval.is_due(trainer)
        self._wanted = self.num_classes is not None and not trainer.sanity_checking and due
        every = self.clusters_every_n_epochs
        self._clusters = every is not None and (not fits or is_nth_or_last(trainer, every))
        self._features, self._labels = [no_features(pl_module)], [no_numbers(pl_module)]
        self._indices, self._counted = [no_numbers(pl_module)], False

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
            seen = sum(map(len, self._indices))
            counted = torch.arange(seen, seen + len(outputs), device=outputs.device)
            self._counted = self._counted or not hasattr(batch, "indices")
            self._indices.append(getattr(batch, "indices", counted))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Build the bank, classify, and log the accuracy over all processes."""
        if self._wanted:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bank = self._bank(trainer, pl_module)
        if len(bank.features) == 0:  # a stream has no bank
            return
        images = PlainFeatures(*map(torch.cat, (self._features, self._labels, self._indices)))
        assert self.num_classes is not None
        votes = knn_votes(*bank[:2], images.features, self.num_classes, self.k, self.temperature, NEAREST)
        known, right = images.labels >= 0, votes.predicted == images.labels
        counts = torch.stack([(right & known).sum(), known.sum()])
        correct, total = gather_uneven(counts[None]).sum(0)
        if total > 0:
            pl_module.log("val/knn_top1", correct / total, prog_bar=True)
            for name, accuracy in self._references.items():
                pl_module.log(f"val/{name}_knn_top1", accuracy)
            if self._clusters:
                self._cluster(trainer, pl_module, images)
            if trainer.state.fn == TrainerFn.FITTING and self._are_of_the_data(trainer, pl_module):
                self.errors = KNNErrors.of(votes, images, bank, trainer.current_epoch + 1)
        self._features, self._labels, self._indices = [], [], []

    def _are_of_the_data(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Whether the validation images are the images of the data module, and known by their indices."""
        is_counted = reduced(torch.tensor(self._counted, dtype=torch.long, device=pl_module.device), "max")
        return not is_counted and getattr(getattr(trainer, "datamodule", None), "val_images", None) is not None

    def _cluster(self, trainer: L.Trainer, pl_module: L.LightningModule, images: PlainFeatures) -> None:
        """Cluster on the first process, and log."""
        order = gather_uneven(images.indices).argsort()
        if len(order) > _CLUSTERED:
            order = order[torch.arange(_CLUSTERED, device=order.device) * len(order) // _CLUSTERED]
        features, labels = gather_uneven(images.features)[order], gather_uneven(images.labels)[order]
        assert self.num_classes is not None
        measures = cluster_measures(features, labels, self.num_classes) if trainer.is_global_zero else {}
        for name, value in trainer.strategy.broadcast(measures).items():
            pl_module.log(f"val/{name}", value)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _bank(self, trainer: L.Trainer, pl_module: L.LightningModule, reference: Any = None) -> PlainFeatures:
        """Features of the labeled training images."""
        data: Any = getattr(trainer, "datamodule", None)
        bank = plain_features(trainer, pl_module, data.train_labelled_dataloader(self.max_samples), reference)
        if reference is None:
            self.bank = trainer.global_step, bank.some(_SHOWN)
        return bank


_SHOWN = 2048
"""Number of images of the bank that are kept to look at."""
