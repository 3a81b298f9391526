"""Semantic segmentation on a pretrained backbone."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from PIL import Image
from torch import Tensor

from ssl_lightning import MAE, ArrayData, Optim, SemanticSegmenter, SimCLR, UserError, VOCSegmentationData
from ssl_lightning.checkpoints import open_backbone
from tests import voc_and_coco
from tests.processes import run_processes
from tests.small import ADAMW, VIT, slow_unless, small, trainer
from tests.small import data as views

CNN: dict[str, Any] = {
    "backbone": "resnet10_cifar",
    "backbone_kwargs": {"stem_stride": 2, "channels": (16, 32, 64, 128)},
}
TORCHVISION: dict[str, Any] = {"backbone": "torchvision/resnet18", "backbone_kwargs": {"width_per_group": 64}}
FAST = Optim("adamw", base_lr=1e-2, lr_scaling="none", warmup_epochs=0)
BACKBONES = pytest.mark.parametrize("net", [CNN, TORCHVISION, VIT], ids=["timm", "torchvision", "vit"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return voc_and_coco.write(tmp_path_factory.mktemp("drawn"))


def masks(pictures: Path, **kwargs: Any) -> VOCSegmentationData:
    arguments: dict[str, Any] = {"num_classes": 3, "image_size": 96, "num_workers": 0, "seed": 0}
    return VOCSegmentationData(str(pictures / "voc"), **{**arguments, **kwargs})


def segmenter(net: dict[str, Any] = CNN, **kwargs: Any) -> SemanticSegmenter:
    L.seed_everything(0)
    return SemanticSegmenter("untrained", **{**net, "optim": FAST, **kwargs})


def miou(module: SemanticSegmenter, pictures: Path, folder: Path, **kwargs: Any) -> float:
    """After a short training."""
    L.seed_everything(0)
    running = trainer(folder, max_epochs=15, check_val_every_n_epoch=15, num_sanity_val_steps=0, **kwargs)
    running.fit(module, masks(pictures))
    return float(running.callback_metrics["val/miou"])


@pytest.mark.slow
def test_a_pretrained_backbone_stays_as_it_is_and_beats_an_untrained_one(pictures: Path, tmp_path: Path) -> None:
    random = np.random.Generator(np.random.Philox(key=1))
    unlabelled = np.stack([np.array(voc_and_coco.draw(random, (96, 80))[0]) for _ in range(256)]).transpose(0, 3, 1, 2)
    L.seed_everything(0)
    pretraining = trainer(tmp_path, max_epochs=10)
    pretraining.fit(SimCLR(**CNN, optim=ADAMW), ArrayData(unlabelled, image_size=32, batch_size=64, num_workers=0))
    pretraining.save_checkpoint(tmp_path / "x.ckpt")

    module = SemanticSegmenter(str(tmp_path / "x.ckpt"), num_classes=3, optim=FAST)
    before = trainer(tmp_path).validate(module, masks(pictures), verbose=False)[0]["val/miou"]
    weights = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    after = miou(module, pictures, tmp_path)
    untrained = miou(segmenter(), pictures, tmp_path)
    assert after > before + 0.15
    assert after > untrained + 0.04
    assert not module.backbone.layer4.training
    assert module.head.training
    assert any("running" in name for name in weights)
    assert all(torch.equal(value, weights[name]) for name, value in module.backbone.state_dict().items())


@pytest.mark.parametrize("net", [CNN, VIT], ids=["cnn", "vit"])
def test_a_backbone_that_learns_does_so_with_an_fcn_head(net: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    module = segmenter(net, head="fcn", frozen=False)
    before = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    running = trainer(tmp_path, limit_train_batches=2)
    running.fit(module, masks(pictures))
    same = [name for name, value in module.backbone.state_dict().items() if torch.equal(value, before[name])]
    assert not [name for name in same if not name.endswith("pos_embed")]
    assert module.backbone.training


@BACKBONES
def test_maps_are_those_that_the_features_come_from(net: dict[str, Any]) -> None:
    module = segmenter(net, num_classes=3).eval()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    prepared = module.prepared(images)
    torch.testing.assert_close(prepared, module.prepared(images / 255))
    found, backbone = module.backbone(prepared)["0"], module.pretrained.backbone
    if net is VIT:
        (expected,) = backbone.forward_intermediates(prepared, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close(found, expected)
    else:
        torch.testing.assert_close(found.mean((2, 3)), backbone(prepared))
    assert module(images).shape == (2, 3, 64, 96)


def test_images_are_normalised_as_the_checkpoint_says(tmp_path: Path) -> None:
    running = trainer(tmp_path, limit_train_batches=1)
    running.fit(small(SimCLR), views(SimCLR))
    running.save_checkpoint(tmp_path / "x.ckpt")
    wanted = open_backbone(str(tmp_path / "x.ckpt")).image_transform
    white = SemanticSegmenter(str(tmp_path / "x.ckpt")).prepared(torch.full((3, 2, 2), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor(wanted["mean"])) / torch.tensor(wanted["std"])
    torch.testing.assert_close(white, expected[:, None, None].expand(3, 2, 2))


def by_hand(module: SemanticSegmenter, pictures: Path) -> tuple[float, float]:
    """Mean intersection over union and accuracy of all validation pixels, one picture at a time."""
    voc, counts = pictures / "voc", np.zeros((3, 3))
    for name in (voc / "ImageSets/Segmentation/val.txt").read_text().split():
        with Image.open(voc / "SegmentationClass" / f"{name}.png") as opened:
            mask = np.array(opened)
        with Image.open(voc / "JPEGImages" / f"{name}.jpg") as opened:
            image = torch.from_numpy(np.array(opened)).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(image, (96, 96), mode="bilinear", antialias=True)
        with torch.no_grad():
            logits = module.head(module.backbone(module.prepared(resized))["0"])
            logits = torch.nn.functional.interpolate(logits, mask.shape, mode="bilinear")
        counted = mask != 255
        np.add.at(counts, (mask[counted], logits[0].argmax(0).numpy()[counted]), 1)
    hits = np.diag(counts)
    return float((hits / (counts.sum(0) + counts.sum(1) - hits)).mean()), float(hits.sum() / counts.sum())


def test_metrics_count_the_pixels_of_whole_masks(pictures: Path, tmp_path: Path) -> None:
    voc_and_coco.write(tmp_path)
    for file in (tmp_path / "voc/SegmentationClass").glob("val_00*.png"):
        with Image.open(file) as opened:
            mask = np.array(opened)
        mask[:20] = 255
        Image.fromarray(mask).save(file)
    module = segmenter(num_classes=3)
    (found,) = trainer(tmp_path).validate(module, masks(tmp_path), verbose=False)
    expected = by_hand(module.eval(), tmp_path)
    assert (found["val/miou"], found["val/pixel_accuracy"]) == pytest.approx(expected, abs=1e-5)
    assert expected != pytest.approx(by_hand(module, pictures), abs=1e-3)  # ignored pixels matter


def _validate(rank: int, pictures: Path) -> dict[str, float]:
    running = trainer(pictures, strategy="ddp", devices=2, plugins=[LightningEnvironment()])
    (found,) = running.validate(segmenter(num_classes=3), masks(pictures, batch_size=4), verbose=False)
    running = trainer(pictures, strategy="ddp", devices=2, plugins=[LightningEnvironment()], limit_train_batches=3)
    running.fit(segmenter(VIT, frozen=False), masks(pictures, batch_size=4))
    return found


def test_two_processes_measure_what_one_does(pictures: Path, tmp_path: Path) -> None:
    (alone,) = trainer(tmp_path).validate(segmenter(num_classes=3), masks(pictures), verbose=False)
    for found in run_processes(_validate, 2, pictures):  # 17 pictures: nine and eight
        assert found == pytest.approx(alone, abs=1e-6)


def test_image_and_mask_are_cropped_alike_whatever_the_number_of_workers(pictures: Path) -> None:
    batches = [[*masks(pictures, num_workers=workers).train_dataloader()] for workers in (0, 2)]
    for (images, labels), (others, other_labels) in zip(*batches, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
        red, _, blue = images.float().unbind(1)
        disc, square = red - blue > 100, blue - red > 100
        assert ((labels == 1) == disc).float().mean() > 0.97
        assert ((labels == 2) == square).float().mean() > 0.97
    assert len({images.float().sum().item() for images, _ in batches[0]}) == 3
    torch.manual_seed(5)
    state = torch.get_rng_state()
    next(iter(masks(pictures).train_dataloader()))
    assert torch.equal(torch.get_rng_state(), state)


def restored(module: SemanticSegmenter, pictures: Path, folder: Path) -> tuple[Tensor, Tensor]:
    """Logits before and after a checkpoint."""
    running = trainer(folder, limit_train_batches=2)
    running.fit(module, masks(pictures))
    running.save_checkpoint(folder / "y.ckpt")
    images = torch.rand(2, 3, 48, 48)
    again = SemanticSegmenter.load_from_checkpoint(folder / "y.ckpt", weights_only=True)
    return module.eval()(images), again.eval()(images)


def test_a_checkpoint_needs_neither_the_data_nor_what_was_transferred(pictures: Path, tmp_path: Path) -> None:
    running = trainer(tmp_path, limit_train_batches=1)
    running.fit(small(MAE), views(MAE))
    running.save_checkpoint(tmp_path / "x.ckpt")
    module = SemanticSegmenter(str(tmp_path / "x.ckpt"), head="fcn")
    (tmp_path / "x.ckpt").unlink()
    torch.testing.assert_close(*restored(module, pictures, tmp_path))


class SaveAt(L.Callback):
    """Writes a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", slow_unless(lambda step: step == 4, [3, 4]))  # three make an epoch
def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted(step: int, pictures: Path, tmp_path: Path) -> None:
    heads = []
    for ckpt_path in (None, tmp_path / "x.ckpt"):
        module, save = segmenter(), SaveAt(step, tmp_path / "x.ckpt")
        running = trainer(tmp_path, max_epochs=3, callbacks=[save])
        running.fit(module, masks(pictures), ckpt_path=ckpt_path, weights_only=True)
        assert running.global_step == 9
        heads.append(module.head.state_dict())
    whole, resumed = heads
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_weight_decay_follows_its_schedule(pictures: Path, tmp_path: Path) -> None:
    optim = Optim("adamw", base_lr=1e-3, lr_scaling="none", weight_decay=0.1, end_weight_decay=0.5, warmup_epochs=0)
    running = trainer(tmp_path, limit_train_batches=2)
    running.fit(segmenter(optim=optim), masks(pictures))
    assert running.optimizers[0].param_groups[0]["weight_decay"] == pytest.approx(0.3)


def spoil(folder: Path, what: str) -> None:
    voc = folder / "voc"
    if what == "listing":
        (voc / "ImageSets/Segmentation/val.txt").unlink()
    elif what == "no names":
        (voc / "ImageSets/Segmentation/val.txt").write_text("\n")
    elif what == "mask":
        (voc / "SegmentationClass/train_003.png").unlink()
    elif what == "shape":
        Image.new("L", (5, 5)).save(voc / "SegmentationClass/val_000.png")
    elif what == "image":
        (voc / "JPEGImages/val_001.jpg").write_bytes(b"none")


@pytest.mark.parametrize(
    ("what", "kwargs", "message"),
    [
        ("listing", {}, r"ImageSets/Segmentation/val.txt does not exist.* the help of VOCSegmentationData"),
        ("no names", {}, r"val.txt lists no image"),
        ("mask", {}, r"train_003.png does not exist \(1 of 48 are missing\)"),
        ("shape", {}, r"val_000.png is of shape \(5, 5\), its image \(80, 96\)"),
        ("image", {}, r"val_001.jpg cannot be read .* fix or remove it"),
        ("", {"num_classes": 2}, r"\.png has class 2; --data.num_classes is 2"),
        ("", {"batch_size": 49}, r"48 training images are too few for a batch of 49 on each of 1 processes"),
    ],
)
def test_data_that_does_not_fit_says_so(what: str, kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    voc_and_coco.write(tmp_path)
    spoil(tmp_path, what)
    for workers in (0, 1) if what == "image" else (0,):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path).fit(segmenter(), masks(tmp_path, num_workers=workers, **kwargs))


def test_what_does_not_fit_the_backbone_says_so(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"patches of 8 px do not divide images of 90x90 px; set --data.image_size"):
        trainer(tmp_path).fit(segmenter(VIT), masks(pictures, image_size=90))
    with pytest.raises(UserError, match=r"the data has 3 classes, but --model.num_classes is 2"):
        trainer(tmp_path).fit(segmenter(num_classes=2), masks(pictures))
    with pytest.raises(UserError, match=r"set --model.num_classes"):
        trainer(tmp_path).fit(segmenter(), masks(pictures).train_dataloader())
    with pytest.raises(UserError, match="'mobilenetv3_small_050' gives no feature maps here; choose a ResNet"):
        segmenter({"backbone": "mobilenetv3_small_050"})
    torch.save(open_backbone("untrained", **CNN).backbone.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not hold a resnet18"):
        SemanticSegmenter(str(tmp_path / "x.pth"), "resnet18")
