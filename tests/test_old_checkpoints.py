"""Checkpoints written before parts of the package were renamed still load and resume."""

import json
import tarfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import ssl_lightning
from tests.make_checkpoints import MOMENT, SAVED, features, resumed

FILES = Path(__file__).with_name("checkpoints_before_1.tar.xz")
RECORDED = json.loads(FILES.with_name("checkpoints_before_1.json").read_text())
QUICK = ("MAE", "SimCLR")
every_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RECORDED]
)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    with tarfile.open(FILES) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def folder(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the checkpoints, and the current one: BEiT's checkpoint names its tokenizer by a relative path."""
    monkeypatch.chdir(unpacked)
    return unpacked


def assert_same(found: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Compare all tensors whatever their names, and those whose names are unchanged by name."""
    contents = [
        sorted((tuple(value.shape), value.contiguous().numpy().tobytes()) for value in state.values())
        for state in (found, saved)
    ]
    assert contents[0] == contents[1]
    for name in found.keys() & saved.keys():
        assert torch.equal(found[name], saved[name]), name


class Restored(L.Callback):
    """Checks, before the first step, that weights and moments equal the file."""

    def __init__(self, saved: dict[str, Any]) -> None:
        self.saved = saved

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert trainer.global_step == SAVED
        assert_same(pl_module.state_dict(), self.saved["state_dict"])
        states = trainer.optimizers[0].state
        assert len(states) == len(self.saved["optimizer_states"][0]["state"])
        for parameter, moments in states.items():
            if moments:
                assert torch.equal(moments["exp_avg"], MOMENT * parameter)


@every_method
def test_an_old_run_resumes(method: str, folder: Path) -> None:
    path, expected = folder / f"{method}.ckpt", RECORDED[method]
    found = resumed(path, Restored(torch.load(path, weights_only=True)))
    for what in ("losses", "probe", "moved"):
        assert found[what] == pytest.approx(expected[what], rel=1e-3, abs=1e-5), what
    for what in ("global_step", "epoch", "written"):
        assert found[what] == expected[what], what


@every_method
def test_an_old_method_loads(method: str, folder: Path) -> None:
    path = folder / f"{method}.ckpt"
    module = getattr(ssl_lightning, method).load_from_checkpoint(path)
    assert_same(module.state_dict(), torch.load(path, weights_only=True)["state_dict"])


@every_method
def test_an_old_backbone_gives_the_same_features(method: str, folder: Path) -> None:
    torch.testing.assert_close(features(folder / f"{method}.ckpt"), RECORDED[method]["features"], rtol=1e-3, atol=1e-4)
