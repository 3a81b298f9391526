"""Which runs a sweep has: a grid, or random draws from it."""

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssl_lightning.errors import UserError

_RANGE = {"min", "max", "log"}
_OF_THE_SWEEP = {"name", "trainer.default_root_dir", "ckpt_path"}
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Range:
    """Numbers from which random draws choose.

    Args:
        low: The smallest.
        high: The largest.
        log: Whether their logarithms are equally likely, not they.
        whole: Whether they are whole numbers.
    """

    low: float
    high: float
    log: bool
    whole: bool

    def draw(self, random: np.random.Generator) -> float | int:
        """A number with three digits.

        Args:
            random: Generator.
        """
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        number = random.uniform(low, high)
        number = math.exp(number) if self.log else number
        return round(number) if self.whole else float(f"{number:.3g}")


def read_grid(path: str) -> dict[str, list[Any] | Range]:
    """The options of a grid and what each may be.

    Args:
        path: A YAML file, e.g. ``model.temperature: [0.1, 0.2]`` or ``model.optim.base_lr: {min: 1e-4, max: 1e-2}``.

    Raises:
        UserError: There is no such file, or it is no grid.
    """
    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).replace("\n", " ")
        raise UserError(f"--grid {path}: {reason}.") from error
    if not isinstance(read, dict) or not read:
        raise UserError(f"--grid {path} holds no options; write a line such as model.temperature: [0.1, 0.2, 0.5].")
    grid = {name.removeprefix("--").replace(".init_args", ""): values for name, values in _flat(read)}
    for name, values in grid.items():
        if name in _OF_THE_SWEEP:
            raise UserError(f"--grid {path}: the sweep itself sets --{name}; leave it out.")
        if values == []:
            raise UserError(f"--grid {path}: {name} has no values.")
    return {name: _choices(path, name, values) for name, values in grid.items()}


def _flat(node: dict[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value and not (value.keys() <= _RANGE):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _choices(path: str, name: str, values: Any) -> list[Any] | Range:
    if not isinstance(values, dict) or not values:
        return values if isinstance(values, list) else [values]
    try:
        low, high, log = float(values["min"]), float(values["max"]), bool(values.get("log", False))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--grid {path}: {name} needs two numbers, e.g. {{min: 1.0e-4, max: 1.0e-2}}.") from error
    if not low < high or (log and low <= 0):
        raise UserError(f"--grid {path}: {name} needs min below max{' and above 0' if log else ''}.")
    return Range(low, high, log, all(isinstance(values[end], int) for end in ("min", "max")))


def combinations(grid: dict[str, list[Any] | Range], draws: int | None, seed: int) -> list[dict[str, Any]]:
    """The options of each run; further draws leave the first ones as they are.

    Args:
        grid: What each option may be.
        draws: Number of random draws, no two alike. None is the whole grid.
        seed: Of the draws.

    Raises:
        UserError: A range has no grid.
    """
    if draws is None:
        for name, values in grid.items():
            if isinstance(values, Range):
                raise UserError(f"{name} is a range, which has no grid; set --random to a number of draws.")
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]  # type: ignore[arg-type]
    chosen: dict[str, dict[str, Any]] = {}
    for number in range(100 * draws):
        random = np.random.default_rng([seed, number])
        run = {
            name: values.draw(random) if isinstance(values, Range) else values[random.integers(len(values))]
            for name, values in grid.items()
        }
        chosen.setdefault(json.dumps(run, default=str), run)
        if len(chosen) == draws:
            break
    return [*chosen.values()]


def words_of(options: dict[str, Any]) -> list[str]:
    """The options of a run as words of the command line.

    Args:
        options: Values by option.
    """
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for name, value in options.items()
    ]


def named(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The runs by names for their folders, such as ``base_lr=0.01,temperature=0.1``.

    Args:
        runs: The options of each.
    """
    keys = [*dict.fromkeys(key for run in runs for key in run)]
    names: dict[str, dict[str, Any]] = {}
    for run in runs:
        values = (word.partition("=")[2] for word in words_of(run))
        text = ",".join(f"{_shortest(key, keys)}={value}" for key, value in zip(run, values, strict=True))
        names[_file_name(text)] = run
    return names


def _shortest(key: str, keys: list[str]) -> str:
    """The last parts of an option's name that no other option has."""
    parts = key.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)


def _file_name(text: str) -> str:
    name = re.sub(r"[^\w.=,+-]+", "-", text)
    if name == text and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{sha256(text.encode()).hexdigest()[:6]}"  # so that no two are alike
