"""Platforms other than a Linux workstation: what Windows and macOS lack, containers, clusters."""

import io
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import ssl_lightning
from ssl_lightning import ShardsData, UserError
from ssl_lightning.cache import cache_folder
from ssl_lightning.cli import main
from ssl_lightning.data.loader import Loader
from ssl_lightning.data.sampler import OrderedBatches
from ssl_lightning.runs import new_version, read_config, requeued_checkpoint
from tests.small import slow_unless

TINY = ["--model=SimCLR", "--model.backbone=resnet10_cifar", "--data=DigitsData", "--data.image_size=16"]
TINY += ["--model.backbone_kwargs={stem_stride: 2, channels: [16, 16, 16, 16]}", "--trainer.accelerator=cpu"]
FAST = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0", "--trainer.max_epochs=1", "--name=x"]
FAST += ["--without=[pictures, health_monitor, knn_probe, view_grid]", "--trainer.enable_model_summary=false"]

UNIX_ONLY = """
import os, signal, sys
for name in ("fcntl", "grp", "posix_ipc", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "getloadavg", "getuid", "geteuid", "killpg", "pread", "preadv", "pwrite",
             "sched_getaffinity", "setsid", "sysconf"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGUSR2", "pthread_sigmask", "sigwaitinfo", "sigwait"):
    if hasattr(signal, name):
        delattr(signal, name)
import multiprocessing
multiprocessing.set_start_method("spawn")
"""
"""What Windows lacks, hidden at the start of Python, in workers, too; they are spawned, as on Windows and macOS.

But for what numpy, torch and Lightning use wherever ``sys.platform`` is not Windows: ``os.uname``,
``os.register_at_fork``, SIGKILL, SIGUSR1.
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """Environment of a process that has nothing of Unix."""
    (tmp_path / "sitecustomize.py").write_text(UNIX_ONLY)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}


@pytest.mark.slow  # starts Python and everything twice
def test_everything_is_imported_and_the_quickstart_trains_without_unix(
    elsewhere: dict[str, str], tmp_path: Path
) -> None:
    modules = [module.name for module in pkgutil.walk_packages(ssl_lightning.__path__, "ssl_lightning.")]
    words = ["fit", "--config=configs/quickstart.yaml", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    words += ["--trainer.accelerator=cpu", "--data.num_workers=1", f"--trainer.default_root_dir={tmp_path}"]
    # a spawned worker imports everything again: only the training has one
    words += ["--trainer.limit_val_batches=0", "--without=[health_monitor, view_grid, pictures]"]
    code = f"""
import importlib, os
if __name__ == "__main__":
    assert not hasattr(os, "fork")
    for module in {[name for name in modules if not name.endswith("__main__")]}:
        importlib.import_module(module)
    from ssl_lightning.cli import main
    main({words})
"""
    (tmp_path / "train.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "train.py"], env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "quickstart/version_0/checkpoints/last.ckpt").is_file()


def test_tar_shards_are_read_without_pread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pread", raising=False)
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(image, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number in range(4):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(image.getvalue())
            archive.addfile(member, io.BytesIO(image.getvalue()))
    data = ShardsData(str(tmp_path / "x.tar"), num_workers=0)
    data.setup()
    assert data.train_images is not None
    assert {tuple(data.train_images.read(index)[:, 0, 0].tolist()) for index in (3, 0, 2)} == {(255, 0, 0)}


# Containers


class Killed(Dataset[int]):
    """Its worker dies as it does when /dev/shm is full."""

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGBUS)
        return index


class TooLarge(Dataset[torch.Tensor]):
    """Its batches do not fit into shared memory."""

    def __getitem__(self, index: int) -> torch.Tensor:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )


@pytest.mark.parametrize("dataset", [Killed(), TooLarge()], ids=["bus error", "no space"])
def test_full_shared_memory_is_one_line(dataset: Any) -> None:
    with pytest.raises(UserError, match=r"shared memory \(/dev/shm\).*--shm-size.*--data.num_workers 0"):
        list(Loader(dataset, OrderedBatches(np.arange(4), 1), num_workers=1))


@pytest.mark.parametrize("place", ["/proc/runs", "file/runs"])
def test_a_folder_that_cannot_be_written_is_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["ssl-lightning"])
    with pytest.raises(SystemExit, match=r"cannot make the folder of the run, .*Set --trainer.default_root_dir"):
        main(["fit", *TINY, f"--trainer.default_root_dir={place}"])


def test_without_a_home_the_cache_is_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_LIGHTNING_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # a user of a container who is not in /etc/passwd
    assert cache_folder() == Path(tempfile.gettempdir(), "ssl_lightning")


# Runs that do not start, and clusters


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ssl-lightning"])
    return tmp_path / "runs" / "x"


@pytest.mark.parametrize(
    "wrong",
    slow_unless(
        lambda wrong: "init_from" in wrong,
        [
            "--trainer.strategy=fsdp",  # refused by the method, or by the Trainer
            "--trainer.strategy=none_such",
            "--data.views=byol_",  # by the data
            "--data.train_samples=1",
            "--model.init_from=nowhere.ckpt",  # before the first step
        ],
    ),
)
def test_a_refused_start_leaves_no_folder(wrong: str, folder: Path) -> None:
    with pytest.raises((SystemExit, ValueError)):
        main(["fit", *TINY, *FAST, wrong])
    assert not list(folder.glob("*"))


def test_what_a_refused_start_has_to_say_is_kept(folder: Path, broken_photos: Path) -> None:
    words = [word for word in TINY if "data" not in word]
    photos = ["--data=ImageFolderData", f"--data.root={broken_photos}", "--data.image_size=32", "--data.batch_size=36"]
    with pytest.raises(SystemExit, match=r"unreadable-0.txt"), pytest.warns(UserWarning, match="3 of 40 images"):
        main(["fit", *words, *photos, "--data.num_workers=0", *FAST])
    assert (folder / "version_0" / "unreadable-0.txt").is_file()


def test_a_configuration_that_was_not_written_to_its_end_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {class_path: Sim")
    assert read_config(tmp_path) == {}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    names = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return monkeypatch


@pytest.mark.slow
def test_every_fit_of_a_slurm_job_has_a_folder_and_continues_in_it(folder: Path, job: pytest.MonkeyPatch) -> None:
    fits = [["--model.temperature=0.3"], ["--model.temperature=0.5"], ["--model.temperature=0.3"]]  # one of them twice

    def run_all() -> None:
        for more in fits:
            main(["fit", *TINY, *FAST, *more])

    run_all()
    assert sorted(path.name for path in folder.iterdir()) == ["slurm_7_0", "slurm_7_1", "slurm_7_2"]
    job.setenv("SLURM_RESTART_COUNT", "1")
    run_all()
    assert sorted(path.name for path in folder.iterdir()) == ["slurm_7_0", "slurm_7_1", "slurm_7_2"]
    for number, expected in enumerate((0.3, 0.5, 0.3)):
        checkpoint = torch.load(folder / f"slurm_7_{number}/checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["hyper_parameters"]["temperature"] == expected
        assert json.loads((folder / f"slurm_7_{number}/slurm.json").read_text())["restarts"] == [0, 1]


def test_steps_of_a_slurm_job_continue_each_their_own_run(folder: Path, job: pytest.MonkeyPatch) -> None:
    job.setattr(sys, "argv", ["ssl-lightning", "fit"])
    for step in ("0", "1"):
        job.setenv("SLURM_STEP_ID", step)
        last = folder / new_version(folder, dry=False) / "checkpoints" / "last.ckpt"
        last.parent.mkdir()
        last.touch()
    job.setenv("SLURM_RESTART_COUNT", "1")
    for step in ("1", "0"):
        job.setenv("SLURM_STEP_ID", step)
        for _process in range(2):  # all processes of a step agree
            assert requeued_checkpoint(folder) == folder / f"slurm_7_{step}/checkpoints/last.ckpt"
