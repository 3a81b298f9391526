"""The command ``benchmark``: the speed of this package and of lightly, both measured here in the same run."""

from collections.abc import Callable, Sequence
from typing import Any

from ssl_lightning.arguments import SSLArgumentParser, title_of
from ssl_lightning.commands.benchmark.counter import OperationCounter
from ssl_lightning.commands.benchmark.pipeline import PipelineResult, pipeline
from ssl_lightning.commands.benchmark.step import StepResult, step

__all__ = ["OperationCounter", "PipelineResult", "StepResult", "pipeline", "run", "step"]


def run(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The command line after ``benchmark``.
    """
    parser = SSLArgumentParser(prog="ssl-lightning benchmark", description="Measure this package and lightly.")
    benchmarks = parser.add_subcommands()
    functions: dict[str, Callable[..., Any]] = {"pipeline": pipeline, "step": step}
    for name, function in functions.items():
        benchmark = SSLArgumentParser(description=title_of(function))
        benchmark.add_function_arguments(function)
        benchmark.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
        benchmarks.add_subcommand(name, benchmark, help=benchmark.description)
    options = parser.parse_args(words)
    chosen = options[options.subcommand]
    as_json = chosen.pop("json")
    result = functions[options.subcommand](**chosen)
    print(result.json if as_json else result)
