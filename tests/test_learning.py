"""The benchmark ``learning``: what our training and lightly's learn in the same time."""

import csv
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from ssl_lightning import BYOL, DINO, MAE, BarlowTwins, MoCoV2, SimCLR, SimSiam, SwAV, UserError, VICReg, ViewSpec
from ssl_lightning.commands import benchmark
from ssl_lightning.commands.benchmark import learning
from ssl_lightning.commands.benchmark.learning import with_recipe
from ssl_lightning.commands.benchmark.learning_result import minutes_to
from ssl_lightning.machine import device_name
from tests.small import digits, slow_unless, small

CONFIGS = Path(__file__).parent.parent / "configs"
STEPS = 6
COMPARED = (SimCLR, MoCoV2, BYOL, SwAV, DINO, BarlowTwins, VICReg, MAE)
FEW: dict[str, Any] = {"batch_size": 32, "train_samples": 64, "val_samples": 32}


class Watched:
    """Notes learning rates, and checks that the benchmark leaves the generator and the modes of its parts alike."""

    left: Any = None
    rates: tuple[float, ...] = ()

    def update_teacher(self) -> None:
        super().update_teacher()  # type: ignore[misc]
        self.left = torch.get_rng_state()

    def on_train_batch_start(self, *_: Any) -> None:
        mine: Any = self
        self.rates = (*self.rates, mine.optimizers().param_groups[0]["lr"])
        assert self.left is None or torch.equal(torch.get_rng_state(), self.left)
        assert all(part.training for part in mine.modules())


@pytest.fixture
def a_second_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time is the number of backward passes, so that every step of both sides takes a second."""
    passes, backward = [0], torch.Tensor.backward

    def counted(*args: Any, **kwargs: Any) -> None:
        passes[0] += 1
        backward(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    monkeypatch.setattr(time, "process_time", lambda: float(passes[0]))


@pytest.mark.usefixtures("a_second_per_step")
@pytest.mark.parametrize("method", slow_unless(lambda method: method is SimCLR, COMPARED))
def test_both_sides_train_for_the_same_time(method: Any, tmp_path: Path) -> None:
    data = digits(**FEW, image_size=32, views=[ViewSpec(size=32)]) if method is MAE else digits(**FEW, num_workers=0)
    model = small(type("Mine", (Watched, method), {}))
    result = learning(model, data, STEPS / 60, epochs=10, clock="processor", output=str(tmp_path))
    for side in ("ours", "lightly"):
        points = [point for point in result.points if point.side == side]
        assert [point.steps for point in points] == [math.ceil(STEPS * share / 8) for share in range(9)]
        assert [60 * point.minutes for point in points] == pytest.approx([point.steps for point in points])
        assert points[-1].images == 32 * STEPS
    assert model.rates[0] == pytest.approx(1e-3)
    assert model.rates[-1] < 0.1 * model.rates[1]  # it falls to 0 with the minutes
    with (tmp_path / "curves.csv").open() as file:
        assert [float(row["knn_top1"]) for row in csv.DictReader(file)] == [p.knn_top1 for p in result.points]
    assert Image.open(tmp_path / "curves.png").width > 500
    found = json.loads(result.json)
    assert found["lightly_knn_top1"] == result.points[-1].knn_top1
    assert all(f"{name}: ours" in str(result) for name in found["differences"])


@pytest.mark.usefixtures("a_second_per_step")
def test_both_sides_have_the_precision(tmp_path: Path) -> None:
    recipe = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    recipe["trainer"] |= {"precision": "bf16-mixed", "gradient_clip_val": 1.0}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.warns(UserWarning, match=r"without the recipe's trainer.gradient_clip_val"):
        words = with_recipe(["learning", "--config", str(path), "--minutes", "1"])
    assert words[words.index("--precision") + 1] == "bf16-mixed"

    dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}  # of our linear layers, and of lightly's
    model = small(SimCLR)
    ours = {*model.modules()}

    def note(module: Any, _: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and module.training:
            dtypes[module in ours].add(output.dtype)

    with register_module_forward_hook(note):
        result = learning(model, digits(**FEW, num_workers=0), 2 / 60, clock="processor", precision="bf16-mixed")
    assert dtypes == {True: {torch.bfloat16}, False: {torch.bfloat16}}
    assert f"{device_name(torch.device('cpu'))}, bf16-mixed, processor time" in str(result)


def test_minutes_to_an_accuracy_are_interpolated() -> None:
    curve = [(0.0, 0.3), (2.0, 0.5), (4.0, 0.4), (6.0, 0.6)]
    assert [minutes_to(curve, accuracy) for accuracy in (0.2, 0.45, 0.55)] == pytest.approx([0.0, 1.5, 5.5])
    assert minutes_to(curve, 0.7) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method simcrl", r"--method simcrl: no such method; did you mean simclr\?"),
        ("--method byol --config configs/quickstart.yaml", r"quickstart.yaml trains SimCLR; set --method"),
        ("--config README.md", r"--config README.md is not a recipe"),
        ("--config configs/quickstart.yaml --minutes 0", r"--minutes 0.0 must be more than 0"),
        ("--config configs/quickstart.yaml --epochs 0", r"--epochs 0.0 must be more than 0"),
        ("--config configs/quickstart.yaml --output README.md", r"cannot write to README.md .*another folder as --out"),
    ],
)
def test_a_wrong_choice_is_explained(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        benchmark.run(["learning", *words.split()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--minuts 1", "--minuts: no such option; did you mean --minutes?"),
        ("--precision 16-mixed", "--precision 16-mixed: expected 32-true, bf16-mixed."),
    ],
)
def test_the_recipe_is_not_blamed_for_a_wrong_option(words: str, message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        benchmark.run(["learning", "--config=configs/quickstart.yaml", *words.split()])
    assert capsys.readouterr().err == f"error: {message}\n"


def test_what_cannot_be_compared_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"SimSiam: lightly's side exists for SimCLR"):
        learning(small(SimSiam), digits(**FEW))
    with pytest.raises(UserError, match=r"--data.num_workers 0"):
        learning(small(SimCLR), digits(**FEW, num_workers=1), clock="processor")
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(UserError, match=r"pip install lightly"):
        learning(small(SimCLR), digits(**FEW))
