"""What the command line prints of Lightning's and other libraries' messages, and how numbers are written for people."""

import logging
import re
import sys
import warnings
from typing import Any

_ADVERTISEMENT = "💡 Tip"

_UNHELPFUL = (
    _ADVERTISEMENT,
    "GPU available",
    "TPU available",
    "HPU available",
    "IPU available",
    "LOCAL_RANK: ",
    "Initializing distributed",
    "-----",  # a box around the number of processes
    "Seed set to",
    "Using default `ModelCheckpoint`",
    "Trainer already configured with model summary",
    "`Trainer.fit` stopped: `max_epochs=",
    "Using 16bit",
    "Using bfloat16",
)
"""Beginnings of Lightning's messages about what the first lines of a run say better, and of its advertisements."""

_ABOUT_LIGHTNING = (".*LeafSpec.* is deprecated", ".*isinstance\\(treespec, LeafSpec\\)")
"""Warnings about how Lightning is written."""

_IGNORED_WARNINGS = (
    *_ABOUT_LIGHTNING,
    "It is recommended to use .*sync_dist=True",  # all processes log the same, or each its own loss
    ".*log_every_n_steps",
    "(?s).*does not have many workers",
    "(?s).*Unable to serialize instance",
    "(?s).*[Rr]ound-?trip",
    "(?s).*JsonargparseDeprecationWarning",
    "(?s).*was deprecated in v4",
    "Checkpoint directory .* exists and is not empty",  # of a run that goes on
    "Found .* in eval mode at the start of training",  # frozen modules
    "Be aware that when using `ckpt_path`",
    "Total length of `(list|Loader)` across ranks is zero",  # data without labels, and predict with no images left
    "You defined a `validation_step` but have no `val_dataloader`",
    "The number of training batches",
    "Trying to infer the `batch_size`",
    "The `srun` command is available",
    "You are overwriting the `",  # overfit_batches and fast_dev_run
    "No device id is provided via `init_process_group`",
)


class _LaterStderr(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is now, so that a progress bar can draw below the message."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.addFilter(_helpful)

    @property
    def stream(self) -> Any:
        return sys.stderr


def _helpful(record: logging.LogRecord) -> bool:
    return not re.sub(r"^\[rank: \d+\] ", "", record.getMessage()).startswith(_UNHELPFUL)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_ADVERTISEMENT)


def drop_noise() -> None:
    """Drop Lightning's advertisements and its warnings about itself, also in notebooks; the rest is the user's."""
    for pattern in _ABOUT_LIGHTNING:
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)


def quiet() -> None:
    """Drop messages that a user can do nothing about: advertisements, devices that are not there, deprecations."""
    for pattern in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(f"{library}.utilities.rank_zero").addFilter(_helpful)
        logger = logging.getLogger(library)
        if logger.handlers:  # else the program around this one decides where messages go
            logger.handlers = [_LaterStderr()]


def duration(seconds: float) -> str:
    """A time as a person says it: 36 s, 3 min 20 s, 45 min, 2 h 10 min, 3 d 4 h.

    Args:
        seconds: The time.

    Example:
        >>> [duration(seconds) for seconds in (0.4, 36, 200, 2700, 7800, 273600)]
        ['0 s', '36 s', '3 min 20 s', '45 min', '2 h 10 min', '3 d 4 h']
    """
    for unit, length, smaller, share in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        whole = round(seconds / share) * share
        if whole >= length:
            rest = (whole % length) // share if unit != "min" or whole < 600 else 0
            return f"{whole // length} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{round(seconds)} s"


def number(value: float) -> str:
    """A number with four digits, however small: 2.002, 3e-05, 12,171.

    Args:
        value: The number.

    Example:
        >>> [number(value) for value in (2.00213, 0.00003, 12171.4, 171.08)]
        ['2.002', '3e-05', '12,171', '171.1']
    """
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
