"""The command ``compare --record``: rows of ``configs/results.csv`` from the folders of runs."""

import csv
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from ssl_lightning import UserError
from ssl_lightning.cli import main
from ssl_lightning.commands.compare import RECORD_COLUMNS, compare
from ssl_lightning.evaluation.results import Results
from tests.results_table import ROOT

COMMAND = (
    "fit --config /there/configs/mae/cifar10_cpu.yaml --data.root=/images --seed_everything 7 --model.optim.base_lr=0"
)
START: dict[str, Any] = {
    "started": "2026-01-01T10:00:00+0000",
    "ended": "2026-01-01T10:10:30+0000",
    "hardware": {"device": "cpu", "processors": 2, "processor": "an Intel Xeon"},
    "processes": {"processes": 1},
    "chance_loss": 0.98,
}
METRICS = """epoch,step,train/loss,train/images_per_second,val/knn_top1,val/linear_top1
0,0,1.2,100,,
0,9,1.0,260,,
0,9,,,0.2,0.3
1,19,0.04,270,,
1,19,,,0.356,0.3708
"""


def write_run(folder: Path, *starts: dict[str, Any]) -> Path:
    """A run of two epochs with two linear evaluations."""
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(METRICS)
    model = {"class_path": "ssl_lightning.MAE", "init_args": {"backbone": "vit_tiny_patch16_224"}}
    (folder / "config.yaml").write_text(json.dumps({"seed_everything": 7, "model": model}))
    (folder / "environment.json").write_text(json.dumps(starts))
    for name, top1 in (("linear", 0.4), ("linear_1", 0.489), ("knn", 0.9)):
        accuracy = {"top1": top1, "interval": [0.3, 0.5]}
        Results(name.partition("_")[0], {}, {}, {}, accuracy, [], [], 1.0).write(folder / "evaluations" / name)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def test_a_recorded_run_is_a_row_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no checkout
    run = write_run(tmp_path / "run", {"command": COMMAND.split(), **START}, START)
    main(["compare", str(run), "--record", "new.csv", "--load", "quiet"])
    main(["compare", str(run), "--record", "new.csv"])
    first, second = rows(tmp_path / "new.csv")
    assert first == {
        "recipe": "configs/mae/cifar10_cpu.yaml --model.optim.base_lr 0",
        "commit": "",
        "date": date.today().isoformat(),
        "hardware": "2 cores of an Intel Xeon",
        "load": "quiet",
        "seed": "7",
        "epochs": "2",
        "minutes": "21.0",
        "knn": "35.6",
        "linear_online": "37.1",
        "linear_offline": "48.9",
        "first_loss": "1.10",
        "last_loss": "0.0400",
        "chance_loss": "0.980",
        "images_per_second": "260",
    }
    assert second == {**first, "load": ""}


def test_what_a_run_does_not_know_stays_empty(tmp_path: Path) -> None:
    killed = {key: value for key, value in START.items() if key not in ("ended", "chance_loss")}
    compare([str(write_run(tmp_path / "run", killed))]).record(tmp_path / "new.csv")
    (row,) = rows(tmp_path / "new.csv")
    assert row["recipe"] == "MAE vit_tiny_patch16_224"
    assert (row["minutes"], row["chance_loss"]) == ("", "")


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    with open(ROOT / "configs" / "results.csv", newline="") as file:
        assert next(csv.reader(file)) == [*RECORD_COLUMNS]
    (tmp_path / "other.csv").write_text("recipe,accuracy\na,1\n")
    with pytest.raises(
        UserError, match=r"columns recipe, accuracy\. Give a new file, or one with the columns recipe, co"
    ):
        compare([str(write_run(tmp_path / "run", START))]).record(tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == "recipe,accuracy\na,1\n"
    evaluation = str(tmp_path / "run" / "evaluations" / "knn")
    with pytest.raises(UserError, match="nothing to record"):
        compare([evaluation]).record(tmp_path / "new.csv")


@pytest.mark.parametrize("words", [["--plot", "x.foo"], ["--plot", "no/x.png"], ["--record", "no/x.csv"]])
def test_the_table_is_printed_even_if_a_file_cannot_be_written(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", START)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["compare", "run", *words])
    printed = capsys.readouterr()
    assert "35.6" in printed.out
    assert "error: cannot be written" in printed.err + str(end.value.code)


@pytest.mark.parametrize("damaged", [b"\xff\xfe", b"# nothing\nname", b"null"])
@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_a_damaged_file_of_a_run_leaves_cells_empty(damaged: bytes, name: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", START)
    (tmp_path / "run" / name).write_bytes(damaged)
    comparison = compare([str(tmp_path)])
    assert "35.6" in str(comparison)
    comparison.record(tmp_path / "x.csv", "")
