"""What the folder of a run says about its course: metrics, starts, warnings, and how it ended."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_lightning.commands.compare import Point, Run, read
from ssl_lightning.runs import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    WARNINGS_FILE,
    last_written,
    read_starts,
    timestamp,
    unreadable_lists,
)

_SILENCE = 600
"""Seconds without a new file after which a run without an end no longer counts as running."""


@dataclass
class History:
    """The course of a run so far.

    Args:
        folder: The run folder.
        run: Its metrics, config and evaluations.
        starts: Its ``environment.json``; empty for a run that wrote none.
    """

    folder: Path
    run: Run
    starts: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> "History":
        """Read a run folder.

        Args:
            folder: The run folder.
        """
        starts = read_starts(folder)
        run = read(folder, "/".join(folder.resolve().parts[-2:]))
        run.metrics = {key: _onward(points) for key, points in run.metrics.items()}
        return cls(folder, run, starts)

    def last(self, key: str) -> float | None:
        """The newest value of a metric.

        Args:
            key: The metric.
        """
        points = self.run.metrics.get(key)
        return points[-1].value if points else None

    @property
    def chance_loss(self) -> float | None:
        """The loss of a model that has learned nothing, if the run wrote it."""
        losses = [start["chance_loss"] for start in self.starts if start.get("chance_loss") is not None]
        return losses[-1] if losses else None

    @property
    def epochs(self) -> tuple[int, int | None]:
        """The current epoch, and how many are planned."""
        logged = [point.epoch for points in self.run.metrics.values() for point in points if point.epoch is not None]
        planned = self.run.row["epochs"] or (self.starts[-1].get("epochs") if self.starts else None)
        return max(logged, default=-1) + 1, planned

    @property
    def last_sign(self) -> float:
        """When the run last wrote a file."""
        return last_written(self.folder, METRICS_FILE, ENVIRONMENT_FILE, CONFIG_FILE, WARNINGS_FILE) or 0.0

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
        """How long it has trained, over all its starts; None if a start was killed, which leaves no end time."""
        spans = [(timestamp(start["started"]), timestamp(start.get("ended", ""))) for start in self.starts]
        if not spans or any(end is None for _, end in spans[:-1]):
            return None
        return sum((self.last_sign if end is None else end) - begin for begin, end in spans if begin is not None)

    @property
    def events(self) -> list[dict[str, Any]]:
        """Warnings, starts and ends, in order of time."""
        events: list[dict[str, Any]] = []
        for number, start in enumerate(self.starts):
            if number:
                text = f"went on at step {start['step']} on {start['hardware']['machine']}"
                events.append({"time": start["started"], "text": text})
            if start.get("end", "finished") != "finished":
                events.append({"time": start["ended"], "text": start["end"], "bad": True})
        with suppress(OSError):
            for line in (self.folder / WARNINGS_FILE).read_text(encoding="utf-8", errors="replace").splitlines():
                moment, step, text = [*line.split("\t", 2), "", ""][:3]
                events.append({"time": moment, "step": step, "text": text, "bad": True})
        if not any("LossFloorAlarm" in event["text"] for event in events):
            for point in self.run.metrics.get("health/alarm", []):
                text = f"LossFloorAlarm: nothing was learned any more at step {point.step}"
                events.append({"time": "", "step": point.step, "text": text, "bad": True})
        for file in unreadable_lists(self.folder):
            lines = file.read_text(errors="replace").splitlines()
            text = f"{len(lines)} images could not be read and were left out ({file.name})"
            events.append({"time": "", "text": text, "bad": True, "lines": lines[:100]})
        events.sort(key=lambda event: event["time"])
        return [{**event, "time": event["time"][:19].replace("T", " ")} for event in events]


def _onward(points: Sequence[Point]) -> list[Point]:
    """The curve without the values that a resumed run computed again."""
    kept: list[Point] = []
    for point in points:
        while kept and kept[-1].step >= point.step:
            kept.pop()
        kept.append(point)
    return kept
