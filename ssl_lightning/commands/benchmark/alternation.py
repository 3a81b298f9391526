"""Two trainings that take turns, ours and lightly's, each with a clock and random numbers of its own."""

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_lightning.backbones.whitened import Whitening
from ssl_lightning.callbacks.features import in_eval_mode, plain_features
from ssl_lightning.commands.benchmark.learning_result import LearningPoint, Side
from ssl_lightning.commands.benchmark.lightly_learning import LightlyMethod
from ssl_lightning.commands.benchmark.transformed_images import TransformedImages
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.images import ImageArray
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation import knn_predict
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.schedules import cosine
from ssl_lightning.seeding import seeded

_EVALUATIONS, _TURNS = 8, 5
"""Evaluations after the first, of untrained networks; and how often both sides train between two evaluations."""
_BANK = 10_000
"""Most training images that kNN searches."""
UNPLANNED = 10**9
"""Planned steps before the first step has shown how long it takes."""


class Clock:
    """Adds up the time between ``start`` and ``stop``.

    Args:
        processor: Whether to count processor time instead of wall-clock time.
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


class Alternation(L.Callback):
    """Lets lightly and the training that this callback belongs to take turns, and evaluates both at equal intervals.

    Args:
        way: How lightly trains.
        seconds: Training time of each side.
        epochs: See ``learning``.
        processor: Whether the clocks count processor time.
        seed: Seed of lightly's weights and views.
    """

    def __init__(self, way: LightlyMethod, seconds: float, epochs: float | None, processor: bool, seed: int) -> None:
        self.way, self.seconds, self.epochs, self.processor, self.seed = way, seconds, epochs, processor, seed
        self.clock, self.turns = Clock(processor), 0
        self.points: list[LearningPoint] = []
        self.lightly: LightlySide

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Build lightly's side, once our weights are what they start from, and evaluate both untrained."""
        if trainer.global_step > 0:
            return
        data = trainer.datamodule
        workers = trainer.train_dataloader.num_workers
        _check(data)
        if self.processor and workers > 0:
            raise UserError("--clock processor does not see workers; set --data.num_workers 0.")
        self.optim = pl_module.optim
        clock, in_precision = Clock(self.processor), trainer.precision_plugin.train_step_context
        self.lightly = LightlySide(self.way, pl_module, data, workers, self.seconds, clock, self.seed, in_precision)
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
        networks: dict[Side, tuple[Any, Callable[[Tensor], Tensor], Clock, int]] = {
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


class LightlySide:
    """lightly's side: networks, images and the loop of its examples.

    Args:
        way: How lightly trains.
        method: Our method, untrained.
        data: The images.
        workers: Processes that load images.
        seconds: Training time, with which the learning rate falls.
        clock: Its clock.
        seed: Seed of weights and views.
        in_precision: Context in which the loss is computed in the precision of both sides.
    """

    def __init__(
        self,
        way: LightlyMethod,
        method: SSLModule,
        data: SSLDataModule,
        workers: int,
        seconds: float,
        clock: Clock,
        seed: int,
        in_precision: Callable[[], AbstractContextManager[Any]],
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
        self.clock, self.steps, self._batches, self._in_precision = clock, 0, self._all_batches(), in_precision
        self._whiten()
        prepared = (data.image_transform[key] for key in ("mean", "std"))
        own = (IMAGENET_NORMALIZE[key] for key in ("mean", "std"))
        self._normalizations = [torch.tensor(values, device=self.device)[:, None, None] for values in (*prepared, *own)]

    def _all_batches(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def _whiten(self) -> None:
        """Compute the frozen whitening layers from lightly's views; the copied layers were computed from ours."""
        layers = [part for part in self.parts.modules() if isinstance(part, Whitening)]
        if layers:
            with self.randomness.in_use():
                images = next(self._batches)[0].to(self.device)
            for layer in layers:
                layer.whitened.fill_(False)
                layer.begin_with_images(images)

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
                with self._in_precision():
                    loss = self.loss(views)
                loss.backward()
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
