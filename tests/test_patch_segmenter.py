"""Segmentation by the features of patches, online and by command."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from ssl_lightning import (
    MAE,
    ArrayData,
    SegmentationEvaluation,
    SegmentationProbe,
    UserError,
    VOCDetectionData,
    VOCSegmentationData,
)
from ssl_lightning.cli import main
from ssl_lightning.evaluation.patch_segmenter import PatchProtocol, PatchSegmenter
from tests import voc_and_coco
from tests.processes import run_processes
from tests.small import ADAMW, BACKBONE, VIT, small, trainer
from tests.small import data as views

CPU = {"accelerator": "cpu"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return voc_and_coco.write(tmp_path_factory.mktemp("drawn"))


def masks(drawn: Path, **kwargs: Any) -> VOCSegmentationData:
    return VOCSegmentationData(str(drawn / "voc"), **{"num_classes": 3, "image_size": 96, "num_workers": 0, **kwargs})


def evaluation(checkpoint: str, data: Any, folder: Path, net: dict[str, Any] | None = None) -> SegmentationEvaluation:
    return SegmentationEvaluation(checkpoint, data, **(net or {}), output=str(folder), trainer=CPU)


@pytest.mark.parametrize("method", ["hummingbird", "capi", "linear"])
def test_patches_that_show_their_class_are_labeled_right(method: Any) -> None:
    random = torch.Generator().manual_seed(0)
    grids = torch.randint(3, (10, 4, 4), generator=random)  # a class for each patch
    maps = torch.nn.functional.one_hot(grids, 3).float().permute(0, 3, 1, 2) + 0.01
    whole = grids.repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8)
    sizes = ((32, 32), (64, 32))  # masks of any size
    images = [whole, whole.repeat_interleave(2, 1)]
    for (height, width), masks in zip(sizes, images, strict=True):
        assert masks.shape[1:] == (height, width)
        segmenter = PatchSegmenter(PatchProtocol(method, k=3, distance="l2"), 3, 8)
        holed = masks.clone()
        holed[8 if method == "capi" else 0 :, : height // 16] = 255  # CAPI's votes may be for an ignored label
        segmenter.remember(maps[:8], [*holed[:8]], 8)
        assert segmenter.memory.parts[0][1].shape == (16, 64)
        segmenter.score(maps[8:], [*holed[8:]], 8)
        assert segmenter.measures()["miou"] > (0.99 if method == "capi" else 0.75)  # interpolation blurs the edges
        assert segmenter.memory.size == 8 * 16


def test_a_small_memory_keeps_the_patches_of_rare_classes() -> None:
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[8:16, 16:24] = 2  # a single patch
    segmenter = PatchSegmenter(PatchProtocol(memory_size=40), 3, 10)
    segmenter.remember(torch.rand(10, 5, 4, 4), [mask] * 10, 8)
    for features, labels, _ in segmenter.memory.parts:
        assert len(features) == 4
        assert sorted(labels[:, 0].tolist()) == [0, 0, 0, 2]


def test_the_probe_measures_what_the_command_does(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = []
    for probes in ([SegmentationProbe(masks(drawn), every_n_epochs=2)], []):
        L.seed_everything(0, verbose=False)
        module = small(MAE, VIT)
        running = trainer(tmp_path, max_epochs=3, callbacks=probes, limit_train_batches=2)
        running.fit(module, views(MAE))
        states.append(module.state_dict())
        if probes:
            measured = {name: float(value) for name, value in running.callback_metrics.items()}
            running.save_checkpoint(tmp_path / "x.ckpt")
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    root = str(drawn / "voc")
    words = ["--data=VOCSegmentationData", f"--data.root={root}", "--data.num_classes=3", "--data.image_size=96"]
    words += ["--data.num_workers=0", f"--output={tmp_path}", '--trainer={"accelerator": "cpu"}']
    main(["evaluate", "segmentation_knn", "--checkpoint", str(tmp_path / "x.ckpt"), *words])
    assert f"miou {measured['val/segmentation_miou']:.4g}, pixel_accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pretrained_vit_beats_an_untrained_one(drawn: Path, tmp_path: Path) -> None:
    random = np.random.Generator(np.random.Philox(key=1))
    unlabeled = np.stack([np.array(voc_and_coco.draw(random, (96, 80))[0]) for _ in range(256)]).transpose(0, 3, 1, 2)
    L.seed_everything(0)
    running = trainer(tmp_path, max_epochs=10)
    data = ArrayData(unlabeled, image_size=32, batch_size=64, num_workers=0)
    running.fit(MAE(**VIT, optim=ADAMW, decoder_dim=32, decoder_depth=1, decoder_heads=2), data)
    running.save_checkpoint(tmp_path / "x.ckpt")
    trained, untrained = (
        [
            found.measures["miou"]
            for found in (
                judged.segmentation_knn(memory_size=1500),
                judged.segmentation_knn("capi"),
                judged.segmentation_linear(),
            )
            if found is not None
        ]
        for judged in (
            evaluation(str(tmp_path / "x.ckpt"), masks(drawn), tmp_path),
            evaluation("untrained", masks(drawn), tmp_path, VIT),
        )
    )
    assert trained[0] > untrained[0] + 0.05
    assert trained[1] > untrained[1] + 0.06
    assert trained[2] > untrained[2]


def _miou(rank: int, drawn: Path, count: int) -> list[float]:
    several = {"strategy": "ddp", "devices": 2, "plugins": [LightningEnvironment()]} if count > 1 else {}
    judged = SegmentationEvaluation(
        "untrained", masks(drawn, batch_size=4), **VIT, output=str(drawn / str(count)), trainer={**CPU, **several}
    )
    found = [judged.segmentation_knn("capi", memory_size=2000), judged.segmentation_linear()]
    return [] if found[0] is None else [one.measures["miou"] for one in found if one is not None]


@pytest.mark.slow
def test_two_processes_segment_as_one(drawn: Path) -> None:
    (one,), (two, nothing) = (run_processes(_miou, count, drawn, count) for count in (1, 2))
    assert two == pytest.approx(one, abs=1e-3)
    assert nothing == []


@pytest.mark.parametrize(
    ("data", "net", "message"),
    [
        ({"image_size": 90}, VIT, "patches of 8 px do not divide images of 90x90 px"),
        ({"val_split": "train"}, VIT, "48 of 48 validation images are training images, too"),
        ({}, {"backbone": "torchvision/mobilenet_v2"}, "gives no feature maps here; choose a ResNet or a ViT"),
        ({}, {**BACKBONE, "backbone_kwargs": {**BACKBONE["backbone_kwargs"], "in_chans": 4}}, "images of 4 channels"),
        (VOCDetectionData, VIT, "segmentation needs masks; give --data VOCSegmentationData"),
    ],
)
def test_what_cannot_be_segmented_says_so(
    data: Any, net: dict[str, Any], message: str, drawn: Path, tmp_path: Path
) -> None:
    images = masks(drawn, **data) if isinstance(data, dict) else data(str(drawn / "voc"), num_workers=0)
    with pytest.raises(UserError, match=message):
        evaluation("untrained", images, tmp_path, net).segmentation_knn()
