"""The command line, as a person uses it."""

import csv
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from ssl_lightning import GramAnchoring, ImageTokenizer, SSLModule
from ssl_lightning.cli import SSLCLI, main
from ssl_lightning.distributed import free_port
from ssl_lightning.runs import new_version
from tests.small import METHODS, VIT_ONLY, digits, simclr, slow_unless, trainer

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "overlays")
QUICKSTARTS = [recipe for recipe in RECIPES if recipe.name == "quickstart.yaml"]
OVERLAYS = sorted((CONFIGS / "overlays").glob("*.yaml"))
DEBUG = ["--config", "configs/quickstart.yaml", "--config", "configs/overlays/debug.yaml"]


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ssl-lightning"])


def shell(*words: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "ssl_lightning", *words]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def curve(run: Path, metric: str) -> list[float]:
    with open(run / "metrics.csv") as file:
        return [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]


# Running


def test_fit_resume_validate_test_and_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *DEBUG])
    run = tmp_path / "runs" / "quickstart" / "version_0"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= names
    assert any("tfevents" in name for name in names)
    assert len(curve(run, "val/knn_top1")) == 2
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed
    for shown in ("loss", "kNN", "linear", "images/s"):
        assert shown in printed

    main(["fit", *DEBUG, "--trainer.max_epochs", "3", "--ckpt_path", "last"])
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]  # the run goes on in its folder
    assert len(curve(run, "val/knn_top1")) == 3
    assert "epoch 3/3" in capsys.readouterr().out
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    assert checkpoint["hyper_parameters"]["backbone"] == "resnet10_cifar"

    for command in ("validate", "test"):
        main([command, *DEBUG, "--ckpt_path", "last"])
        assert "val/knn_top1" in capsys.readouterr().out
    main(["predict", *DEBUG, "--ckpt_path", "best"])


@pytest.mark.slow
def test_the_command_line_wins_over_the_checkpoint(tmp_path: Path) -> None:
    main(["fit", *DEBUG, "--last_checkpoint.every_n_train_steps", "3"])
    more = ["--trainer.max_epochs", "3", "--model.temperature", "0.9"]
    with pytest.warns(UserWarning, match=r"other hyper-parameters .*: temperature 0.9 \(was 0.2\)"):
        main(["fit", *DEBUG, *more, "--ckpt_path", "last"])  # goes on in the middle of the second epoch
    checkpoint = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["temperature"] == 0.9
    assert checkpoint["global_step"] == 12


def test_a_checkpoint_of_a_notebook_is_validated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running = trainer(tmp_path)
    running.fit(simclr(), digits())
    running.save_checkpoint(tmp_path / "plain.ckpt")
    backbone = [
        "--model.backbone",
        "resnet10_cifar",
        "--model.backbone_kwargs",
        "{stem_stride: 2, channels: [16, 16, 16, 16]}",
    ]
    main(["validate", "--model", "SimCLR", *backbone, "--data", "DigitsData", "--ckpt_path", "plain.ckpt"])
    assert "val/knn_top1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_logger_of_ones_own_keeps_the_run_folder(tmp_path: Path) -> None:
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "elsewhere"]
    main(["fit", *DEBUG, *logger])
    assert (tmp_path / "runs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt").is_file()
    assert list((tmp_path / "elsewhere").rglob("metrics.csv"))
    main(["fit", *DEBUG, *logger, "--trainer.max_epochs", "3", "--ckpt_path", "last"])
    assert len(curve(tmp_path / "runs" / "quickstart" / "version_0", "val/knn_top1")) == 3


@pytest.mark.slow
def test_a_saved_config_repeats_the_run(tmp_path: Path) -> None:
    main(["fit", *DEBUG, "--name", "one"])
    main(["fit", "--config", "runs/one/version_0/config.yaml", "--name", "two"])
    one, two = (
        torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True) for name in ("one", "two")
    )
    assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:batch_size=64 is larger than the")
@pytest.mark.parametrize("labels", ["folders", "none"])
def test_a_folder_of_photos_needs_no_config(photos: Path, tmp_path: Path, labels: str) -> None:
    small = ["--model.backbone", "resnet18", "--data.image_size", "32", "--trainer.max_epochs", "1"]
    data = ["--data", "ImageFolderData", "--data.root", str(photos), "--data.labels", labels]
    main(["fit", "--model", "SimCLR", *data, *small, "--trainer.accelerator", "cpu"])
    run = tmp_path / "runs" / "SimCLR" / "version_0"
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "checkpoints" / "best.ckpt").is_file() == (labels == "folders")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:batch_size=64 is larger than the", "ignore:.* unreadable and skipped")
def test_broken_photos_are_listed_in_the_run_folder_or_stop_the_run(broken_photos: Path, tmp_path: Path) -> None:
    small = ["--model.backbone", "resnet10_cifar", "--data.image_size", "16", "--trainer.max_epochs", "1"]
    fit = ["fit", "--model", "SimCLR", "--data", "ImageFolderData", "--data.root", str(broken_photos), *small]
    main([*fit, "--data.max_unreadable", "0.1"])
    listing = tmp_path / "runs" / "SimCLR" / "version_0" / "unreadable-0.txt"
    assert len(listing.read_text().splitlines()) == 3
    with pytest.raises(SystemExit) as end:
        main(fit)
    assert "more than --data.max_unreadable=1.0%" in str(end.value.code)


@pytest.mark.slow
def test_callbacks_can_be_left_out_and_set(tmp_path: Path) -> None:
    main(["fit", *DEBUG, "--without", "[knn_probe, best_checkpoint]", "--linear_probe.lr", "0.5"])
    run = tmp_path / "runs" / "quickstart" / "version_0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["linear_probe"]["lr"] == 0.5
    assert curve(run, "val/linear_top1")
    assert not curve(run, "val/knn_top1")
    assert not (run / "checkpoints" / "best.ckpt").exists()


@pytest.mark.slow
def test_a_method_of_ones_own_module(tmp_path: Path) -> None:
    (tmp_path / "own_methods.py").write_text(
        "from ssl_lightning import SSLModule\n\n\n"
        "class Nothing(SSLModule):\n"
        '    """Learns nothing."""\n\n'
        "    def training_loss(self, views):\n"
        "        return self.backbone(views[0]).square().mean()\n"
    )
    result = shell(
        *("fit", "--model", "own_methods.Nothing", "--model.backbone", "resnet10_cifar"),
        *("--data", "FakeData", "--data.batch_size", "8", "--trainer.fast_dev_run", "true"),
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    less = ["--without", "[pictures, view_grid, health_monitor]"]
    overlay = ["--config", "configs/overlays/ddp.yaml", *pair, "--trainer.precision", "32-true"]
    result = shell("fit", *DEBUG, *overlay, "--name", "pair", "--data.batch_size", "32", *less)
    assert result.returncode == 0, result.stderr
    said = [line for line in (result.stdout + result.stderr).splitlines() if line]
    assert len(said) == len(set(said)) <= 12, said  # each process once, without warnings
    assert "batch   64 images, 32 on each of 2 processes" in said
    run = tmp_path / "runs" / "pair" / "version_0"
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert all(0 <= value <= 1 for value in curve(run, "val/knn_top1") + curve(run, "val/linear_top1"))

    validate = ["validate", *DEBUG, "--trainer.limit_val_batches", "1.0", "--knn_probe.max_samples", "301"]
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    main([*validate, *checkpoint])
    tables = [capsys.readouterr().out, shell(*validate, *checkpoint, *pair).stdout]
    numbers = [
        [word for line in table.splitlines() if "val/" in line for word in line.split() if word[:2] == "0."]
        for table in tables
    ]
    assert len(numbers[0]) == len(numbers[1]) == 6
    assert [float(word) for word in numbers[0]] == pytest.approx([float(word) for word in numbers[1]], abs=1e-6)
    assert float(numbers[0][0]) * 360 == pytest.approx(round(float(numbers[0][0]) * 360), abs=1e-3)  # each image once


def _read(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_two_nodes_train_as_one_process(tmp_path: Path) -> None:
    recipe = ["--config", "configs/mae/quickstart.yaml", "--config", "configs/overlays/debug.yaml"]
    fit = [
        "fit",
        *recipe,
        "--trainer.max_epochs",
        "1",
        "--trainer.accelerator",
        "cpu",
        "--trainer.precision",
        "32-true",
    ]
    # AdamW would enlarge what is rounded otherwise
    sgd = ["--model.optim.name", "sgd", "--model.optim.base_lr", "0.1", "--model.optim.extra", "{}"]
    fit += [*sgd, "--model.optim.warmup_epochs", "0", "--without", "[knn_probe, pictures, view_grid, health_monitor]"]
    main([*fit, "--name", "one", "--data.batch_size", "32"])
    nodes = ["--config", "configs/overlays/nodes.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    words = ["-m", "ssl_lightning", *fit[:5], *nodes, *fit[5:], "--name", "two", "--data.batch_size", "16"]
    running = [
        subprocess.Popen([*torchrun, "--node-rank", node, *address, *words], stderr=subprocess.PIPE) for node in "01"
    ]
    for node in running:
        _, said = node.communicate(timeout=200)
        assert node.returncode == 0, said.decode()
    assert [path.name for path in (tmp_path / "runs" / "two").iterdir()] == ["version_0"]
    one, two = (_read(tmp_path / "runs" / name / "version_0") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_runs_that_start_together_get_a_folder_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: new_version(tmp_path / "run", dry=False), range(16)))
    assert sorted(versions) == sorted(f"version_{number}" for number in range(16))


@pytest.mark.slow
def test_nothing_asks_the_network(tmp_path: Path) -> None:
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(
        "import socket\n\n"
        "def refuse(self, address, *rest):\n"
        "    raise SystemExit(f'network: {address}')\n\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "socket.getaddrinfo = lambda *words, **more: refuse(None, words)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(guard)}
    command = [sys.executable, "-m", "ssl_lightning", "fit", *DEBUG]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    probe = [sys.executable, "-c", "import socket; socket.socket().connect(('127.0.0.1', 9))"]
    result = subprocess.run(probe, capture_output=True, text=True, env=environment, check=False)
    assert "network: " in result.stderr  # the guard does stop connections


# Configs and help


AFTER = {"beit": "image_tokenizer", "distillation": "byol", "gram_anchoring": "dinov2"}
"""Whose checkpoint a method begins with."""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", QUICKSTARTS, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_every_quickstart_runs(recipe: Path, tmp_path: Path) -> None:
    shorter = ["--config", "configs/overlays/debug.yaml", "--without", "[pictures, view_grid]"]
    if before := AFTER.get(recipe.parent.name):
        main(["fit", "--config", f"configs/{before}/quickstart.yaml", *shorter])
    main(["fit", "--config", str(recipe), *shorter])
    run = tmp_path / "runs" / yaml.safe_load(recipe.read_text())["name"] / "version_0"
    assert len(curve(run, "val/knn_top1")) == 2
    assert len(curve(run, "val/linear_top1")) == 2


PUBLISHED = {
    "npid": {"cifar10_", "imagenet_"},
    "resa": {"cifar10_", "imagenet_"},
    "rotnet": {"cifar10_", "imagenet_"},
    **{
        method: {"imagenet_"}
        for method in (
            "beit",
            "capi",
            "dinov2",
            "distillation",
            "gram_anchoring",
            "ibot",
            "ijepa",
            "image_tokenizer",
            "jigsaw",
            "lejepa",
            "simdino",
            "simdinov2",
            "simmim",
            "visreg",
        )
    },
}
"""Where recipes have been published, for methods that have none for CIFAR-10, ImageNet-100 or ImageNet."""


REFERENCE = {
    backbone: yaml.safe_load((CONFIGS / "simclr" / f"cifar10_{backbone}.yaml").read_text())
    for backbone in ("vit_small", "resnet18")
}


def test_every_method_has_its_recipes() -> None:
    names = {
        folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in CONFIGS.iterdir() if folder.is_dir()
    }
    del names["overlays"], names["speedrun"]
    modules = {method.__module__.rpartition(".")[2] for method in METHODS}
    assert set(names) == modules
    for method, recipes in names.items():
        published = PUBLISHED.get(method, {"cifar10_", "imagenet100_", "imagenet_"})
        for wanted in {"quickstart", "cifar10_cpu", *published}:
            found = [name for name in recipes if name.startswith(wanted) and (name != "cifar10_cpu" or wanted == name)]
            assert found or (method, wanted) == ("simclr", "quickstart"), (method, wanted)


@pytest.mark.parametrize("method", [one for one in METHODS if one not in (GramAnchoring, ImageTokenizer)])
def test_one_backbone_can_be_held_fixed_on_cifar10(method: type[SSLModule]) -> None:
    folder = CONFIGS / method.__module__.rpartition(".")[2]
    for backbone in ("vit_small",) if method in VIT_ONLY else ("vit_small", "resnet18"):
        recipe = yaml.safe_load((folder / f"cifar10_{backbone}.yaml").read_text())
        model, other = (one["model"]["init_args"] for one in (recipe, REFERENCE[backbone]))
        assert recipe["model"]["class_path"] == method.__name__
        assert model["backbone"] == other["backbone"]
        if backbone == "vit_small":
            assert model["backbone_kwargs"]["patch_size"] == other["backbone_kwargs"]["patch_size"]


class Parsed(SSLCLI):
    """Reads its words and builds nothing."""

    def instantiate_classes(self) -> None:
        pass


@pytest.fixture(scope="module")
def parser() -> LightningArgumentParser:
    return Parsed(args=words_of(RECIPES[0]), run=False).parser


def words_of(recipe: Path) -> list[str]:
    return ["--config", str(recipe), *([] if "DigitsData" in recipe.read_text() else ["--data.root", "nowhere"])]


def family(recipe: Path) -> tuple[str, str]:
    """The method and the kind of its backbone, such as resnet or vit; nothing for the default."""
    backbone = yaml.safe_load(recipe.read_text())["model"].get("init_args", {}).get("backbone", "")
    return recipe.parent.name, re.split(r"[\d_]", backbone)[0]


BUILT = {family(recipe): recipe for recipe in RECIPES if family(recipe)[1]}
"""One recipe of each method and kind of backbone."""
BUILT["simclr", "resnet"] = CONFIGS / "simclr" / "cifar10_resnet18.yaml"


@pytest.mark.parametrize("recipe", QUICKSTARTS, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_every_quickstart_can_be_read(recipe: Path, parser: LightningArgumentParser) -> None:
    assert parser.parse_args(words_of(recipe)).trainer.max_epochs  # the other recipes are built


@pytest.mark.parametrize(
    "recipe",
    slow_unless(lambda recipe: recipe in BUILT.values(), [recipe for recipe in RECIPES if recipe not in QUICKSTARTS]),
    ids=lambda path: path.relative_to(CONFIGS).as_posix(),
)
def test_every_recipe_can_be_built(recipe: Path) -> None:
    with torch.device("meta"):  # of the size that is published, without the time to fill it
        cli = SSLCLI(args=words_of(recipe), run=False)
    assert cli.trainer.max_epochs
    if recipe.match("simclr/cifar10_resnet18.yaml"):  # what a recipe leaves out stays the paper's
        optim = cli.model.optim
        assert (optim.name, optim.base_lr, optim.weight_decay, optim.warmup_epochs) == ("lars_simclr", 1.0, 1e-4, 10)
        assert cli.model.temperature == 0.5


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_goes_on_top_of_a_recipe(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "configs/quickstart.yaml", "--config", str(overlay), "--print_config"])
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    comments = [line for line in overlay.read_text().splitlines() if line.startswith("#")]
    assert any(f"configs/overlays/{overlay.name}" in line for line in comments)  # its command
    assert config["model"]["init_args"]["temperature"] == 0.2
    for key, value in yaml.safe_load(overlay.read_text()).get("trainer", {}).items():
        if key != "logger":
            assert config["trainer"][key] == value


def test_options_of_a_recipe_that_another_method_lacks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "configs/dino/quickstart.yaml", "--model", "BYOL", "--trainer.accelerator", "none"]
    with pytest.raises(SystemExit):
        main(["fit", *words])
    said = capsys.readouterr().err
    assert "--model BYOL takes the place of DINO in " in said
    assert "dropped, because it has none: model.num_prototypes, model.bottleneck_dim" in said


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["mlflow", "wandb"])
def test_a_run_is_logged_elsewhere(overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(overlay, reason='pip install ".[loggers]"')
    monkeypatch.setenv("WANDB_MODE", "offline")
    less = ["--without", "[pictures, view_grid, health_monitor]", "--data.train_samples", "256"]
    main(["fit", *DEBUG, "--config", f"configs/overlays/{overlay}.yaml", "--trainer.max_epochs", "1", *less])
    assert len(curve(tmp_path / "runs" / "quickstart" / "version_0", "val/knn_top1")) == 1
    if overlay == "wandb":
        assert list((tmp_path / "runs" / "wandb").glob("offline-run-*/*.wandb"))
        return
    import mlflow

    (run,) = mlflow.MlflowClient("sqlite:///runs/mlflow.db").search_runs(["1"])
    assert {"train/loss", "val/knn_top1"} <= run.data.metrics.keys()


def test_overrides_keep_the_other_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model", "SimCLR", "--model.optim.base_lr", "9", "--data", "DigitsData", "--print_config"])
    optim = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optim"]
    assert (optim["base_lr"], optim["name"], optim["weight_decay"]) == (9, "lars_simclr", 1e-6)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--help"], ["fit", "validate", "test", "predict"]),
        (["fit", "--help"], ["--knn_probe.k", "Number of neighbors", "--trainer.max_epochs", "--name"]),
        (
            ["fit", "--model.help", "SimCLR"],
            ["two views of an image attract", "Divides the cosine similarities", "--model.optim.base_lr"],
        ),
        (["fit", "--data.help", "ImageFolderData"], ["nested folders", "--data.batch_size", "Images per batch"]),
    ],
)
def test_help_comes_from_the_docstrings(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code in (0, None)
    printed = capsys.readouterr().out
    for text in expected:
        assert text in printed, text


@pytest.mark.slow
def test_the_command_line_imports_no_more_than_lightning() -> None:
    code = "import sys, ssl_lightning.cli; print({'timm', 'sklearn', 'lightly'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_no_thread_computes_with_denormal_numbers() -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("torch cannot flush denormal numbers on this processor")
    # their bits are counted, because a comparison would take them as 0, too
    code = """
import contextlib, torch
from ssl_lightning.cli import main
with contextlib.suppress(SystemExit): main(["--version"])
torch.set_num_threads(2)
print((torch.full((1000, 1000), 1e-38) * 0.1).view(torch.int32).count_nonzero().item())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split()[-1] == "0"


# Wrong things


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prepare", "missing: --root, --output."),
        ("prepare --root", "--root: a value is missing."),
        ("export", "missing: --checkpoint."),
        ("compare", "missing: runs."),
        ("evaluate knn --data DigitsData", "missing: --checkpoint."),
        ("evaluate knn --checkpoint pixels --data DigitsData --k many", "--k many: expected a whole number or a list"),
        ("fit --model simclr --data DigitsData", "did you mean SimCLR?"),
    ],
)
def test_what_is_missing_is_named_as_it_is_typed(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "SimCLEAR", "--data", "DigitsData"], "did you mean SimCLR?"),
        (["--model", "SimCLR", "--model.backbone", "resnet19", "--data", "DigitsData"], "did you mean resnet18"),
        (["--model", "SimCLR", "--model.temprature", "1", "--data", "DigitsData"], "did you mean --model.temperature?"),
        (["--modle.temperatur", "1"], "did you mean --model.temperature?"),
        (["--model", "SimCLR", "--data", "DigitsData", "--lr", "1"], "did you mean --model.optim.base_lr?"),
        (["--epochs", "1"], "did you mean --trainer.max_epochs?"),
        (["--model", "SimCLR", "--data", "~/photos"], "is --data ImageFolderData --data.root ~/photos"),
        (["SimCLR", "--data", "DigitsData"], "SimCLR: did you mean --model SimCLR?"),
        (["--model", "SimCLR", "--data", "ImageFolderData", "--data.rooot", "x"], "did you mean --data.root?"),
        (["--trainer.max-epochs", "few"], "--trainer.max_epochs few: expected a whole number"),  # also with dashes
        (["--trainer.max_epoch", "3"], "--trainer.max_epoch: no such option; did you mean --trainer.max_epochs?"),
        (["--knn_probe.kk", "3"], "did you mean --knn_probe.k?"),
        (["--model", "SimCLR", "--model.optim", "{base_lrr: 3}"], "did you mean --model.optim.base_lr?"),
        (
            ["--model", "SimCLR", "--data", "DigitsData", "--data.views", "[{sizee: 3}]"],
            "did you mean --data.views.size?",
        ),
        (["--trainer.callbacks", "EarlyStoping"], "did you mean EarlyStopping?"),
        (["--model", "SimCLR", "--model.temperature", "warm"], "--model.temperature warm: expected a number"),
        (["--data", "DigitsData", "--data.resolution", "half"], "--data.resolution half: expected null, or its own"),
        (["--model", "SimCLR", "--model.backbone_kwargs", "{a:1}"], "backbone_kwargs: expected names with values"),
        (["--model", "nowhere.Mine", "--data", "DigitsData"], "--model nowhere.Mine: No module named 'nowhere'"),
        (
            ["--config", "wrong.yaml"],
            "max_epoch in wrong.yaml: no such option; did you mean trainer.max_epochs?",
        ),
        (["--config", "configs/simclr/cifar10_resnet.yaml"], "did you mean configs/simclr/cifar10_resnet18.yaml?"),
        ([], "fit --model SimCLR --data ImageFolderData --data.root PHOTOS"),
        (["--model", "SimCLR"], "missing: --data, the images"),
        (["--model", "SimCLR", "--data", "DigitsData", "--data.views", "simclear"], "did you mean 'simclr'"),
        (["--model", "SimCLR", "--data", "ImageFolderData", "--data.root", "nowhere"], "nowhere does not exist"),
        (["--model", "SimCLR", "--data", "ImageFolderData"], "missing: --data.root. For example: --data.root PHOTOS"),
        (["--model", "SimCLR", "--data", "CIFAR10Data"], "data.download=true"),
        (["--model", "SimCLR", "--data", "DigitsData", "--data.batch_size", "1"], "at least 2"),
        (["--model", "SimCLR", "--data", "DigitsData", "--ckpt_path", "none.ckpt"], "none.ckpt does not exist"),
        (["--model", "SimCLR", "--data", "DigitsData", "--ckpt_path", "last"], "no last*.ckpt below runs/SimCLR"),
        (["--model", "SimCLR", "--data", "DigitsData", "--without", "[probes]"], "choose from run_record"),
        (["--model", "SimCLR", "--data", "DigitsData", "--model.optim.name", "adan2"], "unknown optimizer"),
        (["--config", "configs/none.yaml"], "configs/none.yaml"),
        (["--model", "MAE", "--model.backbone", "resnet18", "--data", "DigitsData"], "set --model.backbone to a ViT"),
        (["--config", "configs/moco_v2/quickstart.yaml", "--model.queue_length", "100"], "queue_length=100"),
        (["--config", "configs/dino/quickstart.yaml", "--data.views", "mae"], "DINO needs 2 views"),
        (
            (
                *("--config", "configs/byol/quickstart.yaml", "--model.backbone", "vit_tiny_patch16_224"),
                *("--model.backbone_kwargs", "{patch_size: 7}"),
            ),
            "patches of 7 px do not divide views of 16 px",
        ),
    ],
)
def test_wrong_things_are_answered_in_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yaml").write_text("{model: SimCLR, data: DigitsData, trainer: {max_epoch: 3}}")
    with pytest.raises(SystemExit) as end:
        main(["fit", *words])
    said = str(end.value.code) + capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
