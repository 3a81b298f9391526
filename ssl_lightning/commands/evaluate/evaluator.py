"""What every evaluation shares: a backbone, a trainer, and results in a file."""

import os
import sys
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ssl_lightning.checkpoints import open_backbone
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.results import Results
from ssl_lightning.runs import new_evaluation


class Evaluator:
    """Base of the evaluations of a backbone; see ``Evaluation`` for the arguments."""

    def __init__(
        self,
        checkpoint: str,
        backbone: str | None,
        backbone_kwargs: dict[str, Any] | None,
        branch: str | None,
        seed: int,
        output: str | None,
        trainer: dict[str, Any] | None,
    ) -> None:
        self.checkpoint, self.backbone, self.backbone_kwargs = checkpoint, backbone, backbone_kwargs
        self.branch, self.seed = branch, seed
        if output is not None and os.path.exists(output) and not os.path.isdir(output):
            raise UserError(f"--output {output} is a file; give a folder.")
        self.output, self.trainer = output, trainer or {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pretrained = open_backbone(checkpoint, backbone, backbone_kwargs, branch)
        self._start = time.perf_counter()

    def _trainer(self, **arguments: Any) -> L.Trainer:
        return quiet_trainer({**self.trainer, **arguments})

    @cached_property
    def _device(self) -> torch.device:
        return self._trainer().strategy.root_device

    def _written(
        self,
        protocol: str,
        parameters: dict[str, Any],
        data: dict[str, Any],
        rows: list[dict[str, Any]],
        accuracy: dict[str, Any] | None = None,
        measures: dict[str, float] | None = None,
        seeds: list[int] | None = None,
        folder: Path | None = None,
    ) -> Results:
        """Write the results; ``folder`` is a new one unless given."""
        pretrained = self.pretrained
        backbone = {
            "source": str(self.checkpoint),
            "name": pretrained.name,
            "backbone_kwargs": pretrained.backbone_kwargs,
            "weights": pretrained.hash,
            "method": pretrained.facts.get("method"),
        }
        parameters = {**parameters, "trainer": self.trainer}
        seconds = round(time.perf_counter() - self._start, 3)
        results = Results(
            protocol, parameters, backbone, data, accuracy or {}, rows, seeds or [self.seed], seconds,
            measures=measures or {},
        )  # fmt: skip
        results.write(folder or new_evaluation(self.checkpoint, protocol, self.output))
        self._start = time.perf_counter()
        return results


def quiet_trainer(options: Mapping[str, Any] | None) -> L.Trainer:
    """A trainer of one device that writes nothing, unless ``--trainer`` says otherwise.

    Args:
        options: Arguments of Lightning's Trainer.

    Raises:
        UserError: The Trainer has no such argument.
    """
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    try:
        return L.Trainer(**{"devices": 1, "enable_progress_bar": sys.stderr.isatty(), **quiet, **(options or {})})
    except TypeError as error:
        raise UserError(f"--trainer: {str(error).rpartition('() ')[2]}.") from error
