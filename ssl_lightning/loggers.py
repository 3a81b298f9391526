"""Where a run is logged, and logs that go on after a resume."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder of a run, that of its first logger which has one; None without such a logger.

    Args:
        trainer: The trainer.
    """
    return next((Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir is not None), None)


class CSVLogger(LightningCSVLogger):
    """Writes ``metrics.csv`` and goes on in it after a resume; Lightning's own deletes the curves so far."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        if os.path.isfile(self.metrics_file_path):
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])
