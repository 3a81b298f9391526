"""The command ``check``: do several processes train exactly as one process does?"""

import logging
import os
import pickle
import warnings
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ssl_lightning.batch_norm import SyncedBatchNorm
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.distributed import free_port, reduced, world_size
from ssl_lightning.errors import UserError
from ssl_lightning.methods.base import SSLModule

Recorded = dict[str, dict[str, Tensor]]
"""Tensors by kind and name."""


@dataclass(frozen=True)
class CheckResult:
    """The largest differences between one process and several.

    Args:
        differences: Largest difference of each quantity, in the order in which training computes the quantities.
        tolerance: Largest difference that counts as equal.
        hint: A likely cause of differences.
    """

    differences: dict[str, float]
    tolerance: float
    hint: str = ""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differing

    @property
    def differing(self) -> list[str]:
        """The quantities that differ; the first is the closest to the cause."""
        return [name for name, difference in self.differences.items() if not difference <= self.tolerance]

    def __str__(self) -> str:
        width = max(map(len, self.differences))
        lines = [
            f"{name:{width}}  {difference:8.1e}  {'DIFFERS' if name in self.differing else 'equal'}"
            for name, difference in self.differences.items()
        ]
        return "\n".join([*lines, "" if self.equal else self.hint]).rstrip()


def run(
    trainer: L.Trainer,
    model: SSLModule,
    datamodule: SSLDataModule,
    processes: int = 2,
    steps: int = 5,
    batch_size: int | None = None,
) -> None:
    """Check that several processes train as one process does: same losses, gradients and parameters.

    Args:
        trainer: Only its ``sync_batchnorm`` is used.
        model: The method.
        datamodule: The data.
        processes: Number of processes that train together, on the CPU.
        steps: Optimizer steps.
        batch_size: Images per batch in each process; None takes the batch size of the data.

    Raises:
        UserError: Several processes train differently from one.
    """
    sync_batchnorm = trainer._accelerator_connector._layer_sync is not None
    result = check(model, datamodule, processes, steps, batch_size, sync_batchnorm)
    print(result)
    if not result.equal:
        raise UserError(f"{result.differing[0]} differ between one process and {processes}.")


def check(
    module: SSLModule,
    data: SSLDataModule,
    processes: int = 2,
    steps: int = 5,
    batch_size: int | None = None,
    sync_batchnorm: bool = True,
) -> CheckResult:
    """Train a few steps in one process and in several with the same global batches, and compare (CPU, float64).

    Other options of the trainer (accumulation, clipping, precision) are not used.

    Optimizers that divide by small numbers, such as Adam, amplify rounding errors: 1e-15 in a gradient can become 1e-7
    in the parameters. A real mistake shows up orders of magnitude larger.

    Args:
        module: The method; it is not changed.
        data: The data.
        processes: Number of processes.
        steps: Optimizer steps.
        batch_size: Images per batch in each of the several processes; None takes the batch size of the data.
        sync_batchnorm: Whether BatchNorm sees the images of all processes.

    Returns:
        The largest differences between losses, gradients of the first step, and parameters and buffers after the last.
    """
    batch_size = batch_size or data.batch_size
    try:
        task = pickle.dumps((module, data, steps, sync_batchnorm))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(f"the method or the data cannot be sent to other processes: {error}") from error
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        single = _trained(pool, 1, batch_size * processes, task)[0]
        several = _trained(pool, processes, batch_size, task)
    if sync_batchnorm or module.batch_norm is None:
        hint = "Look for sums over the batch: gather and summed in ssl_lightning.distributed give the exact gradient."
    elif module.batch_norm == "global":
        hint = "Set --trainer.sync_batchnorm true: this method's BatchNorm sees the images of all processes."
    else:
        hint = "This method computes BatchNorm per process, so the number of processes matters."
    return CheckResult(differences(several, single), 1e-5, hint)


def differences(several: list[Recorded], single: Recorded) -> dict[str, float]:
    """Largest difference of each quantity between one process and any of several, relative where values are large.

    Args:
        several: Records of the processes that trained together.
        single: Record of the single process.
    """
    largest: dict[str, float] = {}
    for kind, expected_values in single.items():
        for name, expected in expected_values.items():
            part = f"{kind} of {name.split('.')[0]}" if name else kind
            difference = max(_difference(record[kind][name], expected) for record in several)
            largest[part] = max(largest.get(part, 0.0), difference)
    return largest


def _difference(value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape:
        return float("inf")
    if not value.numel():
        return 0.0
    scale = float(expected.double().abs().max().clamp(min=1))
    return float((value.double() - expected.double()).abs().max().nan_to_num(float("inf"))) / scale


def _trained(pool: ProcessPoolExecutor, processes: int, batch_size: int, task: bytes) -> list[Recorded]:
    """Train together in several processes, and return the record of each."""
    port = free_port()
    calls = [pool.submit(_train, rank, processes, port, batch_size, task) for rank in range(processes)]
    failed = [call for call in wait(calls, return_when=FIRST_EXCEPTION).done if call.exception()]
    if failed:  # the other processes would wait forever
        for process in pool._processes.values():
            process.kill()
        failed[0].result()
    return [call.result() for call in calls]


def _train(rank: int, processes: int, port: int, batch_size: int, task: bytes) -> Recorded:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    module, data, steps, sync_batchnorm = pickle.loads(task)
    data.batch_size, data.num_workers = batch_size, 0
    return recorded(module, data, processes, steps, sync_batchnorm)


def recorded(module: SSLModule, data: SSLDataModule, processes: int, steps: int, sync_batchnorm: bool) -> Recorded:
    """Train as one of several processes: losses, gradients of the first step, parameters and buffers after the last.

    Args:
        module: The method; it is trained.
        data: The data.
        processes: Number of processes that train together; each calls this function.
        steps: Optimizer steps.
        sync_batchnorm: Whether BatchNorm sees the images of all processes.
    """
    L.seed_everything(0, verbose=False)
    recorder = _Recorder()
    several = processes > 1
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if several else "auto",
        precision="64-true",
        sync_batchnorm=sync_batchnorm and several,
        plugins=[SyncedBatchNorm()] if sync_batchnorm and several else None,
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return {
        "losses": {"": torch.stack(recorder.losses)},
        "gradients": recorder.gradients,
        "parameters": {name: p.detach() for name, p in module.named_parameters()},
        "buffers": dict(module.named_buffers()),
    }


class _Recorder(L.Callback):
    """Keeps the losses of all steps and the gradients of the first."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.gradients:
            gradients = {name: p.grad for name, p in pl_module.named_parameters()}
            self.gradients = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(reduced(outputs["loss"].detach()) / world_size())
