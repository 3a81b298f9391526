"""What every data module knows about its process: the seed, the rank, and the position in the training."""

import os
from typing import Any

import lightning as L
import torch

from ssl_lightning.data.reduce import reduce_command
from ssl_lightning.errors import UserError
from ssl_lightning.machine import processors


class DataModule(L.LightningDataModule):
    """Base of every data module: gives loaders the seed, the process, and the position in the training.

    Args:
        num_workers: Processes that load images. None means one per CPU core, at most 8.
        seed: Seed of all random decisions about the data. None means the seed of ``seed_everything``.
    """

    def __init__(self, num_workers: int | None = None, seed: int | None = None) -> None:
        super().__init__()
        if num_workers is not None and num_workers < 0:
            raise UserError(f"--data.num_workers {num_workers}: give 0 or more.")
        self.method: Any = None
        """The method to load images for, if there is no trainer that knows it."""
        self.num_workers, self.seed = num_workers, seed

    @property
    def _loading_processes(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        return min(8, processors())

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _position(self) -> tuple[int, int] | None:
        """During training: the epoch and how many of its batches are done, also after a resume."""
        trainer: Any = self.trainer  # its class does not declare overfit_batches
        if trainer is None or not trainer.training:
            return None
        epoch = 0 if trainer.overfit_batches else trainer.current_epoch  # overfitting repeats the same batches
        return epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def reduce_command(self) -> str | None:
        """The command that reduces the training images, if they are much larger than their views; else None."""
        images, specs = getattr(self, "train_images", None), getattr(self, "view_specs", ())
        if images is None or not specs:
            return None
        return reduce_command(images, max(spec.size for spec in specs), str(getattr(self, "root", "DIR")))

    @property
    def _module(self) -> Any:
        return getattr(self.trainer, "lightning_module", None) or self.method

    @property
    def _dtype(self) -> torch.dtype:
        """Type of the method's weights: float32 unless ``--trainer.precision`` is 64-true or the like."""
        dtype = getattr(self._module, "dtype", torch.float32)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32
