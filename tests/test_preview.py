"""The picture of the views and its numbers, and the benchmark of the pipeline."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_lightning import ArrayData, HuggingFaceData, ImageFolderData, ViewGrid, ViewSpec
from ssl_lightning.commands.benchmark import pipeline
from ssl_lightning.data.preview import _overlaps
from ssl_lightning.loggers import AppendingCSVLogger
from tests.small import simclr, slow_unless, trainer


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ssl_lightning", *words], capture_output=True, text=True)


def test_overlaps_are_those_of_the_pixels() -> None:
    random = np.random.default_rng(0)
    kinds = [ViewSpec(size=64), ViewSpec(size=64), ViewSpec(size=32, count=1)]
    for _ in range(20):
        tops, lefts = random.integers(20, size=(2, 3))
        heights, widths = random.integers(1, 20, size=(2, 3))
        masks = np.zeros((3, 40, 40), bool)
        for mask, top, left, height, width in zip(masks, tops, lefts, heights, widths, strict=True):
            mask[top : top + height, left : left + width] = True
        expected = [(masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum() for a, b in ((0, 1), (0, 2), (1, 2))]
        assert _overlaps(np.stack([tops, lefts, heights, widths], 1), kinds) == pytest.approx(expected)


def test_views_are_shown_as_training_sees_them(photos: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "image_size": 144, "views": "byol", "num_workers": 0}
    data = ImageFolderData(str(photos), **settings)
    sheet = np.asarray(data.preview(num_rows=3, num_images=8).sheet)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    for number, view in enumerate(batch.views):
        spec = data.view_specs[number]
        pixels = (view[1] * torch.tensor(spec.std).view(3, 1, 1) + torch.tensor(spec.mean).view(3, 1, 1)) * 255
        left, top = 154 + number * 152, 14 + 152 + 2
        found = torch.from_numpy(sheet[top : top + 144, left : left + 144]).permute(2, 0, 1)
        assert (found - pixels).abs().max() <= 0.51


def test_blank_views_and_their_overlap_are_counted() -> None:
    images = np.zeros((8, 3, 64, 64), np.uint8)
    images[::2] = np.random.default_rng(0).integers(256, size=(3, 64, 64))
    whole = ViewSpec(size=32, count=2, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    preview = ArrayData(images, batch_size=8, views=[whole]).preview()
    assert preview.blank == 0.5
    assert (preview.overlap, preview.disjoint) == (1.0, 0.0)
    corners = ArrayData(images, batch_size=8, views=[ViewSpec(size=32, count=2, scale=(0.01, 0.01))]).preview()
    assert corners.disjoint is not None
    assert corners.disjoint > 0.5
    single = ArrayData(images, batch_size=8, views=[ViewSpec(size=32)]).preview()
    assert (single.overlap, single.disjoint) == (None, None)


def test_a_stream_can_be_looked_at(photos: Path) -> None:
    data = HuggingFaceData(
        "imagefolder", data_dir=str(photos), streaming=True, num_images=40, batch_size=4, image_size=32, num_workers=0
    )
    preview = data.preview(num_rows=2, num_images=8)
    assert preview.sheet.height > 2 * 144
    assert preview.images_per_second > 0


@pytest.mark.slow
def test_preview_on_the_command_line(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "views.png"
    done = run(
        *("preview", "--model", "DINO", "--model.backbone", "resnet10_cifar", "--model.num_prototypes", "16"),
        *("--data", "ImageFolderData", "--data.root", str(photos), "--data.image_size", "64", "--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    assert "blank views" in done.stdout
    assert "pairs without a common pixel" in done.stdout
    with Image.open(output) as sheet:  # 2 global and 8 local crops
        assert sheet.size == (4 + 148 + 2 * 152 + 8 * (144 * 24 // 64 + 8), 14 + 8 * 152)


def test_the_grid_is_drawn_when_training_starts(photos: Path, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    data = ImageFolderData(str(photos), batch_size=8, image_size=32, num_workers=0)
    loggers = [AppendingCSVLogger(tmp_path, "run"), TensorBoardLogger(tmp_path, "board")]
    trainer(tmp_path, max_steps=1, logger=loggers, callbacks=[ViewGrid(num_images=3)]).fit(simclr(), data)
    with Image.open(tmp_path / "run" / "version_0" / "views.png") as sheet:
        assert sheet.height == 14 + 3 * 152
    events = EventAccumulator(str(tmp_path / "board" / "version_0"))
    events.Reload()
    assert events.Tags()["images"] == ["views"]


@pytest.mark.parametrize(
    "views",
    slow_unless(lambda views: views == "swav", ["simclr", "moco_v2", "moco_v3", "byol", "swav", "dino", "mae"]),
)
def test_the_pipeline_is_measured_beside_lightly(photos: Path, views: Any) -> None:
    threads = torch.get_num_threads()
    result = pipeline(str(photos), views, image_size=48, batch_size=4, num_images=8, passes=1)
    assert torch.get_num_threads() == threads
    found = json.loads(result.json)
    assert found["ratio"] == pytest.approx(found["images_per_second"] / found["lightly_images_per_second"])
    assert found["worker_ratio"] > found["ratio"] > 0
    pixels = {"swav": 2 * 48**2 + 6 * 24**2, "dino": 2 * 48**2 + 8 * 24**2, "mae": 48**2}.get(views, 2 * 48**2)
    assert found["lightly_bytes"] == 4 * 3 * pixels  # as many pixels, as floats
    assert 3 * pixels < found["bytes"] < 3 * pixels + 1000
    assert "lightly" in str(result)


@pytest.mark.slow
def test_the_benchmark_on_the_command_line(photos: Path) -> None:
    words = f"benchmark pipeline --root {photos} --views swav --image-size 32 --num-workers 1 --num-images 8 --json"
    done = run(*words.split(), "--batch-size=4", "--passes=1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["views"], found["image_size"], found["num_workers"]) == ("swav", 32, 1)
    assert found["loader_ratio"] > 0
    wrong = run("benchmark", "pipeline", "--root", str(photos / "nowhere"))
    assert wrong.returncode != 0
    assert "does not exist" in wrong.stderr
    assert "Traceback" not in wrong.stderr
