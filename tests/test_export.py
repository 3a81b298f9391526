"""Backbones for other programs: the same features there, and a card that tells how to use them."""

import itertools
import json
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_lightning import DINO, MAE, ImageFolderData, MoCoV3, SimCLR, SSLModule, UserError, ViewSpec
from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.backbones.own import without_wrapper
from ssl_lightning.checkpoints import Pretrained, export, load_backbone, open_backbone
from ssl_lightning.cli import main
from tests.processes import FORKSERVER
from tests.small import BACKBONE, DINOV3, SWIN, VIT, Viewed, data, slow_unless, small, trainer

REGISTERS: dict[str, Any] = {"backbone": "vit_small_patch14_reg4_dinov2", "backbone_kwargs": VIT["backbone_kwargs"]}
RESNET18: dict[str, Any] = {"backbone": "resnet18", "backbone_kwargs": {}}
SOURCES: dict[str, tuple[type[SSLModule], dict[str, Any]]] = {
    "ResNet with the CIFAR stem": (SimCLR, BACKBONE),
    "ResNet-18": (SimCLR, RESNET18),
    "ViT": (SimCLR, VIT),
    "teacher": (DINO, VIT),
}


def trained(folder: Path, method: type[SSLModule], net: dict[str, Any]) -> Path:
    """A checkpoint of a training of two steps."""
    running = trainer(folder, limit_train_batches=2, limit_val_batches=1)
    running.fit(small(method, net), data(method))
    running.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: trained(tmp_path_factory.mktemp("runs"), *source) for name, source in SOURCES.items()}


def photo(folder: Path, transform: dict[str, Any]) -> Tensor:
    """``photo.jpg`` in a folder, and its pixels as validation prepares them."""
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (50, 70, 3), np.uint8)).resize((140, 100))
    (folder / "photos").mkdir()
    for name in ("photo.jpg", "photos/one.jpg", "photos/two.jpg"):
        picture.save(folder / name)
    spec = ViewSpec(**{key: transform[key] for key in ("size", "interpolation", "mean", "std")})
    fraction = transform["crop_fraction"]
    source = ImageFolderData(
        root=str(folder / "photos"), labels="none", views=[spec], crop_fraction=fraction, num_workers=0
    )
    batch = next(iter(source.predict_dataloader()[0]))
    return source.on_after_batch_transfer(batch, 0).images[:1]


def card_features(card: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the code in a model card gives, run in the card's folder."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    monkeypatch.chdir(card.parent)
    exec(code, names)
    return torch.as_tensor(names["features"])


FORMATS = {"timm": "x.pth", "torchvision": "x.pth", "safetensors": "x.safetensors", "onnx": "x.onnx"}
PLAIN = [("ResNet with the CIFAR stem", "timm"), ("ResNet-18", "torchvision"), ("teacher", "safetensors")]
"""One pair of each way to load weights with torch."""


@pytest.mark.parametrize(
    ("source", "format"), slow_unless(lambda *case: case in PLAIN, itertools.product(SOURCES, FORMATS))
)
def test_the_code_of_the_card_gives_the_features_of_the_checkpoint(
    checkpoints: dict[str, Path],
    source: str,
    format: Any,  # noqa: A002
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "made" / FORMATS[format]
    if format == "torchvision" and source != "ResNet-18":
        with pytest.raises(UserError, match=r"torchvision has no .* choose the format timm, safetensors or onnx"):
            export(checkpoints[source], format, output)
        assert not output.parent.exists()
        return
    assert export(checkpoints[source], format, output) == output
    assert {file.name for file in output.parent.iterdir()} == {output.name, "x.md"}
    pretrained = open_backbone(str(checkpoints[source]))
    images = photo(output.parent, pretrained.image_transform)
    expected = pretrained.backbone(images)
    torch.testing.assert_close(card_features(output.with_suffix(".md"), monkeypatch), expected, atol=1e-5, rtol=1e-5)


def _json(pretrained: Pretrained) -> str:
    return json.dumps([pretrained.backbone_kwargs, pretrained.facts], sort_keys=True)


def test_our_safetensors_know_everything_and_can_be_opened_again(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for source, checkpoint in checkpoints.items():
        output = export(checkpoint, "safetensors", tmp_path / "x.safetensors")
        before, after = open_backbone(str(checkpoint)), open_backbone(str(output))
        assert (after.name, after.image_transform) == (before.name, before.image_transform)
        assert _json(after) == _json(before)
        assert after.hash == before.hash
        with safe_open(output, "pt") as file:
            metadata = file.metadata()
        assert metadata["method"] == SOURCES[source][0].__name__
        assert metadata["data"] == "FakeData"
        assert "train/loss" in json.loads(metadata["metrics"])
        assert json.loads(metadata["recipe"])["optim"]["base_lr"] == 1e-3
        images = torch.rand(2, 3, 32, 32)
        torch.testing.assert_close(load_backbone(output)(images), before.backbone(images), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", [MAE, MoCoV3])
def test_fixed_positions_stay_fixed_at_other_sizes(method: type[SSLModule], tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, method, {**VIT, "backbone_kwargs": {**VIT["backbone_kwargs"], "img_size": 48}})
    images = torch.rand(4, 3, 32, 32)
    expected = load_backbone(checkpoint)(images)
    output = export(checkpoint, "safetensors", tmp_path / "x.safetensors")
    torch.testing.assert_close(load_backbone(output)(images), expected, atol=1e-6, rtol=0)
    session = onnxruntime.InferenceSession(export(checkpoint, "onnx", tmp_path / "x.onnx"))
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("net", "sizes", "said"),
    [
        pytest.param(VIT, [(32, 32), (48, 48), (24, 40)], "images of sides that 8 divides", marks=pytest.mark.slow),
        pytest.param(DINOV3, [(32, 32)], "images of 32 x 32 px only", marks=pytest.mark.slow),
        pytest.param(REGISTERS, [(32, 32), (48, 48), (24, 40)], "sides that 8 divides", marks=pytest.mark.slow),
        (BACKBONE, [(32, 32), (37, 37), (24, 41)], "images of any sides"),
        pytest.param(SWIN, [(32, 32)], "images of 32 x 32 px only", marks=pytest.mark.slow),
        pytest.param({"backbone": Viewed}, [(32, 32)], "images of 32 x 32 px only", marks=pytest.mark.slow),
    ],
)
def test_an_onnx_file_takes_any_size_or_says_which(
    net: dict[str, Any], sizes: list[tuple[int, int]], said: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    backbone: Any = create_backbone(net["backbone"], **net.get("backbone_kwargs", {})).eval()
    if getattr(backbone, "pos_embed", None) is not None:
        nn.init.normal_(backbone.pos_embed)
    torch.save(without_wrapper(backbone).state_dict(), tmp_path / "x.pth")
    output = export(tmp_path / "x.pth", "onnx", tmp_path / "x.onnx", net["backbone"], net.get("backbone_kwargs"))
    assert said in output.with_suffix(".md").read_text()
    session = onnxruntime.InferenceSession(output)
    channels = session.get_inputs()[0].shape[1]
    for count, size in zip((1, 2, 4), sizes, strict=False):
        images = torch.rand(count, channels, *size)
        (features,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), backbone(images), atol=1e-4, rtol=1e-4)


def random_weights(model: nn.Module, path: Path) -> Path:
    """Weights of a file that tells nothing else; every residual branch of a ResNet counts."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.uniform_(module.bias)
            module.momentum = 0.9
    if any(True for _ in model.buffers()):
        model.train()(torch.rand(8, 3, 64, 64))
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("name", "twin", "kwargs", "twin_kwargs"),
    slow_unless(
        lambda name, *_: name == "resnet18",
        [
            ("resnet18", "resnet18", {}, {}),
            ("vit_base_patch32_224", "vit_b_32", {"img_size": 64}, {"image_size": 64}),
        ],
    ),
)
def test_timm_and_torchvision_load_what_the_other_trained(
    name: str, twin: str, kwargs: dict[str, int], twin_kwargs: dict[str, int], tmp_path: Path
) -> None:
    images = torch.rand(2, 3, 64, 64)
    ours = timm.create_model(name, num_classes=0, **kwargs)
    output = export(random_weights(ours, tmp_path / "a.pth"), "torchvision", tmp_path / "b.pth", name, kwargs)
    theirs = torchvision.models.get_model(twin, **twin_kwargs)
    missing, unexpected = theirs.load_state_dict(torch.load(output), strict=False)
    assert not unexpected
    assert all(key.startswith(("fc.", "heads.")) for key in missing)
    theirs.fc = theirs.heads = nn.Identity()
    torch.testing.assert_close(theirs.eval()(images), ours.eval()(images), atol=1e-5, rtol=1e-5)
    back = export(output, "timm", tmp_path / "c.safetensors", f"torchvision/{twin}", twin_kwargs)
    for key, value in load_file(back).items():
        assert torch.equal(value, ours.state_dict()[key]), key


def test_a_network_that_only_looks_the_same_is_refused(tmp_path: Path) -> None:
    kwargs = {"output_stride": 8}  # in no weight
    weights = random_weights(timm.create_model("resnet18", num_classes=0, **kwargs), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"the weights fit, but the features differ by"):
        export(weights, "torchvision", tmp_path / "b.pth", "resnet18", kwargs)


def test_a_card_leaves_out_what_is_unknown(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = export(checkpoints["teacher"], "timm", tmp_path / "a.pth").with_suffix(".md").read_text()
    for told in ("DINO", "| data | FakeData, 64 images", "| metrics | train/loss", "## Images", '"base_lr": 0.001'):
        assert told in card
    assert open_backbone(str(checkpoints["teacher"])).hash in card
    weights = random_weights(torchvision.models.resnet18(), tmp_path / "b.pth")
    output = export(weights, "timm", tmp_path / "c.pth", "resnet18")
    card = output.with_suffix(".md").read_text()
    for unknown in ("| method", "| data", "| training", "| metrics", "## Images", "## Recipe", "None"):
        assert unknown not in card
    assert card_features(output.with_suffix(".md"), monkeypatch).shape == (1, 512)


def test_the_command_line_exports(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32), tmp_path / "a.pth")
    backbone = ["--backbone", "vit_tiny_patch16_224", "--backbone_kwargs", "{img_size: 32}"]
    output = tmp_path / "b.safetensors"
    main(["export", "--checkpoint", str(weights), "--format", "safetensors", "--output", str(output), *backbone])
    assert capsys.readouterr().out == f"{output}\n{tmp_path / 'b.md'}\n"
    load_backbone(output)
    with pytest.raises(SystemExit):
        main(["export", "--checkpoint", str(weights), "--format", "tar", "--output", str(output), *backbone])
    assert "timm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("format", "output", "message"),
    [
        ("tar", "x.tar", "there is no format 'tar'; choose from timm, torchvision, safetensors, onnx"),
        ("safetensors", "x.pth", "a file of the format safetensors ends in .safetensors"),
        ("onnx", "x.pth", "a file of the format onnx ends in .onnx"),
        ("timm", "x.md", "weights for timm end in .pth or .safetensors"),
        ("timm", "a file/x.pth", "cannot write .*a file/x.pth .*; choose another --output"),
    ],
)
def test_what_cannot_be_written_is_refused_in_words(
    checkpoints: dict[str, Path],
    format: Any,  # noqa: A002
    output: str,
    message: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match=message):
        export(checkpoints["ViT"], format, tmp_path / output)
    with pytest.raises(UserError, match="pixels has no weights to export"):
        export("pixels", "timm", tmp_path / "x.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def _fill_the_disk(checkpoint: Path, folder: Path) -> list[str]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    said = []
    for name in ("x.pth", "y.safetensors"):
        with pytest.raises(UserError) as error:
            export(checkpoint, "timm", folder / name)
        said.append(str(error.value))
    return said


def test_a_full_disk_leaves_the_earlier_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    output = export(checkpoints["ViT"], "timm", tmp_path / "x.pth")
    before = output.read_bytes()
    with FORKSERVER.Pool(1) as pool:
        for message in pool.apply_async(_fill_the_disk, (checkpoints["ViT"], tmp_path)).get(timeout=60):
            assert re.match(r"cannot write .* \(\[Errno 27\] File too large\); choose another --output", message)
    assert output.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"x.pth", "x.md"}
