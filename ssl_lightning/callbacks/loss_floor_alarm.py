"""An alarm for a loss that stays where nothing is learnt, and for features that collapse."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ssl_lightning.errors import UserError


class LossFloorAlarm(L.Callback):
    """Warns once when a run learns nothing, with the method's known remedies.

    Either the smoothed loss stays at the method's ``chance_loss``, that of a model which has learnt nothing, or at its
    ``collapsed_loss``, that of one whose outputs are all the same; or the features that ``HealthMonitor`` looks at stay
    at a point or a line after the first tenth of the training. Logs ``health/alarm`` when it is raised.

    Args:
        tolerance: How close to such a loss counts as being at it, as a share of it; of 4 where it is 0.
        patience: Steps in a row at such a loss before the alarm; None is a tenth of the training, at least 100.
        min_std: Smallest deviation of unit features, as a share of 1 / sqrt(D), that of features on all sides.
        min_rankme: Smallest RankMe. Both are for two looks in a row.
        stop: Whether to stop the run.
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
            raise UserError(f"LossFloorAlarm: tolerance={tolerance} is a share, patience={patience} at least 1 step.")
        self.tolerance, self.patience, self.stop = tolerance, patience, stop
        self.min_std, self.min_rankme = min_std, min_rankme
        self.raised: str | None = None
        """What the alarm was about, once it was raised."""
        self._smooth: float | None = None
        self._steps = self._looks = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Settle how long to wait."""
        planned = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        self._patience = self.patience or (max(100, int(planned) // 10) if planned < math.inf else 1000)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare the newest loss on the host; the device does not wait."""
        loss = getattr(pl_module, "last_loss", None)
        if loss is None or self.raised:
            return
        self._smooth = loss if self._smooth is None else 0.95 * self._smooth + 0.05 * loss
        floors = {
            "a model that has learnt nothing": getattr(pl_module, "chance_loss", None),
            "outputs that are all the same": getattr(pl_module, "collapsed_loss", None),
        }
        at = [name for name, floor in floors.items() if floor is not None and self._is_at(floor)]
        self._steps = self._steps + 1 if at else 0
        if self._steps >= self._patience:
            what = f"the loss has stayed at {floors[at[0]]:.4g}, that of {at[0]}, for {self._steps} steps"
            self._raise(trainer, pl_module, what)

    def _is_at(self, floor: float) -> bool:
        assert self._smooth is not None
        return abs(self._smooth - floor) <= self.tolerance * (abs(floor) or 4)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look at what HealthMonitor found in this epoch."""
        found = trainer.callback_metrics
        std, rank = found.get("health/feature_std"), found.get("health/rankme")
        callbacks: list[L.Callback] = getattr(trainer, "callbacks", [])
        looked = any(getattr(callback, "looked_in", None) == trainer.current_epoch for callback in callbacks)
        if self.raised or not looked or std is None or rank is None:
            return
        spread = float(std) * math.sqrt(int(pl_module.embed_dim))
        collapsed = (spread < self.min_std or float(rank) < self.min_rankme) and pl_module.progress > 0.1
        self._looks = self._looks + 1 if collapsed else 0
        if self._looks == 2:
            what = f"their deviation is {spread:.2g} of that on all sides, their RankMe {float(rank):.3g}"
            self._raise(trainer, pl_module, f"the features have collapsed: {what}")

    def _raise(self, trainer: L.Trainer, pl_module: Any, what: str) -> None:
        self.raised = f"{what} (step {trainer.global_step}, epoch {trainer.current_epoch})"
        remedies = getattr(pl_module, "remedies", "") or "lower the learning rate, or look at the views with preview"
        rank_zero_warn(f"LossFloorAlarm: {self.raised}. What helps: {remedies}.")
        for logger in trainer.loggers:
            logger.log_metrics({"health/alarm": 1.0}, trainer.global_step)
        if self.stop:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Whether the alarm was raised, and how long the loss has been at chance."""
        return {"raised": self.raised, "smooth": self._smooth, "steps": self._steps, "looks": self._looks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.raised, self._smooth = state_dict["raised"], state_dict["smooth"]
        self._steps, self._looks = state_dict["steps"], state_dict["looks"]
