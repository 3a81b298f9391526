"""Layouts of data sets: folders of splits, labels of any kind, held-out images, tar members, sets of torchvision."""

import io
import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ssl_lightning import ArrayData, EmbeddingWriter, ImageFolderData, ShardsData, TorchvisionData, UserError
from ssl_lightning.callbacks.embedding_writer import read_embeddings
from ssl_lightning.commands.evaluate import Evaluation
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.splits import split_kind
from tests.small import BACKBONE, simclr, trainer

PNG = io.BytesIO()
Image.new("RGB", (8, 8)).save(PNG, "PNG")


def files(root: Path, *folders: str) -> Path:
    """A folder of images: ``a/b:3`` are three images in ``a/b``, ``a/b`` is four."""
    for folder in folders:
        name, _, count = folder.partition(":")
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(int(count or 4)):
            (root / name / f"{number}.png").write_bytes(PNG.getvalue())
    return root


def ready(data: Any) -> Any:
    data.setup()
    return data


def folders_of(images: Any, root: Path) -> list[str]:
    if images is None:
        return []
    return sorted({os.path.relpath(os.path.dirname(images.name(index)), root) for index in range(len(images))})


# Names of splits


def test_splits_are_known_in_any_case_and_spelling() -> None:
    names = {
        "train": "train Training TRAIN train_images trainset TrainSet train2017 images-train",
        "val": "val Valid VALIDATION validation_set dev val_split",
        "test": "test Testing TestSet test-images test1",
        None: "cat trainstation train_station test_tube devil value train_masks train_test tester 1",
    }
    assert {name: split_kind(name) for kind in names for name in names[kind].split()} == {
        name: kind for kind in names for name in names[kind].split()
    }


@pytest.mark.parametrize(
    ("folders", "train", "val", "message"),
    [
        ("Training/a Training/b Testing/a Testing/b", "Training/a Training/b", "Testing/a Testing/b", ""),
        ("train_images TEST_IMAGES", "train_images", "TEST_IMAGES", ""),
        ("seg_train/seg_train seg_test/seg_test", "seg_train/seg_train", "seg_test/seg_test",
         "training uses seg_train; validation uses seg_test"),
        ("zip/train/a zip/train/b zip/test/a", "zip/train/a zip/train/b", "zip/test/a", ""),
        ("a/train a/test b/train b/test", "a/train b/train", "a/test b/test", ""),
        ("a b test/a test/b", "a b", "test/a test/b", "training uses the other folders; validation uses test"),
        ("train/a train/b test/unknown", "train/a train/b", "train/a train/b", r"Left out: test \(4 images\)"),
        ("train/a train/b test test/.ipynb_checkpoints", "train/a train/b", "train/a train/b", "Left out: test"),
        ("train/a train/b val/a val/c", "train/a train/b", "val/a val/c", "without training images.*: c"),
        ("train val test extra", "train", "val", r"Left out: extra \(4 images\), test \(4 images\)"),
        ("dev/a dev/b train/a train/b __MACOSX/x @eaDir/y", "train/a train/b", "dev/a dev/b", ""),
        ("airport:10 train_station:10", "airport train_station", "airport train_station", ""),
    ],
)  # fmt: skip
def test_training_never_takes_the_test_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, folders: str, train: str, val: str, message: str
) -> None:
    files(tmp_path, *folders.split())
    with caplog.at_level("INFO"):
        data = ready(ImageFolderData(str(tmp_path)))
    assert folders_of(data.train_images, tmp_path) == train.split()
    assert folders_of(data.val_images, tmp_path) == val.split()
    lines = [record.getMessage() for record in caplog.records if str(tmp_path) in record.getMessage()]
    assert [bool(re.search(message, line)) for line in lines] == [True] * bool(message)


def test_an_empty_training_folder_is_not_replaced_by_the_test_images(tmp_path: Path) -> None:
    files(tmp_path, "train:0", "test")
    (tmp_path / "train" / "0.txt").write_text("no image")
    with pytest.raises(UserError, match=r"no training images .* only test.*--data\.splits false"):
        ready(ImageFolderData(str(tmp_path)))
    assert len(ready(ImageFolderData(str(tmp_path), splits=False)).train_images) == 4


def test_file_names_of_any_bytes_are_read_listed_and_embedded(tmp_path: Path) -> None:
    names = [b"\xff\xfe.png", b"line\nbreak.png", b"tab\t.png", "ü".encode() + b".png", b"x" * 251 + b".png", b"-.PNG"]
    root = tmp_path / os.fsdecode(b"r\xe9")
    root.mkdir()
    for name in names:
        with open(os.fsencode(root) + b"/" + name, "wb") as file:
            file.write(PNG.getvalue())
        with open(os.fsencode(root) + b"/broken" + name[-200:], "wb") as file:
            file.write(b"no image")
    data = ImageFolderData(str(root), batch_size=2, image_size=8, num_workers=0, in_memory=False, max_unreadable=1.0)
    writer = EmbeddingWriter(str(tmp_path / "out"))
    run = trainer(tmp_path, callbacks=[writer])
    with pytest.warns(UserWarning, match="are unreadable and skipped"):
        run.predict(simclr(), data)
    assert set(read_embeddings(tmp_path / "out").paths) == {str(root / os.fsdecode(name)) for name in names}
    (listing,) = tmp_path.glob("unreadable*.txt")
    assert len(listing.read_text("utf-8").splitlines()) == len(names) == len(data.unreadable)


# Labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["dog", "cat", None, ""], [1, 0, -1, -1]),
        ([b"b", b"a", b"a", b"\xff"], [1, 0, 0, 2]),
        ([True, False, True, True], [1, 0, 1, 1]),
        ([torch.tensor(1), np.int8(0), 2, None], [1, 0, 2, -1]),
        (np.array([1.0, 0.0, np.nan, 2.0]), [1, 0, -1, 2]),
        ([1_000_000, 7, 7, 123_456], [2, 0, 0, 1]),
        (np.array([2**63 + 1, 0, 0, 2**63 + 1], np.uint64), [1, 0, 0, 1]),
        (torch.tensor([[1], [0], [0], [-100]]), [1, 0, 0, -1]),
        ([[0, 1], [1, 1], [0, 0], [1, 0]], None),
        ([[1], [0, 2], [], [1]], None),
        ([None] * 4, None),
    ],
)  # fmt: skip
def test_labels_of_any_kind_are_numbered(labels: Any, expected: list[int] | None) -> None:
    data = ready(ArrayData(np.zeros((4, 3, 8, 8), np.uint8), labels, val_fraction=0))
    assert data.num_classes == (None if expected is None else max(expected) + 1)
    if expected is not None:
        assert data.train_images.labels.tolist() == expected


@pytest.mark.parametrize("labels", [[0.2, 0.7, 1.4, 2.0], [1j] * 4, [object()] * 4, np.zeros(4, "M8[D]")])
def test_measurements_are_refused_as_labels(labels: Any) -> None:
    with pytest.raises(UserError, match=r"labels such as .* are no classes; give whole numbers or words"):
        ArrayData(np.zeros((4, 3, 8, 8), np.uint8), labels)


def test_training_and_validation_words_get_the_same_numbers(caplog: pytest.LogCaptureFixture) -> None:
    images = np.zeros((4, 3, 8, 8), np.uint8)
    with caplog.at_level("INFO"):
        data = ready(ArrayData(images, ["b", "c", "b", "c"], images, ["c", "b", "a", ""]))
    assert (data.train_images.labels.tolist(), data.val_images.labels.tolist()) == ([1, 2, 1, 2], [2, 1, -1, -1])
    assert "without training images: a" in caplog.text


# Held-out images


@pytest.mark.parametrize("sizes", [[4] * 30, [100, 20, 5, 2, 1, 1], [1000, 3, 2], [10] * 4, [1, 1, 2, 40]])
def test_each_class_is_on_both_sides(sizes: list[int]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    images = np.zeros((len(labels), 3, 8, 8), np.uint8)
    parts = [ready(ArrayData(images, labels, seed=seed)) for seed in (0, 1)]
    train, val = (Counter(side.labels.tolist()) for side in (parts[0].train_images, parts[0].val_images))
    assert [train[label] + val[label] for label in range(len(sizes))] == sizes
    assert all(val[label] >= 1 and train[label] >= 1 for label, size in enumerate(sizes) if size > 1)
    assert all(abs(val[label] - size / 10) <= 1 for label, size in enumerate(sizes))
    assert parts[0].val_images.labels.tolist() == parts[1].val_images.labels.tolist()


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("knn", {"k": 3}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("lowshot", {"draws": 2}), ("finetune", {"epochs": 1}))
        ),
    ],
)
def test_evaluation_takes_the_classes_of_both_sides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, protocol: str, options: Any
) -> None:
    random = np.random.default_rng(0)
    images, val = (random.integers(256, size=(count, 3, 32, 32), dtype=np.uint8) for count in (24, 12))
    data = ArrayData(images, list("abcd") * 6, val, list("bcde") * 3, num_workers=0, batch_size=4)
    evaluation = Evaluation("untrained", data, **BACKBONE, output=str(tmp_path), trainer={"accelerator": "cpu"})
    with caplog.at_level("INFO"):
        result = getattr(evaluation, protocol)(**options)
    assert (result.data["classes"], result.data["test_images"]) == (3, 9)
    assert "Evaluating 3 classes. Left out, as only one of both sets has images: a" in caplog.text
    evaluation.data = ArrayData(images, list("abab") * 6, val, list("aeff") * 3, num_workers=0)
    with pytest.raises(UserError, match="1 of them in common"):
        evaluation.knn()


# Tar files


def tar(path: Path, *extensions: str, contents: Any = (), names: str = "{:03}", mode: Any = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for number in range(12):
            for extension in extensions:
                label = contents[number % len(contents)] if extension in ("cls", "json") else PNG.getvalue()
                member = tarfile.TarInfo(f"{names.format(number)}.{extension}")
                member.size = len(label)
                archive.addfile(member, io.BytesIO(label))
    return str(path)


@pytest.mark.parametrize(
    ("extensions", "contents", "options", "size", "classes", "message"),
    [
        (("png",), (), {"names": "2021.05.{:02}"}, 12, None, ""),
        (("png", "cls"), (b"cat", b"dog\n"), {"names": "a/2021.05.{:02}"}, 12, 2, ""),
        (("left.png", "right.png"), (), {}, 12, None, "several images: left, right. Using left; set --data.image_key"),
        (("left.png", "right.png", "cls"), (b"1", b"0"), {"image_key": "right"}, 12, 2, ""),
        (("left.png", "right.png"), (), {"image_key": "all"}, 24, None, ""),
        (("jpg", "mask.png"), (), {}, 12, None, "Using the images without a key"),
        (("png", "json"), (b'{"a": {"b": "x"}}', b'{"a": {"b": "y"}}'), {"label_key": "a.b"}, 12, 2, ""),
        (("png", "json"), (b'{"label": [1, 2]}',), {}, 12, None, "multi-label"),
        (("png", "json"), (b"{broken", b"[1]", b"\xff"), {}, 12, None, ""),
        (("png", "json"), (b'{"label": 0.5}',), {"label_key": "none"}, 12, None, ""),
        (("png", "txt"), (), {}, 12, None, "passed over 12 files: 12 .txt"),
    ],
)  # fmt: skip
def test_tar_members_of_any_name_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, extensions: Any, contents: Any, options: Any, size: int,
    classes: int | None, message: str,
) -> None:  # fmt: skip
    names = {"names": options.pop("names")} if "names" in options else {}
    url = tar(tmp_path / "a.tar", *extensions, contents=contents, **names)
    with caplog.at_level("INFO"):
        data = ready(ShardsData(url, val_fraction=0, **options))
    assert (len(data.train_images), data.num_classes) == (size, classes)
    assert message in caplog.text
    if options.get("image_key") == "right":
        assert data.train_images.name(0).endswith("right.png")


@pytest.mark.parametrize(
    ("extensions", "options", "message"),
    [
        (("left.png", "right.png"), {"image_key": "up"}, r"--data.image_key up; the keys are left, right"),
        (("png", "json"), {"label_key": "kind"}, r"--data.label_key kind"),
        (("png", "json"), {}, r"0.5 are no classes; .*--data.label_key"),
        (("txt",), {}, r"no images in .*--data.urls"),
        (("png",), {"mode": "w:gz"}, r"compressed \(gzip\).*unpack it"),
    ],
)  # fmt: skip
def test_wrong_tar_files_say_what_to_change(tmp_path: Path, extensions: Any, options: Any, message: str) -> None:
    mode = options.pop("mode", "w")
    url = tar(tmp_path / "a.tar", *extensions, contents=[b'{"label": 0.5}'], mode=mode)
    with pytest.raises(UserError, match=message):
        ready(ShardsData(url, **options))


# torchvision and Hugging Face


def imagenette(root: Path) -> SSLDataModule:
    files(
        root / "imagenette2",
        *(f"{split}/n{number}" for split in ("train", "val") for number in ("01440764", "02102040")),
    )
    for file in root.rglob("*.png"):
        file.rename(file.with_suffix(".JPEG"))
    return TorchvisionData("Imagenette", str(root))


def rendered_sst2(root: Path) -> SSLDataModule:
    base = root / "rendered-sst2"
    files(base, *(f"{split}/{name}" for split in ("train", "valid", "test") for name in ("negative", "positive")))
    return TorchvisionData("RenderedSST2", str(root))


def country211(root: Path) -> SSLDataModule:
    files(root / "country211", *(f"{split}/{name}" for split in ("train", "valid", "test") for name in ("AD", "AE")))
    return TorchvisionData("Country211", str(root))


def food101(root: Path) -> SSLDataModule:
    files(root / "food-101", "images/pie", "images/tea")
    for file in root.rglob("*.png"):
        file.rename(file.with_suffix(".jpg"))
    (root / "food-101" / "meta").mkdir()
    listing = {name: [f"{name}/{number}" for number in range(4)] for name in ("pie", "tea")}
    for split in ("train", "test"):
        (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(listing))
    return TorchvisionData("Food101", str(root))


def gtsrb(root: Path) -> SSLDataModule:
    files(root / "gtsrb" / "GTSRB", "Training/00000", "Training/00001", "Final_Test/Images")
    for file in root.rglob("*.png"):
        file.rename(file.with_suffix(".ppm"))
    rows = [f"{number}.ppm;{number % 2}" for number in range(4)]
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(["Filename;ClassId", *rows]))
    return TorchvisionData("GTSRB", str(root))


class Unlisted(torch.utils.data.Dataset[Any]):
    """Labels nowhere but in the examples, as in PCAM."""

    def __init__(self, root: str, split: str = "train") -> None:
        if split not in ("train", "test"):
            raise ValueError(split)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return Image.new("RGB", (8, 8)), torch.tensor(index % 2)


class Paired(Unlisted):
    """As in FER2013: pairs of pixels and a class, and None in the test split."""

    def __init__(self, root: str, split: str = "train") -> None:
        super().__init__(root, split)
        self._samples = [(torch.zeros(8, 8), None if split == "test" else index % 2) for index in range(8)]


def unlisted(root: Path) -> SSLDataModule:
    return TorchvisionData("Unlisted", str(root))


def paired(root: Path) -> SSLDataModule:
    return TorchvisionData("Paired", str(root))


@pytest.mark.parametrize("make", [imagenette, rendered_sst2, country211, food101, gtsrb, unlisted, paired])
def test_labels_of_torchvision_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    for kind in (Unlisted, Paired):
        monkeypatch.setattr(torchvision.datasets, kind.__name__, kind, raising=False)
    data = ready(make(tmp_path))
    assert data.train_images.labels.tolist() == sorted(data.train_images.labels) or make in (unlisted, paired)
    assert np.bincount(data.train_images.labels).tolist() == [4, 4]
    assert data.num_classes == 2
    assert (data.val_images.labels.max() == -1) == (make is paired)


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_save_to_disk_are_loaded(tmp_path: Path, streaming: bool) -> None:
    datasets = pytest.importorskip("datasets")
    from ssl_lightning import HuggingFaceData

    picture = {"bytes": PNG.getvalue(), "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": [picture] * 10, "label": [number % 2 for number in range(10)]}
    single = datasets.Dataset.from_dict(columns, features=features)
    single.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"Training": single, "Testing": single}).save_to_disk(str(tmp_path / "both"))
    for name, validation in (("single", 0 if streaming else 2), ("both", 10)):
        data = ready(HuggingFaceData(str(tmp_path / name), streaming=streaming))
        assert len(data.train_stream or data.train_images) == (8 if validation == 2 else 10)
        assert len(data.val_images or []) == validation


def test_a_hugging_face_script_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from ssl_lightning import HuggingFaceData

    (tmp_path / "photos.py").write_text("import datasets")
    with pytest.raises(UserError, match=r"^[^\n]*it is a script.*--data.data_files FILES\.$"):
        ready(HuggingFaceData(str(tmp_path / "photos.py")))
