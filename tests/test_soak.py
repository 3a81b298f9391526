"""Long runs: memory and open files stay as they are."""

import json
import os
import sys
import warnings
from multiprocessing import active_children, set_start_method
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from ssl_lightning.cli import main
from tests.processes import FORKSERVER

STEPS, SETTLED = 3000, 1500  # settled after four epochs and two validations
SMALLEST = ["--model=RotNet", "--model.backbone=pixels", "--model.backbone_kwargs={img_size: 8}"]
SMALLEST += ["--data=DigitsData", "--data.image_size=8", "--data.batch_size=4", "--data.num_workers=2"]
SMALLEST += ["--data.views=[{size: 8, flip: 0}]", "--data.val_samples=64"]
BOUND_MB = {"process": 30.0, "workers": 10.0}
"""How much more memory a process may use after the last step than after step ``SETTLED``."""


class Measure(L.Callback):
    """Memory in MB of this process and of its workers, and the number of open files."""

    measured: list[dict[str, float]] = []  # noqa: RUF012 # the command line makes the callback, the test reads it

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % 500 == 0 and trainer.global_step >= SETTLED:
            children = sorted(active_children(), key=lambda worker: worker._identity)  # in the order of their start
            workers = [worker.pid for worker in children if worker.pid is not None]
            self.measured.append(
                {
                    "process": _memory(os.getpid()),
                    "workers": max(map(_memory, workers[:2])),  # the workers of training live on
                    "number of workers": len(workers),
                    "files": len(os.listdir("/proc/self/fd")),
                }
            )


def _memory(process: int) -> float:
    """Memory of its own, without what it shares."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def _soak(folder: Path) -> None:
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # of the workers, as on Linux before Python 3.14
    os.chdir(folder)
    sys.argv = ["ssl-lightning"]
    words = [f"--trainer.max_steps={STEPS}", "--trainer.accelerator=cpu", "--trainer.callbacks=tests.test_soak.Measure"]
    words += ["--trainer.max_epochs=-1", "--pictures.every_n_epochs=2", "--trainer.check_val_every_n_epoch=2"]
    words += ["--knn_probe.every_n_epochs=2", "--health_monitor.every_n_epochs=1"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does: they are for the authors of libraries
        main(["fit", *SMALLEST, *words])
    warned = [f"{warning.category.__name__}: {warning.message}" for warning in caught]
    (folder / "measured.json").write_text(json.dumps([Measure.measured, warned]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_three_thousand_steps_with_all_callbacks_leave_memory_and_files_as_they_are(tmp_path: Path) -> None:
    process = FORKSERVER.Process(target=_soak, args=(tmp_path,))
    process.start()
    process.join(600)
    assert process.exitcode == 0
    measured, warned = json.loads((tmp_path / "measured.json").read_text())
    assert len(measured) == 1 + (STEPS - SETTLED) // 500
    for what, bound in BOUND_MB.items():
        assert measured[-1][what] - measured[0][what] < bound, [row[what] for row in measured]
    assert measured[-1]["files"] <= measured[0]["files"], [row["files"] for row in measured]
    assert len({row["number of workers"] for row in measured}) == 1  # of training, and of the last validation
    assert not warned
