"""Segmentation by nearest patches while the method trains."""

from typing import Any

import lightning as L
import torch

from ssl_lightning.callbacks.features import in_eval_mode
from ssl_lightning.callbacks.interval import EveryEpochs, Interval
from ssl_lightning.evaluation.patch_features import PatchFeatures
from ssl_lightning.evaluation.patch_segmenter import PatchProtocol, segmenter_of

_WATCHING = 0.005
"""Share of the training that ``auto`` allows."""


class SegmentationProbe(L.Callback):
    """Segments images with masks by the nearest training patches, as ``evaluate segmentation_knn`` does.

    Logs ``val/segmentation_miou`` and ``val/segmentation_accuracy``. The patches come from the backbone that
    the paper evaluates; the images with masks are not trained on.

    Args:
        data: Images with masks, e.g. VOCSegmentationData. On the command line, None turns the callback off.
        every_n_epochs: Run every this many epochs, and after the last one. ``auto`` runs after the first and the last
            epoch, and in between so often that it takes at most 0.5 % of the training: it counts images, as
            ``KNNProbe`` does.
        k: Number of nearest patches.
        temperature: Divides the cosine similarities.
        memory_size: Largest number of training patches, the same of each image, rare classes first. None takes all.
    """

    def __init__(
        self,
        data: L.LightningDataModule | None = None,
        every_n_epochs: EveryEpochs = 10,
        k: int = 30,
        temperature: float = 0.02,
        memory_size: int | None = 50_000,
    ) -> None:
        self.data: Any = data
        self.interval = Interval(every_n_epochs, "--segmentation_probe.every_n_epochs", _WATCHING)
        self.protocol = PatchProtocol("hummingbird", k, temperature=temperature, memory_size=memory_size)
        self._measured_in: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plan in which epochs to run."""
        if self.data is not None and self.interval.is_auto:
            self.interval.plan(trainer, sum(map(len, self.data.splits)))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run before checkpoints are chosen."""
        if trainer.training and self._is_due(trainer):
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run now if there was no validation."""
        if not self._is_due(trainer):
            return
        trainer.strategy.on_validation_start()  # which gathers what is sharded
        with in_eval_mode(pl_module):
            self._measure(trainer, pl_module)
        trainer.strategy.on_validation_end()

    def _is_due(self, trainer: L.Trainer) -> bool:
        return self.data is not None and self._measured_in != trainer.current_epoch and self.interval.is_due(trainer)

    def _measure(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._measured_in = trainer.current_epoch
        self.data.trainer = trainer
        images: Any = getattr(trainer, "datamodule", None)
        name = str(pl_module.hparams.get("backbone"))
        features = PatchFeatures(pl_module.evaluated_backbone, name, images.image_transform)
        segmenter = segmenter_of(self.protocol, self.data)
        loaders = zip(self.data.predict_dataloader(), (segmenter.remember, segmenter.score), strict=True)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            for loader, take in loaders:
                for batch in loader:
                    take(*features(trainer.strategy.batch_to_device(batch, dataloader_idx=0)))
        measures = segmenter.measures()
        pl_module.log("val/segmentation_miou", measures["miou"], prog_bar=True)
        pl_module.log("val/segmentation_accuracy", measures["pixel_accuracy"])
