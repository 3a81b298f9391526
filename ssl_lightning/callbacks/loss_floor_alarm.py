"""An alarm for a run that learns nothing, or whose features collapse."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ssl_lightning.errors import UserError


class LossFloorAlarm(L.Callback):
    """Warns once when a run learns nothing, with the method's known remedies.

    There are two reasons for the alarm. The smoothed loss stays at the method's ``chance_loss`` (the loss of a model
    that has learned nothing) or at its ``collapsed_loss`` (the loss if all outputs are the same). Or, after the first
    tenth of the training, the features that ``HealthMonitor`` measures have collapsed to a point or a line in two
    measurements in a row. Logs ``health/alarm`` when it is raised.

    Args:
        tolerance: Largest distance from such a loss that still counts as staying at it, as a fraction of the loss. If
            the loss is 0, as a fraction of 4.
        patience: Number of steps in a row at such a loss before the alarm. None means a tenth of the training, at least
            100.
        min_std: Features count as collapsed if the standard deviation of unit features, as a fraction of 1 / sqrt(D),
            is lower. It is 1 for features spread evenly in all directions.
        min_rankme: Features also count as collapsed if their RankMe is lower.
        stop: Whether the alarm stops the run.
    """

    def __init__(
        self,
        tolerance: float = 0.005,
        patience: int | None = None,
        min_std: float = 0.02,
        min_rankme: float = 1.2,
        stop: bool = False,
    ) -> None:
        if not 0 < tolerance < 1 or (patience is not None and patience < 1):
            raise UserError(
                f"--loss_floor_alarm.tolerance={tolerance} must lie between 0 and 1, and "
                f"--loss_floor_alarm.patience={patience} must be null or at least 1."
            )
        self.tolerance, self.patience, self.stop = tolerance, patience, stop
        self.min_std, self.min_rankme = min_std, min_rankme
        self.raised: str | None = None
        """The reason for the alarm; None before the alarm."""
        self._smooth: float | None = None
        self._steps = self._looks = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Decide after how many steps to raise the alarm."""
        planned = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        self._patience = self.patience or (max(100, int(planned) // 10) if planned < math.inf else 1000)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare the newest loss that is on the host, so that the device does not wait."""
        loss = getattr(pl_module, "last_loss", None)
        if loss is None or self.raised:
            return
        self._smooth = loss if self._smooth is None else 0.95 * self._smooth + 0.05 * loss
        floors = {
            "a model that has learned nothing": getattr(pl_module, "chance_loss", None),
            "a model whose outputs are all the same": getattr(pl_module, "collapsed_loss", None),
        }
        at = [name for name, floor in floors.items() if floor is not None and self._is_at(floor)]
        self._steps = self._steps + 1 if at else 0
        if self._steps >= self._patience:
            what = f"the loss has stayed at {floors[at[0]]:.4g}, the loss of {at[0]}, for {self._steps} steps"
            self._raise(trainer, pl_module, what)

    def _is_at(self, floor: float) -> bool:
        assert self._smooth is not None
        return abs(self._smooth - floor) <= self.tolerance * (abs(floor) or 4)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check what HealthMonitor measured in this epoch."""
        metrics = trainer.callback_metrics
        std, rank = metrics.get("health/feature_std"), metrics.get("health/rankme")
        callbacks: list[L.Callback] = getattr(trainer, "callbacks", [])
        looked = any(getattr(callback, "looked_in", None) == trainer.current_epoch for callback in callbacks)
        if self.raised or not looked or std is None or rank is None:
            return
        spread = float(std) * math.sqrt(int(pl_module.embed_dim))
        collapsed = (spread < self.min_std or float(rank) < self.min_rankme) and pl_module.progress > 0.1
        self._looks = self._looks + 1 if collapsed else 0
        if self._looks == 2:
            what = f"their standard deviation is {spread:.2g} / sqrt(D), their RankMe {float(rank):.3g}"
            self._raise(trainer, pl_module, f"the features have collapsed: {what}")

    def _raise(self, trainer: L.Trainer, pl_module: Any, what: str) -> None:
        self.raised = f"{what} (step {trainer.global_step}, epoch {trainer.current_epoch})"
        remedies = getattr(pl_module, "remedies", "") or "lower the learning rate, or check the views with preview"
        rank_zero_warn(f"LossFloorAlarm: {self.raised}. What helps: {remedies}.")
        for logger in trainer.loggers:
            logger.log_metrics({"health/alarm": 1.0}, trainer.global_step)
        if self.stop:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """The reason for the alarm, if any, and what has been counted so far."""
        return {"raised": self.raised, "smooth": self._smooth, "steps": self._steps, "looks": self._looks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.raised, self._smooth = state_dict["raised"], state_dict["smooth"]
        self._steps, self._looks = state_dict["steps"], state_dict["looks"]
