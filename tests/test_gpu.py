"""What needs a GPU: ``pytest -m gpu -n 0 tests/test_gpu.py``.

The CPU takes the place of the GPU for one method, so that the checks themselves stay right.
"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_lightning import (
    DINO,
    MAE,
    DigitsData,
    ImageFolderData,
    KNNProbe,
    LinearProbe,
    Optim,
    SimCLR,
    SSLModule,
    Throughput,
)
from ssl_lightning.commands.benchmark import OperationCounter, step
from ssl_lightning.data.batches import Views
from tests.processes import FORKSERVER
from tests.small import CNN_AND_VIT, METHODS, VIT, data, small, trainer

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU (torch.cuda.is_available())"),
)


GENTLE = Optim("adamw", base_lr=1e-5, lr_scaling="none", warmup_epochs=0)
"""Steps so small that rounding errors do not grow: losses of batches of 8 images are chaotic."""


def on_each(*cases: Any) -> Any:
    """Parameters with the device last: each case on the GPU, the first also on the CPU, in the slow tests."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*rows[0], "cpu", marks=pytest.mark.slow),
        *(pytest.param(*row, "cuda", marks=GPU) for row in rows),
    ]


def on(device: str) -> dict[str, Any]:
    """Arguments of a trainer."""
    return {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1}


class Pinned(L.LightningDataModule):
    """Five batches of views that are there already, in pinned memory where there is a GPU."""

    num_classes, batch_size, train_images = 2, 8, range(16)

    def __init__(self, method: type[SSLModule]) -> None:
        super().__init__()
        sizes = [32, 32, 16, 16] if method.local_views else [32] * (method.global_views or 2)
        views = [torch.rand(8, 3, size, size) for size in sizes]
        self.batch = Views(views, torch.arange(8) % 2, torch.arange(8))

    def train_dataloader(self) -> Any:
        pinned = torch.cuda.is_available()
        return DataLoader([self.batch] * 5, batch_size=None, pin_memory=pinned)  # type: ignore[arg-type]


class NoStepWaits(L.Callback):
    """Refuses whatever makes the host wait for the device, from the second step to the last."""

    def __init__(self) -> None:
        self.steps = 0
        self._counter = OperationCounter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        on_gpu = pl_module.device.type == "cuda"
        if batch_idx == 1 and on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        elif batch_idx == 1:
            self._counter.__enter__()
        elif batch_idx == 4:
            self.steps = 3
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
            else:
                self._counter.__exit__(None, None, None)
                assert not self._counter.synchronisations


@pytest.mark.parametrize(("method", "device"), on_each(SimCLR, *METHODS))
def test_no_step_waits_for_the_gpu(method: type[SSLModule], device: str, tmp_path: Path) -> None:
    waits = NoStepWaits()
    running = trainer(tmp_path, callbacks=[LinearProbe(), KNNProbe(), Throughput(), waits], **on(device))
    try:
        running.fit(small(method), datamodule=Pinned(method))
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert waits.steps == 3


@pytest.mark.parametrize(
    ("method", "net", "precision", "device"),
    on_each(*((*case, precision) for case in CNN_AND_VIT for precision in ("bf16-mixed", "16-mixed"))),
)
def test_mixed_precision_trains(
    method: type[SSLModule], net: dict[str, Any], precision: Any, device: str, tmp_path: Path
) -> None:
    mixed: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # from its usual scale the first steps overflow and are skipped
        scaler = torch.amp.GradScaler(device, init_scale=64.0)
        mixed = {"plugins": [MixedPrecision(precision, device, scaler)]}
    losses = []
    for options in ({}, mixed):
        L.seed_everything(0, verbose=False)
        module = small(method, net, optim=GENTLE)
        trainer(tmp_path, max_steps=3, limit_val_batches=0, **options, **on(device)).fit(module, data(method))
        losses.append(module.last_loss)
        assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.05)


@pytest.mark.parametrize(("in_memory", "device"), on_each(False, True))
def test_views_are_those_of_the_cpu(in_memory: bool, device: str, photos: Path) -> None:
    """Within one step of 8 bits: the GPU may round otherwise."""
    images = ImageFolderData(str(photos), batch_size=8, image_size=32, num_workers=0, seed=0)
    digits = DigitsData(batch_size=8, seed=0, num_workers=0)
    source = digits if in_memory else images
    raw = next(iter(source.train_dataloader()))
    specs = source.view_specs
    there = raw.to(torch.device(device)).augmented(specs)
    for view, expected in zip(there.views, raw.augmented(specs).views, strict=True):
        assert view.device.type == device
        assert float((view.cpu() - expected).abs().max()) < 1 / 255 / min(specs[0].std)


@pytest.mark.parametrize(("method", "net", "device"), on_each((DINO, VIT), *CNN_AND_VIT))
def test_deterministic_training_gives_the_same_bits(
    method: type[SSLModule], net: dict[str, Any], device: str, tmp_path: Path
) -> None:
    states = []
    for _ in range(2):
        L.seed_everything(0, verbose=False)
        module = small(method, net)
        try:
            running = trainer(tmp_path, max_steps=3, deterministic=True, callbacks=[KNNProbe()], **on(device))
            running.fit(module, data(method))
        finally:
            torch.use_deterministic_algorithms(False)
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(("method", "device"), on_each(SimCLR, DINO))
def test_convolutions_are_channels_last(method: type[SSLModule], device: str, tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    module = small(method)
    convolution = next(part for part in module.backbone.modules() if isinstance(part, torch.nn.Conv2d))
    following = [part for part in module.backbone.modules() if isinstance(part, torch.nn.Conv2d)][1]
    following.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    trainer(tmp_path, max_steps=2, limit_val_batches=0, **on(device)).fit(module, data(method))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(value.is_contiguous(memory_format=torch.channels_last) for pair in seen for value in pair)


@pytest.mark.parametrize("method", [pytest.param(method, marks=GPU) for method in (SimCLR, DINO, MAE)])
def test_compiled_training_gives_nearly_the_same_loss(method: type[SSLModule], tmp_path: Path) -> None:
    """The CPU's test is in test_contract.py; it needs no compiler."""
    losses = []
    for compiled in (False, True):
        L.seed_everything(0, verbose=False)
        module = small(method, VIT, compile=compiled, optim=GENTLE)
        trainer(tmp_path, max_steps=3, limit_val_batches=0, **on("cuda")).fit(module, data(method))
        losses.append(module.last_loss)
    assert losses[1] == pytest.approx(losses[0], rel=3e-2)  # an H100 gave 1.5 % for DINO, whose temperature is 0.04


class Watched(DigitsData):
    """Digits that note whether batches come in pinned memory, and are transferred without waiting."""

    pinned: list[bool] = []  # noqa: RUF012 # one list for the test

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Look at the batch on its way."""
        self.pinned += [crop.is_pinned() for crop in getattr(batch, "crops", [])]
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


@pytest.mark.parametrize(("workers", "device"), on_each(0, 1))
def test_batches_are_transferred_from_pinned_memory(workers: int, device: str, tmp_path: Path) -> None:
    Watched.pinned.clear()
    images = Watched(batch_size=64, image_size=16, num_workers=workers, seed=0)
    trainer(tmp_path, max_steps=2, limit_val_batches=0, **on(device)).fit(small(SimCLR), images)
    assert Watched.pinned
    assert all(pinned == torch.cuda.is_available() for pinned in Watched.pinned)


@pytest.mark.parametrize(
    ("model", "net", "device"),
    on_each(*((name, {}) for name in ("SimCLR", "BYOL", "MoCoV2")), ("DINO", VIT), ("MAE", VIT)),
)
def test_a_step_costs_little_more_than_the_bare_passes(model: str, net: dict[str, Any], device: str) -> None:
    """Time and peak memory of a step next to its forward and backward passes only."""
    if device == "cpu":
        size = {"image_size": 32, "batch_size": 8, "steps": 1}
        arguments = {"backbone": "resnet10_cifar", "backbone_kwargs": {"channels": (16, 16, 16, 16)}}
    else:
        size = {"image_size": 224, "batch_size": 64, "steps": 20}
        arguments = {"backbone": "vit_small_patch16_224" if net else "resnet50"}
    result = step(model, **size, model_kwargs=arguments)  # type: ignore[arg-type]
    assert result.ours.synchronisations == 0
    assert result.ours.peak_bytes > 0
    assert result.ratios["bare_ratio"] > 0
    if device == "cuda":
        assert result.ratios["bare_ratio"] < 1.25
        assert result.ours.peak_bytes < 1.4 * result.bare.peak_bytes


def _train_together(device: str, folder: Path) -> tuple[str, list[float]]:
    module = small(SimCLR)
    trainer(folder, max_steps=2, limit_val_batches=0, strategy="ddp", **on(device)).fit(module, data(SimCLR))
    rows = torch.arange(4.0, device=device)
    parts = [torch.empty_like(rows)]
    torch.distributed.all_gather(parts, rows)
    torch.distributed.all_reduce(rows)
    return torch.distributed.get_backend(), (parts[0] + rows).tolist()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)])
def test_a_group_of_one_device_trains(device: str, tmp_path: Path) -> None:
    with FORKSERVER.Pool(1) as pool:
        backend, total = pool.apply_async(_train_together, (device, tmp_path)).get(timeout=120)
    assert backend == ("nccl" if device == "cuda" else "gloo")
    assert total == [0.0, 2.0, 4.0, 6.0]
