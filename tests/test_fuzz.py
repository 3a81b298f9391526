"""Damaged image files, tar files and odd folders: nothing crashes or hangs, and what cannot be read is listed."""

import functools
import io
import os
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssl_lightning import ImageFolderData, ShardsData, UserError
from ssl_lightning.data.formats import suffixes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Pillow warns about metadata, the package about what is left out
]


@pytest.fixture(autouse=True)
def two_more_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Headers that claim a huge image meet a limit of memory here, instead of the machine's."""
    monkeypatch.chdir(tmp_path)  # where unreadable files are listed
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@functools.cache
def samples() -> list[tuple[str, bytes]]:
    """A small image in each format that Pillow writes and in some modes, and as an array of numpy."""
    random = np.random.default_rng(0)
    Image.init()
    written = []
    for suffix, name in sorted(Image.registered_extensions().items()):
        for mode in ("RGB", "L", "I;16", "F", "P", "CMYK", "RGBA", "1"):
            image = Image.fromarray(random.integers(256, size=(9, 7, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            try:
                (image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)).save(
                    buffer, name
                )
            except Exception:  # the format knows no such mode, or is only read
                continue
            if suffix in suffixes():
                written.append((suffix, buffer.getvalue()))
    for array in (np.zeros((5, 6), np.uint16), np.zeros((5, 6, 13), np.float32), np.ones((3, 5, 6), np.uint8)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        written.append((".npy", buffer.getvalue()))
    return written


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """The content with a few bytes changed, cut, doubled, or replaced by extreme numbers."""
    data = bytearray(content)
    for _ in range(random.integers(1, 5)):
        start = (
            int(random.integers(len(data) + 1))
            if random.random() < 0.5
            else int(random.integers(min(64, len(data)) + 1))
        )
        match random.integers(6):
            case 0:
                data[start : start + 1] = random.bytes(1)
            case 1:
                del data[start:]
            case 2:
                del data[start : start + int(random.integers(1, 9))]
            case 3:
                data[start:start] = data[start : start + 32]
            case 4:
                data[start : start + 4] = random.choice(
                    [b"\xff\xff\xff\xff", b"\x00" * 4, b"\x7f\xff\xff\xff", b"\x00\x00\x10\x00"]
                )
            case _:
                data[start : start + 8] = random.bytes(8)
    return bytes(data)


def test_mutated_image_files_are_read_or_listed(tmp_path: Path) -> None:
    random, originals = np.random.default_rng(0), samples()
    assert len({suffix for suffix, _ in originals}) > 25
    for number in range(5000):
        suffix, content = originals[number % len(originals)]
        folder = tmp_path / f"{number % 50:02}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}{suffix}").write_bytes(mutated(content, random))
    options: Any = {"batch_size": 250, "image_size": 8, "num_workers": 0, "in_memory": False, "val_fraction": 0}
    data = ImageFolderData(str(tmp_path), channels=3, max_unreadable=1.0, **options)
    data._run_folder = tmp_path / "run"  # where the listing goes
    try:
        data.setup()
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.plain_dataloader(count=5000)]
    except UserError as error:
        pytest.fail(str(error))
    broken = len(data.unreadable)
    assert 500 < broken < 4500
    assert sum(len(batch.images) for batch in batches) == 5000 - broken
    assert len((tmp_path / "run" / "unreadable-0.txt").read_text("utf-8").splitlines()) == broken


def test_mutated_tar_files_are_read_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SSL_LIGHTNING_CACHE", str(tmp_path / "cache"))
    random, originals = np.random.default_rng(1), samples()
    outcomes: list[str] = []
    for number in range(500):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=random.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as archive:
            for member in range(4):
                suffix, content = originals[int(random.integers(len(originals)))]
                name = odd_name(random) + str(member)
                for extension, part in ((suffix, content), (".cls", random.bytes(2)), (".json", b'{"label": "a"}')):
                    info = tarfile.TarInfo(name + extension)
                    info.size = len(part)
                    archive.addfile(info, io.BytesIO(part))
        path.write_bytes(mutated(path.read_bytes(), random))
        data = ShardsData(str(path), num_workers=0, image_size=8, broken_shards=random.choice(["stop", "skip"]))
        try:
            data.setup()
        except UserError as error:
            outcomes.append(str(error))
        else:
            assert data.train_images is not None
            outcomes.append("read")
        path.unlink()
    assert 50 < outcomes.count("read") < 450
    assert not any("\n" in outcome for outcome in outcomes)
    caplog.text.encode()  # raises if a message holds what a terminal cannot show


def odd_name(random: np.random.Generator) -> str:
    """A name of any bytes that a file may have, often with dots, sometimes the name of a split."""
    if random.random() < 0.3:
        return str(random.choice(["train", "Test", "VAL", "test_images", "a.b", "..x", "__MACOSX", "masks", "-", "~"]))
    letters = random.integers(1, 256, size=int(random.integers(1, 40)), dtype=np.uint8).tobytes()
    return os.fsdecode(letters.replace(b"/", b".")).strip(".") or "x"


def test_folders_of_odd_names_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random, content = np.random.default_rng(2), samples()[0][1]
    suffix = samples()[0][0]
    outcomes: list[str] = []
    for number in range(500):
        root = tmp_path / str(number)
        root.mkdir()
        for _ in range(random.integers(1, 9)):
            folder = root.joinpath(*(odd_name(random) for _ in range(random.integers(0, 4))))
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if random.random() < 0.2:
                    (folder / odd_name(random)).symlink_to(random.choice([str(root), str(folder), "nowhere"]))
                if random.random() < 0.1:
                    os.mkfifo(folder / f"pipe{suffix}")
                for _ in range(random.integers(0, 4)):
                    (folder / f"{odd_name(random)}{random.choice([suffix, suffix.upper(), '.txt'])}").write_bytes(
                        content
                    )
            except OSError:  # a file of this name exists
                continue
        options: Any = {"labels": random.choice(["auto", "folders", "none"]), "splits": bool(random.random() < 0.8)}
        data = ImageFolderData(str(root), num_workers=0, image_size=8, in_memory=False, max_unreadable=1.0, **options)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data.setup()
        except UserError as error:
            outcomes.append(str(error).replace(str(root), ""))
        else:
            outcomes.append("read")
            sides = [images for images in (data.train_images, data.val_images) if images is not None]
            names = [images.name(index) for images in sides for index in range(len(images))]
            assert len(names) == len(set(names))
    assert outcomes.count("read") > 200
    caplog.text.encode()  # raises if a message holds what a terminal cannot show
