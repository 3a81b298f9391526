"""How fast training is, and what it waits for."""

import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_lightning import Images, SSLDataModule, Throughput
from ssl_lightning.data.images import OpenedImage, opened_already
from tests.small import DIGIT_VIEW, digits, simclr, trainer


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
    with pytest.warns(UserWarning, match=r"in waiting for images: raise data.num_workers \(now 0") as warned:
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
