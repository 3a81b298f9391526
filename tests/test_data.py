"""Data modules: the same views from any loader, every kind of image and folder, and what cannot be read."""

import io
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image

from ssl_lightning import (
    ArrayData,
    CIFAR10Data,
    CIFAR100Data,
    DigitsData,
    FakeData,
    ImageFolderData,
    SSLDataModule,
    STL10Data,
    UserError,
    ViewSpec,
)
from ssl_lightning.data.batches import Views
from ssl_lightning.data.crops import ViewMaker
from ssl_lightning.data.datasets import PlainDataset
from ssl_lightning.data.decoding import open_image
from ssl_lightning.data.images import ImageArray
from ssl_lightning.data.sampler import OrderedBatches, ShuffledBatches


def decode(data: bytes) -> torch.Tensor:
    image = open_image(data)
    pixels = image.decode(image.height)
    assert pixels.shape == (3, image.height, image.width)
    return pixels


def views_of(data: SSLDataModule, epochs: int = 1) -> list[Views]:
    loader = data.train_dataloader()
    batches = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        batches += [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return batches


def same(one: list[Views], other: list[Views]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x.views, y.views, strict=True)
    )


# The order and the views


@pytest.mark.parametrize("num_workers", [1, 4])
def test_views_do_not_depend_on_the_number_of_workers(photos: Path, num_workers: int) -> None:
    settings: dict[str, Any] = {"root": str(photos), "batch_size": 8, "image_size": 24, "views": "swav", "seed": 3}
    expected = views_of(ImageFolderData(**settings, num_workers=0), epochs=2)
    assert same(expected, views_of(ImageFolderData(**settings, num_workers=num_workers), epochs=2))
    assert len(expected[0].views) == 2
    assert not torch.equal(expected[0].views[0], expected[0].views[1])
    assert not same(expected[: len(expected) // 2], expected[len(expected) // 2 :])  # another epoch, other views
    assert not same(expected, views_of(ImageFolderData(**{**settings, "seed": 4}, num_workers=0), epochs=2))


def test_processes_share_each_global_batch() -> None:
    whole = list(ShuffledBatches(100, 8, seed=1))
    parts = [list(ShuffledBatches(100, 4, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 12
    for (_, batch), (_, first), (_, second) in zip(whole, *parts, strict=True):
        assert batch.tolist() == [*first, *second]


def test_an_epoch_can_start_in_the_middle() -> None:
    order = ShuffledBatches(100, 8, seed=1)
    whole = [indices.tolist() for _, indices in order]
    order.start = 5
    assert [indices.tolist() for _, indices in order] == whole[5:]
    assert [indices.tolist() for _, indices in order] == whole  # only once


def test_every_epoch_has_its_own_order_and_visits_everything() -> None:
    order = ShuffledBatches(96, 8, seed=1)
    epochs = []
    for epoch in range(2):
        order.set_epoch(epoch)
        epochs.append(np.concatenate([indices for _, indices in order]).tolist())
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(96))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_visits_each_image_once(world_size: int) -> None:
    parts = [OrderedBatches(np.arange(20), 6, rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
    assert sorted(index for part in parts for _, indices in part for index in indices) == list(range(20))


def test_images_in_memory_give_the_views_of_files(photos: Path, tmp_path: Path) -> None:
    for number, file in enumerate(sorted(photos.rglob("*.jpg"))):
        folder = tmp_path / file.parent.name
        folder.mkdir(exist_ok=True)
        Image.open(file).resize((40, 40)).save(folder / f"{number}.png")
    settings: dict[str, Any] = {"root": str(tmp_path), "batch_size": 12, "image_size": 32, "views": "byol"}
    files = views_of(ImageFolderData(**settings, in_memory=False, num_workers=0))
    memory = views_of(ImageFolderData(**settings, in_memory=True))
    for one, other in zip(files, memory, strict=True):
        assert torch.equal(one.labels, other.labels)
        for a, b in zip(one.views, other.views, strict=True):
            assert (a - b).abs().median() < 0.01
            assert ((a - b).abs() > 0.1).float().mean() < 0.01  # solarize at its threshold


@pytest.mark.parametrize("in_memory", [False, True], ids=["cropped by workers", "cropped in the batch"])
def test_a_view_can_have_the_crop_of_another_at_its_own_size(photos: Path, in_memory: bool) -> None:
    first, second = (
        ViewSpec(size=16, scale=(0.2, 0.6), flip=0.5),
        ViewSpec(size=16, scale=(0.5, 1.0), jitter=1, brightness=0.9),
    )
    alike = ViewSpec(size=16, count=2, same_crop_as=0)
    larger = ViewSpec(size=32, same_crop_as=1)
    views = [first, second, alike, larger]
    source = DigitsData if in_memory else partial(ImageFolderData, root=str(photos), num_workers=0)
    (batch, *_) = views_of(source(batch_size=16, views=views))
    a, b, same_as_a, plain_b, large_b = batch.views
    assert torch.equal(a, same_as_a)
    assert not torch.equal(b, plain_b)  # its colors are its own
    assert large_b.shape[-1] == 32
    halved = torch.nn.functional.interpolate(large_b, size=16, mode="area")
    assert (halved - plain_b).abs().mean() < 0.3 * (plain_b - a).abs().mean()
    with pytest.raises(UserError, match="same_crop_as=1 with count=1 asks for crops of views that do not come before"):
        views_of(DigitsData(views=[first, replace(alike, count=1, same_crop_as=1)]))


def test_plain_images_have_the_size_of_the_crops_not_of_larger_copies() -> None:
    data = FakeData(image_size=32, views="gram_anchoring")
    assert [(spec.size, spec.count) for spec in data.view_specs] == [(32, 1), (32, 1), (16, 8), (64, 2)]
    assert data.image_transform["size"] == 32


def test_loading_leaves_the_global_generator_alone() -> None:
    data = FakeData(batch_size=16)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data.train_dataloader()), list(data.val_dataloader()), list(data.train_labelled_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_evaluation_transform_is_resize_and_central_crop(photos: Path) -> None:
    data = ImageFolderData(str(photos), image_size=112, views="moco_v2", batch_size=4, val_fraction=0.5)
    batch = next(iter(data.val_dataloader()))  # type: ignore[arg-type]
    assert data.val_images is not None
    spec = data.view_specs[0]
    for row, index in enumerate(batch.indices.tolist()):
        image = TF.resize(data.val_images.read(index), [128], TF.InterpolationMode.BILINEAR, antialias=True)
        assert (batch.images[row].int() - TF.center_crop(image, [112, 112]).int()).abs().max() <= 1
    moved = data.on_after_batch_transfer(batch, 0)
    torch.testing.assert_close(moved.images, TF.normalize(batch.images.float() / 255, spec.mean, spec.std))


# Kinds of images


def test_every_mode_is_read_as_rgb(tmp_path: Path) -> None:
    gray = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    rgb = Image.fromarray(np.stack([gray, gray.T, 255 - gray], axis=2))
    rgb.save(tmp_path / "rgb.png")
    rgb.convert("RGBA").save(tmp_path / "rgba.png")
    rgb.quantize(64).save(tmp_path / "palette.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray).convert("LA").save(tmp_path / "gray_alpha.png")
    Image.fromarray(gray > 127).save(tmp_path / "black_and_white.png")
    expected = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    for name in ("rgb.png", "rgba.png"):
        assert torch.equal(decode((tmp_path / name).read_bytes()), expected)
    for name in ("palette.png", "cmyk.jpg"):
        assert (decode((tmp_path / name).read_bytes()).float() - expected).abs().mean() < 16
    for name in ("gray.png", "gray_alpha.png"):
        assert torch.equal(decode((tmp_path / name).read_bytes()), torch.from_numpy(gray).expand(3, 8, 8)), name
    assert decode((tmp_path / "black_and_white.png").read_bytes()).unique().tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{"quality": 90, "subsampling": 2}, {"progressive": True}, {"quality": 75, "subsampling": 0}]
)
def test_jpegs_are_decoded_as_pillow_does(photos: Path, mode: str, options: dict[str, Any]) -> None:
    photo = Image.open(photos / "flower" / "00.jpg").resize((123, 77)).convert(mode)
    content = io.BytesIO()
    photo.save(content, "jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", **options)
    expected = np.asarray(Image.open(content).convert("RGB"))
    image = open_image(content.getvalue())
    for rows in range(1, 78):
        assert (image.decode(rows).permute(1, 2, 0).numpy()[:rows] == expected[:rows]).all()


@pytest.mark.parametrize("size", [(123, 77), (17, 33), (3, 1)])
@pytest.mark.parametrize("colors", ["444", "422", "420", "440", "411", "Gray", "restarts"])
def test_rows_that_are_not_decoded_change_no_pixel(photos: Path, colors: str, size: tuple[int, int]) -> None:
    photo, content = Image.open(photos / "flower" / "00.jpg").resize(size), io.BytesIO()
    if colors == "restarts":
        photo.save(content, "jpeg", restart_marker_blocks=2)
    else:
        pixels = np.asarray(photo)[..., : 1 if colors == "Gray" else 3].copy()
        content.write(simplejpeg.encode_jpeg(pixels, 90, "GRAY" if colors == "Gray" else "RGB", colors))
    expected = np.asarray(Image.open(content).convert("RGB"))
    image = open_image(content.getvalue())
    for rows in range(1, size[1] + 1):
        assert (image.decode(rows).permute(1, 2, 0).numpy()[:rows] == expected[:rows]).all()
    if size[1] == 77:
        with pytest.raises(OSError, match=r"(?i)truncated"):  # although the first row is there
            open_image(content.getvalue()[:-40]).decode(1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_equal_crops_of_the_whole_image(photos: Path, interpolation: Any) -> None:
    spec = ViewSpec(size=24, count=20, scale=(0.01, 1.0), interpolation=interpolation)
    files = sorted((photos / "flower").iterdir())[:4]
    (crops,), _ = ViewMaker([spec], 0).crop(0, np.arange(4), [open_image(file.read_bytes()) for file in files])
    whole = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for file in files]
    heights, widths = np.array([image.shape[1:] for image in whole]).T
    (boxes,), _ = ViewMaker([spec], 0).draw(0, np.arange(4), heights, widths)
    assert (boxes[:, 0] + boxes[:, 2] == heights[np.arange(80) % 4]).any()  # some touch the lower border
    for row, (crop, (top, left, height, width)) in enumerate(zip(crops, boxes.tolist(), strict=True)):
        part = whole[row % 4][None, :, top : top + height, left : left + width]
        part = part.contiguous(memory_format=torch.channels_last)
        expected = F.interpolate(part, (24, 24), mode=interpolation, antialias=True)[0]
        assert torch.equal(crop, expected)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert decode((tmp_path / "turned.jpg").read_bytes()).shape == (3, 20, 10)


# Kinds of folders


def test_class_folders_are_labels_and_a_part_is_held_out(photos: Path) -> None:
    data = ImageFolderData(str(photos), val_fraction=0.25)
    data.setup()
    assert data.num_classes == 2
    assert data.train_images is not None
    assert data.val_images is not None
    assert (len(data.train_images), len(data.val_images)) == (30, 10)
    train, val = ({images.name(i) for i in range(len(images))} for images in (data.train_images, data.val_images))
    assert not train & val
    for images in (data.train_images, data.val_images):
        assert images.labels is not None
        assert [Path(images.name(i)).parent.name for i in range(len(images))] == [
            ("flower", "temple")[label] for label in images.labels
        ]


def test_flat_and_nested_folders_have_no_labels(photos: Path, tmp_path: Path) -> None:
    flat, nested = tmp_path / "flat", tmp_path / "nested"
    for number, file in enumerate(photos.rglob("*.jpg")):
        for target in (flat / f"{number}.JPG", nested / f"{number % 3}" / f"{number % 2}" / f"{number}.jpg"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    (flat / ".hidden.jpg").write_bytes(b"")
    (flat / "notes.txt").write_text("no image")
    for root in (flat, nested):
        data = ImageFolderData(str(root), batch_size=4, image_size=32)
        data.setup()
        assert data.num_classes is None
        assert data.train_images is not None
        assert len(data.train_images) == 40
        assert data.val_dataloader() == []
        assert len(data.train_labelled_dataloader()) == 0
        assert (next(iter(data.train_dataloader())).labels == -1).all()
    data = ImageFolderData(str(nested), labels="folders")
    data.setup()
    assert data.num_classes == 3
    data = ImageFolderData(str(photos), labels="none")
    data.setup()
    assert data.num_classes is None


def test_a_flat_test_folder_is_no_validation_set(tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "test"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{number}.png")
    data = ImageFolderData(str(tmp_path), in_memory=False)
    data.setup()
    assert data.val_images is not None
    assert len(data.val_images) == 2
    assert "train" in data.val_images.name(0)


def test_train_and_test_folders_are_found(cifar10: Path) -> None:
    data = ImageFolderData(str(cifar10), image_size=32, batch_size=64, in_memory=True, train_samples=500)
    data.setup()
    assert isinstance(data.train_images, ImageArray)
    assert data.train_images.images.shape == (500, 3, 32, 32)
    assert data.train_images.labels is not None
    assert np.bincount(data.train_images.labels).tolist() == [50] * 10
    assert data.val_images is not None
    assert len(data.val_images) == 400
    assert views_of(data)[0].views[1].shape == (64, 3, 32, 32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", "does not exist"),
        (lambda root: _write(root / "file.txt"), "is a file"),
        (lambda root: _write(root / "empty" / "notes.txt").parent, "no images below"),
    ],
)
def test_wrong_folders_say_what_to_change(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageFolderData(str(make(tmp_path))).setup()


def _write(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("text")
    return path


def test_images_of_several_sizes_do_not_fit_in_memory_as_one_array(photos: Path) -> None:
    with pytest.raises(UserError, match=r"in_memory needs images of the same size, but .* px"):
        ImageFolderData(str(photos), in_memory=True).setup()


# What cannot be read


def test_unreadable_images_are_skipped_counted_and_listed(
    broken_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ImageFolderData(str(broken_photos), batch_size=10, image_size=32, max_unreadable=0.1, val_fraction=0.0)
    with pytest.warns(UserWarning, match="unreadable and skipped"):
        batches = views_of(data)
    assert [len(batch.views[0]) for batch in batches] == [10] * 4
    listed = [line.split("\t")[0] for line in (tmp_path / "unreadable-0.txt").read_text().splitlines()]
    assert [Path(path).relative_to(broken_photos).as_posix() for path in listed] == [
        "flower/03.jpg",
        "flower/07.jpg",
        "temple/05.jpg",
    ]
    plain = list(data.train_labelled_dataloader())
    assert sum(len(batch.images) for batch in plain) == 37
    assert all(len(batch.images) == len(batch.labels) == len(batch.indices) for batch in plain)


def test_too_many_unreadable_images_stop_the_run(
    broken_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ImageFolderData(str(broken_photos), batch_size=10, image_size=32, val_fraction=0.0)
    with (
        pytest.raises(UserError, match=r"max_unreadable=1.0%.*unreadable-0.txt"),
        pytest.warns(UserWarning, match="skipped"),
    ):
        views_of(data)


def test_unreadable_images_are_left_out_of_memory(
    broken_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in broken_photos.rglob("*.jpg"):
        with suppress(OSError):
            Image.open(file).resize((16, 16)).save(file)
    data = ImageFolderData(str(broken_photos), image_size=16, in_memory=True, max_unreadable=0.1, val_fraction=0.0)
    with pytest.warns(UserWarning, match="3 of 40 images are unreadable"):
        data.setup()
    assert data.train_images is not None
    assert data.train_images.labels is not None
    assert len(data.train_images) == len(data.train_images.labels) == 37
    assert data.train_images.labels.sum() == 19


@pytest.mark.parametrize("count", [2, 300])
def test_a_folder_of_only_broken_images_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(count):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=f"none of {count} images can be read, e.g. .*0.jpg: the file is empty"):
        views_of(ImageFolderData(str(tmp_path), batch_size=2, image_size=32))


# Data modules


def test_digits_are_real_and_split_without_overlap() -> None:
    data = DigitsData()
    data.setup()
    assert data.train_images is not None
    assert data.val_images is not None
    assert (len(data.train_images), len(data.val_images), data.num_classes) == (1437, 360, 10)
    assert data.train_images.read(0).shape == (3, 8, 8)
    assert data.train_images.read(0).max() == 255


@pytest.mark.parametrize("kind", [CIFAR10Data, CIFAR100Data, STL10Data])
def test_missing_torchvision_data_says_how_to_get_it(kind: type[SSLDataModule], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.root.*data.download=true"):
        kind(root=str(tmp_path)).setup()  # type: ignore[call-arg]


def test_torchvision_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets as datasets

    class Stored(list[None]):
        data, targets = np.zeros((12, 32, 32, 3), np.uint8), [*range(10), 0, 1]

    class StoredSTL(list[None]):
        data, labels = np.zeros((12, 3, 96, 96), np.uint8), np.array([0, 1, 2, -1] * 3)

    monkeypatch.setattr(datasets, "CIFAR10", lambda _root, **_split: Stored([None] * 12))
    monkeypatch.setattr(datasets, "STL10", lambda _root, **_split: StoredSTL([None] * 12))
    cifar, stl = CIFAR10Data(batch_size=4), STL10Data(batch_size=4)
    cifar.setup(), stl.setup()
    assert (cifar.num_classes, stl.num_classes) == (10, 3)
    assert views_of(stl)[0].views[0].shape == (4, 3, 96, 96)
    labelled = torch.cat([batch.labels for batch in stl.train_labelled_dataloader()])
    assert labelled.tolist() == [0, 1, 2] * 3  # the probes do not see unlabeled images


def test_a_batch_larger_than_the_data_is_cut_with_a_warning() -> None:
    data = FakeData(num_images=10, batch_size=64)
    with pytest.warns(UserWarning, match="larger than the 10 training images"):
        assert len(data.train_dataloader()) == 1
    assert data.batch_size == 10


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        FakeData(batch_size=1)


def test_the_bank_of_a_probe_is_bounded_and_spread_over_the_classes() -> None:
    data = FakeData(num_images=64, num_labels=4, batch_size=8)
    batches = list(data.train_labelled_dataloader(max_samples=16))
    indices = torch.cat([batch.indices for batch in batches])
    assert len(indices) == len(indices.unique()) == 16
    assert indices.max() >= 60


def test_small_images_of_one_size_are_held_in_memory(photos: Path, tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    data = ImageFolderData(str(tmp_path), batch_size=4)
    data.setup()
    assert isinstance(data.train_images, ImageArray)
    others = ImageFolderData(str(photos), batch_size=4)  # of many sizes
    others.setup()
    assert not isinstance(others.train_images, ImageArray)
    Image.new("RGB", (31, 40)).save(tmp_path / "05.png")  # an exception that the first look may miss
    mixed = ImageFolderData(str(tmp_path), batch_size=4)
    mixed.setup()
    assert not isinstance(mixed.train_images, ImageArray)


def test_own_views_replace_the_preset() -> None:
    data = FakeData(batch_size=8, views=[ViewSpec(size=24, count=2), ViewSpec(size=12, flip=0.0)])
    assert [view.shape[-1] for view in views_of(data)[0].views] == [24, 24, 12]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((4, 8, 8), np.uint8), r"of shape \(N, C, H, W\)"),
        (np.zeros((4, 8, 8, 3), np.uint8), "put them first"),
    ],
)
def test_arrays_of_another_kind_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageArray(wrong)


def test_plain_images_of_any_shape_are_made_square() -> None:
    for shape in ((3, 17, 90), (3, 90, 17), (3, 5, 5)):
        images = ImageArray(torch.randint(256, (1, *shape), dtype=torch.uint8))
        batch = PlainDataset(images, ViewSpec(size=32), 0.875)[0, np.arange(1)]
        assert batch.images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 10}, "val_fraction 10: give a number from 0"),
        ({"val_fraction": -0.1}, "val_fraction -0.1: give a number from 0"),
        ({"crop_fraction": 1.5}, "crop_fraction 1.5: give a number above 0, at most 1"),
        ({"crop_fraction": 0}, "crop_fraction 0: give a number above 0"),
        ({"train_samples": 0}, "train_samples 0: give a number of 2 or more"),
        ({"image_size": 0}, "image_size 0: give a number of 1 or more"),
        ({"max_unreadable": -1}, "max_unreadable -1: give a number from 0 to 1"),
        ({"seed": 2**64}, "seed 18446744073709551616: give a number from 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"--data.{message}"):
        ArrayData(np.zeros((8, 3, 8, 8), np.uint8), np.arange(8) % 2, **options).setup()


@pytest.mark.parametrize("no", ["0", "0.0", "FALSE"])
def test_a_list_from_a_spreadsheet_is_read(no: str, photos: Path, tmp_path: Path) -> None:
    rows = [f"flower/{number:02}.jpg,{no if number % 2 else 1}" for number in range(20)]
    (tmp_path / "files.csv").write_text("\n".join(["path,kept", *rows]), encoding="utf-8-sig")
    data = ImageFolderData(str(photos), files=str(tmp_path / "files.csv"), val_fraction=0.0)
    data.setup()
    assert len(data.train_images or []) == 10
