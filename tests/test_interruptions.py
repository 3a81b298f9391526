"""What ends a run before its end: kills, signals, failing processes, full disks, files of other runs."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import set_start_method
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_lightning import (
    BYOL,
    DINO,
    MAE,
    NPID,
    DeepClusterV2,
    KNNProbe,
    LastCheckpoint,
    LinearProbe,
    MoCoV2,
    Optim,
    SimCLR,
    SSLModule,
    SwAV,
    UserError,
)
from ssl_lightning.batch_norm import SyncedBatchNorm
from ssl_lightning.callbacks.processes import Preemption
from ssl_lightning.checkpoints import AtomicCheckpointIO
from tests.processes import FORKSERVER, run_processes
from tests.small import VIT, data, slow_unless, small, trainer

# Signals


def test_after_a_training_signals_do_what_they_did_before(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer(tmp_path, callbacks=[Preemption()], max_steps=1).fit(small(SimCLR), data(SimCLR))
    assert signal.getsignal(signal.SIGTERM) == before


# Killed at any moment


def _train(method: type[SSLModule], folder: Path, epochs: int, num_workers: int, start: str | None = None) -> None:
    """Train from the last checkpoint in a folder, if there is one, and leave the end there."""
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # of the workers, as ever on Linux
    sys.stderr = open(folder / "errors.txt", "a")  # noqa: SIM115
    L.seed_everything(1, verbose=False)
    module = small(method, {"queue_length": 16, "queue_start_epoch": 0} if method is SwAV else {})
    probe, last = LinearProbe(), LastCheckpoint(every_n_train_steps=1, dirpath=str(folder))
    options: dict[str, Any] = {"max_epochs": epochs, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    running = trainer(folder, callbacks=[probe, KNNProbe(), last], num_sanity_val_steps=0, **options)
    running.fit(module, data(method, num_workers=num_workers), ckpt_path=start)
    assert probe.head is not None
    torch.save({**module.state_dict(), **probe.head.state_dict(prefix="probe.")}, folder / "end.pt")


def started_from_last(method: type[SSLModule], folder: Path, epochs: int, workers: int) -> Any:
    folder.mkdir(exist_ok=True)
    last = str(folder / "last.ckpt") if (folder / "last.ckpt").exists() else None
    process = FORKSERVER.Process(target=_train, args=(method, folder, epochs, workers, last))
    process.start()
    return process


def ended(method: type[SSLModule], folder: Path, epochs: int, workers: int) -> Any:
    """What a run ends with, from the last checkpoint in its folder if there is one."""
    process = started_from_last(method, folder, epochs, workers)
    process.join(300)
    assert process.exitcode == 0, (folder / "errors.txt").read_text()[-2000:]
    return torch.load(folder / "end.pt")


def killed(method: type[SSLModule], folder: Path, epochs: int, workers: int, at: float) -> None:
    """A run killed so many seconds after it has begun to write checkpoints."""
    last = folder / "last.ckpt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    process = started_from_last(method, folder, epochs, workers)
    while process.is_alive() and (last.stat().st_mtime_ns if last.exists() else 0) == before:
        time.sleep(0.005)
    time.sleep(at)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before; " + (folder / "errors.txt").read_text()[-2000:]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_ends_bit_for_bit_as_the_uninterrupted(
    tmp_path: Path,
) -> None:
    random = np.random.Generator(np.random.Philox(key=5))
    for _ in range(20):  # about a step each: moments of loading, stepping, saving, validating
        killed(BYOL, tmp_path / "killed", 12, 2, random.uniform(0, 0.1))
    same(ended(BYOL, tmp_path / "killed", 12, 2), ended(BYOL, tmp_path / "whole", 12, 2))


@pytest.mark.parametrize(  # a teacher, masks, memories, queues
    "method", slow_unless(lambda method: method is MoCoV2, [DINO, MAE, NPID, DeepClusterV2, MoCoV2, SwAV])
)
def test_methods_of_all_kinds_go_on_after_a_kill_bit_for_bit(method: type[SSLModule], tmp_path: Path) -> None:
    whole = ended(method, tmp_path / "whole", 3, 0)
    killed(method, tmp_path / "killed", 3, 2, 0.2)
    same(ended(method, tmp_path / "killed", 3, 2), whole)


# Signals and failures, on the command line

SLOW = """
import os, time, torch
from ssl_lightning import SimCLR

class Slow(SimCLR):
    def training_loss(self, views):
        time.sleep(0.05)
        return super().training_loss(views)

class Failing(SimCLR):
    '''Fails as the environment says: "<rank> <how>", at step 3.'''
    def training_loss(self, views):
        open(f"{os.environ['PIDS']}/{self.trainer.global_rank}-{os.getpid()}", "w").close()
        rank, how = os.environ["FAIL"].split()
        loss = super().training_loss(views)
        if self.trainer.global_step == 3 and self.trainer.global_rank == int(rank):
            if how == "raises":
                raise RuntimeError(f"process {rank} is broken")
            if how == "nan":
                return loss * float("nan")
            if how == "killed":
                os.kill(os.getpid(), 9)
        return loss
"""
TINY = ["--model.backbone", "resnet10_cifar", "--model.backbone_kwargs", "{stem_stride: 2, channels: [16, 16, 16, 16]}"]
DIGITS = ["--data", "DigitsData", "--data.image_size", "16", "--data.batch_size", "64", "--trainer.accelerator", "cpu"]
PAIR = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.sync_batchnorm", "true"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(*words: str, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "ssl_lightning", "fit", *words, *TINY, *DIGITS]
    env = {**os.environ, **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for(paths: Any, process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    """Until a generator of paths gives one."""
    deadline = time.monotonic() + seconds
    while not list(paths()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def weights(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "several"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_a_signal_saves_within_the_epoch_and_the_run_goes_on_exactly(
    number: signal.Signals, several: bool, folder: Path
) -> None:
    words = ["--model", "slow.Slow", "--name", "x", "--trainer.max_epochs", "2", "--data.num_workers", "2"]
    words += ["--trainer.limit_val_batches", "1", "--preemption.every_n_steps", "2", *(PAIR if several else [])]
    process = started(*words)
    wait_for(lambda: folder.glob("runs/x/version_0/views.png"), process)
    time.sleep(1.5)
    os.killpg(process.pid, number)  # a scheduler signals all processes, those that load the images, too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    last = folder / "runs/x/version_0/checkpoints/last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"]
    assert 0 < step < 2 * (22 if not several else 11)
    resumed = started(*words, "--ckpt_path", "last")
    errors = resumed.communicate(timeout=300)[1]
    assert resumed.returncode == 0, errors
    whole = started(*words[:2], "--name", "whole", *words[4:])
    errors = whole.communicate(timeout=300)[1]
    assert whole.returncode == 0, errors
    same(weights(last), weights(folder / "runs/whole/version_0/checkpoints/last.ckpt"))


@pytest.mark.slow
def test_a_slurm_job_is_requeued_and_goes_on_by_the_same_command(folder: Path) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {folder}/requeued\n")
    (folder / "bin" / "scontrol").chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    environment = {f"SLURM_{key}": value for key, value in slurm.items()}
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    words = ["--model", "slow.Slow", "--name", "x", "--trainer.max_epochs", "2", "--trainer.limit_val_batches", "0"]
    process = started(*words, **environment)
    wait_for(lambda: folder.glob("runs/x/slurm_7_0/views.png"), process)
    process.send_signal(signal.SIGUSR1)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGUSR1, errors
    assert (folder / "requeued").read_text() == "requeue 7\n"
    again = started(*words, **environment, SLURM_RESTART_COUNT="1")
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert [path.name for path in (folder / "runs/x").iterdir()] == ["slurm_7_0"]
    assert torch.load(folder / "runs/x/slurm_7_0/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    assert "slurm_7_0/checkpoints/last.ckpt" in output + errors


def alive(folder: Path) -> Iterator[int]:
    for file in (folder / "pids").iterdir():
        process = int(file.name.split("-")[1])
        status = Path(f"/proc/{process}/stat")
        if status.exists() and status.read_text().split(") ")[1][0] != "Z":
            yield process


@pytest.mark.slow
@pytest.mark.parametrize("fail", ["0 raises", "1 nan", "0 killed"])
def test_one_process_that_fails_stops_all_within_a_minute(fail: str, folder: Path) -> None:
    (folder / "pids").mkdir()
    words = ["--model", "slow.Failing", "--name", "x", *PAIR, "--last_checkpoint.every_n_train_steps", "1"]
    process = started(*words, FAIL=fail, PIDS=str(folder / "pids"))
    wait_for(lambda: (folder / "pids").iterdir(), process)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.monotonic() + 30
    while list(alive(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not list(alive(folder))
    rank, how = fail.split()
    if how == "raises":
        assert f"process {rank} is broken" in errors
    if how == "nan":
        assert "the loss is nan at step 3" in errors
    saved = weights(folder / "runs/x/version_0/checkpoints/last.ckpt")
    assert all(torch.isfinite(value).all() for value in saved.values())


# Files


def _fill_the_disk(folder: Path) -> str:
    files = AtomicCheckpointIO()
    files.save_checkpoint({"weights": torch.ones(10)}, folder / "x.ckpt")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(UserError) as error:
        files.save_checkpoint({"weights": torch.ones(100_000)}, folder / "x.ckpt")
    return str(error.value)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    with FORKSERVER.Pool(1) as pool:
        message = pool.apply_async(_fill_the_disk, (tmp_path,)).get(timeout=60)
    assert "cannot write the checkpoint" in message
    assert "the earlier file is kept. Free space" in message
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")["weights"].sum() == 10


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    files = AtomicCheckpointIO()
    files.save_checkpoint({"weights": torch.ones(1000)}, tmp_path / "x.ckpt")
    content = (tmp_path / "x.ckpt").read_bytes()
    for part in (b"", content[:100], content[: len(content) // 2], b"no checkpoint at all"):
        (tmp_path / "x.ckpt").write_bytes(part)
        with pytest.raises(UserError, match=r"x\.ckpt is damaged or no checkpoint"):
            files.load_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: small(BYOL), r"What differs: the method BYOL \(was SimCLR\)"),
        (lambda: small(SimCLR, VIT), r"backbone vit_tiny_patch16_224 \(was resnet10_cifar\)"),
        (lambda: small(SimCLR, projector_dim=16), r"e.g. projector.*What differs: projector_dim 16 \(was 128\)"),
        (lambda: small(DINO), "the checkpoint does not fit"),
    ],
)
def test_a_checkpoint_of_another_method_or_backbone_says_what_differs(other: Any, message: str, tmp_path: Path) -> None:
    running = trainer(tmp_path, limit_train_batches=1)
    running.fit(small(SimCLR), data(SimCLR))
    running.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, max_epochs=2).fit(other(), data(SimCLR), ckpt_path=tmp_path / "x.ckpt")


def test_a_checkpoint_of_a_newer_version_that_does_not_fit_says_so(tmp_path: Path) -> None:
    running = trainer(tmp_path, limit_train_batches=1)
    running.fit(small(SimCLR), data(SimCLR))
    running.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    checkpoint["ssl_lightning_version"] = "99.0"
    checkpoint["state_dict"]["projector.new"] = torch.ones(1)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"projector.new. What differs: the version of this package .* \(was 99.0\)"):
        trainer(tmp_path, max_epochs=2).fit(small(SimCLR), data(SimCLR), ckpt_path=tmp_path / "x.ckpt")


def test_other_hyper_parameters_are_warned_of(tmp_path: Path) -> None:
    running = trainer(tmp_path, limit_train_batches=1)
    running.fit(small(SimCLR), data(SimCLR))
    running.save_checkpoint(tmp_path / "x.ckpt")
    again = trainer(tmp_path, max_epochs=2, limit_train_batches=1)
    with pytest.warns(UserWarning, match=r"other hyper-parameters than the checkpoint's: temperature 0.3 \(was 0.1\)"):
        again.fit(small(SimCLR, temperature=0.3), data(SimCLR), ckpt_path=tmp_path / "x.ckpt")


# Taken up again and again


@pytest.mark.parametrize(
    "options",
    slow_unless(
        lambda options: options == {"limit_train_batches": 2, "check_val_every_n_epoch": 2},
        [
            {"limit_val_batches": 0},
            {"limit_train_batches": 2, "limit_val_batches": 0},
            {"limit_train_batches": 2, "check_val_every_n_epoch": 2},
            {"val_check_interval": 0.5},
            {"max_epochs": -1, "max_steps": 11},
            {"accumulate_grad_batches": 3},
        ],
    ),
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_a_run_taken_up_after_every_batch_ends_as_the_uninterrupted(options: dict[str, Any], tmp_path: Path) -> None:
    class Stop(L.Callback):
        def __init__(self, batches: float) -> None:
            self.batches = batches

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.total.ready > self.batches:
                raise KeyboardInterrupt

    def run(name: str, batches: float) -> tuple[L.Trainer, dict[str, Tensor]]:
        L.seed_everything(1, verbose=False)
        last = LastCheckpoint(every_n_train_steps=1, dirpath=str(tmp_path / name))
        common = {"max_epochs": 2, "enable_checkpointing": True, "num_sanity_val_steps": 0, **options}
        running = trainer(tmp_path, callbacks=[last, Stop(batches)], **common)
        module, path = small(SimCLR), tmp_path / name / "last.ckpt"
        with suppress(KeyboardInterrupt, SystemExit):
            running.fit(module, data(SimCLR), ckpt_path=path if path.exists() else None)
        return running, module.state_dict()

    whole, expected = run("whole", float("inf"))
    for batches in range(1, whole.fit_loop.epoch_loop.batch_progress.total.ready):
        run("again", batches)
    again, found = run("again", float("inf"))
    same(found, expected)
    loops = [running.fit_loop.epoch_loop for running in (again, whole)]
    assert again.global_step == whole.global_step
    assert loops[0]._batches_that_stepped == loops[1]._batches_that_stepped  # what the loggers count by
    assert loops[0].batch_progress.total == loops[1].batch_progress.total


# Resumed on another number of processes


class StopAt(L.Callback):
    """Ends the training after a step, as if it were killed."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def _part(rank: int, processes: int, method: Any, net: Any, folder: Path, stop: int | None, start: Any) -> Any:
    """Train in double precision, 16 images per global batch, four steps an epoch; returns the weights."""
    L.seed_everything(1, verbose=False)
    last = LastCheckpoint(every_n_train_steps=1, dirpath=str(folder))
    options: dict[str, Any] = {"max_epochs": 2, "precision": "64-true", "enable_checkpointing": True}
    if processes > 1:
        options |= {"strategy": "ddp", "devices": processes, "sync_batchnorm": True, "plugins": [SyncedBatchNorm()]}
    running = trainer(folder, callbacks=[last, StopAt(stop)], num_sanity_val_steps=0, **options)
    sgd = Optim("sgd", base_lr=0.1, lr_scaling="none", warmup_epochs=0)  # AdamW would enlarge what is rounded otherwise
    module = small(method, net, optim=sgd)
    with suppress(InterruptedError):
        running.fit(module, data(method, batch_size=16 // processes), ckpt_path=start)
    assert running.global_step == (stop or 8)
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "net"), [(BYOL, {}), (DINO, VIT)])
def test_a_run_goes_on_within_an_epoch_on_another_number_of_processes(method: Any, net: Any, tmp_path: Path) -> None:
    whole = run_processes(_part, 1, 1, method, net, tmp_path / "whole", None, None)[0]
    start = None
    for processes, stop in ((1, 3), (2, 6), (1, None)):
        end = run_processes(_part, processes, processes, method, net, tmp_path / "parts", stop, start)[0]
        start = tmp_path / "parts" / "last.ckpt"
    for name, value in whole.items():
        torch.testing.assert_close(end[name], value, atol=1e-9, rtol=1e-9, msg=name)
