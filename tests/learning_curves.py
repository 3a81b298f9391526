"""The README's table and picture of ``benchmark learning``, from ``configs/learning.csv``.

``python -m tests.learning_curves`` draws the picture; ``python -m tests.results_table`` writes the table. A row of
the file is an evaluation of one side of one method.
"""

import csv
from pathlib import Path

from matplotlib.figure import Figure

from ssl_lightning.commands.benchmark.learning import METHODS
from ssl_lightning.commands.benchmark.learning_result import LearningPoint, draw, outcome

ROOT = Path(__file__).parent.parent
CURVES, PICTURE = ROOT / "configs" / "learning.csv", ROOT / ".github" / "learning.png"


def curves() -> dict[str, list[LearningPoint]]:
    """The evaluations of each method, of both sides, in order."""
    found: dict[str, list[LearningPoint]] = {}
    with CURVES.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            point = LearningPoint(
                side=row["side"],  # type: ignore[arg-type]
                minutes=float(row["minutes"]),
                steps=int(row["steps"]),
                images=int(row["images"]),
                knn_top1=float(row["knn_top1"]),
            )
            found.setdefault(row["method"], []).append(point)
    return found


def table() -> str:
    """A row for each method: accuracies and images of both sides at the end, and the time to lightly's accuracy."""
    lines = [
        "| | untrained, ours / lightly's | kNN, ours | kNN, lightly | images, ours / lightly "
        "| ours reaches lightly's end | lightly | times as fast |",
        "|---" * 8 + "|",
    ]
    for method, points in curves().items():
        ours, lightly = ([point for point in points if point.side == side] for side in ("ours", "lightly"))
        found = outcome(points)
        needed, times = found["minutes_to_lightly"], found["times_as_fast"]
        cells = [f"`{METHODS[method]}`", f"{_percent(ours[0])} / {_percent(lightly[0])}"]
        cells += [_percent(ours[-1]), _percent(lightly[-1]), f"{ours[-1].images:,} / {lightly[-1].images:,}"]
        cells += ["never" if needed is None else f"{needed:.2f} min" if needed else "before training"]
        cells += [f"{found['lightly_minutes_to_lightly']:.2f} min", f"**{times:.1f}**" if times else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_all() -> None:
    """Draw the picture: a panel for each method."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    for panel, (method, points) in zip(panels.flat, curves().items(), strict=False):
        draw(panel, points, METHODS[method])
    panels[0, 0].legend(loc="best")
    figure.supxlabel("minutes of training, one core")
    figure.supylabel("kNN top-1, %")
    figure.savefig(PICTURE, dpi=100)


def _percent(point: LearningPoint) -> str:
    return f"{100 * point.knn_top1:.1f}"


if __name__ == "__main__":
    draw_all()
