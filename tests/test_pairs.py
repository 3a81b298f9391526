"""Positive pairs: which images form them, and that both methods' views and any loader see the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_lightning import MAE, ArrayData, ImageFolderData, SSLDataModule, UserError, ViewSpec
from ssl_lightning.data.images import ImageArray, Images
from ssl_lightning.data.pairs import Pairs, view_sources
from ssl_lightning.data.views import preset
from tests.small import VIT, simclr, small, trainer
from tests.test_sources import batches_of, equal

WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0, "mean": (0.0,), "std": (1.0,)}
TWO = [ViewSpec(size=8, count=2, **WHOLE)]
NAMES = ["a/f1_l.png", "a/f2_l.png", "a/f10_l.png", "b/f1_l.png", "b/f1_r.png", "c/x.png", "y.png", "z.png"]


class Named(ImageArray):
    """Images whose pixels are their numbers."""

    def __init__(self, names: list[str]) -> None:
        pixels = torch.arange(len(names), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        super().__init__(pixels, names=np.array(names))


def partners_of(positives: str, distance: int = 1) -> dict[str, set[str]]:
    """The partners that each image gets in 60 draws, without images that have none."""
    pairs, random = Pairs(Named(NAMES), positives, distance), np.random.default_rng(0)
    drawn = {
        name: {NAMES[pairs.partner(index, random)] for _ in range(60)} - {name} for index, name in enumerate(NAMES)
    }
    assert pairs.single == sum(not others for others in drawn.values())
    return {name: others for name, others in drawn.items() if others}


def test_pairs_by_folder_order_and_expression() -> None:
    a1, a2, a10, left, right, _, y, z = NAMES
    folder = {a1: {a2, a10}, a2: {a1, a10}, a10: {a1, a2}, left: {right}, right: {left}}
    assert partners_of("folder") == folder
    assert partners_of("next") == {a1: {a2}, a2: {a10}, left: {right}, y: {z}}  # numbers count as numbers
    assert partners_of("next", 5) == {a1: {a2, a10}, a2: {a10}, left: {right}, y: {z}}
    assert partners_of("(.*)_[lr]") == {left: {right}, right: {left}}
    assert partners_of("/(f1)_") == {a1: {left, right}, left: {a1, right}, right: {a1, left}}


@pytest.mark.parametrize("views", ["byol", "dino"])
def test_views_show_both_images_alternately(views: str) -> None:
    sources = view_sources(preset(views)).tolist()
    assert sources == ([0, 1] if views == "byol" else [0, 1, *[0, 1] * 4])
    assert view_sources(preset("gram_anchoring")).tolist() == [0, 1, *[0, 1] * 4, 0, 1]


def shown(data: SSLDataModule, **place: Any) -> list[tuple[int, int]]:
    """The numbers of the images in both views of each image."""
    views = [batch.augmented(data.view_specs).views for batch in batches_of(data, **place)]
    return [
        (round(255 * float(a)), round(255 * float(b)))
        for first, second in views
        for a, b in zip(first.mean((1, 2, 3)), second.mean((1, 2, 3)), strict=True)
    ]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three videos of ten frames whose pixels are 0 to 9, 10 to 19, 20 to 29."""
    for number in range(30):
        file = tmp_path / "videos" / f"v{number // 10}" / f"frame{number % 10}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file)
    return tmp_path / "videos"


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_same_pairs_for_any_loader(videos: Path, in_memory: bool) -> None:
    def data(**more: Any) -> ImageFolderData:
        chosen: dict[str, Any] = {"views": TWO, "positives": "next", "pair_distance": 3, "val_fraction": 0.0, "seed": 1}
        return ImageFolderData(str(videos), **{**chosen, "batch_size": 4, "in_memory": in_memory, **more})

    whole = shown(data(num_workers=0))
    assert all(first // 10 == second // 10 and 0 <= second - first <= 3 for first, second in whole)
    assert sum(first == second for first, second in whole) == 3  # the last frame of each video
    assert {second - first for first, second in whole} == {0, 1, 2, 3}
    assert shown(data(num_workers=2)) == whole
    assert shown(data(num_workers=0), start=3) == whole[12:]
    assert shown(data(num_workers=0), epoch=1) != whole
    parts = [shown(data(num_workers=0, batch_size=2), rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    some = shown(data(num_workers=0, train_samples=12))  # partners are found among the images that are left
    assert len({first for first, _ in some}) == 12
    assert {second for _, second in some} <= {first for first, _ in some}
    if not in_memory:
        assert equal(batches_of(data(num_workers=0))[2], batches_of(data(num_workers=1))[2])


def test_an_unreadable_partner_is_replaced_by_the_image(videos: Path) -> None:
    (videos / "v0" / "frame4.png").write_bytes(b"broken")
    data = ImageFolderData(
        str(videos), views=TWO, positives="next", val_fraction=0.0, batch_size=2, in_memory=False, num_workers=0
    )
    pairs = shown(data)
    assert (3, 3) in pairs
    assert {(2, 3), (24, 25)} <= {*pairs}
    assert {unreadable.name[-9:] for batch in batches_of(data) for unreadable in batch.unreadable} == {"frame4.png"[1:]}


class Steps(Images):
    """A source of one's own: each image is paired with one of the next two."""

    def __len__(self) -> int:
        return 20

    def name(self, index: int) -> str:
        return str(index)

    def open(self, index: int) -> Any:
        return Named([""] * 20).open(index)

    def partner(self, index: int, random: np.random.Generator) -> int:
        return int((index + random.integers(1, 3)) % 20)


class StepsData(SSLDataModule):
    """Its data."""

    def load(self) -> None:
        self.train_images = Steps()


@pytest.mark.parametrize("in_memory", [True, False])
def test_partners_of_ones_own_source(in_memory: bool) -> None:
    pairs = shown(StepsData(batch_size=4, views=TWO, num_workers=0, in_memory=in_memory))
    assert {(second - first) % 20 for first, second in pairs} == {1, 2}
    preview = StepsData(batch_size=4, views=TWO, num_workers=0, in_memory=in_memory).preview(num_rows=2, num_images=8)
    assert preview.sheet.width == 4 + 2 * 148 + 2 * 152  # original, partner, two views
    assert preview.overlap is None  # crops of two images have no overlap


def test_the_run_says_how_many_have_partners(videos: Path, tmp_path: Path) -> None:
    (videos / "v3").mkdir()
    Image.new("RGB", (8, 8)).save(videos / "v3" / "single.png")
    data = ImageFolderData(str(videos), views=TWO, positives="folder", val_fraction=0.0, batch_size=8, num_workers=0)
    trainer(tmp_path, max_steps=1).fit(simclr(), data)
    assert data.facts["pairs"] == "folder: 30 of 31 images have a partner; the rest are paired with themselves"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"positives": "(left"}, r"--data.positives \(left is not a regular expression"),
        ({"positives": "folders"}, "--data.positives folders has no group"),
        ({"positives": "(nothing)"}, r"--data.positives \(nothing\) finds no two images"),
        ({"positives": "next", "pair_distance": 0}, "--data.pair_distance 0"),
    ],
)
def test_pairs_that_are_impossible(videos: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageFolderData(str(videos), batch_size=4, **more).setup()


def test_pairs_need_names_and_two_views(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data.positives folder needs images with file names"):
        ArrayData(np.zeros((4, 3, 8, 8), np.uint8), positives="folder").setup()
    data = ImageFolderData(str(videos), positives="next", batch_size=4, image_size=32, num_workers=0)
    with pytest.raises(UserError, match=r"--data.positives next needs two views"):
        trainer(tmp_path, max_steps=1).fit(small(MAE, VIT), data)
