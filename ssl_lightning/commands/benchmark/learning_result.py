"""What the benchmark ``learning`` measured: accuracy over minutes of both sides, as text, JSON, CSV and a picture."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any, Literal

from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.results import table

Side = Literal["ours", "lightly"]
CURVES_FILE, PICTURE_FILE = "curves.csv", "curves.png"


@dataclass(frozen=True)
class LearningPoint:
    """The state of a side at an evaluation.

    Args:
        side: ours or lightly.
        minutes: Training time so far, its data loading included.
        steps: Optimizer steps so far.
        images: Images seen so far, not counting views.
        knn_top1: kNN accuracy on the validation images, in [0, 1].
    """

    side: Side
    minutes: float
    steps: int
    images: int
    knn_top1: float


@dataclass(frozen=True)
class LearningResult:
    """What ``learning`` measured."""

    model: str
    backbone: str
    images: int
    image_size: int
    batch_size: int
    num_workers: int
    device: str
    precision: str
    minutes: float
    clock: str
    seed: int
    differences: dict[str, tuple[str, str]]
    """What differs, by name: ours, and lightly's."""
    points: Sequence[LearningPoint]

    @property
    def outcome(self) -> dict[str, float | None]:
        """See the function ``outcome``."""
        return outcome(self.points)

    @property
    def json(self) -> str:
        """Everything as JSON."""
        return dumps({**asdict(self), **self.outcome})

    def __str__(self) -> str:
        outcome = self.outcome
        ours, lightly = ([p for p in self.points if p.side == side] for side in ("ours", "lightly"))
        rows = [
            {
                "minutes": f"{mine.minutes:.2f}",
                "ours, kNN %": f"{100 * mine.knn_top1:.1f}",
                "lightly, kNN %": f"{100 * theirs.knn_top1:.1f}",
                "ours, images": f"{mine.images:,}",
                "lightly, images": f"{theirs.images:,}",
            }
            for mine, theirs in zip(ours, lightly, strict=True)
        ]
        lines = [
            f"{self.model} with {self.backbone}: {self.images:,} images of {self.image_size} px, batches of "
            f"{self.batch_size}, {self.num_workers} workers, {self.device}, {self.precision}, {self.clock} time",
            table(rows),
            _speed(outcome),
            "What differs, apart from the code:",
            *(f"  {name}: ours {own}; lightly {theirs}" for name, (own, theirs) in self.differences.items()),
            "Equal time: each side has a clock that runs while it loads images and trains, and stands still while the "
            "other side trains and both are evaluated.",
        ]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write the curves and their picture.

        Args:
            folder: Folder to write to, created if it does not exist.

        Raises:
            UserError: The folder cannot be written.
        """
        from matplotlib.figure import Figure

        with writing_to(folder):
            with (folder / CURVES_FILE).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [*asdict(self.points[0])], lineterminator="\n")
                writer.writeheader()
                writer.writerows(asdict(point) for point in self.points)
            figure = Figure(figsize=(6, 4), layout="constrained")
            panel = figure.subplots()
            draw(panel, self.points, f"{self.model}, {self.device}")
            panel.set(xlabel="minutes of training", ylabel="kNN top-1, %")
            panel.legend(loc="best")
            figure.savefig(folder / PICTURE_FILE, dpi=120)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Create a folder, unless it exists, and write to it.

    Args:
        folder: Folder to write to.

    Raises:
        UserError: It cannot be created, or what is within the context cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error}); give another folder as --output.") from error


def curve(points: Sequence[LearningPoint], side: Side) -> list[tuple[float, float]]:
    """Minutes and accuracy at each evaluation of a side.

    Args:
        points: The evaluations of both sides, in order.
        side: ours or lightly.
    """
    return [(point.minutes, point.knn_top1) for point in points if point.side == side]


def outcome(points: Sequence[LearningPoint]) -> dict[str, float | None]:
    """Final accuracies, minutes to lightly's final accuracy, and how many times as fast ours is there.

    None where a side never reaches that accuracy, or where the untrained network has it already.

    Args:
        points: The evaluations of both sides, in order.
    """
    ours, lightly = curve(points, "ours"), curve(points, "lightly")
    goal = lightly[-1][1]
    own, other = minutes_to(ours, goal), minutes_to(lightly, goal)
    return {
        "knn_top1": ours[-1][1],
        "lightly_knn_top1": goal,
        "minutes_to_lightly": own,
        "lightly_minutes_to_lightly": other,
        "times_as_fast": other / own if own and other else None,
    }


def draw(panel: Any, points: Sequence[LearningPoint], title: str) -> None:
    """Draw accuracy over minutes of both sides, and lightly's final accuracy as a dotted line.

    Args:
        panel: Axes of matplotlib.
        points: The evaluations of both sides, in order.
        title: Title of the panel.
    """
    colors: dict[Side, str] = {"ours": "C0", "lightly": "C1"}
    for side, color in colors.items():
        minutes, accuracies = zip(*curve(points, side), strict=True)
        panel.plot(minutes, [100 * accuracy for accuracy in accuracies], color=color, marker=".", label=side)
    panel.axhline(100 * curve(points, "lightly")[-1][1], color="C1", linestyle=":", linewidth=1)
    panel.set_title(title)
    panel.grid(alpha=0.3)


def minutes_to(curve: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """When a curve first reaches an accuracy, by linear interpolation; None if it never does.

    Args:
        curve: Minutes and accuracy of each evaluation, in order.
        accuracy: The accuracy to reach.

    Example:
        >>> minutes_to([(0.0, 0.3), (2.0, 0.5), (4.0, 0.6)], 0.45)
        1.5
    """
    before: tuple[float, float] | None = None
    for minutes, value in curve:
        if value >= accuracy:
            if before is None:
                return minutes
            return before[0] + (minutes - before[0]) * (accuracy - before[1]) / (value - before[1])
        before = minutes, value
    return None


def _speed(outcome: dict[str, Any]) -> str:
    goal = f"lightly's final {100 * outcome['lightly_knn_top1']:.1f} %"
    if outcome["minutes_to_lightly"] is None:
        return f"ours ended with {100 * outcome['knn_top1']:.1f} % and never reached {goal}"
    if outcome["lightly_minutes_to_lightly"] == 0:
        return f"lightly's untrained network has {goal} already: lightly learned nothing in this time"
    if outcome["minutes_to_lightly"] == 0:
        return f"our untrained network has {goal} already"
    times = f"{outcome['minutes_to_lightly']:.2f} minutes, lightly in {outcome['lightly_minutes_to_lightly']:.2f}"
    return f"ours reached {goal} in {times}: {outcome['times_as_fast']:.2f} times as fast"
