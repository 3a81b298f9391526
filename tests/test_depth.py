"""Depth by the features of patches: the data, the measures, and what training adds."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from PIL import Image

from ssl_lightning import MAE, ArrayData, DepthData, DepthEvaluation, UserError, VOCSegmentationData
from ssl_lightning.cli import main
from ssl_lightning.evaluation.patch_depth import DepthProtocol, PatchDepth
from tests import voc_and_coco
from tests.processes import run_processes
from tests.small import ADAMW, VIT, trainer

CPU = {"accelerator": "cpu"}
COUNTS = {"train": 40, "val": 12}


def drawn_depth(mask: Image.Image, objects: list[Any]) -> np.ndarray[Any, Any]:
    """The lower on the ground the nearer, from 10 to 4 m; the larger a shape the nearer, from 3.3 to 2 m."""
    classes = np.asarray(mask)
    depth = np.linspace(10, 4, len(classes))[:, None].repeat(classes.shape[1], 1)
    for _, (x0, y0, x1, y1) in objects:
        inside = classes[y0:y1, x0:x1] > 0
        depth[y0:y1, x0:x1][inside] = 80 / (x1 - x0)
    depth[:, :2] = 0  # unknown
    return depth


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with depth maps as PNGs in millimeters; the splits are folders."""
    root, random = tmp_path_factory.mktemp("depth"), np.random.Generator(np.random.Philox(key=3))
    for split, count in COUNTS.items():
        for folder in ("images", "depths"):
            (root / folder / split).mkdir(parents=True)
        for number in range(count):
            picture, mask, objects = voc_and_coco.draw(random, (96, 80))
            picture.save(root / "images" / split / f"{number:03}.jpg", quality=95)
            depth = (1000 * drawn_depth(mask, objects)).round().astype(np.uint16)
            Image.fromarray(depth).save(root / "depths" / split / f"{number:03}.png")
    return root


def depths(root: Path, **kwargs: Any) -> DepthData:
    return DepthData(str(root), **{"depth_scale": 0.001, "image_size": 96, "num_workers": 0, **kwargs})


def evaluation(checkpoint: str, data: Any, folder: Path, net: dict[str, Any] | None = None) -> DepthEvaluation:
    return DepthEvaluation(checkpoint, data, **(net or {}), output=str(folder), trainer=CPU)


def test_patches_that_show_their_depth_are_measured_right() -> None:
    random = torch.Generator().manual_seed(0)
    grids = torch.randint(3, (20, 4, 4), generator=random)
    maps = torch.nn.functional.one_hot(grids, 3).float().permute(0, 3, 1, 2)
    meters = torch.tensor([1.0, 2.5, 6.0])[grids].repeat_interleave(8, 1).repeat_interleave(16, 2)  # (20, 32, 64)
    meters[:, :4] = 0
    meters[0], meters[19] = 0, 0  # all unknown
    judge = PatchDepth(DepthProtocol(), 16)
    judge.remember(maps[:16], [*meters[:16]], 8)
    assert judge.memory.parts[1][1].shape == (16, 2)
    assert judge.memory.parts[1][1][:, 1].tolist() == [0.5] * 4 + [1.0] * 12
    judge.score(maps[16:].repeat_interleave(8, 2).repeat_interleave(16, 3), [*meters[16:]], 8)  # no interpolation
    measures = judge.measures()
    assert measures["abs_rel"] < 0.02
    assert measures["rmse"] < 0.06
    assert measures["delta1"] == 1


def test_measures_are_the_usual_ones_averaged_over_images() -> None:
    judge = PatchDepth(DepthProtocol(max_depth=10), 1)
    judge._predict = lambda queries: queries[:, 0]
    truth = torch.tensor([[[2.0, 4.0], [0.0, 11.0]], [[1.0, 1.0], [1.0, 1.0]]])
    judge.score(torch.tensor([[[[3.0, 4.0], [9.0, 9.0]]], [[[1.2, 1.0], [1.0, 1.0]]]]), [*truth], 1)
    expected = {"rmse": (0.5**0.5 + 0.1) / 2, "abs_rel": (0.25 + 0.05) / 2, "delta1": (0.5 + 1) / 2}
    assert judge.measures() == pytest.approx(expected)


def test_a_small_memory_takes_the_same_number_of_patches_of_each_image() -> None:
    judge = PatchDepth(DepthProtocol(memory_size=40), 10)
    judge.remember(torch.rand(10, 5, 4, 4), [*torch.rand(10, 32, 32) + 1], 8)
    assert [len(features) for features, _, _ in judge.memory.parts] == [4] * 10
    assert judge._predict is None


@pytest.mark.parametrize("kind", ["png", "npy", "tif", "L"])
def test_depth_maps_of_all_kinds_are_in_meters(kind: str, tmp_path: Path) -> None:
    meters = np.random.default_rng(0).uniform(1, 9, (20, 30)).astype(np.float32)
    meters[0, 0] = 0
    for folder in ("images", "depths"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / "a.jpg")  # twice as large
    scale = {"png": 1 / 256, "L": 0.04}.get(kind)
    stored = meters if scale is None else (meters / scale).round()
    if kind == "npy":
        stored[1, 1], stored[2, 2], stored[3, 3] = np.nan, np.inf, -1
        meters[[1, 2, 3], [1, 2, 3]] = 0
        np.save(tmp_path / "depths" / "a.npy", stored[..., None])
    else:
        kinds: dict[str, Any] = {"png": np.uint16, "L": np.uint8, "tif": np.float32}
        Image.fromarray(stored.astype(kinds[kind])).save(tmp_path / "depths" / f"a.{'png' if kind == 'L' else kind}")
    (tmp_path / "train.txt").write_text("a.jpg\n")
    (tmp_path / "val.txt").write_text("a\n")
    data = depths(tmp_path, depth_scale=scale, batch_size=1)
    ((_, (read,)),) = data.predict_dataloader()[1]
    np.testing.assert_allclose(read, meters, atol=0.021 if kind == "L" else 0.002)
    images, cropped = next(iter(data.train_dataloader()))
    assert images.shape[2:] == cropped.shape[1:] == (96, 96)


@pytest.mark.slow
def test_a_pretrained_vit_beats_an_untrained_one(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.Generator(np.random.Philox(key=1))
    unlabeled = np.stack([np.array(voc_and_coco.draw(random, (96, 80))[0]) for _ in range(256)]).transpose(0, 3, 1, 2)
    L.seed_everything(0)
    running = trainer(tmp_path, max_epochs=10)
    data = ArrayData(unlabeled, image_size=32, batch_size=64, num_workers=0)
    running.fit(MAE(**VIT, optim=ADAMW, decoder_dim=32, decoder_depth=1, decoder_heads=2), data)
    running.save_checkpoint(tmp_path / "x.ckpt")
    found = evaluation("untrained", depths(drawn), tmp_path, VIT).depth()
    assert found is not None
    words = ["--data=DepthData", f"--data.root={drawn}", "--data.depth_scale=0.001", "--data.image_size=96"]
    words += ["--data.num_workers=0", f"--output={tmp_path}", '--trainer={"accelerator": "cpu"}']
    main(["evaluate", "depth", "--checkpoint", str(tmp_path / "x.ckpt"), *words])
    said = capsys.readouterr().out
    assert "40 training and 12 test images" in said
    trained = float(said.partition("rmse ")[2].partition(",")[0])
    assert trained < 0.6 * found.measures["rmse"]


def _measures(rank: int, drawn: Path, count: int) -> dict[str, float]:
    several = {"strategy": "ddp", "devices": 2, "plugins": [LightningEnvironment()]} if count > 1 else {}
    judged = DepthEvaluation(
        "untrained", depths(drawn, batch_size=4), **VIT, output=str(drawn / str(count)), trainer={**CPU, **several}
    )
    found = judged.depth(memory_size=2000)
    return {} if found is None else found.measures


@pytest.mark.slow
def test_two_processes_measure_as_one(drawn: Path) -> None:
    (one,), (two, nothing) = (run_processes(_measures, count, drawn, count) for count in (1, 2))
    assert two == pytest.approx(one, rel=1e-3)
    assert nothing == {}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"depth_scale": None}, r"000.png holds whole numbers; set --data.depth_scale to the meters of a unit"),
        ({"depth_scale": 0.0}, r"--data.depth_scale=0.0 must be above 0"),
        ({"val_split": "train"}, r"40 of 40 validation images are training images, too"),
        ({"val_split": "test"}, r"images/test has no images, and .*test.txt does not list any; --data.root"),
        ("missing", r"depths has no file named val/003, which the split val needs"),
        ("shape", r"003.png is of 10x80 px, its image of 96x80; they must have the same proportions"),
        ("color", r"003.png has 3 channels; a depth map has a single number"),
        ("unknown", r"no pixel of the training depth maps counts: all are 0, or above --max_depth 0.5"),
        ("masks", r"depth needs images with depth maps; give --data DepthData"),
    ],
)
def test_what_has_no_depth_says_so(what: Any, message: str, drawn: Path, tmp_path: Path) -> None:
    root = drawn
    if what in ("missing", "shape", "color"):
        root = tmp_path / "spoiled"
        for file in [*drawn.rglob("*.jpg"), *drawn.rglob("*.png")]:
            target = root / file.relative_to(drawn)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
        spoiled = root / "depths" / "val" / "003.png"
        spoiled.unlink()
        if what != "missing":
            noise = np.random.default_rng(0).integers(256, size=(80, 96, 3), dtype=np.uint8)
            Image.fromarray(noise if what == "color" else noise[:, :10, 0]).save(spoiled)
    with pytest.raises(UserError, match=message):
        _judged(what, root, tmp_path)


def _judged(what: Any, root: Path, folder: Path) -> None:
    if what == "masks":
        data: Any = VOCSegmentationData(str(voc_and_coco.write(folder) / "voc"), 3, image_size=96, num_workers=0)
    else:
        data = depths(root, **(what if isinstance(what, dict) else {}))
    evaluation("untrained", data, folder, VIT).depth(max_depth=0.5 if what == "unknown" else None, memory_size=500)
