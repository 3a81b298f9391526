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
    """95 % confidence interval of a share, by Wilson's score (Wilson 1927).

    Args:
        correct: Share of correct answers, in [0, 1].
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
        parameters: All its parameters.
        backbone: Its origin: ``source``, ``name``, ``weights`` (a hash), ``method``, ...
        data: The data set, its sizes and how images were prepared.
        accuracy: ``top1`` in [0, 1] and its 95 % ``interval``.
        rows: The table.
        seeds: Seeds of its random choices.
        seconds: Duration in seconds.
        versions: Versions of the packages.
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

    def write(self, folder: Path) -> Path:
        """Write ``results.json``, all of it or nothing.

        Args:
            folder: Its folder, created if it does not exist.

        Raises:
            UserError: It cannot be written.
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
            UserError: It is damaged or something else.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not the {RESULTS_FILE} of an evaluation: {error}") from error

    @property
    def headline(self) -> str:
        """Accuracy with its confidence interval, in percent."""
        low, high = self.accuracy["interval"]
        return f"{100 * self.accuracy['top1']:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"

    def __str__(self) -> str:
        source, data = self.backbone, self.data
        title = f"{self.protocol}: {source['name']} of {source['source']} on {data['data']}"
        sizes = f"{data['train_images']:,} training and {data['test_images']:,} test images, {data['classes']} classes"
        return f"{title}, {sizes}\n{table(self.rows)}\n{self.headline}, {self.seconds:.0f} s"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text, one column for each key.

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
