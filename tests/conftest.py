"""Real images for the tests, and what they share.

torch and scikit-learn are imported where they are used: the process that hands out the tests does without them.
"""

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

DATA = Path(os.environ.get("SSL_LIGHTNING_TEST_DATA", "../shared/data")).resolve()  # before a test changes folder
os.environ["OMP_NUM_THREADS"] = "1"  # the networks are tiny; and processes forked from one with more would hang


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SSL_LIGHTNING_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    from tests.processes import stop_processes

    yield
    stop_processes()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 JPEGs of different sizes in two class folders, cut from the two photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("photos")
    random = np.random.Generator(np.random.Philox(key=1))
    for name, photo in zip(("flower", "temple"), reversed(load_sample_images().images), strict=True):
        (root / name).mkdir()
        for number in range(20):
            height, width = random.integers(60, 120, size=2)
            top, left = random.integers(0, 427 - height), random.integers(0, 640 - width)
            crop = Image.fromarray(photo[top : top + height, left : left + width])
            crop.save(root / name / f"{number:02}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real CIFAR-10 images, ``train`` and ``test`` with a folder per class, from SSL_LIGHTNING_TEST_DATA."""
    archives = [DATA / f"cifar10-{split}.tar" for split in ("train", "test")]
    if not all(archive.is_file() for archive in archives):
        pytest.skip(f"cifar10-train.tar and cifar10-test.tar are not in SSL_LIGHTNING_TEST_DATA={DATA}")
    root = tmp_path_factory.mktemp("cifar10")
    for archive in archives:
        with tarfile.open(archive) as opened:
            members = [member for index, member in enumerate(opened) if index % 25 == 0 and member.isfile()]
            opened.extractall(root, members, filter="data")
    return root


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Chromium without a window."""
    selenium = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = program
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = selenium.Chrome(options, selenium.ChromeService(driver))
    yield window
    window.quit()


@pytest.fixture
def browser(chromium: Any) -> Any:
    """Chromium on an empty page, without what the page of another test, which may ask for news, left in its log."""
    chromium.get("about:blank")
    for log in ("browser", "performance"):
        chromium.get_log(log)
    return chromium


@pytest.fixture
def broken_photos(photos: Path, tmp_path: Path) -> Path:
    """40 photos in class folders, three of them broken."""
    for file in photos.rglob("*.jpg"):
        target = tmp_path / file.relative_to(photos)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    (tmp_path / "flower" / "03.jpg").write_bytes(b"")
    (tmp_path / "flower" / "07.jpg").write_text("no image at all")
    truncated = tmp_path / "temple" / "05.jpg"
    truncated.write_bytes(truncated.read_bytes()[:600])
    return tmp_path
