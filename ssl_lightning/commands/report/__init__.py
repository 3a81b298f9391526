"""The command ``report``: a run on one page."""

import base64
import json
import math
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ssl_lightning.checkpoints.files import replacing
from ssl_lightning.commands.compare import Point, Run, read
from ssl_lightning.errors import UserError

_COLORS = ("#4c7fb8", "#d9863d", "#56a06b", "#9276c0", "#cc5f5f", "#3f9c9c", "#b0883f", "#8a9099")
_GRAY = _COLORS[-1]
_POINTS = 2000
"""Most points of a curve in the page; of more, the smallest and the largest of each stretch are kept."""
_BARS = 100
_PICTURES = 24
"""Most pictures of a name in the page, the newest among them."""
_SILENCE = 600
"""Seconds without a sign after which a run without an end no longer counts as running."""

_TIMES = {
    "loader": "waiting for images",
    "augment": "transfer, augmentation",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer, teacher",
}
_PROBES = {"val/knn_top1": "kNN top-1", "val/linear_top1": "linear top-1", "val/linear_top5": "linear top-5"}
_NOTES = {
    "health/rankme": "effective rank of the features",
    "health/alpha_req": "how fast their spectrum decays",
    "health/feature_std": "their spread: 0 is collapse",
    "health/uniformity": "lower is more even on the sphere",
    "health/alignment": "distance of two views of an image",
    "health/teacher_agreement": "cosine of teacher and student",
    "health/teacher_entropy": "of the teacher's assignments",
    "health/prototypes_in_use": "share of the prototypes that are chosen",
    "health/queue_age": "steps since the keys were made",
    "health/masked_patch_error": "of the hidden patches",
    "train/memory_gb": "most that the GPU has held",
}


def report(run: str, output: str = "report.html") -> Path:
    """Write a run as one HTML file that needs nothing else.

    Args:
        run: Folder of a run, or that above its versions for the newest.
        output: The page to write.

    Returns:
        Its path.

    Raises:
        UserError: There is no such run, or it has logged nothing yet.
    """
    target, folder = Path(output), _folder(run)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise UserError(f"--output {output}: name a file in a folder that exists, e.g. report.html.")
    record = _Record.of(folder)
    if not record.run.metrics:
        raise UserError(
            f"{folder} has no metrics yet: wait for its first logged step (trainer.log_every_n_steps), or let "
            "--watch wait for it; a run with trainer.logger false writes none."
        )
    page = _page(record)
    try:
        with replacing(target) as file:
            file.write(page.encode())
    except OSError as error:
        raise UserError(f"cannot write {target} ({error}); choose another --output.") from error
    return target


def watch(run: str, port: int = 0) -> None:
    """Serve the page of a run to this machine alone, until Ctrl-C; it renews itself as the run goes on.

    Args:
        run: Folder of a run, or that above its versions for the newest.
        port: Port; 0 is a free one.

    Raises:
        UserError: There is no such run, or the port is taken.
    """
    folder = _folder(run)
    _libraries()  # say now if they are missing
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(folder))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: {error}; choose another one, or leave it out for a free one.") from error
    with server:
        print(f"{folder} at http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


# Reading


@dataclass
class _Record:
    """What the folder of a run tells.

    Args:
        folder: The folder.
        run: What ``compare`` reads of it.
        starts: Its ``environment.json``; empty for a run that wrote none.
    """

    folder: Path
    run: Run
    starts: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> "_Record":
        """Read it."""
        starts: list[dict[str, Any]] = []
        with suppress(OSError, ValueError):
            starts = json.loads((folder / "environment.json").read_text())
        run = read(folder, "/".join(folder.resolve().parts[-2:]))
        run.metrics = {key: _onward(points) for key, points in run.metrics.items()}
        return cls(folder, run, starts)

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        points = self.run.metrics.get(key)
        return points[-1].value if points else None

    @property
    def chance_loss(self) -> float | None:
        """The loss of a model that has learnt nothing, if the run wrote it."""
        found = [start["chance_loss"] for start in self.starts if start.get("chance_loss") is not None]
        return found[-1] if found else None

    @property
    def epochs(self) -> tuple[int, int | None]:
        """The epoch at hand, and how many are planned."""
        logged = [point.epoch for points in self.run.metrics.values() for point in points if point.epoch is not None]
        planned = self.run.row["epochs"] or (self.starts[-1].get("epochs") if self.starts else None)
        return max(logged, default=-1) + 1, planned

    @property
    def last_sign(self) -> float:
        """When the run wrote something for the last time."""
        files = [self.folder / name for name in ("metrics.csv", "environment.json", "config.yaml", "warnings.txt")]
        return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)

    @property
    def state(self) -> tuple[str, str]:
        """``finished``, ``running`` or ``stopped``, and what is known about it."""
        if self.starts and "end" in self.starts[-1]:
            end = self.starts[-1]["end"]
            return "finished" if end == "finished" else "stopped", "" if end == "finished" else end
        if time.time() - self.last_sign < _SILENCE:
            return "running", ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.last_sign))
        done, planned = self.epochs
        if not self.starts and planned is not None and done >= planned:
            return "finished", ""
        return "stopped", f"without a word; last sign {when}"

    @property
    def seconds(self) -> float | None:
        """How long it has trained, over all its starts."""
        spans = [(_seconds(start["started"]), _seconds(start.get("ended", ""))) for start in self.starts]
        if not spans or any(end is None for _, end in spans[:-1]):  # one was killed: when, nobody knows
            return None
        return sum((self.last_sign if end is None else end) - begin for begin, end in spans if begin is not None)


def _folder(run: str) -> Path:
    """The folder of a run, or the newest below it."""
    root = Path(run)
    if not root.exists():
        raise UserError(f"{run} does not exist; give the folder of a run, e.g. runs/SimCLR or runs/SimCLR/version_0.")
    root = root.parent if root.is_file() else root
    signs = ("metrics.csv", "config.yaml", "environment.json")
    for folders in ([root], [path for path in root.iterdir() if path.is_dir()]):
        found = {folder: [folder / sign for sign in signs if (folder / sign).is_file()] for folder in folders}
        if runs := {folder: max(file.stat().st_mtime for file in files) for folder, files in found.items() if files}:
            return max(runs, key=lambda folder: runs[folder])
    raise UserError(
        f"{run} is no run of fit: it holds no metrics.csv and no config.yaml, nor does a folder in it. "
        "Give runs/<name>/version_<n>, or runs/<name> for its newest version."
    )


def _onward(points: Sequence[Point]) -> list[Point]:
    """The curve without what a resumed run made again."""
    kept: list[Point] = []
    for point in points:
        while kept and kept[-1].step >= point.step:
            kept.pop()
        kept.append(point)
    return kept


def _seconds(moment: str) -> float | None:
    with suppress(ValueError):
        return datetime.strptime(moment, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return None


# What the page shows


def _summary(record: _Record) -> list[tuple[str, str, str]]:
    """Facts: name, value, and a remark."""
    row, (done, planned) = record.run.row, record.epochs
    start = record.starts[-1] if record.starts else {}
    data = start.get("data") or {}
    data_name = data.get("data") or str((record.run.config.get("data") or {}).get("class_path", "")).rpartition(".")[2]
    counts = [f"{data[key]:,} {key}" for key in ("images", "classes") if data.get(key)]
    facts = [
        ("method", row.get("method") or start.get("method"), ""),
        ("backbone", row.get("backbone") or "resnet50", ""),
        ("data", data_name, ", ".join(counts)),
        ("epoch", str(done), f"of {planned}" if planned else ""),
    ]
    if (loss := record.last("train/loss")) is not None:
        facts.append(("loss", f"{loss:.4g}", "" if record.chance_loss is None else f"chance {record.chance_loss:.4g}"))
    for key, name in [*_PROBES.items()][:2]:
        if points := record.run.metrics.get(key):
            best = max(points, key=lambda point: point.value)
            after = "" if best.epoch is None else f", epoch {best.epoch + 1}"
            remark = "" if best.value == points[-1].value else f"best {100 * best.value:.1f} %{after}"
            facts.append((name, f"{100 * points[-1].value:.1f} %", remark))
    if record.seconds is not None:
        facts.append(("time", _duration(record.seconds), f"in {len(record.starts)} starts" * (len(record.starts) > 1)))
    hours = record.last("train/hours_left")
    if record.state[0] == "running" and hours is not None:
        facts.append(("time left", _duration(3600 * hours), "at this pace"))
    if rates := sorted(point.value for point in record.run.metrics.get("train/images_per_second", [])):
        facts.append(("images per second", f"{rates[len(rates) // 2]:,.0f}", "median"))
    for name, value in row.items():
        if isinstance(value, str) and "±" in value:  # evaluations
            facts.append((name.removesuffix(", %"), f"{value} %", "evaluated"))
    return [(name, str(value), remark) for name, value, remark in facts if value]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _events(record: _Record) -> list[dict[str, Any]]:
    """Warnings, starts and ends, in their order."""
    events: list[dict[str, Any]] = []
    for number, start in enumerate(record.starts):
        if number:
            text = f"went on at step {start['step']} on {start['hardware']['machine']}"
            events.append({"time": start["started"], "text": text})
        if start.get("end", "finished") != "finished":
            events.append({"time": start["ended"], "text": start["end"], "bad": True})
    with suppress(OSError):
        for line in (record.folder / "warnings.txt").read_text(encoding="utf-8", errors="replace").splitlines():
            moment, step, text = [*line.split("\t", 2), "", ""][:3]
            events.append({"time": moment, "step": step, "text": text, "bad": True})
    if not any("LossFloorAlarm" in event["text"] for event in events):
        for point in record.run.metrics.get("health/alarm", []):
            text = f"LossFloorAlarm: nothing was learnt any more at step {point.step}"
            events.append({"time": "", "step": point.step, "text": text, "bad": True})
    for file in sorted(record.folder.glob("unreadable-*.txt")):
        lines = file.read_text(errors="replace").splitlines()
        text = f"{len(lines)} images could not be read and were left out ({file.name})"
        events.append({"time": "", "text": text, "bad": True, "lines": lines[:100]})
    return [
        {**event, "time": event["time"][:19].replace("T", " ")} for event in sorted(events, key=lambda one: one["time"])
    ]


@dataclass
class _Chart:
    title: str
    traces: list[dict[str, Any]]
    note: str = ""
    wide: bool = False
    layout: dict[str, Any] = field(default_factory=dict)

    def figure(self, graph_objects: Any) -> dict[str, Any]:
        """What Plotly draws; a wrong name in it is an error here."""
        base = {"xaxis": {"title": {"text": "step"}}, "showlegend": len(self.traces) > 1}
        layout = {**base, **self.layout, "template": "none"}
        return graph_objects.Figure(self.traces, layout).to_plotly_json()


def _sections(record: _Record) -> dict[str, list[_Chart]]:
    """The charts of what was logged, by section."""
    left = {key: points for key, points in record.run.metrics.items() if key != "health/alarm"}

    def take(wanted: Callable[[str], bool]) -> dict[str, list[Point]]:
        return {key: left.pop(key) for key in [*left] if wanted(key)}

    def several(title: str, found: dict[str, list[Point]], **more: Any) -> list[_Chart]:
        return [_Chart(title, _lines(found), **more)] if found else []

    def each(found: dict[str, list[Point]]) -> list[_Chart]:
        return [
            _Chart(key.partition("/")[2].replace("_", " ") or key, _lines({key: points}), _NOTES.get(key, ""))
            for key, points in sorted(found.items())
        ]

    def named(titles: dict[str, str]) -> dict[str, list[Point]]:
        return {title: left.pop(key) for key, title in titles.items() if key in left}

    loss = several("Loss", named({"train/loss": "loss"}), wide=True)
    if loss and record.chance_loss is not None:
        _add_chance(loss[0], record.chance_loss)
    percent = {"layout": {"yaxis": {"tickformat": ".0%"}}}
    health = each(take(lambda key: key.startswith("health/")))
    decay = take(lambda key: key.startswith("lr-") and key.endswith("-weight_decay"))
    other_momentum = take(lambda key: key.startswith("lr-") and key.endswith("-momentum"))
    rates = take(lambda key: key.startswith("lr-"))
    split = take(lambda key: key.startswith("time/"))
    left.pop("train/hours_left", None)
    if split:  # tells more
        left.pop("train/loader_wait", None)
    sections = {
        "Learning": [*loss, *several("Probes", named(_PROBES), wide=True, **percent)],
        "Health of the features": health,
        "Schedules": [
            *several("Learning rate", _merged(rates)),
            *several("Weight decay", _merged(decay)),
            *several("Momentum of the optimizer", _merged(other_momentum)),
            *several("Momentum of the teacher", named({"train/teacher_momentum": "momentum"})),
        ],
        "Speed": [
            *_time_split(split),
            *several("Images per second", named({"train/images_per_second": "images per second"}), wide=True),
            *each(take(lambda key: key in ("train/memory_gb", "train/loader_wait"))),
        ],
        "Further metrics": each(left),
    }
    return {title: charts for title, charts in sections.items() if charts}


def _lines(found: dict[str, list[Point]]) -> list[dict[str, Any]]:
    return [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(points) < 40 else "lines",
            "name": name,
            "x": [point.step for point in points],
            "y": [point.value if math.isfinite(point.value) else None for point in points],  # JSON has no nan
            "customdata": ["" if point.epoch is None else f", epoch {point.epoch + 1}" for point in points],
            "hovertemplate": f"{_plain(name)} <b>%{{y}}</b><br>step %{{x:,}}%{{customdata}}<extra></extra>",
            "line": {"color": color, "width": 2},
            "marker": {"size": 5},
        }
        for (name, points), color in zip(
            ((name, _thinned(points)) for name, points in found.items()), _COLORS * len(found), strict=False
        )
    ]


def _add_chance(chart: _Chart, chance: float) -> None:
    steps = chart.traces[0]["x"]
    chart.traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "chance",
            "x": [steps[0], steps[-1]],
            "y": [chance, chance],
            "hovertemplate": "a model that has learnt nothing <b>%{y:.4g}</b><extra></extra>",
            "line": {"color": _GRAY, "width": 1.5, "dash": "dash"},
        }
    )


def _plain(name: str) -> str:
    """A name that Plotly takes for no markup."""
    return name.replace("<", "&lt;").replace("%{", "{")


def _thinned(points: list[Point]) -> list[Point]:
    """At most so many points: the smallest and the largest of each stretch, and the last."""
    if len(points) <= _POINTS:
        return points
    kept: list[Point] = []
    length = -(-2 * len(points) // (_POINTS - 2))
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        ends = {min(stretch, key=lambda point: point.value), max(stretch, key=lambda point: point.value)}
        kept += sorted(ends, key=lambda point: point.step)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _merged(found: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """Parameter groups of equal values together, under short names."""
    names: dict[tuple[Point, ...], list[str]] = {}
    for key, points in sorted(found.items()):
        name = key.removeprefix("lr-").removesuffix("-weight_decay").removesuffix("-momentum")
        names.setdefault(tuple(points), []).append(name.replace("/pg", ", group "))
    return {(" = ".join(same) if len(names) > 1 else same[0]): [*points] for points, same in names.items()}


def _time_split(found: dict[str, list[Point]]) -> list[_Chart]:
    """Shares of the time, averaged over epochs, as bars upon each other."""
    epochs = {point.epoch for points in found.values() for point in points if point.epoch is not None}
    if not epochs:
        return []
    per_bar = -(-(max(epochs) + 1) // _BARS)
    bars = sorted({epoch // per_bar for epoch in epochs})
    shares: dict[str, list[float]] = {}
    for phase, title in _TIMES.items():
        of_bar: dict[int, list[float]] = {bar: [] for bar in bars}
        for point in found.get(f"time/{phase}", []):
            if point.epoch is not None:
                of_bar[point.epoch // per_bar].append(point.value)
        shares[title] = [sum(values) / len(values) if values else 0.0 for values in of_bar.values()]
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
    return [_Chart("Where the time goes", traces, wide=True, layout=layout)]


def _pictures(folder: Path) -> list[dict[str, Any]]:
    """Pictures by name, the oldest first, as data URIs; one that is being written is left out."""
    series: dict[str, list[tuple[str, Path]]] = {"views": [("when training started", folder / "views.png")]}
    for place in sorted(path for path in (folder / "pictures").glob("*") if path.is_dir()):
        drawn = sorted((file for file in place.glob("*.png") if file.stem.isdigit()), key=lambda file: int(file.stem))
        series[place.name.replace("_", " ")] = [(f"epoch {int(file.stem)}", file) for file in drawn]
    found: list[dict[str, Any]] = []
    for name, every in series.items():
        last, most = len(every) - 1, min(len(every), _PICTURES) - 1
        chosen = [every[number * last // max(1, most)] for number in range(most + 1)]
        pairs = [(label, _data_uri(path)) for label, path in chosen]
        if shots := [(label, uri) for label, uri in pairs if uri is not None]:
            found.append({"name": name, "shots": shots, "all": len(every)})
    return found


def _data_uri(file: Path) -> str | None:
    with suppress(OSError, SyntaxError, ValueError):  # what Pillow raises at half a picture
        content = file.read_bytes()
        with Image.open(BytesIO(content)) as image:
            image.verify()
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return None


# The page


def _page(record: _Record, stamp: str = "", whole: bool = True) -> str:
    """The page as HTML.

    Args:
        record: What is known of the run.
        stamp: What the files were like, for a page that is served; empty for a file.
        whole: Whether Plotly is in it.
    """
    jinja2, graph_objects, script = _libraries()
    sections = _sections(record)
    numbered = {f"plot-{a}-{b}": chart for a, part in enumerate(sections.values()) for b, chart in enumerate(part)}
    names = {id(chart): name for name, chart in numbered.items()}
    config = record.folder / "config.yaml"
    text = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    start = record.starts[-1] if record.starts else {}
    state, detail = record.state
    return template.render(
        run=record.run.name,
        state=state,
        detail=detail,
        made=time.strftime("%Y-%m-%d %H:%M:%S"),
        summary=_summary(record),
        events=_events(record),
        sections={title: [(names[id(chart)], chart) for chart in charts] for title, charts in sections.items()},
        figures={name: chart.figure(graph_objects) for name, chart in numbered.items()},
        pictures=_pictures(record.folder),
        environment={name: start[name] for name in ("hardware", "processes", "versions") if name in start},
        config=config.read_text() if config.is_file() else "",
        stamp=stamp,
        nonce=secrets.token_urlsafe(12),
        plotly=script if whole else "",
    )


def _libraries() -> tuple[Any, Any, str]:
    """Jinja2, Plotly's graph objects and its script."""
    try:
        import jinja2
        import plotly.graph_objects
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError('report needs Plotly and Jinja2; pip install "ssl_lightning[report]".') from error
    return jinja2, plotly.graph_objects, get_plotlyjs()


# Serving


def _stamp(folder: Path) -> str:
    """Changes when a file of the page does."""
    patterns = ("*.csv", "*.json", "*.txt", "*.yaml", "*.png", "pictures/*/*.png", "evaluations/*/results.json")
    stats = []
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        with suppress(OSError):
            stats.append((file.name, file.stat().st_mtime_ns, file.stat().st_size))
    return f"{hash(tuple(stats)):x}"


def _handler(folder: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers with the page, with what of it changes, or with the stamp."""

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").partition(":")[0]
            if host not in ("127.0.0.1", "localhost"):  # another site's name that leads here
                self._answer(403, "this page is for this machine alone")
            elif self.path == "/stamp":
                self._answer(200, _stamp(folder))
            elif self.path in ("/", "/live"):
                stamp = _stamp(folder)
                try:
                    self._answer(200, _page(_Record.of(folder), stamp, whole=self.path == "/"), "text/html")
                except (OSError, ValueError, UserError, yaml.YAMLError) as error:  # a file is being written
                    self._answer(503, f"{error}; trying again ...")
            else:
                self._answer(404, "there is nothing but /")

        def _answer(self, status: int, text: str, kind: str = "text/plain") -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            if status == 503:
                self.send_header("Refresh", "2")
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 # its name there
            """Say nothing of every request."""

    return Handler
