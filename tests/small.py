"""Small real trainings."""

from pathlib import Path
from typing import Any

import lightning as L

from ssl_lightning import DigitsData, Optim, SimCLR, ViewSpec

BACKBONE: dict[str, Any] = {
    "backbone": "resnet10_cifar",
    "backbone_kwargs": {"stem_stride": 2, "channels": (8, 8, 16, 16)},
}
DIGIT_VIEW = ViewSpec(size=16, count=2, scale=(0.5, 1), ratio=(0.9, 1.1), flip=0, jitter=0.8, brightness=0.4)
ADAMW = Optim("adamw", base_lr=1e-3, lr_scaling="none", warmup_epochs=0)


def simclr(**kwargs: Any) -> SimCLR:
    """SimCLR with a ResNet of 17 thousand parameters."""
    return SimCLR(**{**BACKBONE, "optim": ADAMW, **kwargs})


def digits(**kwargs: Any) -> DigitsData:
    """The digits in batches of 128: 11 steps an epoch."""
    return DigitsData(**{"batch_size": 128, "views": [DIGIT_VIEW], "seed": 0, **kwargs})


def trainer(folder: Path, **kwargs: Any) -> L.Trainer:
    """A quiet trainer on the CPU."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "default_root_dir": folder}
    return L.Trainer(**{**quiet, **defaults, **kwargs})
