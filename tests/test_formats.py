"""Images of any format, depth and number of channels: what is read, how values are scaled, and what is said."""

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ssl_lightning import ArrayData, ImageFolderData, Images, SSLDataModule, UserError, ViewSpec
from ssl_lightning.checkpoints import open_backbone
from ssl_lightning.data.augment import contrast
from ssl_lightning.data.decoding import OpenedImage, open_image, opened_already
from ssl_lightning.data.folder import find_images
from ssl_lightning.data.formats import is_image, passed_over, suffixes
from ssl_lightning.data.pixels import Preparation, robust_range, with_channels
from tests.small import simclr, trainer

SMALL: dict[str, Any] = {"batch_size": 4, "image_size": 32, "num_workers": 0, "val_fraction": 0.0}


def gradient(*shape: int) -> NDArray[np.float64]:
    """Values from 0 to 1, different in each channel, row and column."""
    return np.random.default_rng(0).permutation(np.linspace(0, 1, int(np.prod(shape)))).reshape(shape)


def deep_png(pixels: NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits, gray or in color, which Pillow cannot write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def saved(write: Callable[..., Any], *args: Any, **options: Any) -> bytes:
    content = io.BytesIO()
    write(content, *args, **options)
    return content.getvalue()


def tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    return saved(pytest.importorskip("tifffile").imwrite, pixels, **options)


def dicom(stored: NDArray[np.uint16], **tags: Any) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    shape = {"Rows": stored.shape[-2], "Columns": stored.shape[-1], "SamplesPerPixel": 1}
    depth = {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0}
    for name, value in {"PhotometricInterpretation": "MONOCHROME2", **shape, **depth, **tags}.items():
        setattr(dataset, name, value)
    dataset.PixelData = stored.tobytes()
    return saved(dataset.save_as)


DEEP, FLOAT, BANDS = (
    (gradient(9, 12) * 4095).astype(np.uint16),
    gradient(9, 12).astype(np.float32),
    gradient(13, 20, 24),
)
SIGNED, INTERLEAVED = (FLOAT * 200 - 100).astype(np.int8), (BANDS * 9999).astype(np.uint16).transpose(1, 2, 0).copy()
FILES: dict[str, tuple[Callable[[], bytes], Callable[[], NDArray[Any]]]] = {
    "gray png of 16 bits": (lambda: deep_png(DEEP[..., None]), lambda: DEEP[None]),
    "color png of 16 bits": (
        lambda: deep_png(np.stack([DEEP, DEEP.T.reshape(9, 12), DEEP[::-1]], 2)),
        lambda: np.stack([DEEP, DEEP.T.reshape(9, 12), DEEP[::-1]]),
    ),
    "color ppm of 16 bits": (
        lambda: b"P6 # wide\n12 9\n4095\n" + np.stack([DEEP] * 3, 2).astype(">u2").tobytes(),
        lambda: np.stack([DEEP] * 3),
    ),
    "npy of half precision": (lambda: saved(np.save, FLOAT.astype(np.float16)), lambda: FLOAT.astype(np.float16)[None]),
    "npy of big endians": (lambda: saved(np.save, DEEP.astype(">u2")), lambda: DEEP[None]),
    "npy, channels first": (lambda: saved(np.save, BANDS), lambda: BANDS),
    "npy, channels last": (lambda: saved(np.save, BANDS[:5].transpose(1, 2, 0)), lambda: BANDS[:5]),
    "npy of booleans": (lambda: saved(np.save, FLOAT > 0.5), lambda: (FLOAT > 0.5)[None] * np.uint8(255)),
    "float tiff": (lambda: tiff(FLOAT), lambda: FLOAT[None]),
    "signed tiff": (lambda: tiff(SIGNED), lambda: SIGNED[None]),
    "planar tiff": (
        lambda: tiff(BANDS.astype(np.float32), photometric="minisblack", planarconfig="separate"),
        lambda: BANDS.astype(np.float32),
    ),
    "interleaved big tiff": (
        lambda: tiff(INTERLEAVED, photometric="minisblack", bigtiff=True, planarconfig="contig"),
        lambda: INTERLEAVED.transpose(2, 0, 1),
    ),
    "tiff with a band per page": (lambda: tiff(BANDS.astype(np.float32)), lambda: BANDS.astype(np.float32)),
    "dicom": (lambda: dicom(DEEP, RescaleSlope=1, RescaleIntercept=-1024), lambda: DEEP[None].astype(int) - 1024),
    "inverted dicom": (lambda: dicom(DEEP, PhotometricInterpretation="MONOCHROME1"), lambda: 4095 - DEEP[None]),
    "dicom of frames": (lambda: dicom(np.stack([DEEP, DEEP + 1]), NumberOfFrames=2), lambda: DEEP[None]),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_keep_their_values_and_channels(kind: str) -> None:
    data, expected = FILES[kind][0](), FILES[kind][1]()
    image = open_image(data)
    pixels = image.decode(image.height)
    assert not image.is_photo
    assert (pixels.double().numpy() == expected).all()


def test_heic_and_animations_are_photos(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    red, blue = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
    files = saved(red.save, "heif"), saved(red.save, "gif", save_all=True, append_images=[blue])
    for image in map(open_image, files):
        assert image.is_photo
        assert image.decode(64).float().mean((1, 2)).tolist() == pytest.approx([255, 0, 0], abs=3)


def test_no_image_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert open_image(saved(Image.new("RGB", (30, 20)).save, "png")).width == 30
    assert Image.MAX_IMAGE_PIXELS == 10


def test_suffixes_in_any_case_and_what_is_passed_over(tmp_path: Path) -> None:
    assert all(map(is_image, ["a.JFIF", "a.jpe", "2021.05.03.Jp2", "a.tif", "a.NPY", "a.WebP"]))
    assert not any(map(is_image, ["a.pdf", "a.mpg", "a.txt", "jpg", "a.h5"]))
    assert passed_over({".txt": 10, ".mp4": 2}) == "passed over 12 files: 10 .txt, 2 .mp4"
    assert 'pip install "ssl_lightning[heic]"' in passed_over({".heic": 1})


def test_each_real_file_once_and_links_are_followed(tmp_path: Path) -> None:
    for folder in ("root/cat", "outside/deep", "root/.hidden"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / folder / "1.png")
    links = {
        "cat/loop": "..",
        "above": "../..",
        "a": "cat",
        "b": "../outside",
        "c.png": "cat/1.png",
        "d.png": ".hidden/1.png",
    }
    for name, target in {**links, "broken.png": "nowhere"}.items():
        (tmp_path / "root" / name).symlink_to(target)
    paths = [os.fsdecode(path) for path in find_images(tmp_path / "root").paths]
    assert paths == ["broken.png", "d.png", "b/deep/1.png", "cat/1.png"]


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1.npy").write_bytes(saved(np.save, BANDS))
    (tmp_path / "2.tif").write_bytes(tiff(BANDS, photometric="minisblack", planarconfig="separate"))
    (tmp_path / "3.dcm").write_bytes(dicom(DEEP))
    for module in ("tifffile", "pydicom"):
        monkeypatch.setitem(sys.modules, module, None)
    suffixes.cache_clear()
    try:
        assert 'pip install "ssl_lightning[dicom]"' in passed_over(find_images(tmp_path).others)
        with pytest.raises(UserError, match=r'tifffile.*pip install "ssl_lightning\[tiff\]"'):
            ImageFolderData(str(tmp_path), **SMALL).setup()
    finally:
        suffixes.cache_clear()


@pytest.mark.parametrize(
    ("suffix", "content"), [(".tif", b"II*\0 broken"), (".jpg", b"text"), (".npy", b"\x93NUMPY"), (".png", b"")]
)
def test_a_folder_without_a_readable_image_says_so(tmp_path: Path, suffix: str, content: bytes) -> None:
    for number in range(3):
        (tmp_path / f"{number}{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=r"none of 3 images can be read, e\.g\. .*0\..{3}: (?!.*0x)"):
        ImageFolderData(str(tmp_path), **{**SMALL, "max_unreadable": 1.0}).setup()


def test_the_only_readable_image_takes_the_place_of_all_others(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.png").write_bytes(b"broken")
    np.save(tmp_path / "good.npy", BANDS)
    data = ImageFolderData(str(tmp_path), **{**SMALL, "max_unreadable": 1.0, "in_memory": False})
    assert {index for batch in data.train_dataloader() for index in batch.indices.tolist()} == {40}
    assert data.preview(2, 4).blank == 0


# Depth


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.arange(4096), (0, 4095)),
        (np.arange(65536), (0, 65535)),
        (np.linspace(0, 1, 999), (0, 1)),
        (np.linspace(-1, 1, 999), (-1, 1)),
        (np.linspace(0, 0.2, 9999), (0, 0.2)),
        (np.linspace(-1000, 2000, 9999), (-1000, 2000)),
        (np.append(np.linspace(0, 3000, 9999), [65535, np.nan]), (0, 4095)),
        (np.append(np.linspace(0, 1, 999), [-9999] * 500), (0, 1)),
        (np.full(9, 7), (7, 8)),
        (np.array([np.nan]), (0, 1)),
    ],
)
def test_the_range_is_robust(values: NDArray[Any], expected: tuple[float, float]) -> None:
    assert robust_range(values) == pytest.approx(expected, rel=0.01, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.uint16, torch.int16])
@pytest.mark.parametrize("start", [0, 5000, 30000])
def test_an_image_that_is_not_constant_stays_so(dtype: torch.dtype, start: int) -> None:
    image = (start + torch.arange(12).view(1, 3, 4)).to(dtype)
    prepared = Preparation(1, (0.0, 1000.0), is_deep=True)(image)
    assert (prepared.min(), prepared.max()) >= (0, 0)
    assert prepared.unique().numel() == 12


def test_images_of_eight_bits_stay_as_they_are() -> None:
    image = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    assert torch.equal(Preparation()(image), image)
    assert torch.equal(Preparation(is_deep=True, value_range=(0, 9))(image), image.float())


def folder_of(folder: Path, arrays: list[NDArray[Any]]) -> Path:
    for number, array in enumerate(arrays):
        np.save(folder / f"{number}.npy", array)
    return folder


class Own(Images):
    """A source as a user writes it."""

    def __len__(self) -> int:
        return 8

    def name(self, index: int) -> str:
        return str(index)

    def open(self, index: int) -> OpenedImage:
        return opened_already(torch.from_numpy(BANDS * 0.3))


class OwnData(SSLDataModule):
    """Its data module."""

    def load(self) -> None:
        self.train_images = Own()


def test_every_source_is_scaled_alike(tmp_path: Path) -> None:
    arrays = [BANDS * 0.3] * 8
    options = {key: value for key, value in SMALL.items() if key != "val_fraction"}
    sources = [
        ImageFolderData(str(folder_of(tmp_path, arrays)), **SMALL),
        ArrayData(np.stack(arrays), **SMALL),
        OwnData(**options),
    ]
    for data in sources:
        views = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0).views
        assert views[0].shape == (4, 13, 32, 32)
        assert 0.3 < views[0].std() < 1.5
        low, high = data.image_transform["value_range"]
        assert (low, high) == pytest.approx((0, 0.3), abs=0.002)
        assert len(data.image_transform["mean"]) == data.image_transform["channels"] == 13
        (plain,) = data.predict_dataloader()
        assert next(iter(plain)).images.dtype == torch.float32
        assert data.preview(2, 4).blank == 0


def test_a_given_range_holds(tmp_path: Path) -> None:
    data = ImageFolderData(str(folder_of(tmp_path, [BANDS] * 4)), value_range=(0.0, 2.0), **SMALL)
    data.setup()
    assert data.train_images is not None
    assert data.train_images.read(0).max() == pytest.approx(127.5)
    with pytest.raises(UserError, match=r"--data.value_range.*the smaller one first"):
        ImageFolderData(".", value_range=(2.0, 1.0))


def test_a_checkpoint_keeps_range_and_channels(tmp_path: Path) -> None:
    data = ArrayData((BANDS[None].repeat(8, 0) * 9999).astype(np.uint16), np.arange(8) % 2, **SMALL)
    fitter = trainer(tmp_path, max_steps=1)
    fitter.fit(simclr(backbone_kwargs={"channels": [16, 16, 16, 16], "in_chans": 13}), data)
    fitter.save_checkpoint(tmp_path / "x.ckpt")
    transform = open_backbone(str(tmp_path / "x.ckpt")).image_transform
    assert transform == data.image_transform
    assert tuple(transform["value_range"]) == pytest.approx((0, 9999), rel=0.01)


# Channels


def test_channels_are_converted_as_wanted(tmp_path: Path) -> None:
    rgb = Image.fromarray((gradient(9, 12, 3) * 255).astype(np.uint8))
    for number in range(4):
        (rgb if number else rgb.convert("L")).save(tmp_path / f"{number}.png")
    for wanted in (1, 3, None):
        data = ImageFolderData(str(tmp_path), **SMALL)
        data.backbone_channels = wanted
        data.setup()
        assert data.train_images is not None
        expected = np.asarray(rgb.convert("L"))[None] if wanted == 1 else np.asarray(rgb).transpose(2, 0, 1)
        assert (data.train_images.read(3).numpy() == expected).all()
    assert with_channels(torch.from_numpy(BANDS), 1).numpy() == pytest.approx(BANDS.mean(0, keepdims=True))
    assert (with_channels(torch.from_numpy(BANDS), 3).numpy() == BANDS[:3]).all()


def test_a_backbone_of_another_number_is_refused_before_training(tmp_path: Path) -> None:
    data = ImageFolderData(str(folder_of(tmp_path, [BANDS] * 4)), **SMALL)
    with pytest.raises(UserError, match=r"13 channels.*takes 3; set --model.backbone_kwargs.in_chans 13.*channels 3"):
        trainer(tmp_path, max_steps=1).fit(simclr(), data)


def test_mixed_channels_are_refused_with_names(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path, [BANDS, BANDS[:4]] * 2))
    with pytest.raises(UserError, match=r"1.npy has 4 channels, but .*0.npy has 13.*--data.channels 3"):
        ImageFolderData(folder, **SMALL).setup()
    ImageFolderData(folder, channels=1, **SMALL).setup()


def test_views_keep_what_any_number_of_channels_has(tmp_path: Path) -> None:
    data = ImageFolderData(str(folder_of(tmp_path, [BANDS[:2]] * 4)), views="byol", **SMALL)
    data.setup()
    for spec in data.view_specs:
        assert (spec.saturation, spec.hue, spec.grayscale) == (0, 0, 0)
        assert (spec.jitter, spec.brightness, spec.contrast, spec.flip) == (0.8, 0.4, 0.4, 0.5)
        assert len(spec.mean) == len(spec.std) == 2
    given = [ViewSpec(size=32, count=2, mean=(0.25,), std=(2.0,))]
    data = ImageFolderData(str(tmp_path), views=given, **SMALL)
    data.setup()
    assert (data.view_specs[0].mean, data.view_specs[0].std) == ((0.25,), (2.0,))


def test_contrast_of_any_number_of_channels_blends_with_the_mean() -> None:
    images = torch.from_numpy(BANDS[None])
    blended = contrast(images.clone(), torch.tensor([0.5], dtype=torch.float64))
    assert torch.allclose(blended, (images + images.mean()) / 2)


def test_new_images_are_prepared_as_those_of_the_checkpoint(tmp_path: Path) -> None:
    method = simclr(backbone_kwargs={"channels": [16, 16, 16, 16], "in_chans": 13})
    fitter = trainer(tmp_path, max_steps=1)
    images = (BANDS[None].repeat(8, 0) * 4095).astype(np.uint16)
    fitter.fit(method, ArrayData(images, **SMALL))
    fitter.save_checkpoint(tmp_path / "x.ckpt")
    darker = ArrayData(images // 9, **SMALL)
    trainer(tmp_path).predict(method, darker, ckpt_path=tmp_path / "x.ckpt")
    assert darker.image_transform == open_backbone(str(tmp_path / "x.ckpt")).image_transform
    assert darker.train_images is not None
    assert darker.train_images.read(0).max() < 255 / 8
