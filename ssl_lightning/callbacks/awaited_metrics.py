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
from ssl_lightning.callbacks.loss_floor_alarm import LossFloorAlarm
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
        """Find who watches what.

        Raises:
            UserError: The speed of the machine would decide in which epoch the run ends.
        """
        self._logged, self._first_epoch = set(), trainer.current_epoch
        kinds = (EarlyStopping, ModelCheckpoint)
        self._watching = [one for one in trainer.callbacks if isinstance(one, kinds) and one.monitor is not None]
        for probe in trainer.callbacks:
            if isinstance(probe, _PROBES) and probe.interval.is_auto:
                _refuse_to_stop(trainer.callbacks, probe)
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
        # all are measured in an epoch whose number can be divided by all of these
        parts = [one.interval.epochs for one in trainer.callbacks if isinstance(one, _PROBES)]
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


def _refuse_to_stop(callbacks: list[Any], probe: Any) -> None:
    """Refuse callbacks that end a run by what a probe measures at intervals that follow from measured times."""
    ours = "health/" if isinstance(probe, HealthMonitor) else "val/"
    stops: list[Any] = [one for one in callbacks if isinstance(one, EarlyStopping) and one.monitor.startswith(ours)]
    if isinstance(probe, HealthMonitor):
        stops += [one for one in callbacks if isinstance(one, LossFloorAlarm) and one.stop]
    if stops:
        raise UserError(
            f"{type(stops[0]).__name__} may end the run, and with {probe.interval.option} auto the speed of this "
            f"machine would decide when; set {probe.interval.option} to a number."
        )


def _save_if_measured(checkpoint: Any, save: Any, trainer: Any, candidates: dict[str, Any]) -> None:
    if checkpoint.monitor in candidates:
        save(checkpoint, trainer, candidates)
