"""Schedules as pure functions of progress."""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from ``start`` (progress 0) to ``end`` (progress 1).

    Args:
        start: Value at progress 0.
        end: Value at progress 1.
        progress: Share of training done, in [0, 1]; values outside are clamped.
    """
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
