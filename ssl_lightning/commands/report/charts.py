"""The charts of a run: what was logged, as Plotly draws it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ssl_lightning.commands.compare import Point
from ssl_lightning.commands.report.history import History

_COLORS = ("#4c7fb8", "#d9863d", "#56a06b", "#9276c0", "#cc5f5f", "#3f9c9c", "#b0883f", "#8a9099")
_GRAY = _COLORS[-1]
_POINTS = 2000
"""Most points of a curve. A longer curve keeps the smallest and the largest value of each stretch."""
_BARS = 100

PROBES = {
    "val/knn_top1": "kNN top-1",
    "val/linear_top1": "linear top-1",
    "val/linear_top5": "linear top-5",
    "val/start_knn_top1": "kNN before training",
    "val/teacher_knn_top1": "kNN of the teacher",
}
_TIMES = {
    "loader": "waiting for images",
    "augment": "transfer, augmentation",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer, teacher",
}
_NOTES = {
    "health/rankme": "effective rank of the features",
    "health/alpha_req": "how fast their spectrum decays",
    "health/feature_std": "their spread: 0 is collapse",
    "health/uniformity": "lower is more even on the sphere",
    "health/blank_views": "share of the views that show nothing",
    "health/alignment": "distance of two views of an image",
    "health/teacher_agreement": "cosine of teacher and student",
    "health/teacher_entropy": "of the teacher's assignments",
    "health/prototypes_in_use": "share of the prototypes that are chosen",
    "health/queue_age": "steps since the keys were made",
    "health/masked_patch_error": "of the hidden patches",
    "health/image_agreement": "cosine of prediction and teacher, whole images",
    "health/patch_agreement": "cosine of prediction and teacher, places",
    "health/image_explained": "share of the teacher's variance, whole images",
    "health/patch_explained": "share of the teacher's variance, places",
    "health/neighbors_shared": "share of the teacher's nearest images that are the student's, too",
    "health/teacher_scale": "deviation of the teacher's features",
    "train/memory_gb": "most that the GPU has held",
}

Curves = dict[str, list[Point]]
"""Logged values by name."""


@dataclass
class Chart:
    """A chart of one or more curves.

    Args:
        title: The title.
        traces: The curves, as Plotly's traces.
        note: A remark behind the title.
        wide: Whether the chart takes half of the width.
        layout: Additions to Plotly's layout.
    """

    title: str
    traces: list[dict[str, Any]]
    note: str = ""
    wide: bool = False
    layout: dict[str, Any] = field(default_factory=dict)

    def figure(self, graph_objects: Any) -> dict[str, Any]:
        """The chart as JSON for Plotly, which checks its names.

        Args:
            graph_objects: The module ``plotly.graph_objects``.
        """
        base = {"xaxis": {"title": {"text": "step"}}, "showlegend": len(self.traces) > 1}
        layout = {**base, **self.layout, "template": "none"}
        return graph_objects.Figure(self.traces, layout).to_plotly_json()


def sections(history: History) -> dict[str, list[Chart]]:
    """The charts of a run, by section of the page.

    Args:
        history: The run.
    """
    left = {key: points for key, points in history.run.metrics.items() if key != "health/alarm"}

    def take(wanted: Callable[[str], bool]) -> Curves:
        return {key: left.pop(key) for key in [*left] if wanted(key)}

    def named(titles: dict[str, str]) -> Curves:
        return {title: left.pop(key) for key, title in titles.items() if key in left}

    loss = _together("Loss", named({"train/loss": "loss"}), wide=True)
    if loss and history.chance_loss is not None:
        _add_chance(loss[0], history.chance_loss)
    percent = {"layout": {"yaxis": {"tickformat": ".0%"}}}
    health = _separate(take(lambda key: key.startswith("health/")))
    decay = take(lambda key: key.startswith("lr-") and key.endswith("-weight_decay"))
    momentum = take(lambda key: key.startswith("lr-") and key.endswith("-momentum"))
    rates = take(lambda key: key.startswith("lr-"))
    times = take(lambda key: key.startswith("time/"))
    left.pop("train/hours_left", None)
    if times:  # which include it
        left.pop("train/loader_wait", None)
    by_section = {
        "Learning": [*loss, *_together("Probes", named(PROBES), wide=True, **percent)],
        "Health of the features": health,
        "Schedules": [
            *_together("Learning rate", _merged(rates)),
            *_together("Weight decay", _merged(decay)),
            *_together("Momentum of the optimizer", _merged(momentum)),
            *_together("Momentum of the teacher", named({"train/teacher_momentum": "momentum"})),
        ],
        "Speed": [
            *_time_shares(times),
            *_together("Images per second", named({"train/images_per_second": "images per second"}), wide=True),
            *_separate(take(lambda key: key in ("train/memory_gb", "train/loader_wait"))),
        ],
        "Further metrics": _separate(left),
    }
    return {title: charts for title, charts in by_section.items() if charts}


def _together(title: str, curves: Curves, **options: Any) -> list[Chart]:
    """One chart of all curves; none without curves."""
    return [Chart(title, _lines(curves), **options)] if curves else []


def _separate(curves: Curves) -> list[Chart]:
    """A chart for each curve."""
    return [
        Chart(key.partition("/")[2].replace("_", " ") or key, _lines({key: points}), _NOTES.get(key, ""))
        for key, points in sorted(curves.items())
    ]


def _lines(curves: Curves) -> list[dict[str, Any]]:
    thinned = {name: _thinned(points) for name, points in curves.items()}
    return [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(points) < 40 else "lines",
            "name": name,
            "x": [point.step for point in points],
            "y": [point.value if math.isfinite(point.value) else None for point in points],  # JSON has no nan
            "customdata": ["" if point.epoch is None else f", epoch {point.epoch + 1}" for point in points],
            "hovertemplate": f"{_escaped(name)} <b>%{{y}}</b><br>step %{{x:,}}%{{customdata}}<extra></extra>",
            "line": {"color": color, "width": 2},
            "marker": {"size": 5},
        }
        for (name, points), color in zip(thinned.items(), _COLORS * len(thinned), strict=False)
    ]


def _add_chance(chart: Chart, chance: float) -> None:
    steps = chart.traces[0]["x"]
    chart.traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "chance",
            "x": [steps[0], steps[-1]],
            "y": [chance, chance],
            "hovertemplate": "a model that has learned nothing <b>%{y:.4g}</b><extra></extra>",
            "line": {"color": _GRAY, "width": 1.5, "dash": "dash"},
        }
    )


def _escaped(name: str) -> str:
    """A name without characters that Plotly reads as markup."""
    return name.replace("<", "&lt;").replace("%{", "{")


def _thinned(points: list[Point]) -> list[Point]:
    """At most ``_POINTS`` points: the smallest and the largest of each stretch, and the last."""
    if len(points) <= _POINTS:
        return points
    kept: list[Point] = []
    length = -(-2 * len(points) // (_POINTS - 2))
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        ends = {min(stretch, key=lambda point: point.value), max(stretch, key=lambda point: point.value)}
        kept += sorted(ends, key=lambda point: point.step)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _merged(curves: Curves) -> Curves:
    """Parameter groups with equal values as one curve, under short names."""
    names: dict[tuple[Point, ...], list[str]] = {}
    for key, points in sorted(curves.items()):
        name = key.removeprefix("lr-").removesuffix("-weight_decay").removesuffix("-momentum")
        names.setdefault(tuple(points), []).append(name.replace("/pg", ", group "))
    return {(" = ".join(same) if len(names) > 1 else same[0]): [*points] for points, same in names.items()}


def _time_shares(curves: Curves) -> list[Chart]:
    """Shares of the time, averaged over epochs, as stacked bars."""
    epochs = {point.epoch for points in curves.values() for point in points if point.epoch is not None}
    if not epochs:
        return []
    per_bar = -(-(max(epochs) + 1) // _BARS)
    bars = sorted({epoch // per_bar for epoch in epochs})
    shares: dict[str, list[float]] = {}
    for phase, title in _TIMES.items():
        values_of: dict[int, list[float]] = {bar: [] for bar in bars}
        for point in curves.get(f"time/{phase}", []):
            if point.epoch is not None:
                values_of[point.epoch // per_bar].append(point.value)
        shares[title] = [sum(values) / len(values) if values else 0.0 for values in values_of.values()]
    rest = [max(0.0, 1 - sum(values)) for values in zip(*shares.values(), strict=True)]
    shares["other callbacks, logging"] = rest
    names = [
        f"epochs {bar * per_bar + 1} to {(bar + 1) * per_bar}" if per_bar > 1 else f"epoch {bar + 1}" for bar in bars
    ]
    colors = [*_COLORS[: len(_TIMES)], _GRAY]
    traces = [
        {
            "type": "bar",
            "name": title,
            "x": [bar * per_bar + (per_bar + 1) / 2 for bar in bars],
            "y": values,
            "customdata": names,
            "hovertemplate": f"{title} <b>%{{y:.1%}}</b><br>%{{customdata}}<extra></extra>",
            "marker": {"color": color},
        }
        for (title, values), color in zip(shares.items(), colors, strict=True)
    ]
    layout = {
        "barmode": "stack",
        "bargap": 0.15,
        "xaxis": {"title": {"text": "epoch"}},
        "yaxis": {"tickformat": ".0%", "range": [0, 1]},
        "legend": {"traceorder": "normal"},
    }
    return [Chart("Where the time goes", traces, wide=True, layout=layout)]
