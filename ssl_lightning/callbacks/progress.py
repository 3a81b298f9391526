"""What a person sees while it trains: a bar in a terminal, a line per epoch elsewhere, images per second."""

import itertools
import os
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor


class Throughput(L.Callback):
    """Logs how fast training is, validation not counted, where its time goes, and says so if it waits for images.

    ``train/images_per_second`` over all processes, loading included; ``train/loader_wait``, the share of the time that
    is spent in waiting for batches; ``train/hours_left``, by the time of all epochs so far, validation included; on a
    GPU ``train/memory_gb``, the most it has held.

    ``time/loader``, ``time/augment`` (with the transfer), ``time/forward``, ``time/backward`` and ``time/optimizer``
    (with the teacher) are shares of the time of this process; what they leave is that of other callbacks and logging.
    On a GPU they are shares of the GPU's time, those of the steps before, as reading the newest would make it wait:
    ``time/loader`` is then how long it had nothing to do because of the loader.

    Args:
        every_n_steps: Average over that many optimizer steps.
        warn_above: Share of waiting, over the first epoch, above which it says what would help.
    """

    def __init__(self, every_n_steps: int = 10, warn_above: float = 0.3) -> None:
        self.every_n_steps, self.warn_above = every_n_steps, warn_above
        self.rate: float | None = None
        self.hours_left: float | None = None
        self._split = _TimeSplit()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks; a run resumed within an epoch has no start of it."""
        self._begin, self._begin_step = time.perf_counter(), trainer.global_step
        self._step = trainer.global_step
        self._busy = self._wait = 0.0
        self._told = False
        self._split = _TimeSplit(pl_module.device)
        self._start(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the steps."""
        self._start(trainer)

    def _start(self, trainer: L.Trainer) -> None:
        loader: Any = trainer.train_dataloader
        self._watched = hasattr(loader, "mark")  # what another loader does ends where its step starts
        if self._watched:
            loader.mark = self._split.mark
        self._images, self._since, self._waited = 0, time.perf_counter(), _waited(trainer)
        self._split.begin()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is augmented."""
        self._split.mark("augment" if self._watched else "loader")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """The loss is there."""
        self._split.mark("forward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The gradients are there."""
        self._split.mark("backward")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images of this batch."""
        self._split.mark("optimizer")
        self._images += len(batch[0][0]) * trainer.world_size
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if (stepped and self._step % self.every_n_steps == 0) or trainer.is_last_batch:  # as loggers count, over epochs
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
            found |= {f"time/{phase}": share for phase, share in self._split.end().items()}
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


class _TimeSplit:
    """How the time of some steps is shared among their phases.

    Args:
        device: Where the steps run: the moments are those of its queue if it is a GPU, else those of the host.
    """

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self._cuda = device.type == "cuda"
        self._moments: list[tuple[str, Any]] = []
        self._ended: list[list[tuple[str, Any]]] = []

    def begin(self) -> None:
        """Forget the steps that did not end, and begin with the next."""
        self._moments = []
        self.mark("")

    def mark(self, phase: str) -> None:
        """Note that a phase ends, and the next begins.

        Args:
            phase: Its name; ``other`` is for what does not count.
        """
        moment: Any = torch.cuda.Event(enable_timing=True) if self._cuda else time.perf_counter()
        if self._cuda:
            moment.record()
        self._moments.append((phase, moment))

    def end(self) -> dict[str, float]:
        """Shares of the newest steps whose moments are over, or nothing; never waits for a GPU."""
        self._ended.append(self._moments)
        shares: dict[str, float] = {}
        while self._ended and (not self._cuda or self._ended[0][-1][1].query()):
            shares = self._shares(self._ended.pop(0))
        return shares

    def _shares(self, moments: list[tuple[str, Any]]) -> dict[str, float]:
        spent: dict[str, float] = {}
        for (_, start), (phase, end) in itertools.pairwise(moments):
            spent[phase] = spent.get(phase, 0.0) + (start.elapsed_time(end) if self._cuda else end - start)
        total = sum(spent.values())
        spent.pop("other", None)
        return {phase: one / total for phase, one in spent.items()}


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
        callbacks: list[L.Callback] = getattr(trainer, "callbacks", [])
        throughput = next((callback for callback in callbacks if isinstance(callback, Throughput)), None)
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
