"""The command ``curate``: planted duplicates, outliers, subsets, and training on what was kept."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_lightning import ImageFolderData, UserError
from ssl_lightning.cli import main
from ssl_lightning.commands.curate import Curation


def data(root: Path, **options: object) -> ImageFolderData:
    return ImageFolderData(str(root), num_workers=0, image_size=32, **options)  # type: ignore[arg-type]


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.fixture(scope="module")
def planted(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 1,000 images a*.jpg, and 100 of them resized, recompressed or cropped, b*.jpg."""
    root = tmp_path_factory.mktemp("planted") / "images"
    root.mkdir()
    for number, file in enumerate(sorted((cifar10 / "train").rglob("*.*"))[:1000]):
        shutil.copy(file, root / f"a{number:04}{file.suffix}")
        if number % 10 == 0:
            image, kind = Image.open(file).convert("RGB"), number // 10 % 3
            image = (image.resize((24, 24)), image, image.crop((1, 1, 31, 31)))[kind]
            image.save(root / f"b{number:04}.jpg", quality=60 if kind == 1 else 90)
    return root


def test_planted_duplicates_are_removed_and_training_leaves_them_out(planted: Path, tmp_path: Path) -> None:
    output, page = tmp_path / "kept.csv", tmp_path / "page.html"
    words = ["curate", "duplicates", "--checkpoint", "pixels", "--data", "ImageFolderData", "--data.root", str(planted)]
    main([*words, "--data.image_size", "32", "--data.num_workers", "0", "--output", str(output), "--page", str(page)])
    table = rows(output)
    removed = {row["path"] for row in table if row["kept"] == "0"}
    copies = {row["path"] for row in table if row["path"].startswith("b")}
    assert len(removed & copies) >= 0.95 * max(len(removed), len(copies))  # precision and recall
    pairs = {row["path"]: row["duplicate_of"] for row in table}
    assert all(pairs[copy][1:5] == copy[1:5] for copy in removed & copies if copy in removed)
    assert page.read_text().count("<img") > 100
    kept = data(planted, files=str(output))
    kept.setup()
    assert len(kept.train_images or []) == 1100 - len(removed)


def test_a_training_image_that_repeats_a_validation_image_is_removed(planted: Path, tmp_path: Path) -> None:
    for part, letter in (("train", "a"), ("val", "b")):
        for file in sorted(planted.glob(f"{letter}*"))[:100]:
            target = tmp_path / "images" / part / "class" / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    output = tmp_path / "kept.csv"
    Curation("pixels", data(tmp_path / "images"), output=str(output)).duplicates(0.5)
    table = rows(output)
    assert {row["kept"] for row in table if row["set"] == "val"} == {"1"}
    repeats = [row for row in table if row["kept"] == "0" and row["duplicate_of"].startswith("val/")]
    assert len(repeats) >= 9  # of ten training images with a copy


def test_outliers_are_the_images_that_resemble_no_others(planted: Path, tmp_path: Path) -> None:
    root = shutil.copytree(planted, tmp_path / "images")
    random = np.random.Generator(np.random.Philox(key=0))
    for number in range(5):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(root / f"noise{number}.png")
    output = tmp_path / "kept.csv"
    said = Curation("pixels", data(root), output=str(output), page=str(tmp_path / "page.html")).outliers(0.01)
    gone = [row["path"] for row in rows(output) if row["kept"] == "0"]
    assert len(gone) == 11
    assert sum(path.startswith("noise") for path in gone) == 5
    assert said is not None
    assert "11 outliers" in said


@pytest.mark.parametrize("method", ["balanced", "k_center"])
def test_a_subset_has_the_number_asked_for_and_is_the_same_again(method: str, planted: Path, tmp_path: Path) -> None:
    chosen = []
    for number in range(2):
        output = tmp_path / f"{number}.csv"
        Curation("pixels", data(planted), output=str(output)).select(60, method)  # type: ignore[arg-type]
        chosen.append(rows(output))
    assert chosen[0] == chosen[1]
    kept = [row["path"] for row in chosen[0] if row["kept"] == "1"]
    assert len(kept) == 60
    if method == "balanced":
        clusters = [row["cluster"] for row in chosen[0] if row["kept"] == "1"]
        assert len(set(clusters)) == len({row["cluster"] for row in chosen[0]})  # every cluster is there


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\na.jpg\n", "a column path"),
        ("path,kept\nnowhere.jpg,1\n", "1 files that are no images below"),
        ("path,kept\nflower/00.jpg,0\n", "none at all"),
        (None, "--data.files"),
    ],
)
def test_a_list_that_names_no_images_is_refused(text: str | None, message: str, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        data(photos, files=str(file)).setup()


def test_paths_may_be_absolute_and_other_columns_missing(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("path\n" + "\n".join(map(str, sorted(photos.rglob("0*.jpg")))))
    module = data(photos, files=str(file), val_fraction=0.5)
    module.setup()
    assert (len(module.train_images or []), len(module.val_images or [])) == (10, 10)
    assert module.classes == ["flower", "temple"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["select", "--count", "5000"], "--count 5000 must lie between 1 and 40"),
        (["outliers", "--share", "2"], "--share 2.0 must be at least 0"),
        (["duplicates", "--output", "nowhere/list.csv"], "--output nowhere/list.csv"),
        (["duplicates", "--trainer", "{devicez: 2}"], "--trainer: got an unexpected keyword argument 'devicez'"),
    ],
)
def test_wrong_numbers_are_refused(words: list[str], message: str, photos: Path) -> None:
    common = [
        "--checkpoint",
        "pixels",
        "--data",
        "ImageFolderData",
        "--data.root",
        str(photos),
        "--data.val_fraction=0",
    ]
    with pytest.raises(SystemExit) as end:
        main(["curate", *words, *common, "--data.image_size", "32", "--data.num_workers", "0"])
    assert message in str(end.value.code)
