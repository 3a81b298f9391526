"""Object detection on a pretrained backbone."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor

from ssl_lightning import COCODetectionData, ObjectDetector, Optim, UserError, VOCDetectionData
from ssl_lightning.checkpoints import open_backbone
from tests import voc_and_coco
from tests.processes import run_processes
from tests.small import VIT, trainer

CNN: dict[str, Any] = {"backbone": "resnet10t", "backbone_kwargs": {"channels": (16, 32, 64, 64), "stem_width": 16}}
CIFAR: dict[str, Any] = {"backbone": "resnet10_cifar", "backbone_kwargs": {"channels": (16, 16, 16, 16)}}
TORCHVISION: dict[str, Any] = {"backbone": "torchvision/resnet18"}
FEW = {"rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 50, "box_batch_size_per_image": 32}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return voc_and_coco.write(tmp_path_factory.mktemp("drawn"))


def boxes(pictures: Path, **kwargs: Any) -> COCODetectionData:
    arguments: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "seed": 0}
    return COCODetectionData(str(pictures / "coco"), "train", "val", **{**arguments, **kwargs})


def voc(pictures: Path, **kwargs: Any) -> VOCDetectionData:
    return VOCDetectionData(str(pictures / "voc"), **{"batch_size": 4, "num_workers": 0, "seed": 0, **kwargs})


def detector(net: dict[str, Any] = CNN, **kwargs: Any) -> ObjectDetector:
    L.seed_everything(0)
    sizes = {"min_size": 80, "max_size": 128, "detector_kwargs": FEW}
    optim = Optim("adamw", base_lr=1e-3, lr_scaling="none", warmup_epochs=0)
    return ObjectDetector(**{"checkpoint": "untrained", **net, **sizes, "optim": optim, **kwargs})


@pytest.mark.slow
def test_a_detector_learns(pictures: Path, tmp_path: Path) -> None:
    module = detector()
    running = trainer(tmp_path, max_epochs=3, check_val_every_n_epoch=3, num_sanity_val_steps=0)
    running.fit(module, boxes(pictures))
    found = running.callback_metrics
    assert found["val/map_50"] > 0.2
    assert 0.05 < found["val/map"] < found["val/map_50"]


@pytest.mark.parametrize(
    ("net", "strides"),
    [
        (CNN, [4, 8, 16, 32, 64]),
        (CIFAR, [1, 2, 4, 8, 16]),
        (TORCHVISION, [4, 8, 16, 32, 64]),
        (VIT, [2, 4, 8, 16, 32]),
        ({**VIT, "backbone_kwargs": {**VIT["backbone_kwargs"], "patch_size": 16}}, [4, 8, 16, 32, 64]),
    ],
    ids=["timm", "cifar", "torchvision", "vit/8", "vit/16"],
)
def test_anchors_follow_the_strides_of_the_levels(net: dict[str, Any], strides: list[int], tmp_path: Path) -> None:
    module = detector(net, num_classes=2).detector
    levels = module.backbone.eval()(torch.rand(1, 3, 128, 192))
    assert list(levels) == ["0", "1", "2", "3", "pool"]
    assert [tuple(level.shape) for level in levels.values()] == [
        (1, 256, 128 // stride, 192 // stride) for stride in strides
    ]
    assert [size for (size,) in module.rpn.anchor_generator.sizes] == [8 * stride for stride in strides]


class Thresholds(ObjectDetector):
    """Takes all that is red for one disc and all that is blue for one square: wrong where there are two."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            red, _, blue = image.float()
            masks = [mask.nonzero() for mask in (red - blue > 100, blue - red > 100)]
            seen = [(label, mask) for label, mask in enumerate(masks, 1) if len(mask)]
            corners = [torch.cat([mask.amin(0).flip(0), mask.amax(0).flip(0) + 1]) for _, mask in seen]
            rows = torch.stack(corners).float() if corners else torch.zeros(0, 4)
            labels = torch.tensor([label for label, _ in seen], dtype=torch.long)
            found.append({"boxes": rows, "labels": labels, "scores": 1 / (1 + rows.sum(1))})
        return found


def validated(pictures: Path, data: Any, **kwargs: Any) -> dict[str, float]:
    module = Thresholds("untrained", **CNN)
    (found,) = trainer(pictures, **kwargs).validate(module, data, verbose=False)
    return dict(found)


def test_both_layouts_tell_the_same_boxes(pictures: Path) -> None:
    coco, pascal = (data(pictures).val_dataloader() for data in (boxes, voc))
    for (images, targets), (others, other_targets) in zip(coco, pascal, strict=True):
        for image, other, target, other_target in zip(images, others, targets, other_targets, strict=True):
            assert torch.equal(image, other)
            for key in ("boxes", "labels", "iscrowd"):
                assert torch.equal(target[key], other_target[key])
    found = [validated(pictures, data(pictures)) for data in (boxes, voc)]
    assert found[0] == found[1]
    assert 0.5 < found[0]["val/map"] < found[0]["val/map_50"] < 1


def _validate(rank: int, pictures: Path) -> dict[str, float]:
    two = {"strategy": "ddp", "devices": 2}
    found = validated(pictures, boxes(pictures), **two, plugins=[LightningEnvironment()])
    running = trainer(pictures, **two, plugins=[LightningEnvironment()], limit_train_batches=3, limit_val_batches=0)
    running.fit(detector(VIT), boxes(pictures, batch_size=2))
    return found


def test_two_processes_measure_what_one_does(pictures: Path) -> None:
    alone = validated(pictures, boxes(pictures))
    for found in run_processes(_validate, 2, pictures):  # 17 pictures: nine and eight
        assert found == pytest.approx(alone, abs=1e-6)


def test_boxes_move_with_their_shapes_whatever_the_number_of_workers(pictures: Path) -> None:
    batches = [[*boxes(pictures, num_workers=workers).train_dataloader()] for workers in (0, 2)]
    inside = []
    for (images, targets), (others, other_targets) in zip(*batches, strict=True):
        for image, target, other, other_target in zip(images, targets, others, other_targets, strict=True):
            assert torch.equal(image, other)
            assert torch.equal(target["boxes"], other_target["boxes"])
            red, _, blue = image.float()
            for (x0, y0, x1, y1), label in zip(target["boxes"].int().tolist(), target["labels"].tolist(), strict=True):
                colour = (red - blue if label == 1 else blue - red)[y0:y1, x0:x1]
                inside.append((colour > 100).float().mean().item())
    assert len(inside) > 48
    assert sum(share > 0.6 for share in inside) > 0.9 * len(inside)  # small crops of a disc may miss it
    assert len({image.shape for images, _ in batches[0] for image in images}) > 10


def pretrained(folder: Path, **kwargs: Any) -> ObjectDetector:
    """A detector on weights from a file, whose BatchNorm does something."""
    net = {**CNN, "backbone_kwargs": {**CNN["backbone_kwargs"], "zero_init_last": False}}
    torch.save(open_backbone("untrained", **net).backbone.state_dict(), folder / "x.pth")
    return detector(net, checkpoint=str(folder / "x.pth"), **kwargs)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.slow
def test_what_is_frozen_stays_as_it_is(frozen: bool, pictures: Path, tmp_path: Path) -> None:
    module = pretrained(tmp_path, frozen=frozen)
    before = {name: value.clone() for name, value in module.body.state_dict().items()}
    running = trainer(tmp_path, limit_train_batches=2, limit_val_batches=0)
    running.fit(module, boxes(pictures, batch_size=2))
    after = module.body.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == (set() if frozen else {name for name, value in before.items() if value.ndim > 1})
    assert any("running_var" in name for name in before)


def test_batch_norm_of_an_untrained_backbone_learns(pictures: Path, tmp_path: Path) -> None:
    module = detector()
    running = trainer(tmp_path, limit_train_batches=2, limit_val_batches=0)
    running.fit(module, boxes(pictures, batch_size=2))
    assert module.body.layer4[0].bn2.weight.abs().max() > 0  # else its branch would stay closed
    assert module.body.layer4[0].bn2.running_mean.abs().max() > 0


@pytest.mark.slow
def test_a_checkpoint_needs_neither_the_data_nor_what_was_transferred(pictures: Path, tmp_path: Path) -> None:
    module = pretrained(tmp_path, detector_kwargs={**FEW, "box_score_thresh": 0.0})
    (tmp_path / "x.pth").unlink()
    running = trainer(tmp_path, limit_train_batches=2, limit_val_batches=0)
    running.fit(module, boxes(pictures, batch_size=2))
    running.save_checkpoint(tmp_path / "x.ckpt")
    again = ObjectDetector.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).eval()
    image = torch.rand(3, 80, 96)
    for found, expected in zip(again([image])[0].values(), module.eval()([image])[0].values(), strict=True):
        assert len(expected)
        torch.testing.assert_close(found, expected)


def test_ignored_objects_count_neither_in_training_nor_in_evaluation(tmp_path: Path) -> None:
    voc_and_coco.write(tmp_path)
    before = validated(tmp_path, voc(tmp_path))
    one = [(1, (2, 2, 40, 40))]
    for split in ("train", "val"):  # where nothing is to be seen
        (tmp_path / f"voc/Annotations/{split}_000.xml").write_text(voc_and_coco.annotation(one, difficult=1))
    data = voc(tmp_path)
    assert [len(images) for images in data.splits] == [47, 17]
    assert data.num_classes == 2
    _, targets = next(iter(data.val_dataloader()))
    assert targets[0]["iscrowd"].tolist() == [1]
    assert targets[0]["boxes"].tolist() == [[2, 2, 40, 40]]
    (tmp_path / "voc/Annotations/val_000.xml").write_text(voc_and_coco.annotation([]))
    none = validated(tmp_path, voc(tmp_path))
    (tmp_path / "voc/Annotations/val_000.xml").write_text(voc_and_coco.annotation(one))
    counted = validated(tmp_path, voc(tmp_path))
    (tmp_path / "voc/Annotations/val_000.xml").write_text(voc_and_coco.annotation(one, difficult=1))
    assert validated(tmp_path, voc(tmp_path)) == none
    assert counted["val/map"] < none["val/map"]
    assert before["val/map"] != none["val/map"]


def spoil(folder: Path, what: str) -> None:
    xml = folder / "voc/Annotations/train_002.xml"
    if what == "listing":
        (folder / "voc/ImageSets/Main/train.txt").unlink()
    elif what == "no box":
        xml.write_text("<annotation><object><name>disc</name></object></annotation>")
    elif what == "no xml":
        xml.write_text("disc")
    elif what == "all empty":
        for file in xml.parent.glob("train*.xml"):
            file.write_text("<annotation/>")
    elif what == "class":
        file = folder / "voc/Annotations/val_002.xml"
        file.write_text(voc_and_coco.annotation([(1, (0, 0, 9, 9))]).replace("disc", "cat"))
    else:
        file = folder / f"coco/annotations/instances_{'val' if what == 'category' else 'train'}.json"
        told = json.loads(file.read_text())
        if what == "category":
            told["annotations"][4]["category_id"] = 3
        elif what == "bbox":
            del told["annotations"][4]["bbox"]
        elif what == "file":
            told["images"][0]["file_name"] = "other.jpg"
        else:
            told = told["images"]
        file.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("what", "read", "message"),
    [
        ("listing", voc, r"ImageSets/Main/train.txt does not exist.* the help of VOCDetectionData"),
        ("no box", voc, r"train_002.xml has an object without a box"),
        ("no xml", voc, r"train_002.xml .* is no annotation"),
        ("all empty", voc, r"none of 48 images has a box"),
        ("class", voc, r"val_002.xml has the class 'cat'; --data.classes are disc, square"),
        ("category", boxes, r"instances_val.json: annotation 4 has no box, or its category is not in the split train"),
        ("bbox", boxes, r"instances_train.json: annotation 4 has no box"),
        ("file", boxes, r"other.jpg does not exist"),
        ("list", boxes, r"instances_train.json does not hold COCO's instances \(TypeError"),
    ],
)
def test_data_that_does_not_fit_says_so(what: str, read: Any, message: str, tmp_path: Path) -> None:
    voc_and_coco.write(tmp_path)
    spoil(tmp_path, what)
    with pytest.raises(UserError, match=message):
        read(tmp_path).setup()


def test_what_does_not_fit_the_detector_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="patches of 8, 16 or 32 px, not 14"):
        detector({**VIT, "backbone_kwargs": {**VIT["backbone_kwargs"], "patch_size": 14}})
    with pytest.raises(UserError, match="'mobilenetv3_small_050' gives no feature maps here; choose a ResNet"):
        detector({"backbone": "mobilenetv3_small_050"})
    with pytest.raises(UserError, match="FasterRCNN has no argument anchors"):
        detector(detector_kwargs={"anchors": 3})
    for name in ("_PYCOCOTOOLS_AVAILABLE", "_FASTER_COCO_EVAL_AVAILABLE"):
        monkeypatch.setattr(f"torchmetrics.detection.mean_ap.{name}", False)
    with pytest.raises(UserError, match=r'pip install "ssl_lightning\[detection\]"'):
        detector(num_classes=2)
