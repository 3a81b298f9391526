"""Pictures of what is learnt: right pixels, right neighbours, in the loggers and in the run's folder."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from ssl_lightning import (
    DINO,
    MAE,
    ArrayData,
    HuggingFaceData,
    ImageTokenizer,
    KNNProbe,
    Pictures,
    SimCLR,
    SimMIM,
    SSLModule,
    UserError,
    ViewSpec,
)
from ssl_lightning.backbones.maps import map_and_attention
from ssl_lightning.callbacks.features import PlainFeatures
from ssl_lightning.callbacks.pictures import _neighbors, _projected
from ssl_lightning.drawing import CELL, heat, pixels_of
from ssl_lightning.heads import patchify, unpatchify
from tests.processes import run_processes
from tests.small import VIT, digits, slow_unless, small, trainer


def run(method: type[SSLModule], folder: Path, *more: dict[str, Any], **kwargs: Any) -> Path:
    """Two epochs, drawn after each; gives the run's folder."""
    size = 32 if method is MAE else 16
    data = digits(views=[ViewSpec(size=size, count=method.global_views or 1)], image_size=size)
    logger = TensorBoardLogger(folder, "", "")
    settings = {"callbacks": [Pictures(**{"every_n_epochs": 1, "num_images": 4, **kwargs})], "logger": logger}
    trainer(folder, max_epochs=2, limit_train_batches=2, **settings).fit(small(method, *more), data)
    return folder


@pytest.mark.parametrize(
    ("method", "net", "names"),
    slow_unless(
        lambda method, *_: method is MAE,
        [
            (SimCLR, {}, {"neighbours", "map", "schedules", "components"}),
            (DINO, VIT, {"neighbours", "map", "schedules", "components", "attention"}),
            (MAE, {}, {"neighbours", "map", "schedules", "components", "attention", "reconstructions"}),
        ],
    ),
)
def test_pictures_are_in_the_folder_and_in_tensorboard(
    method: type[SSLModule], net: dict[str, Any], names: set[str], tmp_path: Path
) -> None:
    run(method, tmp_path, net)
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == names
    for name in names:
        assert len(events.Images(name)) == 2
        for epoch in ("0001", "0002"):
            with Image.open(tmp_path / "pictures" / name / f"{epoch}.png") as picture:
                assert np.asarray(picture).std() > 5, "something is drawn"


@pytest.mark.slow
def test_drawing_changes_no_weight(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [Pictures(every_n_epochs=1)]):
        torch.manual_seed(0)
        module = small(MAE)
        logger = TensorBoardLogger(tmp_path / str(len(callbacks)), "", "")
        running = trainer(tmp_path, callbacks=callbacks, logger=logger, max_epochs=2, limit_train_batches=2)
        running.fit(module, digits(views=[ViewSpec(size=32)], image_size=32))
        weights.append(module.state_dict())
        assert module.training
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_patches_are_put_together_again() -> None:
    images = torch.rand(2, 3, 24, 16)
    assert torch.equal(unpatchify(patchify(images, 8), 8, images.shape), images)


def test_mae_shows_visible_patches_and_perfect_predictions_as_the_image() -> None:
    torch.manual_seed(0)
    module, images = small(MAE).eval(), torch.rand(2, 3, 32, 32)

    def perfect(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        patches = patchify(images, 8)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt(), (noise > 0.25).float()

    module.reconstruct = perfect
    made = module.pictures(images)
    torch.testing.assert_close(made["predicted"], images)
    same = patchify((made["visible"] == images).float(), 8).amin(-1)  # 1 where a patch is shown
    assert 0 < same.sum() < same.numel()
    assert (patchify(made["visible"], 8)[same == 0] == 0).all()


def test_simmim_shows_what_it_sees_and_predicts_the_rest() -> None:
    torch.manual_seed(0)
    module, images = small(SimMIM, mask_unit=16).eval(), torch.rand(2, 3, 32, 32) + 1
    module.reconstruct = lambda images, _: -images
    made = module.pictures(images)
    hidden = made["visible"] == 0
    assert hidden.float().mean() == 0.75  # three of four units
    torch.testing.assert_close(made["predicted"], torch.where(hidden, -images, images))


def test_a_tokenizer_shows_images_as_the_vectors_of_their_words() -> None:
    torch.manual_seed(0)
    module, images = small(ImageTokenizer).eval(), torch.rand(2, 3, 32, 32)
    vectors = torch.nn.functional.normalize(module.prototypes, dim=1)[module.tokens(images)]  # (B, N, token_dim)
    side = 32 // module.stride
    made = module.pictures(images)["reconstructed"]
    torch.testing.assert_close(made, module.decoder(vectors.mT.unflatten(2, (side, side))))


def test_attention_is_that_of_the_class_token() -> None:
    vit = small(DINO, VIT, drop_path=0.0).evaluated_backbone.eval()
    images = torch.rand(2, 3, 32, 24)
    with torch.no_grad():
        found = map_and_attention(vit, images)[1]
    assert found.shape == (2, 3, 4, 3)
    assert found is not None
    inputs: list[Tensor] = []
    vit.blocks[-1].attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    vit(images)
    q, k, _ = vit.blocks[-1].attn.qkv(inputs[0]).unflatten(2, (3, 3, 16)).unbind(2)  # (B, N, heads, 16)
    weights = torch.einsum("bhd,bnhd->bhn", q[:, 0], k).div(4).softmax(-1)
    torch.testing.assert_close(found.flatten(2), weights[:, :, 1:])
    assert vit.blocks[-1].attn.fused_attn == vit.blocks[0].attn.fused_attn


def test_pixels_are_those_before_normalisation() -> None:
    pixels = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    normalised = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(pixels_of(normalised, mean, std), pixels)


def test_heat_is_brightest_where_the_value_is_largest() -> None:
    brightness = np.asarray(heat(np.array([[0.0, 0.1], [0.9, 0.2]])).convert("L")).astype(int)
    assert brightness.shape == (CELL, CELL)
    corners = brightness[:: CELL - 1, :: CELL - 1]
    assert corners.argmax() == 2
    assert corners.argmin() == 0


def test_neighbours_are_the_nearest_in_angle() -> None:
    angles = torch.tensor([0.0, 0.1, 3.0, 0.2, 3.1])
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [9.0], [1.0], [0.1], [5.0]])
    grays = torch.tensor([10, 60, 110, 160, 210])
    found = PlainFeatures(features, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([4, 3, 2, 1, 0]))
    images = grays.flip(0).to(torch.uint8).view(5, 1, 1, 1).expand(5, 1, 8, 8)
    sheet = np.asarray(_neighbors(found, lambda index: images[index], 1))
    centres = [4 + (CELL + 8) * column + CELL // 2 for column in range(5)]
    assert [int(sheet[14 + 70, x, 0]) for x in centres] == [10, 60, 160, 110, 210]
    frames = [tuple(sheet[15, x].tolist()) for x in centres[1:]]
    assert frames == [(0x3C, 0xB4, 0x4B), *[(0xE6, 0x19, 0x4B)] * 3]


def test_neighbors_and_map_are_of_the_whole_bank(tmp_path: Path) -> None:
    settings = {"callbacks": [KNNProbe(), Pictures()], "logger": TensorBoardLogger(tmp_path, "", "")}
    data = digits(train_samples=700, image_size=16)
    trainer(tmp_path, limit_train_batches=2, **settings).fit(small(SimCLR), data)
    found = json.loads((tmp_path / "map.json").read_text())
    images = data.train_images
    assert images is not None
    assert images.labels is not None
    assert found["labels"] == images.labels.tolist()
    assert len(found["x"]) == len(found["neighbors"]) == len(found["clusters"]) == 700
    assert all(image not in others for image, others in enumerate(found["neighbors"]))
    sheet = Image.open(io.BytesIO(base64.b64decode(found["tiles"].partition(",")[2])))
    row, column = divmod(333, found["columns"])
    tile = np.asarray(sheet.crop((32 * column, 32 * row, 32 * column + 32, 32 * row + 32)).convert("L")).astype(int)
    image = torch.nn.functional.interpolate(images.read(333)[None].float(), (32, 32), mode="bilinear")[0, 0]
    assert np.corrcoef(tile.ravel(), image.numpy().ravel())[0, 1] > 0.95


def test_the_map_keeps_what_lies_apart_apart() -> None:
    torch.manual_seed(0)
    features = torch.cat([torch.randn(30, 8), torch.randn(30, 8) + 20]).double().numpy()
    for projection in ("pca", "tsne"):
        points = _projected(features, projection)[0]
        first, second = points[:30], points[30:]
        assert points.shape == (60, 2)
        assert np.linalg.norm(first.mean(0) - second.mean(0)) > 2 * max(first.std(), second.std())


def test_what_is_missing_or_senseless_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(UserError, match=r'pip install "ssl_lightning\[umap\]"'):
        Pictures(projection="umap")
    with pytest.raises(UserError, match="every_n_epochs=0"):
        Pictures(every_n_epochs=0)


@pytest.mark.slow
def test_data_without_labels_and_streams_are_drawn_as_far_as_they_go(photos: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(256, size=(40, 3, 32, 32), dtype=np.uint8)
    stream = {"data_dir": str(photos), "streaming": True, "num_images": 40, "num_workers": 0}
    views: dict[str, Any] = {"batch_size": 8, "image_size": 16, "views": [ViewSpec(size=16, count=2)]}
    for number, data in enumerate((ArrayData(images, **views), HuggingFaceData("imagefolder", **stream, **views))):
        folder = tmp_path / str(number)
        settings: dict[str, Any] = {"callbacks": [Pictures()], "logger": TensorBoardLogger(folder, "", "")}
        trainer(tmp_path, limit_train_batches=2, **settings).fit(small(SimCLR), data)
        expected = {"neighbours", "map", "schedules", "components"} if number == 0 else {"schedules"}
        assert {path.name for path in (folder / "pictures").iterdir()} == expected


def _two(rank: int, processes: int, folder: str) -> None:
    data = digits(views=[ViewSpec(size=32)], image_size=32, batch_size=32)
    settings = {"strategy": "ddp", "devices": processes, "logger": TensorBoardLogger(folder, "", "")}
    callbacks = [Pictures(num_images=4)]
    trainer(Path(folder), limit_train_batches=2, callbacks=callbacks, **settings).fit(small(MAE), data)


def test_two_processes_draw_once(tmp_path: Path) -> None:
    run_processes(_two, 2, 2, str(tmp_path))
    drawn = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "pictures").rglob("*.png"))
    assert drawn == [
        f"pictures/{name}/0001.png"
        for name in ("attention", "components", "map", "neighbours", "reconstructions", "schedules")
    ]
    with Image.open(tmp_path / "pictures/reconstructions/0001.png") as sheet:
        assert sheet.height == 14 + 4 * (CELL + 4)
