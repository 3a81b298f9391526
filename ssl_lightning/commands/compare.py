"""The command ``compare``: runs and their evaluations side by side."""

import csv
import os
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, NamedTuple

from ssl_lightning.arguments import SSLArgumentParser
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.results import Results, table
from ssl_lightning.runs import METRICS_FILE, RESULTS_FILE, read_config, read_starts, runs_below, timestamp

RECORD_COLUMNS = (
    *("recipe", "commit", "date", "hardware", "load", "seed", "epochs", "minutes"),
    *("knn", "linear_online", "linear_offline", "first_loss", "last_loss", "chance_loss", "images_per_second"),
)
"""The columns of ``configs/results.csv``."""

_CURVES = {"train/loss": "loss", "val/knn_top1": "kNN top-1, %", "val/linear_top1": "linear top-1, %"}
_NOT_OF_THE_RECIPE = {"--data.root", "--data.download", "--name", "--seed_everything", "--trainer.default_root_dir"}
"""Options that say where the files of a run are, and its seed, which has a column of its own."""


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
    starts: list[dict[str, Any]] = field(default_factory=list)
    """Its ``environment.json``."""

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
            row |= {"method": backbone.get("method"), "backbone": backbone.get("name")}
        for key, title in _CURVES.items():
            if points := self.curves.get(key):
                row[title] = round(points[-1][1], 2)
        for folder, results in self.results:
            number = folder.rpartition("_")[2]
            title = _title(results) + (f" ({number})" if number.isdigit() else "")
            if results.accuracy:
                row[f"{title}, %"] = f"{100 * results.accuracy['top1']:.1f} ± {_half_interval(results):.1f}"
            row |= {f"{title} {name}": _number([value]) for name, value in results.measures.items()}
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

    def record(self, path: Path, load: str = "") -> None:
        """Append a row for each run to a CSV file with ``RECORD_COLUMNS``; a new file gets them as its header.

        Args:
            path: The CSV file.
            load: ``quiet``, or ``shared`` if other programs ran on the machine; empty if that is not known.

        Raises:
            UserError: The file has other columns, or none of the runs has metrics.
        """
        runs = [run for run in self.runs if run.metrics]
        if not runs:
            raise UserError(f"nothing to record: none of these folders holds a run with values in {METRICS_FILE}.")
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        header = next(csv.reader(text.splitlines()), None)
        if header is not None and header != [*RECORD_COLUMNS]:
            raise UserError(
                f"--record {path} has the columns {', '.join(header)}. "
                f"Give a new file, or one with the columns {', '.join(RECORD_COLUMNS)}."
            )
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write("\n" if text and not text.endswith("\n") else "")
            writer = csv.DictWriter(file, RECORD_COLUMNS, lineterminator="\n")
            if header is None:
                writer.writeheader()
            here = {"commit": _commit(), "date": date.today().isoformat(), "load": load}
            writer.writerows({**here, **_recorded(run)} for run in runs)

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
    parser.add_argument(
        "--record",
        type=str,
        default=None,
        help="Append a row for each run to this CSV file, with the columns of configs/results.csv, the date of today "
        "and the commit of the current folder.",
    )
    parser.add_argument(
        "--load",
        type=Literal["quiet", "shared"] | None,
        default=None,
        help="Whether other programs ran on the machine (shared) or not (quiet); a column of --record.",
    )
    options = parser.parse_args(list(words))
    comparison = compare(options.runs)
    print(comparison)
    try:
        if options.csv is not None:
            comparison.write_csv(Path(options.csv))
        if options.plot is not None:
            comparison.draw(Path(options.plot))
        if options.record is not None:
            comparison.record(Path(options.record), options.load or "")
    except (OSError, ValueError) as error:  # matplotlib does not know the format
        raise UserError(f"cannot be written: {error}") from error


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
    return Run(name, metrics, read_config(folder), results, read_starts(folder))


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


# What --record writes


def _recorded(run: Run) -> dict[str, str]:
    """The columns of a row that the folder of the run knows; empty where it does not."""
    epochs = [epoch for points in run.metrics.values() for _, epoch, _ in points if epoch is not None]
    spans = [(timestamp(start["started"]), timestamp(start.get("ended", ""))) for start in run.starts]
    minutes = [(end - begin) / 60 for begin, end in spans if begin is not None and end is not None]
    losses: dict[int | None, list[float]] = {}
    for _, epoch, loss in run.metrics.get("train/loss", []):
        losses.setdefault(epoch, []).append(loss)
    means = [fmean(values) for values in losses.values()]
    chances = [start["chance_loss"] for start in run.starts if start.get("chance_loss") is not None]
    online = {key: [100 * point.value for point in run.metrics.get(key, [])] for key in _CURVES}
    linear = [results for results in run.results if results[1].protocol == "linear"]
    linear.sort(key=lambda results: (len(results[0]), results[0]))  # linear, linear_1, ..., linear_10
    speeds = [point.value for point in run.metrics.get("train/images_per_second", [])]
    seed = run.config.get("seed_everything")
    return {
        "recipe": _recipe(run),
        "hardware": _hardware(run.starts[-1]) if run.starts else "",
        "seed": "" if seed is None else str(seed),
        "epochs": str(max(epochs) + 1) if epochs else "",
        "minutes": _number([sum(minutes)] if 0 < len(minutes) == len(spans) else []),  # a killed start has no end
        "knn": _number(online["val/knn_top1"]),
        "linear_online": _number(online["val/linear_top1"]),
        "linear_offline": _number([100 * results.accuracy["top1"] for _, results in linear]),
        "first_loss": _number(means[:1]),
        "last_loss": _number(means),
        "chance_loss": _number(chances),
        "images_per_second": _number([median(speeds)] if speeds else []),
    }


def _recipe(run: Run) -> str:
    """The recipe with the options that change it; method and backbone if the run does not know its command line."""
    command = run.starts[0].get("command", []) if run.starts else []
    options: list[list[str]] = []
    for word in command[1:]:
        if word.startswith(("--", "-c")):
            options.append([*word.split("=", 1)])
        elif options:
            options[-1].append(word)
    recipe = next((option for option in options if option[0] in ("--config", "-c") and len(option) == 2), None)
    if command[:1] != ["fit"] or recipe is None:
        return " ".join(filter(None, (run.row["method"], run.row["backbone"])))
    shipped = recipe[1].rpartition("configs/")
    changes = [option for option in options if option is not recipe and option[0] not in _NOT_OF_THE_RECIPE]
    return shlex.join(["".join(shipped[1:]), *(word for option in changes for word in option)])


def _hardware(start: dict[str, Any]) -> str:
    hardware, processes = start["hardware"], start["processes"]["processes"]
    if hardware["device"] == "cpu":
        return f"{hardware['processors']} cores of {hardware['processor']}"
    return f"{processes} x {hardware['device']}"


def _commit() -> str:
    """The commit that is checked out in the current folder; empty if there is none."""
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "rev-parse", "--short=7", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


def _number(values: Sequence[float]) -> str:
    """The last of the values with three digits; empty if there are none."""
    if not values:
        return ""
    return f"{values[-1]:.0f}" if abs(values[-1]) >= 99.95 else f"{values[-1]:#.3g}"
