"""The command ``compare``: runs and their evaluations side by side."""

import csv
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.results import Results, table

_CURVES = {"train/loss": "loss", "val/knn_top1": "kNN top-1, %", "val/linear_top1": "linear top-1, %"}


class Point(NamedTuple):
    """A logged value.

    Args:
        step: Optimizer steps done before the batch at hand.
        epoch: Epochs done; None where it was not logged.
        value: The value.
    """

    step: int
    epoch: int | None
    value: float


@dataclass
class Run:
    """A run of ``fit`` or an evaluation on its own, and what was evaluated of it."""

    name: str
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    """All that was logged, by its name."""
    config: dict[str, Any] = field(default_factory=dict)
    results: list[tuple[str, Results]] = field(default_factory=list)
    """Evaluations with the names of their folders."""

    @property
    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """What runs are compared by: the last value of each epoch, counted from 1; accuracies in per cent."""
        found: dict[str, list[tuple[float, float]]] = {}
        for key in _CURVES:
            scale = 1 if key == "train/loss" else 100
            points = self.metrics.get(key, [])
            last = {float(epoch + 1): scale * value for _, epoch, value in points if epoch is not None}
            if last:
                found[key] = [*last.items()]
        return found

    @property
    def row(self) -> dict[str, Any]:
        """Its row in the table."""
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
        for folder, found in self.results:
            number = folder.rpartition("_")[2]
            title = _title(found) + (f" ({number})" if number.isdigit() else "")
            row[f"{title}, %"] = f"{100 * found.accuracy['top1']:.1f} ± {_half(found):.1f}"
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
        """Draw the curves of training, one panel for each quantity.

        Args:
            path: The picture, e.g. a PNG file.

        Raises:
            UserError: No run has curves.
        """
        from matplotlib.figure import Figure

        wanted = [key for key in _CURVES if any(len(run.curves.get(key, [])) > 0 for run in self.runs)]
        if not wanted:
            raise UserError("none of these runs has curves to draw; leave out plot, or give folders of fit.")
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


def compare(runs: Sequence[str]) -> Comparison:
    """Put runs side by side: the last value of their curves, and the results of their evaluations.

    Args:
        runs: Folders of ``fit`` or ``evaluate``, or folders above them.

    Raises:
        UserError: There is nothing in a folder.
    """
    folders = [path for run in runs for path in _folders(Path(run))]
    names = _names(list(dict.fromkeys(folders)))
    return Comparison([read(folder, name) for folder, name in names.items()])


def _folders(root: Path) -> list[Path]:
    """The runs below a folder, and the evaluations that belong to none of them."""
    if not root.exists():
        raise UserError(f"{root} does not exist; give the folder of a run.")
    if root.is_file():
        root = root.parent
    curves = (path.parent for path in root.rglob("metrics.csv") if "evaluations" not in path.parts)
    fits = sorted(folder for folder in curves if not (folder / "results.json").exists())
    alone = sorted(path.parent for path in root.rglob("results.json"))
    alone = [path for path in alone if not any(fit in path.parents for fit in fits)]
    if not fits and not alone:
        raise UserError(f"there is neither a metrics.csv of fit nor a results.json of evaluate below {root}.")
    return [*fits, *alone]


def _names(folders: list[Path]) -> dict[Path, str]:
    """What is left of the paths without what they have in common."""
    resolved = [folder.resolve() for folder in folders]
    common = os.path.commonpath(resolved) if len(resolved) > 1 else resolved[0].parent.parent
    names = [os.path.relpath(path, common).removesuffix("/version_0") for path in resolved]
    return {folder: folder.name if name == "." else name for folder, name in zip(folders, names, strict=True)}


def read(folder: Path, name: str) -> Run:
    """Read a run, or an evaluation on its own, as far as it has come.

    Args:
        folder: Its folder.
        name: What to call it.
    """
    run = Run(name, results=[(path.parent.name, Results.read(path)) for path in sorted(folder.rglob("results.json"))])
    if (config := folder / "config.yaml").is_file():
        run.config = yaml.safe_load(config.read_text()) or {}
    if (metrics := folder / "metrics.csv").is_file():
        run.metrics = _metrics(metrics.read_text(errors="replace"))
    return run


def _metrics(text: str) -> dict[str, list[Point]]:
    """What a ``metrics.csv`` holds; its last line may be half written."""
    metrics: dict[str, list[Point]] = {}
    for line in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        step, epoch = line.pop("step", None), line.pop("epoch", None)
        with suppress(TypeError, ValueError):  # a run that begins to log something else rewrites the whole file
            where = int(float(step or "")), int(float(epoch)) if epoch else None
            for key, value in line.items():
                if value:
                    metrics.setdefault(key, []).append(Point(*where, float(value)))
    return metrics


def _title(found: Results) -> str:
    """The evaluation with what tells it from others of its kind."""
    parameters = found.parameters
    details = {
        "linear": parameters.get("protocol"),
        "finetune": f"{parameters.get('protocol')} {100 * parameters.get('fraction', 1):g} %",
        "lowshot": (parameters.get("reported") or {}).get("shots"),
    }
    return f"{found.protocol} {details[found.protocol]}" if found.protocol in details else found.protocol


def _half(found: Results) -> float:
    low, high = found.accuracy["interval"]
    return 100 * (high - low) / 2
