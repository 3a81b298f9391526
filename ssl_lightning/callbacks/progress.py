"""What a person sees while it trains: a bar in a terminal, a line per epoch elsewhere, images per second."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class Throughput(L.Callback):
    """Logs ``train/images_per_second`` over all processes, loading included, validation not.

    Args:
        every_n_steps: Average over that many training steps.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.rate: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; a run resumed within an epoch has no start of it."""
        self._images, self._since = 0, time.perf_counter()

    on_train_epoch_start = on_train_start

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images of this batch."""
        self._images += len(batch[0][0]) * trainer.world_size
        if (batch_idx + 1) % self.every_n_steps == 0 or trainer.is_last_batch:
            now = time.perf_counter()
            rate = self._images / (now - self._since)
            pl_module.log("train/images_per_second", rate, batch_size=1)
            self.rate = rate
            self._images, self._since = 0, now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the time of validation out."""
        self._images, self._since = 0, time.perf_counter()


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
        """Loss, images per second and the metrics of the bar, under short names and without the logger's version.

        Loss and rate are numbers on the host: what is logged with ``prog_bar=True`` Lightning reads in every step, and
        that waits for the device.
        """
        rates = (callback.rate for callback in trainer.callbacks if isinstance(callback, Throughput))  # type: ignore[attr-defined]
        ours = {"loss": getattr(pl_module, "last_loss", None), "images/s": next(rates, None)}
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
