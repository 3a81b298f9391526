"""What a person sees of a run: in a terminal, in a log file, and from two processes."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ssl_lightning.cli import main
from tests.small import slow_unless
from tests.test_switches import SMALL

pyte = pytest.importorskip("pyte", reason="pyte stands for a terminal")

WORDS = [*SMALL, "--trainer.max_epochs", "2"]
LINE = r"epoch (\d)/2  loss [\d.]+  kNN [\d.]+ %  linear [\d.]+ %(  \d+ s left)?  [\d,.]+ images/s"
NOISE = ("Tip", "TPU", "FLOPs", "Seed set", "sync_dist", "LeafSpec", "log_every_n_steps", "tuple", "hours left")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ssl-lightning"])


def check(lines: list[str]) -> None:
    """Header, one line an epoch, and nothing else that matters to nobody."""
    said = "\n".join(lines)
    assert [re.fullmatch(LINE, line)[1] for line in lines if line.startswith("epoch")] == ["1", "2"], said  # type: ignore[index]
    assert max(map(len, lines)) <= 80
    for start in (
        "DigitsData: 32 images",
        "device  CPU",
        "method  SimCLR with resnet10_cifar: 0.0",
        "batch   16 images",
    ):
        assert len([line for line in lines if line.startswith(start)]) == 1, said
    assert "length  2 epochs of 2 steps, 4 steps in all" in lines
    assert "folder  runs/quickstart/version_0" in lines
    assert "page    python -m ssl_lightning report runs/quickstart/version_0" in lines
    assert not [noise for noise in NOISE if noise in said], said


@pytest.mark.parametrize("columns", slow_unless(lambda columns: columns == 80, [80, 200]))
def test_a_terminal_shows_a_line_for_every_epoch(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pty", reason="a pseudo-terminal needs Unix")
    master, slave = os.openpty()
    screen = pyte.HistoryScreen(columns, 50, history=1000, ratio=1)
    stream = pyte.ByteStream(screen)

    def draw() -> None:
        while data := os.read(master, 65536).partition(b"\x04")[0]:
            stream.feed(data)

    reader = threading.Thread(target=draw, daemon=True)
    reader.start()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        main(WORDS)
        print("\x04", end="", flush=True)
        reader.join(10)
    history = ["".join(line[column].data for column in range(columns)) for line in screen.history.top]
    check([line.rstrip() for line in (*history, *screen.display) if line.strip()])


def test_a_log_file_has_a_line_for_every_epoch_and_no_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    main(WORDS)
    said = "".join(capfd.readouterr())
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", said)
    check([line for line in said.splitlines() if line])


@pytest.mark.slow  # starts Python and everything once more
def test_a_notebook_sees_lightnings_messages_without_its_advertisements(tmp_path: Path) -> None:
    code = """
import lightning as L
from ssl_lightning import DigitsData, SimCLR
trainer = L.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, enable_progress_bar=False)
trainer.fit(SimCLR(backbone="resnet10_cifar"), DigitsData(batch_size=16, train_samples=32))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "GPU available" in done.stderr  # the user's to silence
    assert not [noise for noise in ("Tip: ", "LeafSpec") if noise in done.stderr], done.stderr
