"""A record of the run: where it ran, its warnings, and how it ended."""

import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ssl_lightning.checkpoints.files import replacing
from ssl_lightning.continued import what_trains
from ssl_lightning.machine import processor_name, processors
from ssl_lightning.runs import ENVIRONMENT_FILE, WARNINGS_FILE, read_starts, run_folder

_PACKAGES = ("ssl_lightning", "torch", "lightning", "torchvision", "timm", "numpy")


class RunRecord(L.Callback):
    """Writes ``environment.json`` and ``warnings.txt`` into the run folder; the command ``report`` shows them.

    ``environment.json`` is a list with one entry for each start of the run: command line, versions, hardware,
    processes, the method's chance loss, when it started, and when and how it ended. ``warnings.txt`` has a line for
    each warning of this package: time, step and text.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._starts: list[dict[str, Any]] = []
        self._show: Callable[..., None] | None = None

    @rank_zero_only
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start recording warnings."""
        self._folder = run_folder(trainer) if stage == "fit" else None
        if self._folder is None or self._show is not None:
            return
        package, file = str(Path(__file__).parent.parent), self._folder / WARNINGS_FILE
        self._show = show = warnings.showwarning

        def note(message: Warning | str, category: Any, filename: str, *rest: Any, **more: Any) -> None:
            if filename.startswith(package):
                # failing to write is no reason to stop the run
                with suppress(OSError), file.open("a", encoding="utf-8") as lines:
                    lines.write(f"{_now()}\t{trainer.global_step}\t{' '.join(str(message).split())}\n")
            show(message, category, filename, *rest, **more)

        self._folder.mkdir(parents=True, exist_ok=True)
        warnings.showwarning = note

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write where the run takes place, after the entries of earlier starts."""
        if self._folder is None:
            return
        self._starts = read_starts(self._folder)
        data = getattr(trainer, "datamodule", None)
        self._starts.append(
            {
                "started": _now(),
                "command": sys.argv[1:],
                "step": trainer.global_step,
                "epochs": trainer.max_epochs,
                "method": type(pl_module).__name__,
                "data": getattr(data, "facts", None),
                **what_trains(pl_module, trainer.estimated_stepping_batches),
                "versions": {"python": platform.python_version(), **_versions()},
                "hardware": _hardware(pl_module.device),
                "processes": {
                    "processes": trainer.world_size,
                    "nodes": trainer.num_nodes,
                    "strategy": type(trainer.strategy).__name__,
                    "precision": trainer.precision,
                    "loading processes": getattr(trainer.train_dataloader, "num_workers", None),
                },
            }
        )
        self._write()

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *rest: Any) -> None:
        """Write the chance loss after the first batch, because it may depend on the batch."""
        if self._starts and "chance_loss" not in self._starts[-1]:
            self._starts[-1]["chance_loss"] = getattr(pl_module, "chance_loss", None)
            self._write()

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write that the run ended, and whether it ended before its last planned step."""
        planned = trainer.estimated_stepping_batches
        self._end("finished" if trainer.global_step >= planned else f"stopped early, at step {trainer.global_step}")

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the exception that ended the run."""
        message = " ".join(str(exception).split())[:300]
        self._end(f"stopped by {type(exception).__name__}" + (f": {message}" if message else ""))
        self._stop_recording()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop recording warnings."""
        self._stop_recording()

    def _stop_recording(self) -> None:
        if self._show is not None:
            warnings.showwarning, self._show = self._show, None

    def _end(self, how: str) -> None:
        if self._folder is not None and self._starts and "end" not in self._starts[-1]:
            self._starts[-1] |= {"ended": _now(), "end": how}
            self._write()

    def _write(self) -> None:
        assert self._folder is not None
        with suppress(OSError), replacing(self._folder / ENVIRONMENT_FILE) as file:
            file.write(json.dumps(self._starts, indent=1).encode())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _hardware(device: torch.device) -> dict[str, Any]:
    hardware: dict[str, Any] = {"machine": platform.node(), "system": platform.platform(), "device": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {"device": properties.name, "device memory, GB": round(properties.total_memory / 1e9, 1)}
        hardware |= {"devices of this machine": torch.cuda.device_count(), "CUDA": torch.version.cuda}
    hardware |= {"processors": processors(), "processor": processor_name()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        hardware["memory, GB"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return hardware
