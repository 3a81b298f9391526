"""The command sweep: which runs it has, what it does with runs that end in every way, and mistakes."""

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ssl_lightning import UserError
from ssl_lightning.cli import main
from ssl_lightning.commands.compare import compare
from ssl_lightning.commands.sweep.grid import combinations, named, read_grid

RECIPE = ["sweep", "--config", "configs/quickstart.yaml", "--grid", "grid.yaml"]
GRID = "model.optim.base_lr: [0.002, 0.003]\nmodel: {temperature: [0.2]}\n"
FIT = """#!{python}
import json, os, signal, sys, time
words, started = sys.argv[1:], time.strftime("%Y-%m-%dT%H:%M:%S%z")
rate = next(word.partition("=")[2] for word in words if word.startswith("--model.optim.base_lr"))
folder = os.path.join(words[words.index("--trainer.default_root_dir") + 1], words[words.index("--name") + 1])
run = os.path.join(folder, "version_0")
os.makedirs(os.path.join(run, "checkpoints"), exist_ok=True)
with open("calls.txt", "a") as file:
    file.write(rate + (" resumed" if "--ckpt_path" in words else "") + "\\n")
def end(how, code):
    json.dump([{{"started": started, "ended": started, "end": how}}], open(os.path.join(run, "environment.json"), "w"))
    sys.exit(code)
with open(os.path.join(run, "metrics.csv"), "w") as file:
    file.write(f"step,epoch,val/knn_top1\\n1,0,0.1\\n2,1,0.5{{rate[-1]}}\\n")
if rate == "0.002":
    print("error: the loss is nan at step 3")
    end("stopped by UserError: the loss is nan", 1)
if rate == os.environ.get("HANGS") and "--ckpt_path" not in words:
    open(os.path.join(run, "checkpoints", "last.ckpt"), "w").close()
    signal.signal(signal.SIGTERM, lambda *_: end("stopped by SystemExit", 143))
    time.sleep(60)
end("finished", 0)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(GRID)


@pytest.fixture
def fit_in_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sweep starts writes the folder of a run, and trains nothing."""
    file = tmp_path / "python"
    file.write_text(FIT.format(python=sys.executable).replace("sys.argv[1:]", "sys.argv[3:]"))
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def rows() -> list[dict[str, str]]:
    with open("runs/sweep/sweep.csv") as file:
        return [*csv.DictReader(file)]


def calls() -> list[str]:
    return Path("calls.txt").read_text().splitlines()


@pytest.mark.usefixtures("fit_in_no_time")
def test_runs_are_ranked_failures_are_noted_and_nothing_is_done_twice(capsys: pytest.CaptureFixture[str]) -> None:
    main(RECIPE)
    assert [(row["run"], row["state"], row["val/knn_top1"], row["note"]) for row in rows()] == [
        ("base_lr=0.003,temperature=0.2", "finished", "0.53", ""),
        ("base_lr=0.002,temperature=0.2", "failed", "0.52", "the loss is nan"),
    ]
    assert {row["model.optim.base_lr"] for row in rows()} == {"0.002", "0.003"}
    assert "best by val/knn_top1: base_lr=0.003,temperature=0.2" in capsys.readouterr().out
    main(RECIPE)
    assert calls() == ["0.002", "0.003"]
    Path("grid.yaml").write_text(GRID.replace("0.003", "0.003, 0.004"))
    main([*RECIPE, "--mode", "min"])
    assert calls()[2:] == ["0.004"]
    assert [row["val/knn_top1"] for row in rows()] == ["0.53", "0.54", "0.52"]
    assert len(compare(["runs/sweep"]).rows) == 3
    with pytest.raises(SystemExit, match="holds a sweep with other options"):
        main([*RECIPE, "--trainer.max_epochs", "3"])


@pytest.mark.usefixtures("fit_in_no_time")
def test_a_spent_budget_ends_a_run_at_a_checkpoint_from_which_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANGS", "0.003")
    began = time.monotonic()
    Path("grid.yaml").write_text(GRID.replace("0.002, 0.003", "0.003, 0.002"))
    main([*RECIPE, "--budget", "2s"])
    assert time.monotonic() - began < 20
    assert [row["state"] for row in rows()] == ["interrupted", "not begun"]
    main([*RECIPE, "--budget", "1h", "--parallel", "2"])
    assert sorted(calls()) == ["0.002", "0.003", "0.003 resumed"]
    assert [row["state"] for row in rows()] == ["finished", "failed"]


@pytest.mark.parametrize(
    ("grid", "words", "message"),
    [
        ("model.optim.bas_lr: [1, 2]", [], "--model.optim.bas_lr: no such option; did you mean --model.optim.base_lr?"),
        ("model.temperature: [0.1, warm]", [], "--model.temperature warm: expected a number"),
        ("model: [SimCLR, SimSiamm]", [], "--model SimSiamm: no such class; did you mean SimSiam?"),
        ("- 1", [], "grid.yaml holds no options"),
        ("a: [", [], "--grid grid.yaml: while parsing"),
        ("name: [a]", [], "the sweep itself sets --name"),
        ("model.temperature: []", [], "model.temperature has no values"),
        ("model.temperature: {min: 0.1, max: 0.2}", [], "set --random to a number of draws"),
        ("model.temperature: {min: 0.3, max: 0.2}", [], "needs min below max"),
        ("model.temperature: {min: 0.3}", [], "needs two numbers"),
        (GRID, ["--budget", "30"], "--budget 30: give hours, minutes or seconds"),
        (GRID, ["--random", "0"], "--random 0 must be at least 1"),
        (GRID, ["--grid", "nowhere.yaml"], "--grid nowhere.yaml: No such file or directory"),
    ],
)
def test_mistakes_are_answered_before_anything_trains(
    grid: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("grid.yaml").write_text(grid)
    with pytest.raises(SystemExit) as stopped:
        main([*RECIPE, *words])
    assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert not Path("runs").exists()


def test_more_draws_keep_the_first_and_names_are_no_two_alike() -> None:
    ranges = "--model.optim.base_lr: {min: 1e-4, max: 1e-2, log: true}\ndata.batch_size: {min: 8, max: 64}\n"
    Path("grid.yaml").write_text(ranges + "model.a: [x/y, x:y]")
    grid = read_grid("grid.yaml")
    few, many = combinations(grid, 5, 0), combinations(grid, 40, 0)
    assert many[:5] == few
    assert combinations(grid, 5, 1) != few
    assert all(1e-4 <= run["model.optim.base_lr"] <= 1e-2 and isinstance(run["data.batch_size"], int) for run in many)
    assert sum(run["model.optim.base_lr"] < 1e-3 for run in many) > 10  # of the logarithms, half
    assert len(named(many)) == len(many) == 40
    choices: dict[str, Any] = {"a": [1, 2], "b": [True, None]}
    assert len(combinations(choices, 100, 0)) == len(combinations(choices, None, 0)) == 4
    assert next(iter(named(combinations(choices, None, 0)))) == "a=1,b=true"
    with pytest.raises(UserError, match="is a range"):
        combinations(grid, None, 0)


@pytest.mark.slow
def test_a_real_sweep_survives_a_run_that_diverges(tmp_path: Path) -> None:
    Path("grid.yaml").write_text("model.optim.base_lr: [1.0e+30, 0.003]\nmodel.optim.warmup_epochs: [0]")
    main([*RECIPE, "--config", "configs/overlays/debug.yaml"])
    assert [row["state"] for row in rows()] == ["finished", "failed"]
    assert float(rows()[0]["val/knn_top1"]) > 0
    assert "the loss is" in rows()[1]["note"]
    assert json.loads((tmp_path / "runs/sweep/sweep.json").read_text())["failed"]
