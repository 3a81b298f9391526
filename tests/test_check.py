"""The check command."""

import subprocess
import sys
from pathlib import Path

import pytest

OWN = """
import torch
from ssl_lightning import SimCLR

class Local(SimCLR):
    '''Forgets the images of the other processes.'''
    def training_loss(self, views):
        z0, z1 = (torch.nn.functional.normalize(self.projector(self.backbone(view))) for view in views)
        return torch.nn.functional.cross_entropy(z0 @ z1.T / 0.1, torch.arange(len(z0)))
"""
TINY = ["--model.backbone", "resnet10_cifar", "--model.backbone_kwargs", "{stem_stride: 2, channels: [8, 8, 16, 16]}"]


def check(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    (folder / "own.py").write_text(OWN)
    data = ["--data", "FakeData", "--batch_size", "8", "--steps", "2", "--data.image_size", "32"]
    command = [sys.executable, "-m", "ssl_lightning", "check", *words, *TINY, *data]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--model", "SimCLR", "--trainer.sync_batchnorm", "true"], 0, "parameters of projector"),
        (["--model", "SimCLR"], 1, "Set trainer.sync_batchnorm to true"),
        (["--model", "own.Local", "--trainer.sync_batchnorm", "true"], 1, "Look for sums over the batch: gather"),
    ],
)
def test_check_says_whether_processes_train_as_one(words: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = check(tmp_path, *words)
    assert result.returncode == code, result.stderr
    assert message in result.stdout
    assert ("DIFFERS" in result.stdout) == (code == 1)
    if code:
        assert "error: losses differ between one process and 2." in result.stderr
