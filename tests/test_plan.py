"""What a training would do, before it does it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_lightning import BYOL, MoCoV2, Optim
from ssl_lightning.commands.plan import plan
from tests.small import digits, simclr, small, trainer


def test_the_plan_is_what_the_training_does(tmp_path: Path) -> None:
    optim = Optim("sgd", base_lr=0.1, lr_scaling="linear", warmup_epochs=2, end_lr_factor=0.01)
    module = small(BYOL, optim=optim)
    found = plan(trainer(tmp_path, max_epochs=10, accumulate_grad_batches=2), module, digits(batch_size=64))
    assert found.rows["batch"] == "128 images = 64 x 1 (processes) x 2 (accumulated)"
    assert found.rows["steps"] == "110 in 10 epochs, 22 of them warm-up"  # 22 batches an epoch
    assert found.rows["learning rate"] == "0.05 at its peak, 0.0005 at the end (sgd)"
    assert found.rows["teacher momentum"] == "0.996 to 1"
    counted = sum(parameter.numel() for parameter in module.predictor.parameters())
    assert found.rows["parameters of predictor"] == f"{counted:,}"
    seconds = float(found.rows["time"].split(" s a batch")[0])
    hours = float(found.rows["time"].split(", ")[1].split(" hours")[0])
    assert abs(hours - seconds * 220 / 3600) <= 0.05 * hours + 0.005 * 220 / 3600
    assert found.doubts == []


def test_what_looks_wrong_is_told_with_the_argument_to_change(tmp_path: Path) -> None:
    optim = Optim("sgd", base_lr=3.0, weight_decay=1e-4, warmup_epochs=5)
    module = small(MoCoV2, optim=optim, queue_length=2048, bn_splits=2)
    views = "moco_v2"  # crops of a fifth of 8 px
    found = plan(trainer(tmp_path, max_epochs=5), module, digits(batch_size=8, views=views, image_size=64))
    doubts = "\n".join(found.doubts)
    assert "model.optim.base_lr 3 is 1e+02 times the paper's 0.03" in doubts
    assert "the warm-up of 5 epochs is the whole training" in doubts
    assert "BatchNorm statistics of 8 images are noisy; raise --data.batch_size" in doubts
    assert "the queue of 2,048 is longer than the data set of 1,437 images" in doubts
    assert "crops down to 4 px are enlarged to 64 px" in doubts
    assert found.rows["queue"] == "2,048, that is 256 steps"


@pytest.mark.slow
def test_the_command_prints_the_plan_alone_and_leaves_nothing(tmp_path: Path) -> None:
    words = ["plan", "--config", "configs/quickstart.yaml", "--trainer.accelerator", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(
        [sys.executable, "-m", "ssl_lightning", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.startswith("method ")
    assert "330 in 15 epochs, 22 of them warm-up" in printed.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_no_training(tmp_path: Path) -> None:
    running = trainer(tmp_path, max_epochs=10)
    plan(running, simclr(), digits())
    assert running.global_step == 3


def test_a_plan_leaves_out_memory_where_the_platform_does_not_report_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    rows = plan(trainer(tmp_path, max_epochs=1), simclr(), digits()).rows
    assert "time" in rows
    assert "memory" not in rows
