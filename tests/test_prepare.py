"""The command prepare: a smaller copy of large images, and the advice that names it."""

import io
import itertools
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.transforms.v2.functional as TF
from PIL import Image

from ssl_lightning import ImageFolderData, ShardsData, UserError, ViewSpec
from ssl_lightning.callbacks.progress import Throughput
from ssl_lightning.data import smaller_copy as module
from ssl_lightning.data.reduce import reduced
from ssl_lightning.data.smaller_copy import prepare
from tests.conftest import DATA
from tests.small import simclr, trainer


@pytest.fixture
def mixed(photos: Path, tmp_path: Path) -> Path:
    """12 large photos in two classes, with dots and equal stems in their names, one lying on its side, one broken."""
    root = tmp_path / "mixed"
    for file in itertools.chain(*(sorted((photos / kind).iterdir())[:5] for kind in ("flower", "temple"))):
        (root / file.parent.name).mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.resize((240, 160)).save(root / file.parent.name / f"2021.05.{file.name}", quality=95)
    with Image.open(photos / "flower" / "00.jpg") as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.resize((200, 120)).save(root / "flower" / "side.jpg", exif=exif)
        image.resize((100, 200)).save(root / "flower" / "side.png")
        image.resize((40, 30)).save(root / "temple" / "small.png")
    (root / "temple" / "broken.jpg").write_bytes(b"no image")
    return root


def sizes(data: Any) -> dict[str, tuple[int, int, int]]:
    """Height, width and class of each training image, by its folder and name."""
    data.load()
    images = data.train_images
    shapes = [tuple(images.read(index).shape[1:]) for index in range(len(images))]
    names = [images.path(index).removesuffix(".jpg") for index in range(len(images))]
    return {name: (*shape, int(label)) for name, shape, label in zip(names, shapes, images.labels, strict=True)}


@pytest.mark.parametrize("format_", ["shards", "folder"])
def test_images_are_reduced_with_their_labels(mixed: Path, tmp_path: Path, format_: Any) -> None:
    output = tmp_path / "out"
    result = prepare(str(mixed), str(output), size=64, format=format_, num_workers=2)
    assert (result.images, result.unreadable) == (13, 1)
    assert "broken.jpg\tOSError: not an image" in (output / "unreadable.txt").read_text()
    assert str(result).count("images per second") == 1
    assert result.rate_before > 0
    if format_ == "folder":
        shapes = sizes(ImageFolderData(str(output), val_fraction=0.0))
        assert shapes["flower/2021.05.03"][:2] == (64, 96)
        assert (output / "temple" / "small.png").read_bytes() == (mixed / "temple" / "small.png").read_bytes()
    else:
        shapes = sizes(ShardsData(str(output / "*.tar"), val_fraction=0.0))
        assert shapes["flower/2021_05_03"][:2] == (64, 96)
    assert sorted(label for *_, label in shapes.values()) == [0] * 7 + [1] * 6
    assert {shape[:2] for name, shape in shapes.items() if "side" in name} == {(107, 64), (128, 64)}
    assert shapes["temple/small.png"][:2] == (30, 40)  # never enlarged


def test_reducing_equals_torchvision(photos: Path) -> None:
    with Image.open(photos / "flower" / "01.jpg") as image:
        picture = image.resize((301, 202))
    file = io.BytesIO()
    picture.save(file, "PNG")
    data, suffix = reduced(file.getvalue(), 96, 100)
    assert suffix == ".jpg"
    with Image.open(io.BytesIO(data)) as image:
        pixels = TF.pil_to_tensor(image)
    expected = TF.resize(TF.pil_to_tensor(picture), [96, 143], TF.InterpolationMode.BICUBIC, antialias=True)
    assert (pixels.float() - expected.float()).abs().mean() < 1.5  # of the JPEG
    assert reduced(data, 96, 100) == (data, "")


@pytest.mark.parametrize(
    "kind", ["16-bit PNG", "float TIFF", "int TIFF", "gray", "RGBA PNG", "four bands", "13 bands", "array"]
)
def test_other_depths_and_bands_are_kept(kind: str) -> None:
    random, file = np.random.default_rng(0), io.BytesIO()
    if kind == "13 bands":
        tifffile = pytest.importorskip("tifffile")
        tifffile.imwrite(file, random.integers(0, 10_000, (80, 100, 13)).astype(np.uint16), planarconfig="contig")
    elif kind == "array":
        np.save(file, random.integers(0, 10_000, (6, 80, 100)).astype(np.int16))
    elif kind == "16-bit PNG":
        Image.fromarray(random.integers(3000, 65536, (80, 100)).astype(np.uint16)).save(file, "PNG")
    elif kind == "float TIFF":
        Image.fromarray(random.random((80, 100)).astype(np.float32)).save(file, "TIFF")
    elif kind == "int TIFF":
        Image.fromarray(random.integers(-(10**6), 10**6, (80, 100)).astype(np.int32)).save(file, "TIFF")
    else:
        shape, name = {"gray": ((80, 100), "BMP"), "RGBA PNG": ((80, 100, 4), "PNG")}.get(kind, ((80, 100, 4), "TIFF"))
        Image.fromarray(random.integers(256, size=shape).astype(np.uint8)).save(file, name)
    data, suffix = reduced(file.getvalue(), 40, 92)
    if suffix == ".tif":
        pixels = pytest.importorskip("tifffile").imread(io.BytesIO(data))
    else:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(image)
    expected = {
        "16-bit PNG": (".png", "uint16", ()),
        "float TIFF": (".tif", "float32", ()),
        "int TIFF": (".tif", "int32", ()),
        "gray": (".jpg", "uint8", ()),
        "RGBA PNG": (".jpg", "uint8", (3,)),
        "four bands": (".tif", "uint8", (4,)),
        "13 bands": (".tif", "uint16", (13,)),
        "array": (".tif", "int16", (6,)),
    }[kind]
    assert (suffix, str(pixels.dtype), pixels.shape) == (*expected[:2], (40, 50, *expected[2]))
    if kind == "float TIFF":
        assert 0 < pixels.min() < 0.4 < 0.6 < pixels.max() < 1


@pytest.mark.parametrize("format_", ["shards", "folder"])
def test_an_interrupted_run_goes_on(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: Any) -> None:
    monkeypatch.setattr(module, "_IMAGES_PER_SHARD", 4)
    whole, output = tmp_path / "whole", tmp_path / "out"
    prepare(str(mixed), str(whole), size=64, format=format_, num_workers=0)
    calls = iter(range(10))

    def interrupted(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return reduced(*arguments)

    monkeypatch.setattr(module, "reduced", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(mixed), str(output), size=64, format=format_, num_workers=0)
    counted: list[int] = []
    monkeypatch.setattr(module, "reduced", lambda *arguments: counted.append(1) or reduced(*arguments))
    prepare(str(mixed), str(output), size=64, format=format_, num_workers=0)
    assert len(counted) < 14 - 7

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    assert contents(output) == contents(whole)
    with pytest.raises(UserError, match="was made with another size"):
        prepare(str(mixed), str(output), size=32, format=format_)


def test_train_and_val_are_kept_apart(mixed: Path, tmp_path: Path) -> None:
    root = tmp_path / "both"
    for split in ("train", "val"):
        shutil.copytree(mixed, root / split)
    result = prepare(str(root), str(tmp_path / "out"), size=64, num_workers=0)
    assert "--data.val_urls" in result.data
    for split in ("train", "val"):
        with tarfile.open(tmp_path / "out" / f"{split}-000000.tar") as archive:
            assert sum(name.endswith(".cls") for name in archive.getnames()) == 13


def test_what_cannot_be_prepared(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    for arguments, message in (
        ({"root": str(tmp_path / "nowhere")}, "does not exist"),
        ({"output": str(mixed / "small")}, "--output .* lies in --root"),
        ({"output": str(tmp_path / "full")}, "--output .* is not empty"),
        ({"size": 0}, "--size 0"),
        ({"quality": 101}, "--quality 101"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(**{"root": str(mixed), "output": str(tmp_path / "out"), **arguments})  # type: ignore[arg-type]


def test_waiting_for_large_images_names_the_command(mixed: Path, tmp_path: Path) -> None:
    (mixed / "temple" / "broken.jpg").unlink()
    for size, named in ((32, True), (128, False)):
        data = ImageFolderData(
            str(mixed), views=[ViewSpec(size=size, count=2)], batch_size=4, num_workers=0, val_fraction=0.0
        )
        throughput = Throughput(warn_above=0.0)
        with pytest.warns(UserWarning, match="of the training time is spent waiting") as warned:
            trainer(tmp_path, max_epochs=1, callbacks=[throughput]).fit(simclr(), data)
        texts = [str(warning.message) for warning in warned]
        command = f"python -m ssl_lightning prepare --root {mixed} --output SMALLER --size 64"
        assert any(command in text for text in texts) == named


@pytest.mark.slow
def test_the_gain_on_photos_of_12_megapixels(tmp_path: Path) -> None:
    archive = DATA / "imagenet-sample.tar"
    if not archive.is_file():
        pytest.skip(f"imagenet-sample.tar is not in SSL_LIGHTNING_TEST_DATA={DATA}")
    with tarfile.open(archive) as opened:
        members = [member for member in opened if member.name.lower().endswith((".jpg", ".jpeg"))][:8]
        for member in members:
            with Image.open(io.BytesIO(opened.extractfile(member).read())) as image:  # type: ignore[union-attr]
                (tmp_path / "large").mkdir(exist_ok=True)
                large = image.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC)
                large.save(tmp_path / "large" / Path(member.name).name, quality=92)
    words = ["prepare", "--root", str(tmp_path / "large"), "--output", str(tmp_path / "small"), "--num-workers=1"]
    done = subprocess.run([sys.executable, "-m", "ssl_lightning", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    gain = float(done.stdout.partition(" times as many")[0].split()[-1])
    assert gain > 5
