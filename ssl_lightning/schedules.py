"""Schedules as pure functions of progress."""

import math
from dataclasses import dataclass


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from ``start`` (progress 0) to ``end`` (progress 1).

    Args:
        start: Value at progress 0.
        end: Value at progress 1.
        progress: Share of training done, in [0, 1]; values outside are clamped.

    Example:
        >>> [round(cosine(0.99, 1.0, step / 4), 6) for step in range(5)]  # momentum of a teacher
        [0.99, 0.991464, 0.995, 0.998536, 1.0]
    """
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def truncated_cosine(
    step: float, steps: float, peak: float, end: float, warmup: int = 0, start: float = 0.0, share: float = 1.0
) -> float:
    """A straight line to the peak, then the first part of half a cosine towards the end (CAPI's released code).

    Args:
        step: Steps done.
        steps: Steps of the whole training.
        peak: Value at the last step of the warm-up, and at the step after it.
        end: Where the whole cosine would lead.
        warmup: Steps of the warm-up, including the first and the last.
        start: Value at the first step of the warm-up.
        share: Share of the cosine that is run; with less than 1 the last value lies between peak and end.

    Example:
        >>> [round(truncated_cosine(step, 100, 1e-3, 0.0, 10, share=0.8), 7) for step in (0, 1, 9, 10, 50, 99)]
        [0.0, 0.0001111, 0.001, 0.001, 0.0007192, 0.0001039]
    """
    if step < warmup:
        return start + (peak - start) * step / max(1, warmup - 1)
    return cosine(peak, end, share * min(1.0, (step - warmup) / max(1, steps - warmup)))


def token_dropout(rate: float, progress: float) -> float:
    """Share of the patches to drop: ``rate`` in the first quarter, then down to 0 at three quarters, and 0 at the end.

    Args:
        rate: Share at the start.
        progress: Share of training done, in [0, 1].

    Example:
        >>> [token_dropout(0.75, progress) for progress in (0, 0.25, 0.5, 0.75, 1)]
        [0.75, 0.75, 0.375, 0.0, 0.0]
    """
    return rate * min(1.0, max(0.0, (0.75 - progress) / 0.5))


def warmed_up(start: float, end: float, step: float, steps: float) -> float:
    """Straight line from ``start`` at step 0 to ``end`` at the last step of the warm-up, then ``end``.

    Args:
        start: Value at step 0.
        end: Value after the warm-up.
        step: Steps (or epochs) done.
        steps: Steps of the warm-up, including the first and the last.

    Example:
        >>> [round(warmed_up(0.04, 0.07, epoch, 30), 6) for epoch in (0, 1, 29, 100)]  # DINO's teacher temperature
        [0.04, 0.041034, 0.07, 0.07]
    """
    return end if step >= steps - 1 else start + (end - start) * step / (steps - 1)


def ramp_after(step: int, frozen: int, ramp: int) -> float:
    """Learning-rate multiplier of what is frozen at first: 0, then a straight line to 1.

    Args:
        step: Optimizer steps done.
        frozen: Steps of multiplier 0; if there are none, the multiplier is 1 throughout.
        ramp: Steps of the line, the last of them at 1.

    Example:
        >>> [ramp_after(step, frozen=10, ramp=4) for step in (0, 9, 10, 11, 12, 13, 14)]
        [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    if frozen <= 0:
        return 1.0
    return 0.0 if step < frozen else min(1.0, (step - frozen + 1) / max(1, ramp))


@dataclass(frozen=True)
class Warmup:
    """A value that rises linearly, then stays.

    Args:
        start: First value.
        end: Last value.
        length: When the last value is reached, in epochs or steps.

    Example:
        >>> Warmup(0.04, 0.07, 30)(29)
        0.07
    """

    start: float
    end: float
    length: float

    def __call__(self, position: float) -> float:
        """The value at an epoch or step."""
        return warmed_up(self.start, self.end, position, self.length)
