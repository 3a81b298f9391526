"""Checkpoints: the last one to resume from, the best one to use."""

import os
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ssl_lightning.runs import BEST_CHECKPOINT, LAST_CHECKPOINT


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` to resume from, written after every epoch.

    Args:
        every_n_epochs: Write every this many epochs. None means 1, or never if ``every_n_train_steps`` is set.
        every_n_train_steps: Write every this many optimizer steps, instead of after epochs.
        keep_epochs: Epochs after which a further checkpoint, ``epoch_<n>.ckpt``, is written and kept.
        dirpath: Folder. None means ``checkpoints`` in the run folder.
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        keep_epochs: list[int] | None = None,
        dirpath: str | None = None,
    ) -> None:
        self.keep_epochs = keep_epochs or []
        super().__init__(
            dirpath=dirpath,
            filename=LAST_CHECKPOINT,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=None if every_n_train_steps else True,
            enable_version_counter=False,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the resumed step as saved. With gradient accumulation, the next batch may not complete a new step."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the checkpoint, and those to keep."""
        super().on_train_epoch_end(trainer, pl_module)
        if (epoch := trainer.current_epoch + 1) in self.keep_epochs:
            trainer.save_checkpoint(os.path.join(str(self.dirpath), f"epoch_{epoch}.ckpt"))

    def save(self, trainer: L.Trainer) -> str:
        """Write the checkpoint now.

        Args:
            trainer: The trainer.

        Returns:
            The path of the checkpoint.
        """
        path = self.format_checkpoint_name({})
        self._save_checkpoint(trainer, path)
        return path


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the best value of a logged metric; saves nothing while the metric is not logged.

    Args:
        monitor: Name of the metric.
        mode: Whether the largest (``max``) or the smallest (``min``) value is best.
        save_top_k: Number of checkpoints to keep.
        dirpath: Folder. None means ``checkpoints`` in the run folder.
        filename: Name of the file, without its extension. May contain names of metrics in braces.
        save_weights_only: Whether to save only the weights, so that training cannot resume from the file.
    """

    def __init__(
        self,
        monitor: str = "val/knn_top1",
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
        dirpath: str | None = None,
        filename: str = BEST_CHECKPOINT,
        save_weights_only: bool = False,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            enable_version_counter=save_top_k > 1,
        )

    def _save_topk_checkpoint(self, trainer: Any, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor in monitor_candidates:  # data without labels has no kNN accuracy: not an error
            super()._save_topk_checkpoint(trainer, monitor_candidates)
