"""The runs of a sweep: each a ``fit`` in a process of its own, so that none takes the others down."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from textwrap import shorten as shortened
from typing import Any

import torch

from ssl_lightning.checkpoints.files import replacing
from ssl_lightning.commands.compare import Run, read
from ssl_lightning.commands.sweep.grid import words_of
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.results import table
from ssl_lightning.messages import duration
from ssl_lightning.runs import LAST_CHECKPOINT, newest_checkpoint, newest_run, timestamp

TABLE_FILE, RECORD_FILE, LOG_FILE = "sweep.csv", "sweep.json", "log.txt"
_STOPPED = "stopped by SystemExit", "stopped by KeyboardInterrupt", "stopped by SIGTERMException"
_GRACE = 120.0
"""Seconds that a run has to save its checkpoint before it is killed."""


@dataclass
class Job:
    """A run of the sweep.

    Args:
        folder: Where its versions lie.
        options: The options of the grid, by name.
        state: ``new``, ``interrupted``, ``finished`` or ``failed``.
        note: Why it failed.
    """

    folder: Path
    options: dict[str, Any]
    state: str = "new"
    note: str = ""
    run: Run | None = None

    def look(self) -> None:
        """See how far it is, from what it wrote into its folder."""
        self.run = None
        with suppress(UserError):  # it has not begun
            self.run = read(newest_run(str(self.folder)), self.folder.name)
        if self.run is None or self.state == "failed":
            return
        end = str(self.run.starts[-1].get("end", "")) if self.run.starts else ""
        if end.startswith("stopped by") and not end.startswith(_STOPPED):
            self.state, self.note = "failed", end.removeprefix("stopped by ").removeprefix("UserError: ")
        else:
            self.state = "finished" if end and not end.startswith(_STOPPED) else "interrupted"

    @property
    def seconds(self) -> float:
        """How long its starts took, as far as they ended."""
        starts = self.run.starts if self.run is not None else []
        spans = [(timestamp(start["started"]), timestamp(start.get("ended", ""))) for start in starts]
        return sum(end - begin for begin, end in spans if begin is not None and end is not None)

    def value(self, metric: str) -> float | None:
        """The last value of a metric; of ``train/loss`` the mean of the last epoch.

        Args:
            metric: Its name.
        """
        points = self.run.metrics.get(metric, []) if self.run is not None else []
        if metric.startswith("train/"):
            points = [point for point in points if point.epoch == points[-1].epoch]
            return fmean(point.value for point in points) if points else None
        return points[-1].value if points else None


@dataclass
class Sweep:
    """Runs one after the other, or several at a time.

    Args:
        folder: Where the runs, the record and the table lie.
        words: Options of all runs, as words.
        jobs: The runs.
        rank: Metric to rank by; None is kNN, or RankMe where the data has no labels.
        highest: Whether a high value is good.
        budget: Seconds that the sweep may take; None is no limit.
        parallel: Number of runs at the same time.
    """

    folder: Path
    words: list[str]
    jobs: list[Job]
    rank: str | None
    highest: bool
    budget: float | None
    parallel: int
    _running: dict[int, tuple[Job, "subprocess.Popen[bytes]"]] = field(default_factory=dict)
    """By the number of the device."""

    def begin(self) -> None:
        """See what earlier sweeps in the folder did.

        Raises:
            UserError: The folder holds a sweep with other options.
        """
        record = self.folder / RECORD_FILE
        before: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            before = json.loads(record.read_text(encoding="utf-8"))
        if before and before["options"] != self.words:
            raise UserError(
                f"{self.folder} holds a sweep with other options ({' '.join(before['options'])}); give the same, or "
                "another --output."
            )
        for job in self.jobs:
            if (reason := before.get("failed", {}).get(job.folder.name)) is not None and job.folder.exists():
                job.state, job.note = "failed", reason
            job.look()

    @property
    def waiting(self) -> list[Job]:
        """The runs that are not finished and did not fail."""
        return [job for job in self.jobs if job.state in ("new", "interrupted")]

    def train(self) -> None:
        """Train what is not finished, until the budget is spent."""
        began = time.monotonic()
        waiting = self.waiting
        done = len(self.jobs) - len(waiting)
        print(f"{len(self.jobs)} runs in {self.folder}" + (f", {done} of them done" if done else ""), flush=True)
        previous = signal.signal(signal.SIGTERM, _raise_exit)
        try:
            while waiting or self._running:
                left = float("inf") if self.budget is None else self.budget - (time.monotonic() - began)
                if left <= 0:
                    print("the budget is spent; the same command goes on later", flush=True)
                    break
                for device in range(self.parallel):
                    if waiting and device not in self._running and self._fits(waiting[0], left):
                        self._start(waiting.pop(0), device)
                if not self._running:
                    print("the next run would not fit into the budget; the same command goes on later", flush=True)
                    break
                time.sleep(0.2)
                for device, (job, process) in [*self._running.items()]:
                    if process.poll() is not None:
                        del self._running[device]
                        self._end(job, process.returncode)
        finally:
            self._stop()
            self.write()
            signal.signal(signal.SIGTERM, previous)

    def _fits(self, job: Job, left: float) -> bool:
        """Whether there is time for a run that has not begun, by what the others took."""
        longest = max((other.seconds for other in self.jobs if other.state == "finished"), default=0.0)
        return job.state == "interrupted" or longest <= left

    def _start(self, job: Job, device: int) -> None:
        name, resume = job.folder.name, newest_checkpoint(job.folder, LAST_CHECKPOINT) is not None
        if not resume:
            for version in job.folder.glob("*_*/"):  # of a start that left no checkpoint
                shutil.rmtree(version, ignore_errors=True)
        job.folder.mkdir(parents=True, exist_ok=True)
        print(f"{name}: {'goes on' if resume else 'begins'}", flush=True)
        where = ["--trainer.default_root_dir", str(self.folder), "--name", name]
        words = ["fit", *self.words, *words_of(job.options), *where, *(["--ckpt_path", "last"] if resume else [])]
        with (job.folder / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ssl_lightning", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_environment(device, self.parallel)},
                start_new_session=True,  # so that Ctrl-C reaches only the sweep, which lets the runs save
            )
        self._running[device] = job, process

    def _end(self, job: Job, code: int) -> None:
        job.look()
        if code in (143, 138, -signal.SIGTERM):
            job.state = "interrupted"
        elif code != 0 or job.state != "finished":
            job.state = "failed"
            job.note = job.note or _last_error(job.folder / LOG_FILE) or f"exit code {code}"
        metric = self.metric
        value = job.value(metric)
        result = f", {metric} {value:.4g}" if value is not None else ""
        print(f"{job.folder.name}: {job.state}{f' ({job.note})' if job.note else result}", flush=True)
        self.write()

    def _stop(self) -> None:
        """Let the runs that still train save a checkpoint, and end them."""
        for _, process in self._running.values():
            process.terminate()
        deadline = time.monotonic() + _GRACE
        for job, process in self._running.values():
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            self._end(job, 0 if code == 0 else 143)
        self._running.clear()

    @property
    def metric(self) -> str:
        """The metric to rank by."""
        if self.rank is not None:
            return self.rank

        def logged(metric: str) -> bool:
            return any(job.value(metric) is not None for job in self.jobs)

        return "health/rankme" if logged("health/rankme") and not logged("val/knn_top1") else "val/knn_top1"

    @property
    def ranked(self) -> list[Job]:
        """The runs, the best first; those without a value last."""
        sign = -1 if self.highest else 1

        def place(job: Job) -> tuple[bool, bool, float]:
            value = job.value(self.metric)
            return job.state == "failed", value is None, 0.0 if value is None else sign * value

        return sorted(self.jobs, key=place)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table: a row for each run."""
        return [
            {
                "run": job.folder.name,
                "state": "not begun" if job.state == "new" else job.state,
                self.metric: job.value(self.metric),
                "minutes": round(job.seconds / 60, 2),
                **job.options,
                "note": job.note,
            }
            for job in self.ranked
        ]

    def write(self) -> None:
        """Write the table, and what the next sweep in the folder must know."""
        self.folder.mkdir(parents=True, exist_ok=True)
        failed = {job.folder.name: job.note for job in self.jobs if job.state == "failed"}
        with replacing(self.folder / RECORD_FILE) as file:
            file.write(json.dumps({"options": self.words, "failed": failed}, indent=1).encode())
        rows = self.rows
        with (self.folder / TABLE_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*dict.fromkeys(key for row in rows for key in row)])
            writer.writeheader()
            writer.writerows(rows)


def _environment(device: int, parallel: int) -> dict[str, str]:
    """Gives each of several runs that train at the same time a GPU of its own."""
    count = torch.cuda.device_count()
    if parallel == 1 or count == 0:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": seen[device % count] if len(seen) == count else str(device % count)}


def _last_error(log: Path) -> str:
    """The last message of a run: its error, or the last line of a trace."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")[:300]


def _raise_exit(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def report(sweep: Sweep) -> str:
    """What the sweep says at its end.

    Args:
        sweep: The sweep.
    """
    best = next((job for job in sweep.ranked if job.state == "finished" and job.value(sweep.metric) is not None), None)
    rows = [{**row, "note": shortened(row["note"], 60, placeholder=" ...")} for row in sweep.rows]
    lines = [table(rows), f"the table is {sweep.folder / TABLE_FILE}"]
    logged = sorted({name for job in sweep.jobs if job.run is not None for name in job.run.metrics})
    if best is not None:
        page = f"python -m ssl_lightning report {shlex.quote(str(best.folder))}"
        lines.append(f"best by {sweep.metric}: {best.folder.name}; its page: {page}")
    elif logged and sweep.metric not in logged:
        lines.append(f"no run logged {sweep.metric}; set --rank to one of {', '.join(logged)}.")
    total = sum(job.seconds for job in sweep.jobs)
    return "\n".join([*lines, f"all runs together took {duration(total)}"])
