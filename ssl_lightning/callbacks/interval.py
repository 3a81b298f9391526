"""In which epochs a callback that watches a training runs: every n epochs, or as often as its cost allows."""

import math
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ssl_lightning.callbacks.progress import planned_epochs
from ssl_lightning.errors import UserError

EveryEpochs = int | Literal["auto"]


class Interval:
    """The epochs in which a callback runs: every n epochs, or with ``auto`` as often as its cost allows.

    ``auto`` counts images instead of measuring time: an image that is looked at takes one pass through the network, a
    view that is trained on the method's ``view_cost``, a smaller one in proportion to its pixels. So it chooses the
    same on every machine, on any number of processes and after a resume. Teachers and augmentation are not counted:
    they only make the share of watching smaller. ``token_dropout`` makes it larger.

    Args:
        epochs: A number of epochs, or ``auto``.
        option: Option of the command line that sets it.
        share: With ``auto``, the largest share of the training. The first and the last epoch always come.
    """

    def __init__(self, epochs: EveryEpochs, option: str, share: float) -> None:
        if epochs != "auto" and (not isinstance(epochs, int) or epochs < 1):
            raise UserError(f"{option}={epochs} must be at least 1, or auto.")
        self.is_auto, self.option, self.share = epochs == "auto", option, share
        self.epochs = 1 if epochs == "auto" else epochs
        """The interval; with ``auto`` 1 until it is planned."""

    def is_due(self, trainer: L.Trainer, last: bool = True) -> bool:
        """Whether to run in the current epoch.

        Args:
            trainer: The trainer, in ``fit``.
            last: Whether a number of epochs is followed by the last epoch; ``auto`` always is.
        """
        epoch = trainer.current_epoch + 1
        is_first = self.is_auto and epoch == 1
        is_last = (last or self.is_auto) and epoch == planned_epochs(trainer)
        return is_first or is_last or epoch % self.epochs == 0

    def plan(self, trainer: Any, looked_at: int, multiple_of: int = 1) -> None:
        """With ``auto``, choose the interval, and say so: call it in ``on_train_start``.

        Args:
            trainer: The trainer, in ``fit``.
            looked_at: Number of images that the callback looks at each time, over all processes.
            multiple_of: What the interval must be a multiple of.
        """
        data = counted_data(trainer)
        if not self.is_auto or data is None:
            return
        share, planned = looked_at / _passes_of_an_epoch(trainer, data), planned_epochs(trainer)
        if planned is None:
            interval = share / self.share
        else:
            times = max(2, int(self.share * planned / max(share, 1e-9)))
            interval = planned / (times - 1)
        self.epochs = max(1, math.ceil(interval / multiple_of)) * multiple_of
        if self.epochs > 1:
            between = "" if planned is not None and self.epochs >= planned else f", every {self.epochs} epochs,"
            rank_zero_info(
                f"{self.option} auto: runs after the first epoch{between} and after the last; each time takes about "
                f"{share:.1%} of an epoch."
            )


def counted_data(trainer: Any) -> Any:
    """The data module of a training, if it knows its images; None for streams and data modules of other packages.

    Args:
        trainer: The trainer, in ``fit``.
    """
    data: Any = getattr(trainer, "datamodule", None)
    return data if hasattr(data, "view_specs") and data.train_images is not None else None


def _passes_of_an_epoch(trainer: Any, data: Any) -> float:
    """Passes through the network that an epoch takes."""
    views = sum(spec.count * min(1.0, (spec.size / data.image_size) ** 2) for spec in data.view_specs)
    images = trainer.num_training_batches * data.batch_size * trainer.world_size
    return float(getattr(trainer.lightning_module, "view_cost", 3) * views * images)
