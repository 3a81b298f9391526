"""In which epochs a callback that watches a training runs: every n epochs, or as often as its cost allows."""

import math
import time
from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ssl_lightning.callbacks.progress import planned_epochs
from ssl_lightning.errors import UserError

EveryEpochs = int | Literal["auto"]


class Interval:
    """The epochs in which a callback runs. ``auto`` chooses the interval once, after the first time.

    The first process chooses for all, and a checkpoint keeps the choice: what is measured differs from machine to
    machine, but not between processes, nor after a resume.

    Args:
        epochs: A number of epochs, or ``auto``.
        option: Option of the command line that sets it.
        share: With ``auto``, the largest share of the training time. The first and the last epoch always come.
    """

    def __init__(self, epochs: EveryEpochs, option: str, share: float) -> None:
        if epochs != "auto" and (not isinstance(epochs, int) or epochs < 1):
            raise UserError(f"{option}={epochs} must be at least 1, or auto.")
        self.is_auto, self.option, self.share = epochs == "auto", option, share
        self.epochs = 1 if epochs == "auto" else epochs
        """The interval; 1 until ``auto`` has chosen."""
        self.chosen: int | None = None
        """What ``auto`` has chosen."""
        self._batches = 0
        self._begin = self._first = self._last = time.perf_counter()

    def epoch_starts(self) -> None:
        """Start the clock: call it in ``on_train_epoch_start``."""
        self._batches, self._begin = 0, time.perf_counter()

    def batch_ends(self) -> None:
        """Note the time: call it in ``on_train_batch_end``."""
        self._batches, self._last = self._batches + 1, time.perf_counter()
        if self._batches == 1:
            self._first = self._last

    def is_due(self, trainer: L.Trainer, last: bool = True) -> bool:
        """Whether to run in the current epoch.

        Args:
            trainer: The trainer, in ``fit``.
            last: Whether a number of epochs is followed by the last epoch; ``auto`` always is.
        """
        epoch = trainer.current_epoch + 1
        is_last = (last or self.is_auto) and epoch == planned_epochs(trainer)
        return epoch % self.epochs == 0 or is_last

    def took(self, trainer: Any, seconds: float, multiple_of: int = 1) -> None:
        """Choose the interval if it is still to choose. Every process must call it.

        Args:
            trainer: The trainer, in ``fit``, at the end of an epoch.
            seconds: How long the callback took in this epoch.
            multiple_of: What the interval must be a multiple of.
        """
        if not self.is_auto or self.chosen is not None or self._batches == 0:
            return
        # the first batch starts workers and compiles
        batches, span = self._batches - 1, self._last - self._first
        epoch = span / batches * self._batches if batches else self._last - self._begin
        share, planned = seconds / max(epoch, 1e-9), planned_epochs(trainer)
        interval = share / self.share
        if planned is not None:
            times = max(2, int(self.share * planned / max(share, 1e-9)))
            interval = planned / (times - 1)
        interval = max(1, math.ceil(interval / multiple_of)) * multiple_of
        self.load({"every_n_epochs": trainer.strategy.broadcast(interval)})
        often = "after every epoch" if self.epochs == 1 else f"after every {self.epochs} epochs, and after the last"
        rank_zero_info(
            f"{self.option} auto: it took {seconds:.2g} s, {share:.1%} of the time of an epoch. From now on it runs "
            f"{often}."
        )

    @property
    def state(self) -> dict[str, int]:
        """What ``auto`` has chosen, for a checkpoint; empty if nothing."""
        return {} if self.chosen is None else {"every_n_epochs": self.chosen}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with an interval that was chosen before.

        Args:
            state: As a checkpoint keeps it, also with entries of others.
        """
        if self.is_auto and (chosen := state.get("every_n_epochs")) is not None:
            self.chosen = self.epochs = int(chosen)
