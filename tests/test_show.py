"""The command ``show``: a page with patches to click on, and a picture, of any backbone at any size."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ssl_lightning.backbones.maps import map_and_attention
from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.cli import main
from ssl_lightning.commands.show import show
from ssl_lightning.drawing import CELL
from tests.small import DINOV3, SWIN, VIT

RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16)}
COLORS = {"checkpoint": "untrained", "backbone": "tests.test_show.Colors"}


class Colors(nn.Module):
    """The mean color of squares of 8 px."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 8)


class Encoder(nn.Module):
    """A class token and 4 x 4 patches, of torch's own layers."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(3, 16, 8, stride=8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.img_size = 32

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embedding(images).flatten(2).mT
        return self.layer(torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1))


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """An image that is red on its left and blue on its right half, twice as wide as high."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :64, 0] = pixels[:, 64:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "halves.png")
    return tmp_path / "halves.png"


def test_a_click_shows_which_patches_are_similar(browser: Any, halves: Path, tmp_path: Path) -> None:
    evil = tmp_path / "<img src=x onerror=alert(1)>.png"
    evil.write_bytes(halves.read_bytes())
    page = show([str(evil), str(halves)], **COLORS, image_size=64, output=str(tmp_path / "page.html"))
    size = {"width": 420, "height": 2000, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")
    browser.get(page.absolute().as_uri())
    assert not browser.get_log("browser")
    places = browser.find_elements("css selector", ".place")
    assert len(places) == 8  # image, components, foreground and similarity of each

    def shown(x: int) -> list[int]:
        pixel = f"getContext('2d').getImageData({x}, 3, 1, 1).data"
        return browser.execute_script(f"return [...document.querySelectorAll('canvas.similarity')[1].{pixel}]")

    from selenium.webdriver import ActionChains

    bright, dark = [253, 231, 37, 255], [68, 1, 84, 255]
    for offset, expected in ((-40, (bright, dark)), (40, (dark, bright))):  # from the middle of the second image
        ActionChains(browser).move_to_element_with_offset(places[4], offset, 0).click().perform()
        assert (shown(2), shown(13)) == expected
    chosen = browser.find_element("id", "chosen").text
    assert re.fullmatch(r"row [45], column \d+ of halves.png", chosen)
    assert browser.find_element("id", "high").text == "1.00"
    assert browser.find_element("id", "under").text == "1.00 under the pointer"
    assert browser.execute_script("return document.documentElement.scrollWidth <= 420")


def test_a_picture_has_the_whole_image_and_the_colors_of_its_patches(halves: Path, tmp_path: Path) -> None:
    output = show([str(halves)], **COLORS, image_size=32, output=str(tmp_path / "picture.png"))
    picture = np.asarray(Image.open(output))
    assert picture.shape[0] == 14 + CELL // 2 + 4  # a row as high as half of its width
    cells = [picture[20, 4 + number * (CELL + 4) :][:CELL] for number in range(3)]
    assert (cells[0][10].tolist(), cells[0][-10].tolist()) == ([255, 0, 0], [0, 0, 255])
    left, right = cells[1][10].tolist(), cells[1][-10].tolist()
    assert left != right
    assert [0, 0, 0] in (cells[2][10].tolist(), cells[2][-10].tolist())  # a half is background


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "grid", "heads"),
    [
        (VIT["backbone"], VIT["backbone_kwargs"], (48, 64), (6, 8), 3),
        (VIT["backbone"], {**VIT["backbone_kwargs"], "class_token": False, "global_pool": "avg"}, (32, 32), (4, 4), 3),
        (VIT["backbone"], {**VIT["backbone_kwargs"], "reg_tokens": 2}, (32, 32), (4, 4), 3),
        (DINOV3["backbone"], DINOV3["backbone_kwargs"], (48, 64), (6, 8), 3),
        ("beit_base_patch16_224", VIT["backbone_kwargs"], (32, 32), (4, 4), 3),
        (SWIN["backbone"], SWIN["backbone_kwargs"], (32, 32), (4, 4), None),
        ("resnet18", RESNET, (128, 160), (4, 5), None),
        ("resnet18", RESNET, (32, 64), (4, 8), None),  # of an earlier stage: the last has 1 x 2 places
        ("torchvision/shufflenet_v2_x0_5", {}, (96, 128), (6, 8), None),
        ("tests.test_show.Encoder", {}, (32, 32), (4, 4), 2),
    ],
)
def test_every_kind_of_network_shows_its_map(
    name: str, kwargs: dict[str, Any], size: tuple[int, int], grid: tuple[int, int], heads: int | None
) -> None:
    torch.manual_seed(0)
    backbone: Any = create_backbone(name, **kwargs).eval()
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        features = backbone(images)
        found, attention = map_and_attention(backbone, images)
        assert torch.equal(backbone(images), features)  # nothing is left behind
    assert tuple(found.shape[2:]) == grid
    if heads is None:
        assert attention is None
    else:
        assert attention is not None
        assert tuple(attention.shape[1:]) == (heads, *grid)
        assert (attention.sum((2, 3)) < 1 + 1e-5).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "IMAGES nowhere is no image file, folder or pattern"),
        (["empty"], "IMAGES empty is a folder without images"),
        (["*.txt"], "IMAGES *.txt is no image file, folder or pattern"),
        (["text.txt"], "text.txt: not an image that can be read; give other IMAGES"),
        (
            ["halves.png", "--image_size", "50"],
            "--image_size 50: the backbone's patches of 8 px do not divide it; use 48",
        ),
        (["halves.png", "--output", "page.pdf"], "--output page.pdf: name a file such as show.html or show.png"),
        (["halves.png", "--output", "nowhere/page.html"], "--output nowhere/page.html"),
        (["halves.png", "--num_images", "0"], "--num_images 0"),
        (["halves.png", "--checkpoint", "pixels"], "Pixels' gives no map"),
        (["halves.png", "--checkpoint", "nowhere.ckpt"], "nowhere.ckpt"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_line(
    words: list[str], message: str, halves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(halves.parent)
    Path("empty").mkdir()
    Path("text.txt").write_text("no image")
    vit = ["--checkpoint", "untrained", "--backbone", VIT["backbone"]]
    vit += [f"--backbone_kwargs.{key}={value}" for key, value in VIT["backbone_kwargs"].items()]
    with pytest.raises(SystemExit) as end:
        main(["show", *([] if "--checkpoint" in words else vit), *words])
    assert message in str(end.value.code)
    assert "\n" not in str(end.value.code)


def test_images_of_any_depth_and_number_are_shown(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 4000, (40, 30), np.uint16)).save(tmp_path / "deep [1].png")
    Image.fromarray(random.integers(0, 255, (30, 40), np.uint8)).save(tmp_path / "gray.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    words = [str(tmp_path), str(tmp_path / "deep [1].png"), str(photos / "*" / "0*.jpg")]
    with pytest.warns(UserWarning, match=r"broken\.jpg cannot be read"):
        main(["show", *words, "--checkpoint", "untrained", "--backbone", COLORS["backbone"], "--num_images", "23",
              "--image_size", "32", "--output", str(tmp_path / "page.html")])  # fmt: skip
    assert (tmp_path / "page.html").read_text().count("<section") == 22  # 20 photos, each once
    assert capsys.readouterr().out.strip().endswith("page.html")
