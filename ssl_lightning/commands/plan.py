"""The command ``plan``: what a training run would do, before it starts."""

import inspect
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from ssl_lightning.continued import what_trains
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim

_STEPS = 3
"""Steps to take; the first step warms up and is not timed."""


@dataclass
class Plan:
    """What a training run would do.

    Args:
        rows: Values by name.
        doubts: What looks wrong, and what to change.
    """

    rows: dict[str, str] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(map(len, self.rows), default=0)
        lines = [f"{name.ljust(width)}  {value}" for name, value in self.rows.items()]
        return "\n".join([*lines, *(f"looks wrong: {doubt}" for doubt in self.doubts)])


def run(trainer: L.Trainer, model: SSLModule, datamodule: SSLDataModule) -> None:
    """Show what fit would do: steps, learning rate, parameters, measured memory and time, and what looks wrong.

    Args:
        trainer: The trainer of the run.
        model: The method.
        datamodule: The data.
    """
    planned = plan(trainer, model, datamodule)
    if trainer.is_global_zero:
        print(planned)


def plan(trainer: Any, model: Any, datamodule: Any) -> Plan:
    """Work out what a training run would do, and measure a few of its steps.

    Args:
        trainer: The trainer of the run.
        model: The method; the steps change its weights.
        datamodule: The data.
    """
    measure = _Measure()
    trainer.callbacks.append(measure)
    trainer.limit_val_batches = trainer.num_sanity_val_steps = 0
    trainer.fit(model, datamodule=datamodule)
    return measure.plan


class _Measure(L.Callback):
    def __init__(self) -> None:
        self.plan, self.times = Plan(), [0.0]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.plan.rows |= _schedule(trainer, pl_module) | _parameters(pl_module)
        self.plan.doubts += _doubts(trainer, pl_module)
        self.times = [time.perf_counter()]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.times.append(time.perf_counter())
        trainer.should_stop = len(self.times) > _STEPS

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        steps = len(self.times) - 1
        seconds = (self.times[-1] - self.times[min(1, steps - 1)]) / max(1, steps - 1)
        hours = seconds * trainer.accumulate_grad_batches * trainer.estimated_stepping_batches / 3600
        self.plan.rows |= _memory(pl_module.device)
        self.plan.rows["time"] = f"{seconds:.2f} s a batch, {hours:.2g} hours in total without validation"


def _memory(device: torch.device) -> dict[str, str]:
    """The most memory in use so far, where the platform reports it."""
    if device.type == "cuda":
        return {"memory": f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of the GPU"}
    try:
        import resource
    except ImportError:  # on Windows
        return {}
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes on macOS, kilobytes elsewhere
    return {"memory": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GB of the process"}


def _schedule(trainer: Any, module: Any) -> dict[str, str]:
    data, optim = trainer.datamodule, module.optim
    accumulated = trainer.accumulate_grad_batches
    batch = data.batch_size * trainer.world_size * accumulated
    steps = trainer.estimated_stepping_batches
    per_epoch = math.ceil(trainer.num_training_batches / accumulated)
    warmup = optim.warmup_epochs * per_epoch
    peak = optim.peak_lr(batch)
    end = optim.lr_factor(int(steps), int(steps), per_epoch) if 0 < steps < math.inf else 1.0
    parts = f"{data.batch_size} x {trainer.world_size} (processes) x {accumulated} (accumulated)"
    rows = {
        "method": f"{type(module).__name__} with {module.hparams['backbone']}",
        "views": ", ".join(f"{spec.count} of {spec.size} px" for spec in data.view_specs),
        "batch": f"{batch:,} images = {parts}",
        "steps": f"{steps:,.0f} in {trainer.max_epochs} epochs, {min(warmup, steps):,.0f} of them warm-up",
        "learning rate": f"{peak:.3g} at its peak, {peak * end:.3g} at the end ({optim.name})",
    }
    rows |= what_trains(module, steps)
    first, last = module.teacher_momentum(0.0), module.teacher_momentum(1.0)
    if first is not None:
        rows["teacher momentum"] = f"{first:g}" if first == last else f"{first:g} to {last:g}"
    if getattr(module, "queue", None) is not None:
        rows["queue"] = f"{len(module.queue.rows):,}, that is {len(module.queue.rows) / batch:.3g} steps"
    if module.chance_loss is not None:
        rows["chance loss"] = f"{module.chance_loss:.4g}"
    return rows


def _parameters(module: nn.Module) -> dict[str, str]:
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()}
    return {f"parameters of {name}": f"{count:,}" for name, count in counts.items() if count}


def _doubts(trainer: Any, module: Any) -> list[str]:
    """Settings that are far from those known to work."""
    data, optim, doubts = trainer.datamodule, module.optim, []
    default = inspect.signature(type(module).__init__).parameters.get("optim")
    recipe = default.default if default is not None and isinstance(default.default, Optim) else None
    if recipe is not None and (optim.name, optim.lr_scaling) == (recipe.name, recipe.lr_scaling):
        share = optim.base_lr / recipe.base_lr
        if not 0.1 <= share <= 10:
            doubts.append(
                f"--model.optim.base_lr {optim.base_lr:g} is {share:.2g} times the paper's {recipe.base_lr:g}"
            )
    if trainer.max_epochs and trainer.max_epochs > 0 and optim.warmup_epochs >= trainer.max_epochs:
        doubts.append(
            f"the warm-up of {optim.warmup_epochs:g} epochs is the whole training; lower --model.optim.warmup_epochs"
        )
    batch_norm = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
    if batch_norm and data.batch_size < 16:
        doubts.append(
            f"BatchNorm statistics of {data.batch_size} images are noisy; raise --data.batch_size, or use a ViT"
        )
    images = data.facts["images"]
    queue = getattr(module, "queue", None)
    if queue is not None and len(queue.rows) > images:
        doubts.append(
            f"the queue of {len(queue.rows):,} is longer than the data set of {images:,} images; "
            f"lower --model.queue_length"
        )
    side = min(data.train_images.read(0).shape[1:]) if data.train_images is not None else None
    for spec in data.view_specs:
        smallest = None if side is None else side * math.sqrt(spec.scale[0])
        if smallest is not None and smallest < spec.size / 8:
            doubts.append(
                f"crops down to {smallest:.0f} px are enlarged to {spec.size} px; raise their scale in --data.views"
            )
    return doubts
