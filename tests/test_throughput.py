"""How fast training is, and what it waits for."""

import csv
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_lightning import DigitsData, Images, SimCLR, SSLDataModule, Throughput
from ssl_lightning.callbacks.progress import _TimeSplit
from ssl_lightning.data.decoding import OpenedImage, opened_already
from ssl_lightning.loggers import AppendingCSVLogger
from tests.small import ADAMW, BACKBONE, DIGIT_VIEW, digits, simclr, slow_unless, trainer


class SlowImages(Images):
    """Noise that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.labels = seconds, np.arange(32) % 2

    def __len__(self) -> int:
        return 32

    def name(self, index: int) -> str:
        return str(index)

    def open(self, index: int) -> OpenedImage:
        time.sleep(self.seconds)
        return opened_already(torch.randint(256, (3, 16, 16), dtype=torch.uint8))


class SlowData(SSLDataModule):
    """Such images."""

    def load(self) -> None:
        self.train_images = SlowImages(0.02)


def test_a_slow_loader_is_told_with_the_remedy(tmp_path: Path) -> None:
    data = SlowData(batch_size=8, views=[DIGIT_VIEW], num_workers=0, in_memory=False)
    running = trainer(tmp_path, callbacks=[Throughput(every_n_steps=1)], max_epochs=2)
    with pytest.warns(UserWarning, match=r"spent waiting for images; raise --data.num_workers \(now 0") as warned:
        running.fit(simclr(), data)
    assert len([one for one in warned if "waiting for images" in str(one.message)]) == 1
    waited = float(running.callback_metrics["train/loader_wait"])
    rate = float(running.callback_metrics["train/images_per_second"])
    assert 0.3 < waited <= 1
    assert rate < 1 / 0.02
    assert waited == pytest.approx(0.02 * rate, rel=0.5)  # each image takes 0.02 s, of 1 / rate


def test_images_in_memory_are_not_waited_for(tmp_path: Path) -> None:
    left: list[Any] = []

    class Watch(Throughput):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_batch_end(*args, **kwargs)
            left.append(self.hours_left)

    running = trainer(tmp_path, callbacks=[Watch(every_n_steps=1)], max_epochs=2, limit_train_batches=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*waiting for images")
        running.fit(simclr(), digits())
    assert float(running.callback_metrics["train/loader_wait"]) < 0.3
    assert left[-1] == 0
    assert 0 < left[-2] < 1


# Where the time goes

PHASES = ("loader", "augment", "forward", "backward", "optimizer")


class Sleeper(SimCLR):
    """Sleeps in one part of its step."""

    def __init__(self, phase: str) -> None:
        super().__init__(**BACKBONE, optim=ADAMW)
        self.phase = phase

    def training_loss(self, views: Any) -> Tensor:
        if self.phase == "forward":
            time.sleep(0.4)
        loss = super().training_loss(views)
        if self.phase == "backward":
            loss.register_hook(lambda _: time.sleep(0.4))
        return loss

    def update_teacher(self) -> None:
        if self.phase == "optimizer":
            time.sleep(0.4)


class SleepyData(DigitsData):
    """Sleeps while it augments."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        time.sleep(0.4)
        return super().on_after_batch_transfer(batch, dataloader_idx)


def shares(folder: Path, model: Any, data: Any, **kwargs: Any) -> dict[str, float]:
    running = trainer(folder, callbacks=[Throughput(warn_above=1)], limit_train_batches=4, **kwargs)
    running.fit(model, data)
    found = {name[5:]: float(value) for name, value in running.callback_metrics.items() if name.startswith("time/")}
    assert all(share >= 0 for share in found.values())
    assert sum(found.values()) <= 1 + 1e-6
    return found


@pytest.mark.parametrize("slow", slow_unless(lambda phase: phase == "backward", PHASES))
def test_the_share_of_a_phase_follows_its_time(slow: str, tmp_path: Path) -> None:
    data: Any = digits(batch_size=16)
    if slow == "augment":
        data = SleepyData(batch_size=16, views=[DIGIT_VIEW])
    elif slow == "loader":
        data = SlowData(batch_size=8, views=[DIGIT_VIEW], num_workers=0, in_memory=False)
    found = shares(tmp_path, Sleeper(slow), data)
    assert found.keys() == set(PHASES)
    assert max(found, key=lambda phase: found[phase]) == slow


@pytest.mark.slow
def test_accumulated_batches_are_split_alike(tmp_path: Path) -> None:
    found = shares(tmp_path, Sleeper("backward"), digits(batch_size=16), accumulate_grad_batches=2)
    assert found.keys() == set(PHASES)
    assert max(found, key=lambda phase: found[phase]) == "backward"


@pytest.mark.slow
def test_a_loader_of_another_kind_ends_where_the_step_starts(tmp_path: Path) -> None:
    batch = ([torch.rand(8, 3, 16, 16) for _ in range(2)], torch.arange(8) % 2)

    class Slow(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            time.sleep(0.4)
            return batch

    found = shares(tmp_path, Sleeper("none"), torch.utils.data.DataLoader(Slow(), batch_size=None))
    assert found.keys() == set(PHASES) - {"augment"}
    assert max(found, key=lambda phase: found[phase]) == "loader"


def test_every_window_reaches_the_logger_whatever_the_length_of_an_epoch(tmp_path: Path) -> None:
    logger = AppendingCSVLogger(tmp_path, "", "")
    limits = {"limit_train_batches": 7, "max_epochs": 3, "log_every_n_steps": 5}
    running = trainer(tmp_path, callbacks=[Throughput(every_n_steps=5, warn_above=1)], logger=logger, **limits)
    running.fit(simclr(), digits(batch_size=16))
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/images_per_second"]]
    assert [int(row["step"]) for row in rows] == [4, 9, 14, 19]
    assert all(row["time/backward"] for row in rows)


def test_moments_of_a_gpu_are_read_only_once_they_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"queued": 0.0, "over": 0.0}

    class Event:
        """A CUDA event of a GPU whose queue ends at ``queued``, and which has come to ``over``."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock["queued"]

        def query(self) -> bool:
            return self.at <= clock["over"]

        def elapsed_time(self, end: "Event") -> float:
            assert self.query()
            assert end.query(), "this waits for the GPU"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    split = _TimeSplit(torch.device("cuda"))

    def window(forward: float) -> dict[str, float]:
        split.begin()
        for phase, length in (("forward", forward), ("backward", 4 - forward), ("other", 4)):
            clock["queued"] += length
            split.mark(phase)
        return split.end()

    assert window(1) == {}  # at 8, nothing of it is done
    clock["over"] = 7
    assert window(2) == {}
    clock["over"] = 8
    assert window(3) == {"forward": 1 / 8, "backward": 3 / 8}
    clock["over"] = 24
    assert window(3) == {"forward": 3 / 8, "backward": 1 / 8}  # of the third: the newest that is over


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_split_of_a_gpu_is_logged(tmp_path: Path) -> None:
    running = trainer(tmp_path, callbacks=[Throughput(every_n_steps=2)], accelerator="gpu", limit_train_batches=10)
    running.fit(simclr(), digits())
    found = [float(running.callback_metrics[f"time/{phase}"]) for phase in PHASES]
    assert 0 < sum(found) <= 1 + 1e-6
