"""The benchmark ``learning``: what our training and lightly's learn in the same time."""

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ssl_lightning.arguments import SSLArgumentParser, with_shipped_configs
from ssl_lightning.backbones.whitened import Whitening
from ssl_lightning.commands.benchmark.alternation import UNPLANNED, Alternation
from ssl_lightning.commands.benchmark.learning_result import LearningResult, writing_to
from ssl_lightning.commands.benchmark.lightly_learning import LIGHTLY, LightlyMethod
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.views import ViewSpec
from ssl_lightning.errors import UserError
from ssl_lightning.machine import device_name
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.mistakes import did_you_mean
from ssl_lightning.optim import Optim

METHODS = {
    "simclr": "SimCLR",
    "moco_v2": "MoCoV2",
    "byol": "BYOL",
    "swav": "SwAV",
    "dino": "DINO",
    "barlow_twins": "BarlowTwins",
    "vicreg": "VICReg",
    "mae": "MAE",
}
"""What ``--method`` takes, and our classes."""


def learning(
    model: SSLModule,
    data: SSLDataModule,
    minutes: float = 5.0,
    epochs: float | None = None,
    clock: Literal["wall", "processor"] = "wall",
    seed: int = 0,
    output: str | None = None,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
) -> LearningResult:
    """Compare what our training and lightly's learn in the same time: kNN accuracy over minutes.

    Ours is a recipe of this package. lightly's is its documented way to train the method, with the settings of its
    CIFAR-10 benchmark (VICReg, MAE: Imagenette): its networks, loss, transform, optimizer, learning rate and schedule,
    in a loop without further work. Both get the same backbone with the same weights (MAE: lightly's own), the same
    images, batch size, workers and threads. They differ in temperature, optimizer, learning rate, views and heads; the
    result lists these line by line.

    Both train in one process, in short turns. Each side has a clock, which runs while it loads images and trains, and
    stands still while the other side trains and during evaluation. Each side stops when its clock shows the minutes.
    Learning rates and other schedules of both follow these clocks, so that they end with the minutes. But views keep
    the size of the recipe's first epochs, and what our method counts in epochs, such as DINO's frozen prototypes, keeps
    its epochs.

    kNN (k 20, temperature 0.07) searches up to 10,000 training images and classifies all validation images, the same
    for both sides, each normalized as in its training.

    Args:
        model: Our method. By default the recipe's.
        data: The images and our views. By default the recipe's; set ``--data.root``.
        minutes: Training time of each side.
        epochs: Length of the recipe, which determines the share of the warm-up. None keeps the warm-up's epochs.
        clock: What the clocks count: wall-clock time, or processor time of this process, all threads together, for a
            CPU that other programs use, too.
        seed: Seed of weights, data and steps.
        output: Folder for the curves, ``curves.csv`` and ``curves.png``. None writes none.
        precision: Precision of both sides, in training and evaluation. By default the recipe's.

    Raises:
        UserError: lightly has no such method here, the images have no labels, ...
    """
    if not minutes > 0:
        raise UserError(f"--minutes {minutes} must be more than 0.")
    if epochs is not None and not epochs > 0:
        raise UserError(f"--epochs {epochs} must be more than 0.")
    name = type(model).__name__
    way = next((LIGHTLY[base.__name__] for base in type(model).__mro__ if base.__name__ in LIGHTLY), None)
    if way is None:
        raise UserError(f"--model {name}: lightly's side exists for {', '.join(LIGHTLY)}, and subclasses of them.")
    try:
        import lightly  # noqa: F401
    except ImportError as error:
        raise UserError("this compares with lightly, which is not installed; pip install lightly") from error
    if output is not None:
        with writing_to(Path(output)):
            pass  # before the minutes are spent
    L.seed_everything(seed, verbose=False)
    alternation = Alternation(way, 60 * minutes, epochs, clock == "processor", seed)
    trainer = L.Trainer(
        accelerator="cpu" if clock == "processor" else "auto",
        devices=1,
        precision=precision,
        max_epochs=-1,
        max_steps=UNPLANNED,
        limit_val_batches=0,
        callbacks=[alternation],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    result = LearningResult(
        model=name,
        backbone=model.hparams["backbone"],
        images=len(data.train_images or []),
        image_size=data.image_size,
        batch_size=data.batch_size,
        num_workers=alternation.lightly.loader.num_workers,
        device=device_name(alternation.lightly.device),
        precision=precision,
        minutes=minutes,
        clock=clock,
        seed=seed,
        differences=_differences(model, alternation.optim, way, alternation.lightly.rates[0], data, epochs),
        points=alternation.points,
    )
    if output is not None:
        result.write(Path(output))
    return result


def add_recipe_arguments(parser: SSLArgumentParser) -> None:
    """Add the options that choose a recipe.

    Args:
        parser: The parser of the benchmark.
    """
    parser.add_argument("--method", type=str, default="simclr", help=f"The method: {', '.join(METHODS)}.")
    parser.add_argument(
        "--config",
        type=str | None,
        default=None,
        help="Recipe whose method and data are our side; by default configs/METHOD/cifar10_cpu.yaml.",
    )


def with_recipe(words: Sequence[str]) -> list[str]:
    """Write what the recipe says before the options, which may then change it: method, data, length and precision.

    Says which other settings of the recipe's trainer are left out.

    Args:
        words: The command line after ``benchmark``.

    Raises:
        UserError: No such method or recipe, or they do not fit.
    """
    choice = ArgumentParser(add_help=False, allow_abbrev=False)
    choice.add_argument("--method", nargs="?")
    choice.add_argument("--config", nargs="?")
    given, options = choice.parse_known_args(words[1:])
    method, config = given.method, given.config
    if method and method not in METHODS:
        raise UserError(
            f"--method {method}: no such method; {did_you_mean(method, METHODS)}Choose from {', '.join(METHODS)}."
        )
    default = f"configs/{method or 'simclr'}/cifar10_cpu.yaml"
    path = config or with_shipped_configs(["--config", default])[1]
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        model, data = recipe["model"], recipe["data"]
        name = model["class_path"].rpartition(".")[2]
        trainer = dict(recipe.get("trainer") or {})
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--config {path} is not a recipe with a model and data: {error!r}") from error
    if method and METHODS[method] != name:
        raise UserError(f"--config {path} trains {name}; set --method to match it, or leave out --method.")
    epochs, precision = trainer.pop("max_epochs", None), trainer.pop("precision", None)
    if trainer:
        rank_zero_warn(f"--config {path}: both sides train without the recipe's trainer.{', trainer.'.join(trainer)}.")
    of_recipe = ["--model", json.dumps(model), "--data", json.dumps(data)]
    if epochs is not None and epochs >= 1:
        of_recipe += ["--epochs", str(epochs)]
    if precision is not None:
        of_recipe += ["--precision", str(precision)]
    return [words[0], *of_recipe, *options]


def _differences(
    method: Any, optim: Optim, way: LightlyMethod, rate: float, data: SSLDataModule, epochs: float | None
) -> dict[str, tuple[str, str]]:
    """What differs between the sides, in words."""
    settings = {
        name: method.hparams[name]
        for name in signature(type(method).__init__).parameters
        if name in method.hparams and name not in ("backbone", "backbone_kwargs", "optim")
    }
    ours = f"{optim.warmup_epochs:g} epochs" if epochs is None else f"{optim.warmup_epochs / epochs:.0%}"
    return {
        "loss and heads": (", ".join(f"{name} {value}" for name, value in settings.items()), way.settings),
        "views": (" and ".join(map(_view, data.small_view_specs or data.view_specs)), way.views(data.image_size)),
        "optimizer": (f"{optim.name}, weight decay {optim.weight_decay:g}", way.optimizer_text),
        "highest learning rate": (f"{optim.peak_lr(data.batch_size):.3g}", f"{rate:.3g}"),
        "warm-up": (ours, f"{way.warmup:.0%}"),
        "first weights of the backbone": ("our own", _first_weights(method)),
    }


def _first_weights(method: Any) -> str:
    """lightly's, in words."""
    if "decoder_dim" in method.hparams:
        return "its own"
    whitens = any(isinstance(part, Whitening) for part in method.modules())
    return "the same, but its own views are whitened" if whitens else "the same"


def _view(spec: ViewSpec) -> str:
    names = ("flip", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize")
    operations = "".join(f", {name} {value:g}" for name in names if (value := getattr(spec, name)))
    return f"{spec.count} of {spec.size} px, area {spec.scale[0]:g} to {spec.scale[1]:g}{operations}"
