"""The page of a run as HTML: facts, events, charts, pictures, environment and config."""

import base64
import json
import secrets
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ssl_lightning.commands.report.charts import PROBES, sections
from ssl_lightning.commands.report.history import History
from ssl_lightning.runs import BLANK_FILE, CONFIG_FILE, ERRORS_FILE, MAP_FILE, VIEWS_FILE, picture_files

_PICTURES = 24
"""Most pictures of one kind in the page, the newest among them."""


def page_of(history: History, stamp: str = "", whole: bool = True) -> str:
    """The page as HTML.

    Args:
        history: The run.
        stamp: State of the run's files, for a page that is served; empty for a file.
        whole: Whether to include Plotly.
    """
    jinja2, graph_objects, script = libraries()
    by_section = sections(history)
    numbered = {
        f"plot-{a}-{b}": chart for a, charts in enumerate(by_section.values()) for b, chart in enumerate(charts)
    }
    names = {id(chart): name for name, chart in numbered.items()}
    config = history.folder / CONFIG_FILE
    text = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    start = history.starts[-1] if history.starts else {}
    state, detail = history.state
    explored, errors, blank = (_kept(history.folder / name) for name in (MAP_FILE, ERRORS_FILE, BLANK_FILE))
    links = {
        "kNN top-1": errors is not None and "errors",
        "blank views": blank is not None and blank["count"] and "blank",
    }
    return template.render(
        run=history.run.name,
        state=state,
        detail=detail,
        made=time.strftime("%Y-%m-%d %H:%M:%S"),
        summary=_summary(history),
        events=history.events,
        sections={title: [(names[id(chart)], chart) for chart in charts] for title, charts in by_section.items()},
        figures={name: chart.figure(graph_objects) for name, chart in numbered.items()},
        pictures=_pictures(history.folder),
        explored=explored,
        errors=errors,
        blank=blank,
        links=links,
        environment={name: start[name] for name in ("hardware", "processes", "versions") if name in start},
        config=config.read_text() if config.is_file() else "",
        stamp=stamp,
        nonce=secrets.token_urlsafe(12),
        plotly=script if whole else "",
    )


def libraries() -> tuple[Any, Any, str]:
    """Jinja2, Plotly's graph objects and Plotly's script, imported only for a page."""
    import jinja2
    import plotly.graph_objects
    from plotly.offline import get_plotlyjs

    return jinja2, plotly.graph_objects, get_plotlyjs()


def _summary(history: History) -> list[tuple[str, str, str]]:
    """Facts: name, value, and a remark."""
    row, (done, planned) = history.run.row, history.epochs
    start = history.starts[-1] if history.starts else {}
    data = start.get("data") or {}
    data_name = data.get("data") or str((history.run.config.get("data") or {}).get("class_path", "")).rpartition(".")[2]
    counts = [f"{data[key]:,} {key}" for key in ("images", "classes") if data.get(key)]
    facts = [
        ("method", row.get("method") or start.get("method"), ""),
        ("backbone", row.get("backbone") or "resnet50", ""),
        ("data", data_name, ", ".join(counts)),
        ("pairs", *(data.get("pairs") or ": ").rsplit(": ", 1)),
        ("views", data.get("transform"), "by --data.transform"),
        ("trains", start.get("trains"), "by --model.trainable"),
        ("stages", start.get("stages"), "by --model.continued"),
        ("epoch", str(done), f"of {planned}" if planned else ""),
    ]
    if (loss := history.last("train/loss")) is not None:
        chance = "" if history.chance_loss is None else f"chance {history.chance_loss:.4g}"
        facts.append(("loss", f"{loss:.4g}", chance))
    for key, name in PROBES.items():
        if key != "val/linear_top5" and (points := history.run.metrics.get(key)):
            best = max(points, key=lambda point: point.value)
            after = "" if best.epoch is None else f", epoch {best.epoch + 1}"
            remark = "" if best.value == points[-1].value else f"best {100 * best.value:.1f} %{after}"
            facts.append((name, f"{100 * points[-1].value:.1f} %", remark))
    if (blank := history.last("health/blank_views")) is not None:
        facts.append(("blank views", f"{100 * blank:.1f} %", "of the last batch"))
    if history.seconds is not None:
        starts = f"in {len(history.starts)} starts" * (len(history.starts) > 1)
        facts.append(("time", _duration(history.seconds), starts))
    hours = history.last("train/hours_left")
    if history.state[0] == "running" and hours is not None:
        facts.append(("time left", _duration(3600 * hours), "at this pace"))
    if rates := sorted(point.value for point in history.run.metrics.get("train/images_per_second", [])):
        facts.append(("images per second", f"{rates[len(rates) // 2]:,.0f}", "median"))
    for name, value in row.items():
        if isinstance(value, str) and "±" in value:  # evaluations
            facts.append((name.removesuffix(", %"), f"{value} %", "evaluated"))
    return [(name, str(value), remark) for name, value, remark in facts if value]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _pictures(folder: Path) -> list[dict[str, Any]]:
    """Pictures by name, the oldest first, as data URIs; a picture that is still being written is left out."""
    series: dict[str, list[tuple[str, Path]]] = {"views": [("when training started", folder / VIEWS_FILE)]}
    for name, files in picture_files(folder).items():
        series[name.replace("_", " ")] = [(f"epoch {epoch}", file) for epoch, file in files.items()]
    pictures: list[dict[str, Any]] = []
    for name, labelled in series.items():
        last, most = len(labelled) - 1, min(len(labelled), _PICTURES) - 1
        chosen = [labelled[number * last // max(1, most)] for number in range(most + 1)]
        shots = [(label, uri) for label, file in chosen if (uri := _data_uri(file)) is not None]
        if shots:
            pictures.append({"name": name, "shots": shots, "all": len(labelled)})
    return pictures


def _kept(file: Path) -> dict[str, Any] | None:
    """What a callback has kept for the page; None if there is nothing."""
    with suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    return None


def _data_uri(file: Path) -> str | None:
    with suppress(OSError, SyntaxError, ValueError):  # which Pillow raises for half a picture
        content = file.read_bytes()
        with Image.open(BytesIO(content)) as image:
            image.verify()
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return None
