"""Lets EarlyStopping and checkpoints of one's own wait for metrics that are not measured in every epoch."""

import difflib
import functools
import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from ssl_lightning.callbacks.checkpoint import BestCheckpoint
from ssl_lightning.callbacks.health_monitor import HealthMonitor
from ssl_lightning.callbacks.knn_probe import KNNProbe
from ssl_lightning.callbacks.segmentation_probe import SegmentationProbe
from ssl_lightning.errors import UserError

_PROBES = KNNProbe | HealthMonitor | SegmentationProbe


class AwaitedMetrics(L.Callback):
    """Lets callbacks that watch a metric see it only in epochs that measured it, and refuses metrics that never come.

    Lightning keeps the last value of a metric: EarlyStopping would count it again in every epoch, and a checkpoint
    would store later weights under it. Before the first value both would stop the run.
    """

    def __init__(self) -> None:
        self._watching: list[Any] = []
        self._logged: set[str] = set()
        self._first_epoch = 0

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Find who watches what."""
        self._logged, self._first_epoch = set(), trainer.current_epoch
        kinds = (EarlyStopping, ModelCheckpoint)
        self._watching = [one for one in trainer.callbacks if isinstance(one, kinds) and one.monitor is not None]
        for watcher in self._watching:
            if isinstance(watcher, EarlyStopping):
                watcher.strict = False
            elif not isinstance(watcher, BestCheckpoint):  # it waits on its own
                save: Any = type(watcher)._save_topk_checkpoint
                watcher._save_topk_checkpoint = functools.partial(_save_if_measured, watcher, save)

    def on_train_epoch_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Forget the values of the last epoch."""
        for watcher in self._watching:
            trainer.callback_metrics.pop(watcher.monitor, None)

    def on_train_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Look whether every metric has come once all have had their epoch.

        Raises:
            UserError: A metric that is watched does not exist.
        """
        self._logged |= trainer.callback_metrics.keys()
        intervals = [one.interval for one in trainer.callbacks if isinstance(one, _PROBES)]
        # all are measured in an epoch whose number can be divided by all of these; auto measures in the first, too
        parts = [1 if one.is_auto and self._first_epoch == 0 else one.epochs for one in intervals]
        together = math.lcm(trainer.check_val_every_n_epoch or 1, *parts)
        done = trainer.current_epoch + 1
        if trainer.fast_dev_run or trainer.should_stop or done // together <= self._first_epoch // together:
            return
        for watcher in self._watching:
            by_default = isinstance(watcher, BestCheckpoint) and watcher.monitor == BestCheckpoint().monitor
            if watcher.monitor not in self._logged and not by_default:
                near = difflib.get_close_matches(watcher.monitor, sorted(self._logged), n=3)
                others = near or sorted(name for name in self._logged if not name.startswith("time/"))
                raise UserError(
                    f"{type(watcher).__name__} watches {watcher.monitor}, which this run does not log; set its monitor "
                    f"to {', '.join(others)}."
                )


def _save_if_measured(checkpoint: Any, save: Any, trainer: Any, candidates: dict[str, Any]) -> None:
    if checkpoint.monitor in candidates:
        save(checkpoint, trainer, candidates)
