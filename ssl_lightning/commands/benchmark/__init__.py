"""How fast this package is beside lightly: both measured on the user's machine, in one run."""

from ssl_lightning.commands.benchmark.counter import OperationCounter
from ssl_lightning.commands.benchmark.pipeline import PipelineResult, pipeline
from ssl_lightning.commands.benchmark.step import StepResult, step

__all__ = ["OperationCounter", "PipelineResult", "StepResult", "pipeline", "step"]
