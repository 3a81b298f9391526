"""The command ``compare``: runs and their evaluations side by side."""

import csv
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ssl_lightning.arguments import SSLArgumentParser
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.results import Results, table
from ssl_lightning.runs import METRICS_FILE, RESULTS_FILE, read_config, runs_below

_CURVES = {"train/loss": "loss", "val/knn_top1": "kNN top-1, %", "val/linear_top1": "linear top-1, %"}


class Point(NamedTuple):
    """A logged value.

    Args:
        step: Optimizer steps done before the batch that logged the value.
        epoch: Epochs done before that batch; None if the epoch was not logged.
        value: The value.
    """

    step: int
    epoch: int | None
    value: float


@dataclass
class Run:
    """A run of ``fit`` with its evaluations, or an evaluation that belongs to no run."""

    name: str
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    """Every logged value, by metric."""
    config: dict[str, Any] = field(default_factory=dict)
    results: list[tuple[str, Results]] = field(default_factory=list)
    """Evaluations with the names of their folders."""

    @property
    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """The curves to compare: the last value of each epoch. Epochs count from 1, accuracies are in percent."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for key in _CURVES:
            scale = 1 if key == "train/loss" else 100
            points = self.metrics.get(key, [])
            last = {float(epoch + 1): scale * value for _, epoch, value in points if epoch is not None}
            if last:
                curves[key] = [*last.items()]
        return curves

    @property
    def row(self) -> dict[str, Any]:
        """The row of the table."""
        model, trainer = self.config.get("model") or {}, self.config.get("trainer") or {}
        arguments = model.get("init_args") or {}
        row: dict[str, Any] = {
            "run": self.name,
            "method": str(model.get("class_path", "")).rsplit(".", 1)[-1] or None,
            "backbone": arguments.get("backbone"),
            "epochs": trainer.get("max_epochs"),
        }
        if not self.config and self.results:
            backbone = self.results[0][1].backbone
            row |= {"method": backbone.get("method"), "backbone": backbone["name"]}
        for key, title in _CURVES.items():
            if points := self.curves.get(key):
                row[title] = round(points[-1][1], 2)
        for folder, results in self.results:
            number = folder.rpartition("_")[2]
            title = _title(results) + (f" ({number})" if number.isdigit() else "")
            row[f"{title}, %"] = f"{100 * results.accuracy['top1']:.1f} ± {_half_interval(results):.1f}"
        return row


@dataclass
class Comparison:
    """Runs side by side.

    Args:
        runs: The runs.
    """

    runs: list[Run]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each run."""
        rows = [run.row for run in self.runs]
        known = {key for row in rows for key, value in row.items() if value is not None}
        return [{key: value for key, value in row.items() if key in known} for row in rows]

    def __str__(self) -> str:
        return table(self.rows)

    def write_csv(self, path: Path) -> None:
        """Write the table.

        Args:
            path: The CSV file.
        """
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def draw(self, path: Path) -> None:
        """Draw the training curves, one panel for each metric.

        Args:
            path: The picture, e.g. a PNG file.

        Raises:
            UserError: No run has curves.
        """
        from matplotlib.figure import Figure

        wanted = [key for key in _CURVES if any(len(run.curves.get(key, [])) > 0 for run in self.runs)]
        if not wanted:
            raise UserError(
                "none of these runs has curves to draw; leave out --plot, or give run folders that fit wrote."
            )
        figure = Figure(figsize=(2 + 5 * len(wanted), 4), layout="constrained")
        shown: dict[str, Any] = {}
        for panel, key in zip(figure.subplots(1, len(wanted), squeeze=False)[0], wanted, strict=True):
            for number, run in enumerate(self.runs):
                if points := run.curves.get(key):
                    epochs, values = zip(*points, strict=True)
                    marker = "." * (len(points) < 3)
                    panel.plot(epochs, values, color=f"C{number % 10}", label=run.name, marker=marker)
            panel.set(xlabel="epoch", title=_CURVES[key])
            panel.grid(alpha=0.3)
            labelled = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
            shown |= labelled
        figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize="small")
        figure.savefig(path, dpi=120)


def run(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The command line after ``compare``.
    """
    parser = SSLArgumentParser(prog="ssl-lightning compare", description="Put runs and their evaluations side by side.")
    parser.add_argument(
        "runs", type=str, nargs="+", help="Run folders of fit, result folders of evaluate, or folders above them."
    )
    parser.add_argument("--csv", type=str, default=None, help="Write the table to this CSV file.")
    parser.add_argument("--plot", type=str, default=None, help="Draw the training curves to this picture, e.g. PNG.")
    options = parser.parse_args(list(words))
    comparison = compare(options.runs)
    if options.csv is not None:
        comparison.write_csv(Path(options.csv))
    if options.plot is not None:
        comparison.draw(Path(options.plot))
    print(comparison)


def compare(runs: Sequence[str]) -> Comparison:
    """Put runs side by side: the last value of their curves, and the results of their evaluations.

    Args:
        runs: Folders of ``fit`` or ``evaluate``, or folders above them.

    Raises:
        UserError: A folder holds neither runs nor evaluations.
    """
    folders = dict.fromkeys(folder for path in runs for folder in runs_below(path))
    return Comparison([read(folder, name) for folder, name in _names([*folders]).items()])


def _names(folders: list[Path]) -> dict[Path, str]:
    """Names of runs: their paths without the part they share."""
    resolved = [folder.resolve() for folder in folders]
    common = os.path.commonpath(resolved) if len(resolved) > 1 else resolved[0].parent.parent
    names = [os.path.relpath(path, common).removesuffix("/version_0") for path in resolved]
    return {folder: folder.name if name == "." else name for folder, name in zip(folders, names, strict=True)}


def read(folder: Path, name: str) -> Run:
    """Read a run, finished or not, or an evaluation that belongs to no run.

    Args:
        folder: Its folder.
        name: What to call it.
    """
    results = [(file.parent.name, Results.read(file)) for file in sorted(folder.rglob(RESULTS_FILE))]
    file = folder / METRICS_FILE
    metrics = _metrics(file.read_text(errors="replace")) if file.is_file() else {}
    return Run(name, metrics, read_config(folder), results)


def _metrics(text: str) -> dict[str, list[Point]]:
    """The values in a ``metrics.csv``, whose last line may be half written."""
    metrics: dict[str, list[Point]] = {}
    for line in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        step, epoch = line.pop("step", None), line.pop("epoch", None)
        with suppress(TypeError, ValueError):  # a run that logs a new metric rewrites the whole file
            moment = int(float(step or "")), int(float(epoch)) if epoch else None
            for key, value in line.items():
                if value:
                    metrics.setdefault(key, []).append(Point(*moment, float(value)))
    return metrics


def _title(results: Results) -> str:
    """The protocol, with the parameter that distinguishes its evaluations."""
    protocol, parameters = results.protocol, results.parameters
    details = {
        "linear": parameters.get("protocol"),
        "finetune": f"{parameters.get('protocol')} {100 * parameters.get('fraction', 1):g} %",
        "lowshot": (parameters.get("reported") or {}).get("shots"),
    }
    return f"{protocol} {details[protocol]}" if protocol in details else protocol


def _half_interval(results: Results) -> float:
    low, high = results.accuracy["interval"]
    return 100 * (high - low) / 2
