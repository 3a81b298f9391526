"""An alarm for a run that loses what the weights it began with know."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ssl_lightning.errors import UserError


class ForgettingAlarm(L.Callback):
    """Warns once when kNN falls clearly below its value at the start of a run with ``model.continued``.

    Such a run begins with good weights, and a learning rate that is too high for them, or comes too early, undoes them.
    ``KNNProbe`` measures both values.

    Args:
        tolerance: How far kNN accuracy may fall below its value at the start, e.g. 0.03 for three points of a hundred.
        stop: Whether the alarm stops the run.
    """

    def __init__(self, tolerance: float = 0.03, stop: bool = False) -> None:
        if not 0 <= tolerance < 1:
            raise UserError(f"--forgetting_alarm.tolerance={tolerance} is a difference of accuracies; give 0 to 1.")
        self.tolerance, self.stop = tolerance, stop
        self.raised: str | None = None
        """The reason for the alarm; None before the alarm."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compare kNN with its value at the start."""
        metrics = trainer.callback_metrics
        start, now = metrics.get("val/start_knn_top1"), metrics.get("val/knn_top1")
        if getattr(pl_module, "continued", None) is None or trainer.sanity_checking or self.raised:
            return
        if start is None or now is None or float(now) >= float(start) - self.tolerance:
            return
        self.raised = (
            f"kNN fell from {100 * float(start):.1f} % at the start to {100 * float(now):.1f} % (step "
            f"{trainer.global_step}, epoch {trainer.current_epoch}): the backbone loses what it began with"
        )
        rank_zero_warn(
            f"ForgettingAlarm: {self.raised}. What helps: a lower --model.optim.base_lr, longer "
            "--model.continued.frozen_steps and ramp_steps, or --model.trainable lora."
        )
        if self.stop:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """The reason for the alarm, if any."""
        return {"raised": self.raised}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.raised = state_dict["raised"]
