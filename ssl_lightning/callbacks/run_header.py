"""The first lines of a training: what trains on what, for how long, and where the results go."""

import os
import shlex
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from ssl_lightning.callbacks.progress import planned_epochs
from ssl_lightning.continued import what_trains
from ssl_lightning.messages import duration
from ssl_lightning.optim import steps_per_epoch
from ssl_lightning.runs import run_folder


class RunHeader(L.Callback):
    """Prints device, method, batch, epochs, folder, and the command for the page of the run, before the first step.

    The data module prints its own line: how many images and classes.
    """

    def __init__(self) -> None:
        self._printed = False

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print before the first validation."""
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print, unless it has been printed."""
        if not self._printed:
            self._printed = True
            rows = header(trainer, pl_module)
            width = max(map(len, rows))
            rank_zero_info("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items()))
            if (doubt := _doubt(trainer)) is not None:
                rank_zero_warn(doubt)


def header(trainer: Any, module: Any) -> dict[str, str]:
    """The lines by their first word.

    Args:
        trainer: The trainer, once its optimizer and loaders are there.
        module: The method.
    """
    rows = {"device": _device(trainer), "method": _method(module)}
    size = getattr(trainer.datamodule, "batch_size", None)
    if size is not None:
        processes, accumulated = trainer.world_size, trainer.accumulate_grad_batches
        rows["batch"] = f"{size * processes * accumulated:,} images"
        if processes > 1 or accumulated > 1:
            factors = [f"{size:,} on each of {processes} processes"] if processes > 1 else [f"{size:,}"]
            factors += [f"{accumulated} accumulated batches"] if accumulated > 1 else []
            rows["batch"] += f", {' x '.join(factors)}"
    rows["length"] = _length(trainer)
    rows |= what_trains(module, trainer.estimated_stepping_batches)
    if trainer.global_step > 0:
        rows["resumed"] = f"in epoch {trainer.current_epoch + 1}, after {trainer.global_step:,} steps"
    if trainer.fast_dev_run:
        rows["folder"] = "none: --trainer.fast_dev_run keeps nothing"
    elif (folder := run_folder(trainer)) is not None:
        rows["folder"] = str(folder)
        rows["page"] = f"python -m ssl_lightning report {shlex.quote(str(folder))}"
    elif trainer.checkpoint_callbacks:
        rows["folder"] = str(Path(trainer.default_root_dir))
    return rows


def _device(trainer: Any) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    count = f"{trainer.world_size} processes" if trainer.world_size > 1 else "1 process"
    nodes = f" on {trainer.num_nodes} machines" if trainer.num_nodes > 1 else ""
    threads = f", {torch.get_num_threads()} of {os.cpu_count()} processors" if device.type == "cpu" else ""
    return f"{name}, {count}{nodes}{threads}, precision {trainer.precision}"


def _method(module: Any) -> str:
    name, backbone = type(module).__name__, getattr(module, "backbone", None)
    if backbone is None:
        return f"{name}: {_millions(module)} parameters"
    given = getattr(module, "hparams", {}).get("backbone")
    kind = given if isinstance(given, str) else type(backbone).__name__
    return f"{name} with {kind}: {_millions(backbone)} parameters, {_millions(module)} in all"


def _millions(module: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    return f"{count:,.{2 if count < 10 else 0}f} million"


def _length(trainer: Any) -> str:
    epochs, in_each, steps = planned_epochs(trainer), steps_per_epoch(trainer), trainer.estimated_stepping_batches
    each = f" of {_counted(int(in_each), 'step')}" if in_each < float("inf") else ""
    parts = [f"{_counted(epochs, 'epoch')}{each}" if epochs is not None else f"epochs{each} without a last one"]
    if 0 < steps < float("inf"):
        parts.append(f"{_counted(int(steps), 'step')} in all")
    timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)
    if timer is not None and timer._duration is not None:
        parts.append(f"at most {duration(timer._duration)}")
    return ", ".join(parts)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _doubt(trainer: Any) -> str | None:
    planned = trainer.estimated_stepping_batches
    if planned == float("inf"):
        return (
            "nothing says after how many steps this training ends, so learning rate, weight decay and the momentum of "
            "a teacher stay as they begin; set --trainer.max_epochs or --trainer.max_steps to give them an end."
        )
    if 0 < planned < trainer.max_steps:
        return (
            f"--trainer.max_epochs {trainer.max_epochs} ends the training after {planned:,.0f} steps, before "
            f"--trainer.max_steps {trainer.max_steps:,}; set --trainer.max_epochs to -1 to train all steps."
        )
    return None
