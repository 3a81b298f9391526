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


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, end: float = 0.0) -> float:
    """Linear warm-up from 0, then a cosine from 1 to ``end``: the factor on the peak learning rate.

    The first optimizer step has factor 0, as in the code of SimCLR, BYOL, MoCo v3, MAE, Barlow Twins and VICReg.

    Args:
        step: Optimizer steps done so far.
        warmup_steps: Optimizer steps of warm-up.
        total_steps: Optimizer steps of the whole training.
        end: Factor at the end of training.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return cosine(1.0, end, (step - warmup_steps) / max(1, total_steps - warmup_steps))
