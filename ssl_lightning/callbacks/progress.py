"""Progress of the training: a bar in a terminal, a line per epoch, and images per second."""

import itertools
import math
import os
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text
from torch import Tensor

from ssl_lightning.messages import duration, number
from ssl_lightning.optim import steps_per_epoch


class Throughput(L.Callback):
    """Logs the speed of training and where its time goes, and warns if training waits for images.

    Logs ``train/images_per_second``, over all processes and including loading; ``train/loader_wait``, the fraction of
    the time spent waiting for batches; ``train/hours_left``, estimated from all epochs so far, including validation;
    and on a GPU ``train/memory_gb``, the largest amount of memory used so far. The first two do not count validation.

    ``time/loader``, ``time/augment`` (with the transfer to the device), ``time/forward``, ``time/backward`` and
    ``time/optimizer`` (with the update of the teacher) are fractions of the time of this process. Other callbacks and
    logging take the rest. On a GPU they are fractions of the GPU's time, and ``time/loader`` is how long the GPU was
    idle because of the loader. They may then belong to earlier steps, so that the GPU need not wait for the newest.

    Args:
        every_n_steps: Average over this many optimizer steps.
        warn_above: Warn if the first epoch spends more than this fraction of its time waiting for batches.
    """

    def __init__(self, every_n_steps: int = 10, warn_above: float = 0.3) -> None:
        self.every_n_steps, self.warn_above = every_n_steps, warn_above
        self.rate: float | None = None
        self.hours_left: float | None = None
        self._split = _TimeSplit()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks, because a run that resumes within an epoch does not call ``on_train_epoch_start``."""
        self._begin, self._begin_step = time.perf_counter(), trainer.global_step
        self._step, self._planned = trainer.global_step, trainer.estimated_stepping_batches
        self._busy = self._wait = 0.0
        self._warned = False
        self._split = _TimeSplit(pl_module.device)
        self._start(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock for the next steps."""
        self._start(trainer)

    def _start(self, trainer: L.Trainer) -> None:
        loader: Any = trainer.train_dataloader
        self._watched = hasattr(loader, "mark")  # other loaders do not report when they start and end
        if self._watched:
            loader.mark = self._split.mark
        self._images, self._since, self._waited = 0, time.perf_counter(), _waited(trainer)
        self._split.begin()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Augmentation has ended."""
        self._split.mark("augment" if self._watched else "loader")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """The forward pass has ended."""
        self._split.mark("forward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The backward pass has ended."""
        self._split.mark("backward")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images of this batch."""
        self._split.mark("optimizer")
        self._images += len(batch[0][0]) * trainer.world_size
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        planned = self._planned
        # like loggers, count steps across epochs
        due = stepped and (self._step % self.every_n_steps == 0 or self._step >= planned)
        if due or trainer.is_last_batch:
            now = time.perf_counter()
            seconds, wait = now - self._since, _waited(trainer) - self._waited
            self._busy, self._wait = self._busy + seconds, self._wait + wait
            self.rate = self._images / seconds
            metrics = {"train/images_per_second": self.rate, "train/loader_wait": wait / seconds}
            steps = trainer.global_step - self._begin_step
            if steps and planned < float("inf"):
                self.hours_left = (now - self._begin) / steps * (planned - trainer.global_step) / 3600
                metrics["train/hours_left"] = self.hours_left
            if pl_module.device.type == "cuda":
                metrics["train/memory_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
            metrics |= {f"time/{phase}": share for phase, share in self._split.end().items()}
            pl_module.log_dict(metrics, batch_size=1)
            self._start(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn after the first epoch if images arrive too slowly, and suggest a remedy."""
        if not self._warned and self._wait > self.warn_above * self._busy:
            loader, cores = trainer.train_dataloader, os.cpu_count() or 1
            workers = getattr(loader, "num_workers", 0)
            more = f"--data.num_workers (now {workers}, this machine has {cores} processors)"
            remedy = f"raise {more}" if workers < cores else "store smaller images, or use fewer or smaller views"
            data: Any = getattr(trainer, "datamodule", None)
            if hasattr(data, "reduce_command") and (command := data.reduce_command()):
                remedy = (
                    f"the images are much larger than their views, so reduce them once with '{command}', or {remedy}"
                )
            share = f"{self._wait / self._busy:.0%}"
            rank_zero_warn(f"{share} of the training time is spent waiting for images; {remedy}.")
        self._warned = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out the time of validation."""
        self._start(trainer)


def _waited(trainer: L.Trainer) -> float:
    return getattr(trainer.train_dataloader, "waited", 0.0)


class _TimeSplit:
    """Divides the time of some steps among their phases.

    Args:
        device: Where the steps run. On a GPU, events in its queue measure the time; otherwise the host's clock does.
    """

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self._cuda = device.type == "cuda"
        self._moments: list[tuple[str, Any]] = []
        self._ended: list[list[tuple[str, Any]]] = []

    def begin(self) -> None:
        """Discard unfinished steps, and start measuring."""
        self._moments = []
        self.mark("")

    def mark(self, phase: str) -> None:
        """Record that a phase ends and the next begins.

        Args:
            phase: Name of the phase that ends. ``other`` counts toward the total, but is not reported.
        """
        moment: Any = torch.cuda.Event(enable_timing=True) if self._cuda else time.perf_counter()
        if self._cuda:
            moment.record()
        self._moments.append((phase, moment))

    def end(self) -> dict[str, float]:
        """Fractions for the newest steps that have finished; empty if none have. Never waits for a GPU."""
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
        return {phase: seconds / total for phase, seconds in spent.items()}


class ProgressBar(RichProgressBar):
    """A bar in a terminal, and one line for every epoch that stays; in files and notebooks only the lines.

    A line holds the loss, the metrics logged with ``prog_bar=True``, the time left and images per second, as far as
    they fit into the terminal, or into 80 columns elsewhere.

    Args:
        refresh_rate: Updates of the bar per second.
        leave: Whether a terminal keeps a line for every epoch, too.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = True) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=False)
        self.lines = leave
        self.status = ""
        """What the bar shows next to the number of batches."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Draw no bar if the output is not a terminal."""
        if not sys.stdout.isatty():
            self.disable()
        super().setup(trainer, pl_module, stage)

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Epoch, bar, batches, and how it goes."""
        width = max(5, min(40, get_console().width - 72))
        return [TextColumn("{task.description}"), BarColumn(width), MofNCompleteColumn(), _Status(self)]

    def _init_progress(self, trainer: L.Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress is not None:
            self.progress.live.transient = True

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What the bar and the lines show, as text by name: the loss, what was logged for it, the time left, the speed.

        Loss, time and speed are numbers on the host. Lightning reads metrics logged with ``prog_bar=True`` in every
        step, which would wait for the device.
        """
        callbacks: list[L.Callback] = getattr(trainer, "callbacks", [])
        throughput = next((callback for callback in callbacks if isinstance(callback, Throughput)), None)
        rate, hours = (None, None) if throughput is None else (throughput.rate, throughput.hours_left)
        logged: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        logged.pop("v_num", None)
        loss = getattr(pl_module, "last_loss", None)
        shown = {} if loss is None else {"loss": f"loss {number(loss)}"}
        for name, title in _ACCURACIES.items():
            if (share := logged.pop(name, None)) is not None:
                shown[name] = f"{title} {float(share):.1%}".replace("%", " %")
        if hours:
            shown["left"] = f"{duration(3600 * hours)} left"
        if rate is not None:
            shown["rate"] = f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"
        own = {name: f"{name.split('/')[-1]} {_text(value)}" for name, value in logged.items()}
        return shown | own

    def _update_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:  # more arguments before lightning 2.6.1
        if self.is_enabled:
            self.status = "  ".join(self.get_metrics(trainer, pl_module).values())

    def _get_train_description(self, current_epoch: int) -> str:
        return _epoch(self.trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the metrics of the last epoch: not all are measured in every epoch."""
        trainer.progress_bar_metrics.clear()
        super().on_train_epoch_start(trainer, pl_module)

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of the epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        parts = [_epoch(trainer), *self.get_metrics(trainer, pl_module).values()]
        if not self.is_enabled:
            print(_fitting(parts, 80), flush=True)
        elif self.progress is not None and self.lines:
            console = self.progress.console
            console.print(_fitting(parts, console.width), markup=False, highlight=False, soft_wrap=True)


_ACCURACIES = {"val/knn_top1": "kNN", "val/linear_top1": "linear"}


class _Status(ProgressColumn):
    """The status of a progress bar, cut off where the terminal ends."""

    def __init__(self, bar: ProgressBar) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self.bar = bar

    def render(self, task: Task) -> Text:
        return Text(self.bar.status if task.id == self.bar.train_progress_bar_id else "")


def _epoch(trainer: L.Trainer) -> str:
    """Such as ``epoch 3/15``, counted from 1; ``epoch 3`` if there is no last epoch."""
    last = planned_epochs(trainer)
    return f"epoch {trainer.current_epoch + 1}" + (f"/{last}" if last is not None else "")


def planned_epochs(trainer: L.Trainer) -> int | None:
    """Number of epochs after which the training ends, the last of which may be shorter; None if it is not known.

    Args:
        trainer: Its loader of training images is there.
    """
    steps, batches = trainer.max_steps, trainer.num_training_batches
    ends = [trainer.max_epochs] if trainer.max_epochs is not None and trainer.max_epochs >= 0 else []
    if steps >= 0 and 0 < batches < float("inf"):
        ends.append(math.ceil(steps / steps_per_epoch(trainer)))
    return min(ends, default=None)


def is_nth_or_last(trainer: L.Trainer, every: int) -> bool:
    """Whether the current epoch is every n-th, counted from 1, or the last one.

    Args:
        trainer: The trainer, in ``fit``.
        every: The n.
    """
    epoch = trainer.current_epoch + 1
    return epoch % every == 0 or epoch == planned_epochs(trainer)


def _fitting(parts: list[str], width: int) -> str:
    """As many of the first parts as fit into a line, at least two."""
    while len(parts) > 2 and len("  ".join(parts)) > width:
        parts = parts[:-1]
    return "  ".join(parts)


def _text(value: Any) -> str:
    try:
        return number(float(value))
    except (TypeError, ValueError):
        return str(value)
