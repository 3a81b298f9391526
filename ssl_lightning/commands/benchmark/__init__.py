"""The command ``benchmark``: this package and lightly, both measured here in the same run."""

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import yaml

from ssl_lightning.arguments import SSLArgumentParser, title_of
from ssl_lightning.commands.benchmark.counter import OperationCounter
from ssl_lightning.commands.benchmark.learning import add_recipe_arguments, learning, with_recipe
from ssl_lightning.commands.benchmark.learning_result import LearningResult
from ssl_lightning.commands.benchmark.pipeline import PipelineResult, pipeline
from ssl_lightning.commands.benchmark.step import StepResult, step

__all__ = [
    "LearningResult",
    "OperationCounter",
    "PipelineResult",
    "StepResult",
    "learning",
    "pipeline",
    "run",
    "step",
]


def run(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The command line after ``benchmark``.
    """
    parser = SSLArgumentParser(prog="ssl-lightning benchmark", description="Measure this package and lightly.")
    benchmarks = parser.add_subcommands()
    functions: dict[str, Callable[..., Any]] = {"pipeline": pipeline, "step": step, "learning": learning}
    for name, function in functions.items():
        benchmark = SSLArgumentParser(description=(inspect.getdoc(function) or "").partition("\nArgs:")[0])
        if function is learning:
            add_recipe_arguments(benchmark)
        benchmark.add_function_arguments(function)
        benchmark.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
        benchmarks.add_subcommand(name, benchmark, help=title_of(function))
    if words[:1] == ["learning"]:
        words = with_recipe(words)
    elif words[:1] == ["step"]:
        words = _with_model_kwargs(words)
    options = parser.parse_args([*words])
    name = options.subcommand
    chosen = options[name]
    as_json = chosen.pop("json")
    if name == "learning":
        L.seed_everything(chosen.seed, verbose=False)  # before weights are drawn
        chosen = parser.instantiate(options)[name]
        for option in ("method", "config"):  # they are in the model and the data by now
            chosen.pop(option)
    result = functions[name](**chosen)
    print(result.json if as_json else result)


def _with_model_kwargs(words: Sequence[str]) -> list[str]:
    """Write arguments of the method as ``step`` takes them: ``--model.momentum 0.99`` as ``--model_kwargs {...}``.

    Args:
        words: The command line after ``benchmark``.
    """
    left: list[str] = []
    arguments: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not option.startswith("--model."):
            left.append(word)
            continue
        *parents, name = option.removeprefix("--model.").replace("-", "_").split(".")
        place: dict[str, Any] = arguments
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = yaml.safe_load(value if equals else next(rest, ""))
    return [*left, "--model_kwargs", json.dumps(arguments)] if arguments else left
