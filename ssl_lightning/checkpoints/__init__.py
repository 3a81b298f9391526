"""Checkpoints: writing files that survive interruptions, and reading backbones from many formats."""

from ssl_lightning.checkpoints.export import export
from ssl_lightning.checkpoints.files import (
    AtomicCheckpointIO,
    check_fit,
    describe,
    reading,
    rename,
    replacing,
    settle_progress,
)
from ssl_lightning.checkpoints.load import load_backbone, open_backbone, read_checkpoint, weights_for
from ssl_lightning.checkpoints.pretrained import Pretrained
from ssl_lightning.checkpoints.sources import weights_in

__all__ = [
    "AtomicCheckpointIO",
    "Pretrained",
    "check_fit",
    "describe",
    "export",
    "load_backbone",
    "open_backbone",
    "read_checkpoint",
    "reading",
    "rename",
    "replacing",
    "settle_progress",
    "weights_for",
    "weights_in",
]
