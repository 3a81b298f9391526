"""The benchmark ``step``: our training step, the passes that no step can avoid, and lightly's step."""

import copy
import inspect
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from json import dumps
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import ssl_lightning
from ssl_lightning.commands.benchmark.counter import OperationCounter
from ssl_lightning.commands.benchmark.lightly_step import lightly_step
from ssl_lightning.data.views import resolve
from ssl_lightning.errors import UserError
from ssl_lightning.machine import device_name
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.mistakes import did_you_mean

_WARM_UP = 2
_LATER: dict[str, dict[str, Any]] = {"SwAV": {"freeze_prototypes_steps": 0}, "DINO": {"freeze_last_layer": 0}}
"""Arguments that make the first steps cost as much as all later ones."""


@dataclass(frozen=True)
class StepCost:
    """The cost of a step.

    Args:
        ms: Median milliseconds; on the CPU of processor time, which other programs disturb less.
        operations: Operations that the host dispatches.
        synchronisations: Operations that make the host wait for a device; see ``OperationCounter``.
        peak_bytes: Largest total size of the tensors of the step: activations, gradients, temporary tensors.
    """

    ms: float
    operations: int
    synchronisations: int
    peak_bytes: int


@dataclass(frozen=True)
class StepResult:
    """What ``step`` measured."""

    model: str
    backbone: str
    sizes: list[int]
    batch_size: int
    device: str
    ours: StepCost
    bare: StepCost
    lightly: StepCost | None

    @property
    def ratios(self) -> dict[str, float]:
        """Ratios: our time to the bare passes', lightly's time to ours, our operations and memory to lightly's."""
        ratios = {"bare_ratio": self.ours.ms / self.bare.ms}
        if self.lightly:
            ratios["lightly_ratio"] = self.lightly.ms / self.ours.ms
            ratios["operations_ratio"] = self.ours.operations / self.lightly.operations
            ratios["memory_ratio"] = self.ours.peak_bytes / self.lightly.peak_bytes
        return ratios

    @property
    def json(self) -> str:
        """All numbers and ratios as JSON."""
        return dumps({**asdict(self), **self.ratios})

    def __str__(self) -> str:
        rows = [["", "ms/step", "x ours", "x bare", "operations", "syncs", "peak MB"]]
        for name, cost in {"ours": self.ours, "bare passes": self.bare, "lightly": self.lightly}.items():
            if cost is not None:
                ratios = [f"{cost.ms / other.ms:.3f}" for other in (self.ours, self.bare)]
                counts = [f"{cost.operations:,}", f"{cost.synchronisations:,}", f"{cost.peak_bytes / 1e6:,.1f}"]
                rows.append([name, f"{cost.ms:,.1f}", *ratios, *counts])
        sizes = ", ".join(f"{self.sizes.count(size)} x {size} px" for size in sorted(set(self.sizes), reverse=True))
        lines = [f"{self.model} with {self.backbone}, views of {sizes}, batches of {self.batch_size}, {self.device}"]
        lines += [f"{row[0]:12}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows]
        return "\n".join(lines)


def step(
    model: str = "SimCLR",
    backbone: str | None = None,
    image_size: int = 224,
    batch_size: int = 32,
    steps: int = 10,
    model_kwargs: dict[str, Any] | None = None,
) -> StepResult:
    """Compare the training step with its bare forward and backward passes, and with lightly's step.

    The three take turns on the same random views, which have the sizes of the method's augmentation. Our step is all
    that Lightning does from batch to batch: loss, backward pass, optimizer, teacher. The bare passes run the same
    modules on the same inputs, without loss, optimizer and teacher update. lightly's step uses its heads, loss and
    optimizer as in its examples, on the same backbone.

    Args:
        model: Name of the method.
        backbone: Name of a timm or torchvision model; None takes the method's default.
        image_size: Side of the full-size views in pixels.
        batch_size: Images per batch.
        steps: Number of timed steps of each kind; the median is reported.
        model_kwargs: Further arguments of the method, e.g. ``{"queue_length": 4096}``; or each as an option,
            ``--model.queue_length 4096``.

    Raises:
        UserError: No method has that name.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = _method(model, {**({"backbone": backbone} if backbone else {}), **(model_kwargs or {})}).to(device)
    sizes = [spec.size for spec in resolve(method.views, image_size) for _ in range(spec.count)]
    views = [torch.rand(batch_size, 3, size, size, device=device) for size in sizes]
    turns = _Turns(views, steps)
    turns.add("bare", *_bare_passes(copy.deepcopy(method), views))
    if (composed := lightly_step(method, views)) is not None:
        turns.add("lightly", *composed)
    turns.add("ours", None, [*method.parameters()])
    with _quiet():
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(method, turns)
    return StepResult(
        model=model,
        backbone=method.hparams["backbone"],
        sizes=sizes,
        batch_size=batch_size,
        device=device_name(device),
        ours=turns.cost("ours"),
        bare=turns.cost("bare"),
        lightly=turns.cost("lightly") if composed else None,
    )


def _method(name: str, arguments: dict[str, Any]) -> SSLModule:
    methods = {
        key: value
        for key, value in vars(ssl_lightning).items()
        if inspect.isclass(value) and issubclass(value, SSLModule) and value is not SSLModule
    }
    if name not in methods:
        hint = did_you_mean(name, methods)
        raise UserError(f"--model {name}: no such method; {hint}Choose from {', '.join(methods)}.")
    return methods[name](**{**_LATER.get(name, {}), **arguments})


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _bare_passes(method: SSLModule, views: Sequence[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
    """A function that repeats the loss's calls of modules, with a backward pass from their mean outputs."""
    calls: list[tuple[nn.Module, Any, Any, bool]] = []
    inside: list[nn.Module] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not inside:
            calls.append((module, tree_map(_as_leaf, args), tree_map(_as_leaf, kwargs), torch.is_grad_enabled()))
        inside.append(module)

    def leave(*_: Any) -> None:
        inside.pop()

    hooks: list[Any] = []
    for module in method.modules():
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave))
    method.training_loss(views)
    for hook in hooks:
        hook.remove()
    inputs = [leaf for call in calls for leaf in tree_leaves(call[1:3]) if isinstance(leaf, Tensor)]
    learning = [*method.parameters(), *(leaf for leaf in inputs if leaf.requires_grad)]

    def passes() -> None:
        outputs = []
        for module, args, kwargs, with_gradient in calls:
            with torch.set_grad_enabled(with_gradient):
                outputs.append(module(*args, **kwargs))
        means = [output.mean() for output in outputs if output.requires_grad]
        torch.autograd.backward(means)
        for tensor in learning:
            tensor.grad = None

    return passes, learning


def _as_leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


class _Turns:
    """The loader of our training run: before each batch, the others take their step.

    So Lightning itself drives our step, and the time from one batch to the next covers all of it.
    """

    def __init__(self, views: list[Tensor], steps: int) -> None:
        self.batch = (views, torch.zeros(len(views[0]), dtype=torch.long, device=views[0].device))
        self.batch_size = len(views[0])  # to scale the learning rate by
        self.steps = steps
        self.run: dict[str, Callable[[], None] | None] = {}
        self.parameters: dict[str, list[Tensor]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.costs: dict[str, tuple[int, int, int]] = {}

    def add(self, name: str, run: Callable[[], None] | None, parameters: list[Tensor]) -> None:
        """Add a participant that takes turns; None stands for the training run that asks for batches."""
        self.run[name], self.parameters[name], self.seconds[name] = run, parameters, []

    def __len__(self) -> int:
        return _WARM_UP + 1 + self.steps + 1  # the last of ours is not measured: nobody asks for another batch

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self) - 1):
            for name, run in self.run.items():
                with self._counted(name) if index == _WARM_UP else self._timed(name):
                    if run is None:
                        yield self.batch
                    else:
                        run()
        yield self.batch

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = _now()
        yield
        self.seconds[name].append(_now() - start)

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        gradients = [p.grad for p in self.parameters[name] if p.grad is not None]  # held until the step drops them
        on_gpu = self.batch[1].is_cuda
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() - sum(gradient.nbytes for gradient in gradients)
        counter = OperationCounter(gradients)
        del gradients
        with counter:
            yield
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else counter.peak_bytes
        self.costs[name] = (counter.counts.total(), counter.synchronisations.total(), peak)

    def cost(self, name: str) -> StepCost:
        """The cost of a step."""
        return StepCost(1000 * statistics.median(self.seconds[name][_WARM_UP:]), *self.costs[name])


def _now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
