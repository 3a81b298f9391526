"""The check command."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from ssl_lightning.cli import main

OWN = """
import torch
from ssl_lightning import SimCLR

class Local(SimCLR):
    '''Forgets the images of the other processes.'''
    def training_loss(self, views):
        z0, z1 = (torch.nn.functional.normalize(self.projector(self.backbone(view))) for view in views)
        return torch.nn.functional.cross_entropy(z0 @ z1.T / 0.1, torch.arange(len(z0)))
"""
TINY = ["--model.backbone", "resnet10_cifar", "--model.backbone_kwargs", "{stem_stride: 2, channels: [16, 16, 16, 16]}"]


DATA = ["--data", "FakeData", "--batch_size", "8", "--steps", "2", "--data.image_size", "32"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.sync_batchnorm", "true"], "parameters of projector"),
        ([], "Set --trainer.sync_batchnorm true"),
    ],
)
def test_check_says_whether_processes_train_as_one(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ssl-lightning"])
    with nullcontext() if words else pytest.raises(SystemExit, match="error: losses differ between one process"):
        main(["check", "--model", "SimCLR", *words, *TINY, *DATA])
    printed = capsys.readouterr().out
    assert message in printed
    assert ("DIFFERS" in printed) == (not words)


@pytest.mark.slow
def test_check_finds_what_a_method_of_ones_own_forgets(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    words = ["check", "--model", "own.Local", "--trainer.sync_batchnorm", "true", *TINY, *DATA]
    command = [sys.executable, "-m", "ssl_lightning", *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 1, result.stderr
    assert "Look for sums over the batch: gather" in result.stdout
    assert "DIFFERS" in result.stdout
    assert "error: losses differ between one process and 2." in result.stderr
