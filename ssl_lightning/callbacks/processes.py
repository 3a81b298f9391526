"""Stops a run early: with a checkpoint if a scheduler asks, and in all processes if one of them fails."""

import atexit
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ssl_lightning.callbacks.checkpoint import LastCheckpoint
from ssl_lightning.distributed import reduced
from ssl_lightning.runs import LAST_CHECKPOINT, slurm_job

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # Windows has no SIGUSR1


class Preemption(L.Callback):
    """Saves ``last.ckpt`` between two steps and exits when SIGTERM or SIGUSR1 arrives at any process.

    A single process exits after the current step or within a validation. Several processes agree every
    ``every_n_steps`` training steps, which must take less time than the scheduler leaves.

    The exit code is 128 + the number of the signal (143, 138), which asks a scheduler to queue the job again. In a
    SLURM job, SIGUSR1 (``#SBATCH --signal=SIGUSR1@90``) also requeues the job, and the command line then continues
    from that file. Without this callback, Lightning would save in the middle of a step, from where a run cannot
    continue exactly, and would synchronize all processes after every step, which waits for the device.

    Args:
        every_n_steps: With several processes, check every this many optimizer steps whether one received a signal.
        requeue: Whether SIGUSR1 requeues a SLURM job.
    """

    def __init__(self, every_n_steps: int = 10, requeue: bool = True) -> None:
        self.every_n_steps, self.requeue = every_n_steps, requeue
        self._signal = 0
        self._step = 0
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remember the signal handlers from before Lightning's, which it takes away before ``teardown``."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle the signals instead of Lightning."""
        self._signal, self._step = 0, trainer.global_step
        for number in self._before:
            signal.signal(number, self._remember)
        epoch_loop: Any = trainer.fit_loop.epoch_loop
        epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and exit if asked to, between two optimizer steps."""
        if trainer.global_step == self._step:  # gradients of accumulated batches would be lost
            return
        self._step = trainer.global_step
        if trainer.world_size == 1 or self._step % self.every_n_steps == 0:
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Save and exit if asked to; the resumed run repeats the validation."""
        if trainer.world_size == 1 and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        number = self._signal
        if trainer.world_size > 1:
            number = int(reduced(torch.tensor(number, device=trainer.strategy.root_device), "max"))
        if number == 0:
            return
        name = signal.Signals(number).name
        path = _save(trainer)
        if path is None:
            rank_zero_warn(f"{name}: stopping without a checkpoint, because the run keeps none.")
        else:
            rank_zero_info(f"{name}: stopping; continue from {path}")
        if self.requeue and name == "SIGUSR1" and trainer.is_global_zero and SLURMEnvironment.detect():
            _requeue()
        trainer.strategy.barrier()  # srun may kill all processes at the first exit
        # if a process that Lightning started exits with another code than 0, Lightning kills the remaining processes
        raise SystemExit(0 if _started_by_lightning(trainer) else 128 + number)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class FailTogether(L.Callback):
    """Ends all processes of a machine within seconds if one of them fails.

    Lightning ends them when a process that it started fails. But if the first process fails or is killed, the others
    wait for it in a collective operation, with NCCL for ten minutes. torchrun ends all of them itself, as SLURM does
    with ``srun --kill-on-bad-exit``.

    Args:
        patience: Seconds that the other processes have to end by themselves and report their errors.
    """

    def __init__(self, patience: float = 10.0) -> None:
        self.patience = patience

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Watch the process that started this one."""
        if _started_by_lightning(trainer):
            threading.Thread(target=self._end_with, args=(os.getppid(),), daemon=True).start()

    def _end_with(self, parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(self.patience)
        os._exit(1)  # whatever the main thread waits for

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the processes that this one started, once it has reported the error."""
        if started := getattr(trainer.strategy.launcher, "procs", None):
            atexit.register(self._end, started)

    def _end(self, processes: list["subprocess.Popen[Any]"]) -> None:
        deadline = time.monotonic() + self.patience
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()


def _save(trainer: L.Trainer) -> str | None:
    """Save ``last.ckpt`` and return its path, where the run keeps its checkpoints; None if it keeps none."""
    checkpoints: list[Any] = trainer.checkpoint_callbacks
    last = next((checkpoint for checkpoint in checkpoints if isinstance(checkpoint, LastCheckpoint)), None)
    if last is not None:
        return last.save(trainer)
    folder = next((checkpoint.dirpath for checkpoint in checkpoints if checkpoint.dirpath is not None), None)
    if folder is None:
        return None
    path = os.path.join(folder, f"{LAST_CHECKPOINT}.ckpt")
    trainer.save_checkpoint(path)
    return path


def _started_by_lightning(trainer: L.Trainer) -> bool:
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0


def _requeue() -> None:
    command = ["scontrol", "requeue", slurm_job()]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"the job was not requeued ({error}); run: {' '.join(command)}")
