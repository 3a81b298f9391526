"""Smaller views for the first part of a training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssl_lightning.data.views import ViewSpec, with_side
from ssl_lightning.errors import UserError


@dataclass(frozen=True)
class Resolution:
    """Smaller views in the first epochs, for a fraction of their cost: the same crops, resized to fewer pixels.

    Zhang et al. 2025, FastDINOv2, https://arxiv.org/abs/2507.03779. Here a single run has both parts, with one schedule
    of the learning rate.

    Args:
        scale: Side of the views in the first epochs, as a fraction of their full side, rounded to the patches.
        until: Fraction of the epochs, rounded up to whole ones, after which views have their full size; 1 for never.
        noise: Largest standard deviation, where white is 1, of the Gaussian noise on a random square of each image once
            views have their full size, e.g. 0.5 as in the released code. All views of the image show it. 0 for none.
    """

    scale: float = 0.5
    until: float = 0.75
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Reject impossible values.

        Raises:
            UserError: A number is out of range.
        """
        for name, possible in (("scale", 0 < self.scale < 1), ("until", 0 < self.until <= 1)):
            if not possible:
                raise UserError(
                    f"--data.resolution.{name} {getattr(self, name)}: give a number between 0 and 1, or set "
                    "--data.resolution to null."
                )
        if not 0 <= self.noise <= 1:
            raise UserError(f"--data.resolution.noise {self.noise}: give a number from 0 to 1; white is 1.")

    def small(self, specs: Sequence[ViewSpec], patch: int) -> tuple[ViewSpec, ...]:
        """The views of the first epochs.

        Args:
            specs: The views at their full size.
            patch: Number of pixels that their sides must be divisible by.

        Raises:
            UserError: None is smaller.
        """
        sides = [max(1, round(spec.size * self.scale / patch)) * patch for spec in specs]
        if all(side >= spec.size for side, spec in zip(sides, specs, strict=True)):
            sizes = ", ".join(str(size) for size in sorted({spec.size for spec in specs}))
            raise UserError(
                f"--data.resolution.scale {self.scale} makes no view smaller than {sizes} px, in steps of {patch} px; "
                "set it lower."
            )
        return tuple(
            with_side(spec, side) if side < spec.size else spec for spec, side in zip(specs, sides, strict=True)
        )


@dataclass(frozen=True)
class Stages:
    """The views of each epoch.

    Args:
        full: The views at their full size.
        small: The views of the first epochs.
        epochs: How many epochs have the latter.
        noise: As for ``Resolution``, in the epochs after them.
    """

    full: tuple[ViewSpec, ...]
    small: tuple[ViewSpec, ...] = ()
    epochs: float = 0.0
    noise: float = 0.0

    def at(self, epoch: int) -> tuple[ViewSpec, ...]:
        """The views of an epoch; they differ only in size.

        Args:
            epoch: Epochs done.
        """
        return self.small if epoch < self.epochs else self.full

    def noise_at(self, epoch: int) -> float:
        """Largest standard deviation of the noise in an epoch.

        Args:
            epoch: Epochs done.
        """
        return 0.0 if epoch < self.epochs else self.noise


def length_in_epochs(trainer: Any, batches: int) -> float:
    """Epochs that a training will take; the last one may be a part of an epoch.

    Args:
        trainer: Its ``max_epochs`` and ``max_steps`` apply.
        batches: Batches of an epoch.

    Raises:
        UserError: It has no end.
    """
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    ends = [float(trainer.max_epochs)] if trainer.max_epochs is not None and trainer.max_epochs >= 0 else []
    if trainer.max_steps >= 0:
        steps = math.ceil(batches / trainer.accumulate_grad_batches)  # the last one may be of fewer batches
        ends.append(trainer.max_steps / max(1, steps))
    if not ends:
        raise UserError("--data.resolution counts in fractions of the training; set --trainer.max_epochs.")
    return min(ends)
