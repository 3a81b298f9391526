"""The benchmark ``learning``: what our training and lightly's learn in the same time."""

import json
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_lightning.arguments import SSLArgumentParser, with_shipped_configs
from ssl_lightning.callbacks.features import in_eval_mode, plain_features
from ssl_lightning.commands.benchmark.learning_result import LearningPoint, LearningResult, Side
from ssl_lightning.commands.benchmark.lightly_learning import LIGHTLY, LightlyMethod
from ssl_lightning.commands.benchmark.transformed_images import TransformedImages
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.images import ImageArray
from ssl_lightning.data.views import ViewSpec
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation import knn_predict
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.mistakes import did_you_mean
from ssl_lightning.schedules import cosine
from ssl_lightning.seeding import seeded

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

_EVALUATIONS, _TURNS = 8, 5
"""Evaluations after the first, of untrained networks; and how often both sides train between two evaluations."""
_BANK = 10_000
"""Most training images that kNN searches."""
_UNPLANNED = 10**9
"""Planned steps before the first step has shown how long it takes."""


def learning(
    model: SSLModule,
    data: SSLDataModule,
    minutes: float = 5.0,
    epochs: float | None = None,
    clock: Literal["wall", "processor"] = "wall",
    seed: int = 0,
    output: str | None = None,
) -> LearningResult:
    """Compare what our training and lightly's learn in the same time: kNN accuracy over minutes.

    Ours is a recipe of this package. lightly's is its documented way to train the method, with the settings of its
    CIFAR-10 benchmark (VICReg, MAE: Imagenette): its networks, loss, transform, optimizer, learning rate and schedule,
    in a loop without further work. Both get the same backbone with the same weights (MAE: lightly's own), the same
    images, batch size, workers and threads. They differ in temperature, optimizer, learning rate, views and heads; the
    result lists these line by line.

    Both train in one process, in short turns. Each side has a clock, which runs while it loads images and trains, and
    stands still while the other side trains and during evaluation. Each side stops when its clock shows the minutes.
    Learning rates and other schedules of both follow these clocks, so that they end with the minutes.

    kNN (k 20, temperature 0.07) searches up to 10,000 training images and classifies all validation images, the same
    for both sides, each normalized as in its training.

    Args:
        model: Our method. By default the recipe's.
        data: The images and our views. By default the recipe's; set ``--data.root``.
        minutes: Training time of each side.
        epochs: Length of the recipe, which determines the share of the warm-up. None keeps the warm-up's epochs.
        clock: What the clocks count: time on the wall, or processor time of this process, all threads together, for a
            machine that other programs use, too.
        seed: Seed of weights, data and steps.
        output: Folder for the curves, ``curves.csv`` and ``curves.png``. None writes none.

    Raises:
        UserError: lightly has no such method here, the images have no labels, ...
    """
    if not minutes > 0:
        raise UserError(f"--minutes {minutes} must be more than 0.")
    name = type(model).__name__
    way = next((LIGHTLY[base.__name__] for base in type(model).__mro__ if base.__name__ in LIGHTLY), None)
    if way is None:
        raise UserError(f"--model {name}: lightly's side exists for {', '.join(LIGHTLY)}, and subclasses of them.")
    try:
        import lightly  # noqa: F401
    except ImportError as error:
        raise UserError("this compares with lightly, which is not installed; pip install lightly") from error
    L.seed_everything(seed, verbose=False)
    alternation = _Alternation(way, 60 * minutes, epochs, clock == "processor", seed)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=-1,
        max_steps=_UNPLANNED,
        limit_val_batches=0,
        callbacks=[alternation],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    device = model.device
    result = LearningResult(
        model=name,
        backbone=model.hparams["backbone"],
        images=len(data.train_images or []),
        image_size=data.image_size,
        batch_size=data.batch_size,
        num_workers=alternation.lightly.loader.num_workers,
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        minutes=minutes,
        clock=clock,
        seed=seed,
        differences=alternation.differences,
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
    """Write the method, the data and the length of the recipe before the options, which may then change them.

    Args:
        words: The command line after ``benchmark``.

    Raises:
        UserError: No such method or recipe, or they do not fit.
    """
    given = {"--method": "", "--config": ""}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option in given:
            given[option] = value if equals else following
    method, config = given["--method"], given["--config"]
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
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--config {path} is not a recipe with a model and data: {error!r}") from error
    if method and METHODS[method] != name:
        raise UserError(f"--config {path} trains {name}; set --method to match it, or leave out --method.")
    epochs = (recipe.get("trainer") or {}).get("max_epochs")
    length = [] if epochs is None or epochs < 1 else ["--epochs", str(epochs)]
    return [words[0], "--model", json.dumps(model), "--data", json.dumps(data), *length, *words[1:]]


class _Clock:
    """Adds up the time between ``start`` and ``stop``.

    Args:
        processor: Whether to count processor time instead of time on the wall.
    """

    def __init__(self, processor: bool) -> None:
        self._processor, self._before = processor, 0.0
        self._started: float | None = None

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._started is None else self._now() - self._started)

    def _now(self) -> float:
        if self._processor:
            return time.process_time()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class _Alternation(L.Callback):
    """Lets lightly train in turns with the training that it belongs to, and evaluates both now and then.

    Args:
        way: How lightly trains.
        seconds: Training time of each side.
        epochs: See ``learning``.
        processor: Whether the clocks count processor time.
        seed: Seed of lightly's weights and views.
    """

    def __init__(self, way: LightlyMethod, seconds: float, epochs: float | None, processor: bool, seed: int) -> None:
        self.way, self.seconds, self.epochs, self.processor, self.seed = way, seconds, epochs, processor, seed
        self.clock, self.turns = _Clock(processor), 0
        self.points: list[LearningPoint] = []
        self.differences: dict[str, tuple[str, str]] = {}
        self.lightly: _Lightly

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Build lightly's side, once our weights are what they start from, and evaluate both untrained."""
        if trainer.global_step > 0:
            return
        data = trainer.datamodule
        workers = trainer.train_dataloader.num_workers
        _check(data)
        if self.processor and (workers > 0 or pl_module.device.type != "cpu"):
            raise UserError("--clock processor sees neither workers nor a GPU; set --data.num_workers 0 on a CPU.")
        self.optim = pl_module.optim
        self.lightly = _Lightly(self.way, pl_module, data, workers, self.seconds, _Clock(self.processor), self.seed)
        self.differences = _differences(pl_module, self.way, data, self.lightly.optimizer, self.epochs)
        self._evaluate(trainer, pl_module)
        self.clock.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """At the end of our turn, lightly takes its turn."""
        planned = trainer.global_step + 1 < trainer.max_steps and self.turns > 0
        if self.clock.seconds < self._turn_end and planned:
            return
        self.clock.stop()
        while self.clock.seconds >= self._turn_end and not trainer.should_stop:
            self.lightly.train(self._turn_end)
            self.turns += 1
            if self.turns % _TURNS == 0:
                self._evaluate(trainer, pl_module)
            trainer.should_stop = self.turns == _TURNS * _EVALUATIONS
        if not trainer.should_stop:
            self._plan(trainer, pl_module)
            self.clock.start()

    @property
    def _turn_end(self) -> float:
        return self.seconds * (self.turns + 1) / (_TURNS * _EVALUATIONS)

    def _plan(self, trainer: Any, pl_module: Any) -> None:
        """Plan as many steps as the time that is left allows at our speed so far, and rebuild the schedule for them."""
        done = trainer.global_step
        steps = max(1, math.ceil((self.seconds - self.clock.seconds) * done / self.clock.seconds))
        trainer.fit_loop.epoch_loop.max_steps = done + steps
        if self.epochs is not None:
            stretched = (done + steps) / len(trainer.train_dataloader) / self.epochs
            pl_module.optim = replace(self.optim, warmup_epochs=self.optim.warmup_epochs * stretched)
        planned = pl_module.configure_optimizers()
        for config in trainer.lr_scheduler_configs:
            config.scheduler.lr_lambdas = planned["lr_scheduler"]["scheduler"].lr_lambdas

    def _evaluate(self, trainer: Any, pl_module: Any) -> None:
        data, lightly = trainer.datamodule, self.lightly
        networks: dict[Side, tuple[Any, Callable[[Tensor], Tensor], _Clock, int]] = {
            "ours": (pl_module, pl_module, self.clock, trainer.global_step),
            "lightly": (lightly.parts, lightly.features, lightly.clock, lightly.steps),
        }
        with lightly.randomness.in_use(), torch.no_grad():
            for side, (module, features, clock, steps) in networks.items():
                with in_eval_mode(module):
                    accuracy = _knn_top1(trainer, pl_module, features)
                self.points.append(LearningPoint(side, clock.seconds / 60, steps, steps * data.batch_size, accuracy))
        ours, theirs = self.points[-2:]
        rank_zero_info(
            f"{ours.minutes:.2f} of {self.seconds / 60:g} minutes: kNN {100 * ours.knn_top1:.1f} % after "
            f"{ours.images:,} images, lightly {100 * theirs.knn_top1:.1f} % after {theirs.images:,}"
        )


def _check(data: SSLDataModule) -> None:
    """Raise a UserError if the images are not what lightly's transforms and kNN need."""
    images = data.train_images
    if images is None:
        raise UserError("lightly's side needs images with random access, not a stream; give other --data.")
    if data.num_classes is None or not data.val_images:
        raise UserError("kNN needs labeled training and validation images; give --data with a folder for each class.")
    if images.channels != 3 or images.dtype != torch.uint8:
        raise UserError("lightly's transforms take color images of 8 bits; set --data.channels 3 or other --data.")
    if not isinstance(images, ImageArray) and not Path(images.name(0)).is_file():
        raise UserError("lightly's side takes image files or images in memory; set --data.in_memory true.")


def _knn_top1(trainer: Any, pl_module: Any, features: Callable[[Tensor], Tensor]) -> float:
    """The kNN accuracy of a network on the validation images."""
    data, network = trainer.datamodule, (features, int(pl_module.embed_dim))
    bank = plain_features(trainer, pl_module, data.train_labelled_dataloader(_BANK), network)
    images = plain_features(trainer, pl_module, data.val_dataloader(), network)
    known = images.labels >= 0
    predicted = knn_predict(bank.features, bank.labels, images.features[known], data.num_classes)
    return float((predicted == images.labels[known]).float().mean())


class _Lightly:
    """lightly's side: networks, images and the loop of its examples.

    Args:
        way: How lightly trains.
        method: Our method, untrained.
        data: The images.
        workers: Processes that load images.
        seconds: Training time, with which the learning rate falls.
        clock: Its clock.
        seed: Seed of weights and views.
    """

    def __init__(
        self,
        way: LightlyMethod,
        method: SSLModule,
        data: SSLDataModule,
        workers: int,
        seconds: float,
        clock: _Clock,
        seed: int,
    ) -> None:
        from lightly.transforms.utils import IMAGENET_NORMALIZE

        assert data.train_images is not None
        self.way, self.seconds, self.device = way, seconds, method.device
        self.randomness = _Randomness(seed)
        with self.randomness.in_use(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about lightly's use of torch
            self.parts, self.loss = way.compose(method, data.image_size)
            transform = way.transform(data.image_size)
        self.parts.to(self.device).train()
        parameters = [p for p in self.parts.parameters() if p.requires_grad]
        self.optimizer = way.optimizer(parameters, data.batch_size)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.loader: Any = DataLoader(
            TransformedImages(data.train_images, transform),
            data.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        self.clock, self.steps, self._batches = clock, 0, self._all_batches()
        prepared = (data.image_transform[key] for key in ("mean", "std"))
        own = (IMAGENET_NORMALIZE[key] for key in ("mean", "std"))
        self._normalizations = [torch.tensor(values, device=self.device)[:, None, None] for values in (*prepared, *own)]

    def _all_batches(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def features(self, images: Tensor) -> Tensor:
        """Features of images that were normalized for our side."""
        mean, std, own_mean, own_std = self._normalizations
        return self.parts["backbone"]((images * std + mean - own_mean) / own_std)

    def train(self, seconds: float) -> None:
        """Train until the clock shows a time."""
        with self.randomness.in_use(), torch.enable_grad():
            self.clock.start()
            while self.clock.seconds < seconds:
                views = [view.to(self.device) for view in next(self._batches)]
                self._set_rate(min(1.0, self.clock.seconds / self.seconds))
                self.loss(views).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.steps += 1
            self.clock.stop()

    def _set_rate(self, share: float) -> None:
        """Set the learning rate, given the share of the time that is over."""
        warmup = self.way.warmup
        factor = share / warmup if share < warmup else cosine(1.0, 0.0, (share - warmup) / (1 - warmup))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate


class _Randomness:
    """States of the global generators that belong to one side.

    Args:
        seed: What the generators start with.
    """

    def __init__(self, seed: int) -> None:
        with seeded(seed):
            self._states = _states()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the global generators these states, and afterwards those that they had."""
        others = _states()
        _set_states(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _set_states(others)


def _states() -> tuple[Any, ...]:
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpu  # noqa: NPY002


def _set_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])


# In words


def _differences(
    method: Any, way: LightlyMethod, data: SSLDataModule, optimizer: torch.optim.Optimizer, epochs: float | None
) -> dict[str, tuple[str, str]]:
    optim = method.optim
    settings = {
        name: method.hparams[name]
        for name in signature(type(method).__init__).parameters
        if name in method.hparams and name not in ("backbone", "backbone_kwargs", "optim")
    }
    peak = optimizer.param_groups[0]["lr"]
    ours = f"{optim.warmup_epochs:g} epochs" if epochs is None else f"{optim.warmup_epochs / epochs:.0%}"
    return {
        "loss and heads": (", ".join(f"{name} {value}" for name, value in settings.items()), way.settings),
        "views": (" and ".join(map(_view, data.view_specs)), way.views(data.image_size)),
        "optimizer": (f"{optim.name}, weight decay {optim.weight_decay:g}", way.optimizer_text),
        "highest learning rate": (f"{optim.peak_lr(data.batch_size):.3g}", f"{peak:.3g}"),
        "warm-up": (ours, f"{way.warmup:.0%}"),
        "first weights of the backbone": ("ours", "lightly's" if "decoder" in method.hparams else "the same"),
    }


def _view(spec: ViewSpec) -> str:
    names = ("flip", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize")
    operations = "".join(f", {name} {value:g}" for name in names if (value := getattr(spec, name)))
    return f"{spec.count} of {spec.size} px, area {spec.scale[0]:g} to {spec.scale[1]:g}{operations}"
