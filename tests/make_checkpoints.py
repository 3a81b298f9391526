"""Make a small checkpoint of every method, and record how a run continues from it.

Run once, with the package as of commit c6349a2, before its parts were renamed:

    PYTHONPATH=<checkout of that commit> python tests/make_checkpoints.py tests/checkpoints_before_1

The checkpoints stand for the runs that users have, so newer code never makes them again. How a run continues was
recorded again where views or steps of a method now follow its released code. Tests import ``resumed`` and ``features``.

Each method trains for three steps and is saved in the middle of an epoch. Before saving, weights, buffers and
optimizer moments are replaced by pieces of one short row of numbers: 14 MB compress to less than 200 kB.
"""

import json
import math
import os
import re
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

import ssl_lightning
from ssl_lightning import BEiT, FakeData, ImageTokenizer, LinearProbe, SSLModule, SwAV, ViewSpec
from ssl_lightning.checkpoints import load_backbone
from tests.small import METHODS, small, trainer

SAVED, LAST = 3, 6
"""Optimizer steps before and after the interruption; an epoch has 4."""

MOMENT = 2**-10
"""In the files, the first moments are this multiple of their parameter."""

TOKENIZER = "ImageTokenizer.ckpt"
CROPS = [ViewSpec(size=32, count=2), ViewSpec(size=16, count=2)]


class Watch(L.Callback):
    """The state at the first step, and all losses."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.losses: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def training(folder: Path, *callbacks: L.Callback) -> L.Trainer:
    """A trainer for six steps."""
    return trainer(folder, max_epochs=2, max_steps=LAST, callbacks=list(callbacks))


def data(method: type[SSLModule]) -> FakeData:
    """64 images in batches of 16, with local crops for the methods that take them."""
    return FakeData(batch_size=16, seed=0, views=CROPS if method.local_views else None)


def resumed(path: Path, *callbacks: L.Callback) -> dict[str, Any]:
    """Continue a run from its checkpoint, and return what came of it, under names that do not change with the code.

    Call it from the folder of the checkpoints: BEiT's names its tokenizer by a relative path.
    """
    file = torch.load(path, weights_only=True)
    method: type[SSLModule] = getattr(ssl_lightning, file["method"])
    torch.manual_seed(1)  # not the seed of the run: that comes from the checkpoint
    module = method(**file["hyper_parameters"])
    watch, probe = Watch(), LinearProbe()
    running = training(path.parent, watch, probe, *callbacks)
    running.fit(module, data(method), ckpt_path=str(path))
    state = module.state_dict()
    assert probe.head is not None
    return {
        "losses": watch.losses,
        "global_step": running.global_step,
        "epoch": running.current_epoch,
        "moved": moved(watch.before, state),
        "written": {name.partition(".")[0]: int(n) for name, n in state.items() if name.endswith("_extra_state")},
        "probe": float(probe.head[1].weight.detach().norm()),
    }


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """How far weights and buffers moved, summed over all names that share the first word: backbone, teacher, ..."""
    squares: dict[str, float] = {}
    for name, value in after.items():
        if value.is_floating_point() and "running" not in name:
            part = re.split(r"[._]", name)[0]
            squares[part] = squares.get(part, 0.0) + float((value - before[name]).double().square().sum())
    return {part: math.sqrt(square) for part, square in squares.items()}


def features(path: Path) -> list[list[float]]:
    """The first features of two images."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load_backbone(path)(images)[:, :6].tolist()


# Only to make the files


class Save(L.Callback):
    """Makes the state compressible, saves it in the middle of the first epoch, and stops."""

    def __init__(self, path: Path, watch: Watch, probe: LinearProbe) -> None:
        self.path, self.watch, self.probe = path, watch, probe

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == SAVED:
            before = self.watch.before
            fill({name: value for name, value in pl_module.state_dict().items() if moves(before[name], value)})
            fill_moments(trainer.optimizers[0])
            assert self.probe.head is not None
            fill(self.probe.head.state_dict())
            fill_moments(self.probe.optimizer)
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def moves(before: Tensor, after: Tensor) -> bool:
    """Whether training changed a weight or buffer. Constants, such as fixed positions, stay as they are."""
    return before.shape != after.shape or not torch.equal(before, after)


@torch.no_grad()
def fill(state: dict[str, Tensor]) -> None:
    """Replace tensors by pieces of one row of numbers, scaled to about their mean and standard deviation."""
    random = np.random.Generator(np.random.Philox(key=0))
    row = torch.from_numpy(np.clip(np.round(random.standard_normal(1021) * 16), -48, 48) / 16)  # few digits
    for number, (name, value) in enumerate(state.items()):
        if not value.is_floating_point() or value.ndim == 0:
            continue
        in_memory = value.as_strided((value.numel(),), (1,))  # where channels-last weights have another order
        numbers = row[(torch.arange(value.numel()) + 211 * number) % len(row)]  # no two start at the same place
        norms = value.norm(dim=-1, keepdim=True)
        if name.endswith("running_var"):
            in_memory.fill_(power_of_two(value.mean()))
        elif value.ndim > 1 and ((norms == 0) | ((norms - 1).abs() < 1e-4)).all():  # rows of a queue or memory
            signs = torch.where(numbers.view(value.shape) < 0, -1.0, 1.0)
            value.copy_(signs / math.sqrt(value.shape[-1]) * (norms > 0))
        elif (value >= 0).all():  # weights of norms, usage of tokens
            in_memory.copy_(power_of_two(value.mean()) * (1 + numbers / 8))
        else:
            mean = power_of_two(value.mean()) if value.mean().abs() > 2 * value.std() else 0.0
            deviation = max(2**-5, power_of_two(value.std()))  # less, and all images have the same features
            in_memory.copy_(mean + deviation * numbers)


@torch.no_grad()
def fill_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the first moments a multiple of their parameter, so that a test sees when two parameters swap theirs."""
    for parameter, moments in optimizer.state.items():
        if moments:
            squares = max(2**-30, power_of_two(moments["exp_avg_sq"].mean()))  # less, and rounding errors move weights
            moments["exp_avg_sq"].fill_(squares)
            moments["exp_avg"].copy_(MOMENT * parameter)


def power_of_two(value: Any) -> float:
    """The nearest power of two, with the same sign. Numbers multiplied by it keep their digits."""
    return math.copysign(2.0 ** round(math.log2(abs(value))), value) if value else 0.0


def make(method: type[SSLModule], folder: Path) -> Path:
    """Train a method for three steps, and save it."""
    more: dict[str, Any] = {"queue_length": 16, "queue_start_epoch": 0} if method is SwAV else {}
    more |= {"tokenizer": TOKENIZER} if method is BEiT else {}
    L.seed_everything(7, verbose=False)
    module, path = small(method, more), folder / f"{method.__name__}.ckpt"
    watch, probe = Watch(), LinearProbe()
    training(folder, watch, probe, Save(path, watch, probe)).fit(module, data(method))
    return path


def without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who made a file and when."""
    return info.replace(mtime=0, uid=0, gid=0, uname="", gname="", deep=False)


def main(name: str) -> None:
    """Write ``name.tar.xz`` and ``name.json``."""
    torch.set_num_threads(1)
    target, recorded = Path(name).resolve(), {}
    with tempfile.TemporaryDirectory() as folder, tarfile.open(f"{target}.tar.xz", "w:xz", preset=9) as archive:
        os.chdir(folder)
        for method in sorted(METHODS, key=lambda method: method is not ImageTokenizer):  # BEiT needs its checkpoint
            path = make(method, Path(folder))
            archive.add(path, path.name, filter=without_owner)
            recorded[method.__name__] = {**resumed(path), "features": features(path)}
    Path(f"{target}.json").write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
