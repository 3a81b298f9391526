"""The README's table and picture of ``benchmark learning``, from ``configs/learning.csv``.

``python -m tests.learning_curves`` draws the picture; ``python -m tests.results_table`` writes the table. A row of
the file is an evaluation of one side of one method.
"""

import csv
from pathlib import Path

from matplotlib.figure import Figure

from ssl_lightning.commands.benchmark.learning import METHODS
from ssl_lightning.commands.benchmark.learning_result import LearningPoint, minutes_to

ROOT = Path(__file__).parent.parent
CURVES, PICTURE = ROOT / "configs" / "learning.csv", ROOT / ".github" / "learning.png"


def curves() -> dict[str, dict[str, list[LearningPoint]]]:
    """The evaluations of each method and side, in order."""
    found: dict[str, dict[str, list[LearningPoint]]] = {}
    with CURVES.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            point = LearningPoint(
                side=row["side"],  # type: ignore[arg-type]
                minutes=float(row["minutes"]),
                steps=int(row["steps"]),
                images=int(row["images"]),
                knn_top1=float(row["knn_top1"]),
            )
            found.setdefault(row["method"], {}).setdefault(row["side"], []).append(point)
    return found


def table() -> str:
    """A row for each method: accuracies and images of both sides at the end, and the time to lightly's accuracy."""
    lines = [
        "| | untrained, ours / lightly's | kNN, ours | kNN, lightly | images, ours / lightly "
        "| ours reaches lightly's end | lightly | times as fast |",
        "|---" * 8 + "|",
    ]
    for method, sides in curves().items():
        ours, lightly = sides["ours"], sides["lightly"]
        goal = lightly[-1].knn_top1
        needed = [minutes_to([(p.minutes, p.knn_top1) for p in side], goal) for side in (ours, lightly)]
        if None in needed or not all(needed):
            speed = ["never" if needed[0] is None else "before training", f"{needed[1]:.2f} min", ""]
        else:
            speed = [*(f"{minutes:.2f} min" for minutes in needed), f"**{needed[1] / needed[0]:.1f}**"]  # type: ignore[operator]
        cells = [f"`{METHODS[method]}`", f"{_percent(ours[0])} / {_percent(lightly[0])}"]
        cells += [_percent(ours[-1]), _percent(lightly[-1]), f"{ours[-1].images:,} / {lightly[-1].images:,}", *speed]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw() -> None:
    """Draw the picture: a panel for each method."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    for panel, (method, sides) in zip(panels.flat, curves().items(), strict=False):
        for side, color in (("ours", "C0"), ("lightly", "C1")):
            minutes, accuracies = zip(*((p.minutes, 100 * p.knn_top1) for p in sides[side]), strict=True)
            panel.plot(minutes, accuracies, color=color, marker=".", label=side)
        panel.axhline(100 * sides["lightly"][-1].knn_top1, color="C1", linestyle=":", linewidth=1)
        panel.set_title(METHODS[method])
        panel.grid(alpha=0.3)
    panels[0, 0].legend(loc="best")
    figure.supxlabel("minutes of training, one core")
    figure.supylabel("kNN top-1, %")
    figure.savefig(PICTURE, dpi=100)


def _percent(point: LearningPoint) -> str:
    return f"{100 * point.knn_top1:.1f}"


if __name__ == "__main__":
    draw()
