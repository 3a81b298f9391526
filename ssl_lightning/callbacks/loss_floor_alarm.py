"""An alarm for a loss that stays where nothing is learnt, and for features that collapse."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ssl_lightning.errors import UserError


class LossFloorAlarm(L.Callback):
    """Warns once when a run learns nothing, with the method's known remedies.

    Either the smoothed loss stays at the method's ``chance_loss``, that of a model which has learnt nothing, or the
    features that ``HealthMonitor`` looks at have collapsed to a point or a line. Logs ``health/alarm``: 0, or 1 from
    then on.

    Args:
        tolerance: How close to the chance loss counts as being at it, as a share of it.
        patience: Steps in a row at the chance loss before the alarm; None is a tenth of the training, at least 100.
        min_std: Smallest deviation of unit features, as a share of 1 / sqrt(D), that of features on all sides.
        min_rankme: Smallest RankMe.
        stop: Whether to stop the run.
    """

    def __init__(
        self,
        tolerance: float = 0.005,
        patience: int | None = None,
        min_std: float = 0.02,
        min_rankme: float = 1.5,
        stop: bool = False,
    ) -> None:
        if not 0 < tolerance < 1 or (patience is not None and patience < 1):
            raise UserError(f"LossFloorAlarm: tolerance={tolerance} is a share, patience={patience} at least 1 step.")
        self.tolerance, self.patience, self.stop = tolerance, patience, stop
        self.min_std, self.min_rankme = min_std, min_rankme
        self.raised: str | None = None
        """What the alarm was about, once it was raised."""
        self._smooth: float | None = None
        self._steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Settle how long to wait."""
        planned = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        self._patience = self.patience or (max(100, int(planned) // 10) if planned < math.inf else 1000)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare the newest loss on the host; the device does not wait."""
        loss, chance = getattr(pl_module, "last_loss", None), getattr(pl_module, "chance_loss", None)
        if loss is None or chance is None or self.raised:
            return
        self._smooth = loss if self._smooth is None else 0.95 * self._smooth + 0.05 * loss
        self._steps = self._steps + 1 if abs(self._smooth - chance) <= self.tolerance * chance else 0
        if self._steps >= self._patience:
            share = 100 * self.tolerance
            self._raise(
                trainer,
                pl_module,
                f"the loss has stayed within {share:g} % of {chance:.4g}, that of a model which has learnt nothing, "
                f"for {self._steps} steps",
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look at what HealthMonitor found."""
        found = trainer.callback_metrics
        std, rank = found.get("health/feature_std"), found.get("health/rankme")
        if self.raised or trainer.sanity_checking or std is None or rank is None:
            return
        spread = float(std) * math.sqrt(int(pl_module.embed_dim))
        if spread < self.min_std or float(rank) < self.min_rankme:
            what = f"their deviation is {spread:.2g} of that on all sides, their RankMe {float(rank):.3g}"
            self._raise(trainer, pl_module, f"the features have collapsed: {what}")

    on_train_epoch_end = on_validation_end

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
        return {"raised": self.raised, "smooth": self._smooth, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.raised, self._smooth, self._steps = (state_dict[key] for key in ("raised", "smooth", "steps"))
