"""Tables of the READMEs, rendered from ``configs/results.csv``: ``python -m tests.results_table`` writes them.

In a README, such a table stands between ``<!-- results:begin ... -->`` or ``<!-- knn:begin ... -->`` and the matching
``end``. The first is the whole table of results. The second is a table of methods, whose column ``kNN`` is filled in.
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "configs" / "README.md"]
"""The READMEs with rendered tables."""

_UNTRAINED = {"--model.optim.base_lr 0": "untrained", "--model.backbone pixels": "raw pixels"}
"""Names of the baselines, by the first option that makes them of a recipe."""


def results() -> dict[str, dict[str, str]]:
    """The newest row of each recipe, by the recipe and its options; it is the last one in the file."""
    with open(ROOT / "configs" / "results.csv", newline="") as file:
        return {row["recipe"]: row for row in csv.DictReader(file)}


def rendered(text: str) -> str:
    """A README with its tables as the results are now."""
    renderers: dict[str, Callable[[str], str]] = {"results": lambda _: _all_results(), "knn": _with_knn}
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
    for recipe, row in results().items():
        losses = " → ".join(filter(None, (row["first_loss"], row["last_loss"])))
        cells = [_title(recipe), row["knn"], row["linear_online"], row["linear_offline"], losses, row["chance_loss"]]
        cells += [row[column] for column in ("epochs", "minutes", "images_per_second")]
        cells += [row[column] for column in ("hardware", "load", "date", "commit")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _title(recipe: str) -> str:
    file, _, options = recipe.partition(" ")
    names = [name for start, name in _UNTRAINED.items() if options.startswith(start)]
    return ", ".join([f"`{file.removeprefix('configs/').removesuffix('.yaml')}`", *names])


def _with_knn(table: str) -> str:
    """Fill in the next to last column: the accuracy of the recipe ``cifar10_cpu`` of the folder in the last one."""
    measured, lines = results(), table.splitlines()
    for number, line in enumerate(lines):
        if folder := re.search(r"`(configs/\w+)/`", line):
            cells = line.split(" | ")
            cells[-2] = measured.get(f"{folder[1]}/cifar10_cpu.yaml", {"knn": ""})["knn"]  # some were not run yet
            lines[number] = " | ".join(cells)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")
