"""Platforms other than a Linux workstation: what Windows and macOS lack, containers, clusters."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ssl_lightning

UNIX_ONLY = """
import os, signal, sys
for name in ("fcntl", "grp", "posix_ipc", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "getloadavg", "getuid", "geteuid", "killpg", "pread", "preadv", "pwrite",
             "sched_getaffinity", "setsid", "sysconf"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "pthread_sigmask", "sigwaitinfo", "sigwait"):
    if hasattr(signal, name):
        delattr(signal, name)
import multiprocessing
multiprocessing.set_start_method("spawn")
"""
"""What Windows lacks, hidden at the start of Python, in workers, too; they are spawned, as on Windows and macOS."""


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """Environment of a process that has nothing of Unix."""
    (tmp_path / "sitecustomize.py").write_text(UNIX_ONLY)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}


def test_everything_is_imported_and_the_quickstart_trains_without_unix(
    elsewhere: dict[str, str], tmp_path: Path
) -> None:
    modules = [module.name for module in pkgutil.walk_packages(ssl_lightning.__path__, "ssl_lightning.")]
    words = ["fit", "--config=configs/quickstart.yaml", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    words += ["--trainer.accelerator=cpu", "--data.num_workers=1", f"--trainer.default_root_dir={tmp_path}"]
    code = f"""
import importlib, os
if __name__ == "__main__":
    assert not hasattr(os, "fork")
    for module in {[name for name in modules if not name.endswith("__main__")]}:
        importlib.import_module(module)
    from ssl_lightning.cli import main
    main({[*words, "--pictures.every_n_epochs=1"]})
"""
    (tmp_path / "train.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "train.py"], env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "quickstart/version_0/checkpoints/last.ckpt").is_file()
