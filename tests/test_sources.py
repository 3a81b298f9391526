"""Where images come from: folders with an index, torchvision, Hugging Face, tar files and arrays."""

import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from ssl_lightning import ArrayData, HuggingFaceData, ImageFolderData, ShardsData, TorchvisionData, UserError, ViewSpec
from ssl_lightning.data import folder as folders
from ssl_lightning.data import shards
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.batches import RawViews
from ssl_lightning.data.folder import find_images
from tests.small import simclr, slow_unless, trainer

SMALL: dict[str, Any] = {"batch_size": 4, "image_size": 32, "num_workers": 0}
PLAIN = ViewSpec(size=32, count=2)


def batches_of(
    data: SSLDataModule, rank: int = 0, world_size: int = 1, epoch: int = 0, start: int = 0
) -> list[RawViews]:
    """What one of several processes loads."""
    kind = type(data)
    data.__class__ = type(f"{kind.__name__}OfAProcess", (kind,), {"_rank": rank, "_world_size": world_size})
    loader = data.train_dataloader()
    loader.sampler.epoch, loader.sampler.start = epoch, start
    return list(loader)


def equal(one: RawViews, other: RawViews) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.crops, other.crops, strict=True)) and torch.equal(
        one.indices, other.indices
    )


# Folders


def old(root: Path) -> None:
    """Let all folders look unchanged for an hour."""
    for path in (root, *root.rglob("*")):
        if path.is_dir():
            os.utime(path, ns=(path.stat().st_mtime_ns - 3600 * 10**9,) * 2)


def test_a_large_folder_is_scanned_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_WORTH_CACHING", 10)
    for file in photos.rglob("*.jpg"):
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        (tmp_path / file.parent.name / file.name).symlink_to(file)
    old(tmp_path)
    scans = []
    scan = folders._scan
    monkeypatch.setattr(folders, "_scan", lambda root: scans.append(root) or scan(root))
    first, second = find_images(tmp_path), find_images(tmp_path)
    assert len(scans) == 1
    assert first.paths.tolist() == second.paths.tolist() == sorted(first.paths.tolist())
    assert (
        (first.folders, first.counts.tolist())
        == (second.folders, second.counts.tolist())
        == (
            ["flower", "temple"],
            [20, 20],
        )
    )
    shutil.copy(file, tmp_path / "temple" / "new.jpg")
    assert len(find_images(tmp_path).paths) == 41
    assert len(find_images(tmp_path).paths) == 41  # just changed: not to be trusted yet
    assert len(scans) == 3


def test_a_broken_index_is_made_anew(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_WORTH_CACHING", 10)
    monkeypatch.setenv("SSL_LIGHTNING_CACHE", str(tmp_path))
    find_images(photos)
    for index in tmp_path.glob("*.npz"):
        index.write_bytes(index.read_bytes()[:100])
    assert len(find_images(photos).paths) == 40
    monkeypatch.setenv("SSL_LIGHTNING_CACHE", "/proc/nowhere")
    assert len(find_images(photos).paths) == 40


# torchvision


def test_torchvision_data_with_an_array_is_held_in_memory(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = np.random.default_rng(0).integers(256, size=(12, 28, 28), dtype=np.uint8)
    for name, count in (("train", 12), ("t10k", 6)):
        images, labels = digits[:count], np.arange(count, dtype=np.uint8) % 3
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(np.array([0x801, count], ">i4").tobytes() + labels.tobytes())
    data = TorchvisionData("MNIST", str(tmp_path), views=[PLAIN], **SMALL)
    data.setup()
    assert data.num_classes == 3
    assert data.train_images is not None
    assert data.val_images is not None
    assert (len(data.train_images), len(data.val_images)) == (12, 6)
    assert (data.train_images.read(5).numpy() == digits[5]).all()  # gray in three channels
    assert len(batches_of(data)) == 3


def test_torchvision_data_of_files_is_read_one_by_one(photos: Path, tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    for name in ("images", "annotations"):
        (base / name).mkdir(parents=True)
    lines = []
    for number, file in enumerate(sorted(photos.rglob("*.jpg"))[::4]):
        (base / "images" / f"Pet_{number}.jpg").write_bytes(file.read_bytes())
        lines.append(f"Pet_{number} {number % 2 + 1} 1 1")
    for split in ("trainval", "test"):
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"data\.train_split"):
        TorchvisionData("OxfordIIITPet", str(tmp_path), **SMALL).setup()
    data = TorchvisionData("OxfordIIITPet", str(tmp_path), train_split={"split": "trainval"}, **SMALL)
    data.setup()
    assert data.num_classes == 2
    assert data.train_images is not None
    assert torch.equal(data.train_images.read(3), pixels_of(base / "images" / "Pet_3.jpg"))
    assert len(batches_of(data)) == 2


def pixels_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path))).permute(2, 0, 1)


def test_torchvision_data_without_splits_is_divided(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "eurosat" / "2750")
    data = TorchvisionData("EuroSAT", str(tmp_path), val_fraction=0.25, **SMALL)
    data.setup()
    assert data.train_images is not None
    assert data.val_images is not None
    assert (len(data.train_images), len(data.val_images), data.num_classes) == (30, 10, 2)


def test_unknown_torchvision_data_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Flowers102"):
        TorchvisionData("Flower102").setup()


# Arrays


def test_arrays_train_with_and_without_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(256, size=(40, 3, 20, 24), dtype=np.uint8)
    data = ArrayData(images, np.arange(40) % 4, val_fraction=0.25, batch_size=5, views=[PLAIN])
    data.setup()
    assert data.image_size == 24
    assert data.num_classes == 4
    assert data.train_images is not None
    assert data.val_images is not None
    assert (len(data.train_images), len(data.val_images)) == (30, 10)
    trainer(tmp_path, max_steps=2).fit(simclr(), data)
    unlabelled = ArrayData(torch.from_numpy(images), batch_size=5, views=[PLAIN])
    assert unlabelled.val_dataloader() == []
    assert unlabelled.num_classes is None


def test_images_of_four_channels_take_the_geometric_part(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(256, size=(12, 4, 32, 32), dtype=np.uint8)
    with pytest.raises(UserError, match=r"mean=.* is for 3 channels"):
        ArrayData(images, batch_size=4, views=[ViewSpec(size=16, mean=(0.1, 0.2, 0.3))]).train_dataloader()
    spec = ViewSpec(size=16, count=2, blur=0.5, blur_kernel=3, solarize=0.5, mean=(0.5,), std=(0.25,))
    data = ArrayData(images, np.arange(12) % 2, batch_size=4, views=[spec])
    views = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0).views
    assert [view.shape for view in views] == [(4, 4, 16, 16)] * 2
    trainer(tmp_path, max_steps=2).fit(simclr(backbone_kwargs={"channels": [16, 16, 16, 16], "in_chans": 4}), data)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 32, 32, 3), np.uint8), r"transpose\(0, 3, 1, 2\)"),
        (np.zeros((4, 32, 32, 13), np.float32), r"transpose\(0, 3, 1, 2\)"),
        (np.empty((4, 3, 8, 8), object), r"numbers of shape .* not object"),
        (np.zeros((4, 3, 0, 8), np.uint8), r"not uint8 \(4, 3, 0, 8\)"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.complex64), "not torch.complex64"),
    ],
)
def test_arrays_that_are_no_images_are_refused(images: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ArrayData(images)


@pytest.mark.parametrize(
    "images",
    [
        np.linspace(0, 1, 4 * 3 * 8 * 8, dtype=np.longdouble).reshape(4, 3, 8, 8),
        torch.linspace(0, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8).requires_grad_(),
        [np.full((3, 8, 8), number, np.uint16) for number in range(4)],
    ],
)
def test_arrays_of_any_kind_are_scaled(images: Any) -> None:
    data = ArrayData(images, **SMALL)
    data.setup()
    assert len(data.image_transform["value_range"]) == 2


# Hugging Face


@pytest.fixture(scope="module")
def parquet(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four parquet files of ten images each; the label is the number of the image."""
    import datasets

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # the library waits for 5 seconds at each end
    root = tmp_path_factory.mktemp("parquet")
    files = sorted(photos.rglob("*.jpg"))
    for part in range(4):
        rows = range(part * 10, part * 10 + 10)
        table = datasets.Dataset.from_dict(
            {"picture": [{"bytes": files[row].read_bytes(), "path": None} for row in rows], "label": list(rows)},
            features=datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")}),
        )
        table.to_parquet(str(root / f"part-{part}.parquet"))
    return str(root / "part-*.parquet")


def test_hugging_face_data_is_read_with_random_access(photos: Path, parquet: str, tmp_path: Path) -> None:
    data = HuggingFaceData("parquet", data_files=parquet, val_fraction=0.25, **SMALL)
    data.setup()
    assert data.num_classes == 40
    assert data.train_images is not None
    assert data.val_images is not None
    assert (len(data.train_images), len(data.val_images)) == (30, 10)
    assert data.train_images.labels is not None
    file = sorted(photos.rglob("*.jpg"))[data.train_images.labels[7]]
    assert torch.equal(data.train_images.read(7), pixels_of(file))
    trainer(tmp_path, max_steps=2).fit(simclr(), data)


@pytest.mark.parametrize(
    ("world_size", "num_workers"),
    slow_unless(lambda *case: case in ((2, 2), (3, 0)), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 0)]),
)
def test_a_stream_is_divided_among_processes_and_workers(parquet: str, world_size: int, num_workers: int) -> None:
    settings: dict[str, Any] = {**SMALL, "batch_size": 5, "num_workers": num_workers, "seed": 1}
    settings |= {"data_files": parquet, "streaming": True, "num_images": 40}
    parts = [batches_of(HuggingFaceData("parquet", **settings), rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [8 // world_size] * world_size
    labels = [label for part in parts for batch in part for label in batch.labels.tolist()]
    if world_size < 3:
        assert sorted(labels) == list(range(40))  # each once
    assert labels != sorted(labels)
    again = batches_of(HuggingFaceData("parquet", **settings), 0, world_size)
    assert all(equal(one, other) for one, other in zip(parts[0], again, strict=True))
    other_epoch = batches_of(HuggingFaceData("parquet", **settings), 0, world_size, epoch=1)
    assert not torch.equal(other_epoch[0].labels, parts[0][0].labels)


@pytest.mark.parametrize("num_workers", slow_unless((0, 2).__contains__, [0, 1, 2, 3]))
def test_a_stream_goes_on_where_it_was_interrupted(parquet: str, num_workers: int) -> None:
    settings: dict[str, Any] = {**SMALL, "data_files": parquet, "streaming": True, "num_images": 40}
    settings["num_workers"] = num_workers
    whole = batches_of(HuggingFaceData("parquet", **settings))
    for start in (5, 6):
        rest = batches_of(HuggingFaceData("parquet", **settings), start=start)
        assert [equal(one, other) for one, other in zip(whole[start:], rest, strict=True)] == [True] * (10 - start)


def test_a_stream_without_a_readable_image_ends(tmp_path: Path) -> None:
    import datasets

    broken = [{"bytes": b"no image", "path": None}] * 6
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": broken}, features=features).to_parquet(str(tmp_path / "broken.parquet"))
    settings: dict[str, Any] = {**SMALL, "data_files": str(tmp_path / "broken.parquet"), "streaming": True}
    with pytest.raises(UserError, match="no image of the stream can be read"):
        batches_of(HuggingFaceData("parquet", num_images=6, **settings))


def test_images_of_a_stream_may_lie_in_an_archive(photos: Path, tmp_path: Path) -> None:
    from ssl_lightning.data.decoding import open_example

    file = next(photos.rglob("*.jpg"))
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(file, "one.jpg")
    image = open_example({"bytes": None, "path": f"zip://one.jpg::{tmp_path}/photos.zip"})
    assert torch.equal(image.decode(image.height), pixels_of(file))


def test_a_stream_trains_and_is_watched_by_the_probes(photos: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        shutil.copytree(photos, tmp_path / "images" / split)
    settings: dict[str, Any] = {**SMALL, "data_dir": str(tmp_path / "images"), "streaming": True}
    with pytest.raises(UserError, match=r"data\.num_images"):
        HuggingFaceData("imagefolder", **settings).setup()
    from ssl_lightning import KNNProbe, LinearProbe

    data = HuggingFaceData("imagefolder", num_images=40, **settings)
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=4, callbacks=[LinearProbe(), KNNProbe()])
    run.fit(simclr(), data)
    assert data.num_classes == 2
    assert "val/linear_top1" in run.callback_metrics
    assert "val/knn_top1" not in run.callback_metrics  # no bank


def test_wrong_hugging_face_data_says_what_to_change(parquet: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="columns are picture, label"):
        HuggingFaceData("parquet", data_files=parquet, image_column="image", **SMALL).setup()
    with pytest.raises(UserError, match=r"--data\.image_column label holds no images"):
        HuggingFaceData("parquet", data_files=parquet, image_column="label", **SMALL).setup()
    with pytest.raises(UserError, match="'parquet'"):
        HuggingFaceData("parquet", data_files=str(tmp_path / "none.parquet"), **SMALL).setup()


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_arrays_are_images(tmp_path: Path, streaming: bool) -> None:
    import datasets

    features = datasets.Features({"pixels": datasets.Array3D((2, 8, 8), "uint8"), "label": datasets.Value("int64")})
    images = np.random.default_rng(0).integers(90, size=(8, 2, 8, 8), dtype=np.uint8)
    columns = {"pixels": [*images], "label": [300, 301] * 4}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path))
    data = HuggingFaceData(str(tmp_path), image_column="pixels", streaming=streaming, num_workers=0, batch_size=4)
    next(iter(data.train_dataloader()))
    assert data.image_transform["channels"] == 2
    assert "value_range" not in data.image_transform  # 8 bits stay as they are


# Tar files


@pytest.fixture
def tars(photos: Path, tmp_path: Path) -> Path:
    """Five tar files of eight images; the class is the number of the file."""
    files = sorted(photos.rglob("*.jpg"))
    for number in range(5):
        write_tar(tmp_path / f"train-{number:03}.tar", files[number * 8 : number * 8 + 8], label=number)
    return tmp_path


def write_tar(path: Path, files: list[Path], label: int) -> None:
    with tarfile.open(path, "w") as archive:
        for number, file in enumerate(files):
            description = (
                {"cls": str(label).encode()} if number % 2 else {"json": json.dumps({"label": label}).encode()}
            )
            for extension, content in {"jpg": file.read_bytes(), **description}.items():
                member = tarfile.TarInfo(f"{path.stem}/{number:04}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def tar_data(root: Path | str, **kwargs: Any) -> ShardsData:
    return ShardsData(f"{root}/train-{{000..004}}.tar", val_fraction=0, **{**SMALL, **kwargs})


def test_tar_files_are_read_with_their_labels(tars: Path, photos: Path) -> None:
    data = tar_data(tars)
    data.setup()
    images = data.train_images
    assert images is not None
    assert images.labels is not None
    assert images.labels.tolist() == [number // 8 for number in range(40)]
    for index, file in enumerate(sorted(photos.rglob("*.jpg"))):
        assert torch.equal(images.read(index), pixels_of(file))
    assert images.name(9) == f"{tars}/train-001.tar/train-001/0001.jpg"


@pytest.mark.parametrize("num_workers", [1, 4])
def test_tar_files_give_the_same_views_with_any_number_of_workers(tars: Path, num_workers: int) -> None:
    alone, together = batches_of(tar_data(tars)), batches_of(tar_data(tars, num_workers=num_workers))
    assert all(equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_processes_share_the_views_of_each_global_batch(tars: Path, photos: Path, kind: str) -> None:
    def make(batch_size: int) -> SSLDataModule:
        if kind == "tar":
            return tar_data(tars, batch_size=batch_size)
        return ImageFolderData(str(photos), labels="none", **{**SMALL, "batch_size": batch_size})

    whole = batches_of(make(8))
    parts = [batches_of(make(4), rank, 2) for rank in (0, 1)]
    assert len(whole) == 5
    for batch, first, second in zip(whole, *parts, strict=True):
        crops = [part.crops[0].view(2, 4, *part.crops[0].shape[1:]) for part in (first, second)]  # two views
        assert torch.equal(batch.crops[0].view(2, 8, *batch.crops[0].shape[1:]), torch.cat(crops, 1))
        assert batch.indices.tolist() == [*first.indices.tolist(), *second.indices.tolist()]


def test_an_epoch_of_tar_files_goes_on_where_it_was_interrupted(tars: Path) -> None:
    whole, rest = batches_of(tar_data(tars), epoch=2), batches_of(tar_data(tars), epoch=2, start=6)
    assert all(equal(one, other) for one, other in zip(whole[6:], rest, strict=True))


def test_tar_files_are_shuffled_a_few_at_a_time(tars: Path) -> None:
    batches = batches_of(tar_data(tars, shuffle_shards=2))
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    assert sorted(labels) == [number // 8 for number in range(40)]
    assert [len(set(labels[start : start + 16])) for start in (0, 16, 32)] == [2, 2, 1]
    assert len({tuple(pair) for pair in pairwise(labels[:16])}) > 2  # mixed
    later = torch.cat([batch.labels for batch in batches_of(tar_data(tars, shuffle_shards=2), epoch=1)]).tolist()
    assert later != labels


def test_validation_is_held_out_and_training_stays_local(tars: Path) -> None:
    data = tar_data(tars, shuffle_shards=1)
    data.val_fraction = 0.25
    labels = torch.cat([batch.labels for batch in batches_of(data)]).tolist()
    assert data.val_images is not None
    assert len(data.val_images) == 10
    assert sum(one != other for one, other in pairwise(labels)) == 4  # one file after the other


@pytest.fixture
def server(tars: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tars))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("scheme", ["memory", "http"])
def test_tar_files_behind_a_url_are_copied_once(
    tars: Path, tmp_path: Path, scheme: str, request: pytest.FixtureRequest
) -> None:
    import fsspec

    if scheme == "http":
        pytest.importorskip("aiohttp")
        root = request.getfixturevalue("server")
    else:
        root = "memory://shards"
        for tar in tars.glob("*.tar"):
            fsspec.filesystem("memory").pipe_file(f"/shards/{tar.name}", tar.read_bytes())
    expected = batches_of(tar_data(tars))
    copies = tmp_path / "copies"
    found = batches_of(tar_data(root, copies=str(copies)))
    assert all(equal(one, other) for one, other in zip(expected, found, strict=True))
    assert len(list(copies.iterdir())) == 5
    times = [copy.stat().st_mtime_ns for copy in sorted(copies.iterdir())]
    batches_of(tar_data(root, copies=str(copies)))
    assert [copy.stat().st_mtime_ns for copy in sorted(copies.iterdir())] == times
    assert shards.find_shards("memory://shards/*.tar") == [f"memory:///shards/train-{i:03}.tar" for i in range(5)] or (
        scheme == "http"
    )


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


class Damage(L.Callback):
    """Breaks a file once training has begun."""

    def __init__(self, break_it: Callable[[], None]) -> None:
        self.break_it = break_it

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.break_it()


@pytest.mark.parametrize(("num_workers", "broken_shards"), product([0, 1], ["stop", "skip"]))
@pytest.mark.slow
def test_a_tar_file_broken_while_training_stops_the_run_or_is_skipped(
    tars: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    broken_shards: Literal["stop", "skip"],
) -> None:
    """A file that is removed is no such case: the system keeps it while it is open."""
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"shuffle_shards": 1, "num_workers": num_workers, "seed": 0, "in_memory": False}
    data = tar_data(tars, broken_shards=broken_shards, max_unreadable=0.5, **settings)
    last = int(batches_of(tar_data(tars, **settings))[-1].labels[-1])  # the file that is read last
    callback = Damage(lambda: truncate(tars / f"train-{last:03}.tar"))
    run = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    if broken_shards == "stop":
        with pytest.raises(UserError, match=rf"train-{last:03}.tar: .*broken_shards=skip.$"):
            run.fit(simclr(), data)
        return
    with pytest.warns(UserWarning, match="images are unreadable and skipped"):
        run.fit(simclr(), data)
    assert run.global_step == 10
    listed = Path("unreadable-0.txt").read_text().splitlines()
    assert 1 <= len(listed) <= 8
    assert all(f"train-{last:03}.tar/" in line for line in listed)


def overwrite(path: Path) -> None:
    """Garble the header of the ninth member."""
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[8].offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"garbage " * 64)


@pytest.mark.parametrize("damage", [Path.unlink, truncate, overwrite])
def test_a_tar_file_broken_from_the_start_is_named(tars: Path, damage: Callable[[Path], None]) -> None:
    damage(tars / "train-001.tar")
    with pytest.raises(UserError, match=r"train-001.tar: .*broken_shards=skip"):
        tar_data(tars).setup()
    data = tar_data(tars, broken_shards="skip")
    with pytest.warns(UserWarning, match=r"train-001.tar: .* whole images"):
        data.setup()
    assert data.train_images is not None
    assert 32 <= len(data.train_images) < 40


def test_no_tar_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tar file matches .*data\.urls"):
        ShardsData(str(tmp_path / "*.tar"), **SMALL).setup()


PEAK = """
import resource, sys
from ssl_lightning import ShardsData
data = ShardsData(sys.argv[1], val_fraction=0, batch_size=8, image_size=32, num_workers=0)
for batch in data.train_dataloader():
    pass
print(len(data.train_images), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_stays_flat_as_tar_files_grow(photos: Path, tmp_path: Path) -> None:
    files = sorted(photos.rglob("*.jpg"))
    peaks = []
    for count in (2, 20):
        root = tmp_path / str(count)
        root.mkdir()
        for number in range(count):
            write_tar(root / f"{number}.tar", files * 3, label=number)
        command = [sys.executable, "-c", PEAK, str(root / "*.tar")]
        images, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert int(images) == count * 120
        peaks.append(int(peak) / 1024)
    size = sum(file.stat().st_size for file in files) * 3 * 18 / 2**20
    assert peaks[1] - peaks[0] < size / 3, f"{size:.0f} MB more of images took {peaks[1] - peaks[0]:.0f} MB"


@pytest.mark.slow
def test_every_source_can_be_chosen_by_its_name(tars: Path, tmp_path: Path) -> None:
    run = "fit --model SimCLR --model.backbone resnet10_cifar --trainer.max_steps 2 --trainer.accelerator cpu "
    run += f"--data ShardsData --data.urls {tars}/*.tar --data.image_size 32 --data.batch_size 8 --data.num_workers 0 "
    run += f"--trainer.default_root_dir {tmp_path}"
    subprocess.run([sys.executable, "-m", "ssl_lightning", *run.split()], check=True, capture_output=True)
    assert (tmp_path / "SimCLR" / "version_0" / "views.png").is_file()
