"""Tables of the READMEs, rendered from ``configs/results.csv``: ``python -m tests.results_table`` writes them.

In a README, such a table stands between ``<!-- NAME:begin ... -->`` and the matching ``end``. ``results`` is the whole
table of results. ``knn`` is a table of methods, whose column ``kNN`` is filled in. ``start`` compares the ways to start
from a foundation model, over seeds. ``learning`` compares with lightly, from ``configs/learning.csv``.
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from tests import learning_curves

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "configs" / "README.md", ROOT / "ssl_lightning" / "methods" / "README.md"]
"""The READMEs with rendered tables."""

_UNTRAINED = {"--model.optim.base_lr 0": "untrained", "--model.backbone pixels": "raw pixels"}
"""Names of the baselines, by the first option that makes them of a recipe."""


_CONTINUE = "configs/simclr/continue_cifar10_cpu.yaml"
_SCRATCH = f"{_CONTINUE} --model.init_from null --model.continued null"
_STARTS = {
    "untrained": f"{_SCRATCH} --model.optim.base_lr 0",
    "as it is": f"{_CONTINUE} --model.continued null --model.optim.base_lr 0",
    "from scratch": _SCRATCH,
    "distilled": "configs/distillation/continue_cifar10_cpu.yaml",
    "continued, LoRA": f"{_CONTINUE} --model.trainable lora",
    "continued": _CONTINUE,
}
"""Recipe and options of each way to start."""


def results() -> dict[str, dict[str, str]]:
    """The newest row of each recipe, by the recipe and its options; it is the last one in the file."""
    return {row["recipe"]: row for row in _rows()}


def _rows() -> list[dict[str, str]]:
    with open(ROOT / "configs" / "results.csv", newline="") as file:
        return [*csv.DictReader(file)]


def _over_seeds() -> dict[str, dict[str, str]]:
    """``results()``, with mean and standard deviation of the accuracies where the same commit has several seeds."""
    rows, newest = _rows(), results()
    for recipe, last in newest.items():
        seeds = {row["seed"]: row for row in rows if row["recipe"] == recipe and row["commit"] == last["commit"]}
        if len(seeds) > 1:
            spread = {name: _spread([row[name] for row in seeds.values()]) for name in ("knn", "linear_online")}
            newest[recipe] = {**last, **spread}
    return newest


def rendered(text: str) -> str:
    """A README with its tables as the results are now."""
    renderers: dict[str, Callable[[str], str]] = {
        "results": lambda _: _all_results(),
        "knn": _with_knn,
        "start": lambda _: _starts(),
        "learning": lambda _: learning_curves.table(),
    }
    for name, render in renderers.items():
        marked = re.compile(rf"(<!-- {name}:begin.*?-->\n)(.*?)(<!-- {name}:end -->)", re.DOTALL)
        text = marked.sub(lambda match, render=render: match[1] + render(match[2]) + match[3], text)
    return text


def _all_results() -> str:
    lines = [
        "| recipe | kNN, % | linear online, % | linear offline, % | loss, first → last epoch | chance | epochs "
        "| minutes | images/s | hardware | load | date | commit |",
        "|---" * 13 + "|",
    ]
    for recipe, row in _over_seeds().items():
        if recipe in _STARTS.values():
            continue  # a table of their own
        losses = " → ".join(filter(None, (row["first_loss"], row["last_loss"])))
        cells = [_title(recipe), row["knn"], row["linear_online"], row["linear_offline"], losses, row["chance_loss"]]
        cells += [row[column] for column in ("epochs", "minutes", "images_per_second")]
        cells += [row[column] for column in ("hardware", "load", "date", "commit")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _starts() -> str:
    """A column for each way."""
    measured = _over_seeds()
    lines = ["| | " + " | ".join(_STARTS) + " |", "|---" * (1 + len(_STARTS)) + "|"]
    for title, column in (("kNN, %", "knn"), ("linear, %", "linear_online")):
        cells = [measured[recipe][column] for recipe in _STARTS.values()]
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines) + "\n"


def _spread(numbers: list[str]) -> str:
    values = [float(number) for number in numbers if number]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def _title(recipe: str) -> str:
    file, _, options = recipe.partition(" ")
    names = [name for start, name in _UNTRAINED.items() if options.startswith(start)] or [f"`{options}`"]
    return ", ".join([f"`{file.removeprefix('configs/').removesuffix('.yaml')}`", *names[: bool(options)]])


def _with_knn(table: str) -> str:
    """Fill in the next to last column: the accuracy of the recipe ``cifar10_cpu`` of the folder in the last one."""
    measured, lines = _over_seeds(), table.splitlines()
    for number, line in enumerate(lines):
        if folder := re.search(r"`(configs/\w+)/`", line):
            cells = line.split(" | ")
            cells[-2] = measured.get(f"{folder[1]}/cifar10_cpu.yaml", {"knn": ""})["knn"]  # some were not run yet
            lines[number] = " | ".join(cells)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")
