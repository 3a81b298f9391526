"""What a person sees while it trains: a bar in a terminal, a line per epoch elsewhere, images per second."""

import os
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn


class Throughput(L.Callback):
    """Logs how fast training is, validation not counted, and says so if it waits for images.

    ``train/images_per_second`` over all processes, loading included; ``train/loader_wait``, the share of the time that
    is spent in waiting for batches; ``train/hours_left``, by the time of all epochs so far, validation included; on a
    GPU ``train/memory_gb``, the most it has held.

    Args:
        every_n_steps: Average over that many training steps.
        warn_above: Share of waiting, over the first epoch, above which it says what would help.
    """

    def __init__(self, every_n_steps: int = 10, warn_above: float = 0.3) -> None:
        self.every_n_steps, self.warn_above = every_n_steps, warn_above
        self.rate: float | None = None
        self.hours_left: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks; a run resumed within an epoch has no start of it."""
        self._begin, self._begin_step = time.perf_counter(), trainer.global_step
        self._busy = self._wait = 0.0
        self._told = False
        self._start(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the steps."""
        self._start(trainer)

    def _start(self, trainer: L.Trainer) -> None:
        self._images, self._since, self._waited = 0, time.perf_counter(), _waited(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images of this batch."""
        self._images += len(batch[0][0]) * trainer.world_size
        if (batch_idx + 1) % self.every_n_steps == 0 or trainer.is_last_batch:
            now = time.perf_counter()
            seconds, wait = now - self._since, _waited(trainer) - self._waited
            self._busy, self._wait = self._busy + seconds, self._wait + wait
            self.rate = self._images / seconds
            found = {"train/images_per_second": self.rate, "train/loader_wait": wait / seconds}
            steps, planned = trainer.global_step - self._begin_step, trainer.estimated_stepping_batches
            if steps and planned < float("inf"):
                self.hours_left = (now - self._begin) / steps * (planned - trainer.global_step) / 3600
                found["train/hours_left"] = self.hours_left
            if pl_module.device.type == "cuda":
                found["train/memory_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
            pl_module.log_dict(found, batch_size=1)
            self._start(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say once what would help, if images come too slowly."""
        if not self._told and self._wait > self.warn_above * self._busy:
            loader, cores = trainer.train_dataloader, os.cpu_count() or 1
            workers = getattr(loader, "num_workers", 0)
            more = f"data.num_workers (now {workers}, this machine has {cores} processors)"
            remedy = f"raise {more}" if workers < cores else "store the images smaller, or use fewer or smaller views"
            share = f"{self._wait / self._busy:.0%}"
            rank_zero_warn(f"{share} of the training time goes by in waiting for images: {remedy}.")
        self._told = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the time of validation out."""
        self._start(trainer)


def _waited(trainer: L.Trainer) -> float:
    return getattr(trainer.train_dataloader, "waited", 0.0)


class ProgressBar(RichProgressBar):
    """Lightning's rich progress bar; where the output is no terminal, a line after every epoch instead.

    Args:
        refresh_rate: Batches between updates of the bar.
        leave: Whether to keep the bar of every epoch on the screen.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = True) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Draw no bar where there is no terminal."""
        if not sys.stdout.isatty():
            self.disable()
        super().setup(trainer, pl_module, stage)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Loss, images per second, hours left and the bar's metrics, under short names, without the logger's version.

        They are numbers on the host: what is logged with ``prog_bar=True`` Lightning reads in every step, and
        that waits for the device.
        """
        throughput = next((one for one in trainer.callbacks if isinstance(one, Throughput)), None)  # type: ignore[attr-defined]
        rate, hours = (None, None) if throughput is None else (throughput.rate, throughput.hours_left)
        ours = {"loss": getattr(pl_module, "last_loss", None), "images/s": rate, "hours left": hours}
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        shown = {key: value for key, value in ours.items() if value is not None}
        return {**shown, **{key.split("/")[-1]: value for key, value in metrics.items()}}

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line where there is no terminal."""
        super().on_train_epoch_end(trainer, pl_module)
        if not sys.stdout.isatty():
            metrics = "  ".join(
                f"{name} {float(value):.4g}" for name, value in self.get_metrics(trainer, pl_module).items()
            )
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {metrics}", flush=True)
