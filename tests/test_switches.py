"""Lightning's own options of ``fit``: each does what Lightning says, next to the callbacks of every run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import LearningRateMonitor, ModelSummary, TQDMProgressBar

from ssl_lightning import UserError
from ssl_lightning.cli import SSLCLI
from tests.small import slow_unless

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")
SMALL = [
    *("fit", "--config", QUICKSTART, "--model.backbone_kwargs", "{channels: [16, 16, 16, 16]}"),
    *("--data.train_samples", "32", "--data.val_samples", "16", "--data.batch_size", "16", "--data.num_workers", "0"),
    *("--trainer.accelerator", "cpu", "--without", "[pictures, view_grid, health_monitor]"),
]
RUN = Path("runs/quickstart/version_0")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ssl-lightning"])


def fit(*words: str) -> Any:
    """The trainer after two steps an epoch, for one epoch."""
    return SSLCLI(args=[*SMALL, "--trainer.max_epochs", "1", *words]).trainer


class Seen(L.Callback):
    """Keeps which images each step saw."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.indices.append(pl_module.image_indices.tolist())


def kinds(trainer: Any, kind: type) -> list[str]:
    return [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, kind)]


def seen(trainer: Any) -> list[list[int]]:
    return next(callback.indices for callback in trainer.callbacks if isinstance(callback, Seen))


def own(*names: str) -> list[str]:
    return [f"--trainer.callbacks+={name}" for name in names]


WAITING = ["--knn_probe.every_n_epochs", "2", "--best_checkpoint.monitor", "val/knn_top1"]

SWITCHES: dict[str, tuple[list[str], Callable[[Any], Any]]] = {
    "enable_progress_bar": (["--trainer.enable_progress_bar", "false"], lambda one: one.progress_bar_callback is None),
    "enable_checkpointing": (["--trainer.enable_checkpointing", "false"], lambda _: not [*RUN.rglob("*.ckpt")]),
    "logger": (
        ["--trainer.logger", "false"],
        lambda _: (RUN / "checkpoints" / "last.ckpt").is_file() and not (RUN / "metrics.csv").exists(),
    ),
    "nothing kept": (
        ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"],
        lambda _: not Path("runs").exists(),
    ),
    "own callbacks": (
        [
            *own("TQDMProgressBar", "LearningRateMonitor", "RichModelSummary", "ModelCheckpoint"),
            *("--trainer.callbacks.dirpath", "own"),
        ],
        lambda one: (
            isinstance(one.progress_bar_callback, TQDMProgressBar)
            and len(kinds(one, LearningRateMonitor)) == len(kinds(one, ModelSummary)) == 1
            and [type(callback).__name__ for callback in one.checkpoint_callbacks] == ["ModelCheckpoint"]
            and len([*Path().rglob("*.ckpt")]) == len([*Path("own").iterdir()]) == 1
        ),
    ),
    "own best checkpoint": (
        own("BestCheckpoint"),
        lambda _: sorted(path.name for path in RUN.rglob("*.ckpt")) == ["best.ckpt", "last.ckpt"],
    ),
    "EarlyStopping waits": (  # counting the value of epoch 2 again in epoch 3 would stop there
        [
            *("--trainer.max_epochs", "4", *WAITING, *own("EarlyStopping"), "--trainer.callbacks.monitor"),
            *("val/knn_top1", "--trainer.callbacks.patience", "1", "--trainer.callbacks.mode", "max"),
        ],
        lambda one: one.current_epoch == 4,
    ),
    "ModelCheckpoint waits": (
        [
            *("--trainer.max_epochs", "4", *WAITING, *own("ModelCheckpoint"), "--trainer.callbacks.monitor"),
            *("val/knn_top1", "--trainer.callbacks.save_top_k", "-1"),
        ],
        lambda one: len(one.checkpoint_callback.best_k_models) == 2,
    ),
    "max_steps": (
        ["--trainer.max_epochs", "-1", "--trainer.max_steps", "3"],
        lambda one: (
            (one.global_step, one.current_epoch) == (3, 2)
            and one.lr_scheduler_configs[0].scheduler.get_last_lr()[0] < 1e-9
        ),
    ),
    "max_time": (["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:01"], lambda one: one.global_step > 0),
    "fast_dev_run": (
        ["--trainer.fast_dev_run", "true"],
        lambda one: one.global_step == 1 and not Path("runs").exists(),
    ),
    "overfit_batches": (
        ["--trainer.max_epochs", "2", "--trainer.overfit_batches", "1", *own("tests.test_switches.Seen")],
        lambda one: len(seen(one)) == 2 and seen(one)[0] == seen(one)[1],
    ),
    "limit_train_batches": (["--trainer.limit_train_batches", "1"], lambda one: one.global_step == 1),
    "limit_val_batches": (
        ["--trainer.limit_val_batches", "0"],
        lambda one: not [name for name in one.callback_metrics if name.startswith("val/")],
    ),
    "num_sanity_val_steps": (["--trainer.num_sanity_val_steps", "-1"], lambda one: one.global_step == 2),
    "profiler": (["--trainer.profiler", "simple"], lambda one: one.global_step == 2),
    "detect_anomaly": (["--trainer.detect_anomaly", "true"], lambda one: one.global_step == 2),
    "inference_mode": (["--trainer.inference_mode", "false"], lambda one: "val/knn_top1" in one.callback_metrics),
    "accumulate_grad_batches": (["--trainer.accumulate_grad_batches", "2"], lambda one: one.global_step == 1),
    "gradient_clip_val": (["--trainer.gradient_clip_val", "0.1"], lambda one: one.global_step == 2),
    "check_val_every_n_epoch": (
        ["--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2"],
        lambda one: "val/linear_top1" in one.callback_metrics,
    ),
    "val_check_interval": (["--trainer.val_check_interval", "1"], lambda one: "val/knn_top1" in one.callback_metrics),
    "barebones": (["--trainer.barebones", "true"], lambda one: one.global_step == 2),
    "enable_model_summary": (["--trainer.enable_model_summary", "true"], lambda one: kinds(one, ModelSummary)),
}
PLAIN = {"logger", "own callbacks", "EarlyStopping waits", "max_steps"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", slow_unless(lambda name: name in PLAIN, SWITCHES))
def test_a_switch_of_the_trainer_works(name: str) -> None:
    words, as_expected = SWITCHES[name]
    assert as_expected(fit(*words))


@pytest.mark.parametrize(
    "callback", slow_unless(lambda name: name == "EarlyStopping", ["EarlyStopping", "ModelCheckpoint"])
)
def test_a_metric_that_does_not_exist_is_refused(callback: str) -> None:
    with pytest.raises(UserError, match=f"{callback} watches val/knn_top, .* set its monitor to val/knn_top1"):
        fit(*own(callback), "--trainer.callbacks.monitor", "val/knn_top")


class Parsed(SSLCLI):
    """Reads its words and builds nothing."""

    def instantiate_classes(self) -> None:
        pass


@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        ("", 100),
        ("--trainer.max_epochs 7 --trainer.max_steps 9", 7),
        ("--trainer.max_steps 20000", -1),
        ("--trainer.max_time 01:00:00:00", -1),
        ("--trainer.callbacks Timer", -1),
        ("--trainer.min_epochs 200", 200),
    ],
)
def test_the_default_number_of_epochs_gives_way(words: str, epochs: int) -> None:
    cli = Parsed(args=["--model", "SimCLR", "--data", "DigitsData", *words.split()], run=False)
    assert cli.config.trainer.max_epochs == epochs


@pytest.mark.parametrize(
    "words", ["--trainer.strategy foo", "--trainer.accelerator foo", "--trainer.devices foo", "--trainer.max_time foo"]
)
def test_options_that_the_trainer_refuses_are_answered_in_words(words: str) -> None:
    with pytest.raises(UserError, match="the options of --trainer do not fit"):
        SSLCLI(args=[*SMALL[1:], *words.split()], run=False)
