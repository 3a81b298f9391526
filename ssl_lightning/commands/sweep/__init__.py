"""The command ``sweep``: a grid or random draws of options, trained one after the other and ranked."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ssl_lightning.arguments import SSLArgumentParser
from ssl_lightning.commands.sweep.grid import combinations, named, read_grid, words_of
from ssl_lightning.commands.sweep.runner import Job, Sweep, report
from ssl_lightning.errors import UserError

_UNITS = {"h": 3600, "m": 60, "s": 1}


def run(words: Sequence[str], check_words: Callable[[Sequence[str]], None]) -> None:
    """Run the command.

    Args:
        words: The command line after ``sweep``.
        check_words: Exits with an answer if a command line has a mistake.

    Raises:
        UserError: The sweep makes no sense.
    """
    parser = SSLArgumentParser(
        prog="ssl-lightning sweep",
        description="Train a grid or random draws of options, and rank the runs. Other options go to fit.",
    )
    parser.add_argument(
        "--grid",
        type=str,
        required=True,
        help="YAML file: options of fit with lists of values, e.g. model.temperature: [0.1, 0.2], or for --random with "
        "ranges, e.g. model.optim.base_lr: {min: 1.0e-4, max: 1.0e-2, log: true}.",
    )
    parser.add_argument("--random", type=int | None, default=None, help="Number of random draws instead of the grid.")
    parser.add_argument("--draw_seed", type=int, default=0, help="Seed of the random draws.")
    parser.add_argument(
        "--budget",
        type=str | None,
        default=None,
        help="Time for all runs, e.g. 30m or 1h30m. What does not fit is not begun, what trains then saves a "
        "checkpoint; the same command goes on later.",
    )
    parser.add_argument(
        "--rank",
        type=str | None,
        default=None,
        help="Metric to rank by, its last value: val/knn_top1, or without labels health/rankme.",
    )
    parser.add_argument("--mode", type=Literal["max", "min"], default="max", help="Whether a high or a low value wins.")
    parser.add_argument(
        "--parallel", type=int, default=1, help="Number of runs at the same time, each on a GPU of its own."
    )
    parser.add_argument("--output", type=str, default="runs/sweep", help="Folder for the runs and the table.")
    own, fit = _split(words, {action.dest for action in parser._actions} | {"h"})
    options = parser.parse_args(own)
    for name in ("random", "parallel"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1.")
    budget = None if options.budget is None else _seconds(options.budget)
    runs = named(combinations(read_grid(options.grid), options.random, options.draw_seed))
    jobs = [Job(Path(options.output) / name, chosen) for name, chosen in runs.items()]
    sweep = Sweep(Path(options.output), fit, jobs, options.rank, options.mode == "max", budget, options.parallel)
    sweep.begin()
    level = logging.root.manager.disable
    logging.disable(logging.INFO)  # each of them would say the same
    try:
        for job in sweep.waiting:
            check_words(["fit", *fit, *words_of(job.options)])
    finally:
        logging.disable(level)
    try:
        sweep.train()
    except KeyboardInterrupt:
        print(report(sweep))
        raise SystemExit(130) from None
    print(report(sweep))


def _split(words: Sequence[str], own: set[str]) -> tuple[list[str], list[str]]:
    """The words for the sweep itself, and the words for ``fit``."""
    ours: list[str] = []
    theirs: list[str] = []
    side = theirs
    for word in words:
        if word.startswith("-") and not re.match(r"-\d", word):
            side = ours if word.lstrip("-").partition("=")[0] in own else theirs
        side.append(word)
    return ours, theirs


def _seconds(text: str) -> float:
    """A length of time such as 1h30m."""
    parts = re.fullmatch(r"((?:\d+(?:\.\d+)?[hms])+)", text.strip().lower())
    if parts is None:
        raise UserError(f"--budget {text}: give hours, minutes or seconds, e.g. 2h, 30m, 1h30m or 90s.")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([hms])", parts[1]))
