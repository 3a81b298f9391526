"""The results of an evaluation, as a table and as ``results.json``."""

import json
import math
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ssl_lightning.checkpoints import replacing
from ssl_lightning.errors import UserError
from ssl_lightning.runs import RESULTS_FILE


def interval(correct: float, total: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy, by Wilson's score (Wilson 1927).

    Args:
        correct: Fraction of correct answers, in [0, 1].
        total: Number of answers.
    """
    z = 1.959964
    center = (correct + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(correct * (1 - correct) / total + z * z / (4 * total * total))
    return max(0.0, center - half), min(1.0, center + half)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("ssl_lightning", "torch", "torchvision", "timm", "lightning")}


@dataclass
class Results:
    """The results of an evaluation.

    Args:
        protocol: Name of the evaluation, e.g. knn.
        parameters: All parameters of the evaluation.
        backbone: Where the backbone comes from: ``source``, ``name``, ``weights`` (a hash), ``method``, ...
        data: The data set, its numbers of images and classes, and how images were prepared.
        accuracy: ``top1`` in [0, 1] and its 95 % ``interval``; empty for evaluations that measure something else.
        rows: Rows of the table of results.
        seeds: Seeds of the random choices.
        seconds: Duration in seconds.
        versions: Versions of the packages.
        measures: What evaluations without an accuracy measure, by name.
    """

    protocol: str
    parameters: dict[str, Any]
    backbone: dict[str, Any]
    data: dict[str, Any]
    accuracy: dict[str, Any]
    rows: list[dict[str, Any]]
    seeds: list[int]
    seconds: float
    versions: dict[str, str] = field(default_factory=_versions)
    measures: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write ``results.json``, completely or not at all.

        Args:
            folder: Folder to write to, created if it does not exist.

        Raises:
            UserError: The file cannot be written.
        """
        path = folder / RESULTS_FILE
        try:
            with replacing(path) as file:
                file.write((json.dumps(asdict(self), indent=2, default=str) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write {path} ({error}); give another folder as --output.") from error
        return path

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a ``results.json``.

        Args:
            path: The file.

        Raises:
            UserError: The file is damaged, or no ``results.json`` of an evaluation.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not the {RESULTS_FILE} of an evaluation: {error}") from error

    @property
    def headline(self) -> str:
        """Accuracy with its confidence interval, in percent; without an accuracy, the measures."""
        if not self.accuracy:
            return ", ".join(f"{name} {_cell(value)}" for name, value in self.measures.items())
        low, high = self.accuracy["interval"]
        return f"{100 * self.accuracy['top1']:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"

    def __str__(self) -> str:
        source, data = self.backbone, self.data
        title = f"{self.protocol}: {source['name']} of {source['source']} on {data['data']}"
        counts = {"training": data["train_images"], "test": data["test_images"]}
        sizes = " and ".join(f"{count:,} {name}" for name, count in counts.items() if count) + " images"
        sizes += f", {data['classes']} classes" if data["classes"] else ""
        return f"{title}, {sizes}\n{table(self.rows)}\n{self.headline}, {self.seconds:.0f} s"


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows as text, with a column for each key.

    Args:
        rows: The rows, with the accuracies already in percent.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *[["" if row.get(key) is None else _cell(row[key]) for key in columns] for row in rows]]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
