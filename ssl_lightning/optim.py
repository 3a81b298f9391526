"""The optimizer and schedule of a recipe as one small dataclass, its translation to torch objects, and clipping."""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ssl_lightning.backbones.tokens import layer_scale
from ssl_lightning.continued import Stages
from ssl_lightning.distributed import norms, shards
from ssl_lightning.errors import UserError
from ssl_lightning.lars import LARC, LARS
from ssl_lightning.ranges import check_ranges
from ssl_lightning.schedules import cosine


def clip_each(parameters: Iterable[Tensor], largest: float) -> None:
    """Clip the gradient of each parameter on its own, not of all together (DINO's released code).

    Args:
        parameters: Parameters without a gradient are skipped.
        largest: Largest norm of a gradient; 0 for no clipping.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if largest > 0 and gradients:
        factors = (largest / (norms(gradients) + 1e-6)).clamp(max=1)
        torch._foreach_mul_(shards(gradients), list(factors.unbind()))


def clip_together(parameters: Iterable[Tensor], largest: float) -> None:
    """Clip the gradient of several parameters by the norm of all together.

    Args:
        parameters: Parameters without a gradient are skipped.
        largest: Largest norm; 0 for no clipping.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if largest > 0 and gradients:
        torch._foreach_mul_(shards(gradients), (largest / (norms(gradients).norm() + 1e-6)).clamp(max=1))


def clip_parts(parts: Iterable[Iterable[Tensor]], largest: float) -> None:
    """Clip the gradient of each part of a method by its own norm (DINOv2's released code).

    Args:
        parts: The parameters of each part; parameters without a gradient are skipped.
        largest: Largest norm; 0 for no clipping.
    """
    for parameters in parts:
        clip_together(parameters, largest)


def by_layer(module: Any) -> Callable[[str], float]:
    """Learning-rate multiplier of a parameter of a method, given its name: its ViT has one for each layer (DINOv2).

    Args:
        module: Its ``backbone`` is a ViT; ``layer_decay`` and ``patch_embed_lr`` say how the rate falls.
    """
    blocks = len(module.backbone.blocks)
    return lambda name: layer_scale(name, blocks, module.layer_decay, module.patch_embed_lr)


def steps_per_epoch(trainer: L.Trainer) -> float:
    """Optimizer steps of an epoch, once the loader is there; infinite if it has no length.

    Args:
        trainer: The trainer of the training.
    """
    batches = trainer.num_training_batches
    return math.ceil(batches / trainer.accumulate_grad_batches) if batches < float("inf") else float("inf")


@dataclass(frozen=True)
class Optim:
    """Optimizer and learning-rate schedule of a recipe.

    Args:
        name: Optimizer: ``lars``, ``lars_simclr`` (the learning rate enters the momentum, as in SimCLR's code),
            ``larc`` (SwAV's variant), or any optimizer of torch.optim or timm, e.g. ``sgd``, ``adamw``, ``lamb``.
        base_lr: Learning rate before scaling.
        lr_scaling: How the peak learning rate follows from ``base_lr`` and the global batch size (over processes and
            accumulated batches): ``linear`` multiplies by batch / 256, ``sqrt`` by the square root of the batch,
            ``none`` by 1.
        weight_decay: Weight decay at the start.
        end_weight_decay: Weight decay at the end, reached along a cosine (DINO); None keeps it constant.
        decay_norm_and_bias: Whether tensors of fewer than two dimensions (biases, norms) are decayed too.
        momentum: Momentum; ignored by optimizers without it.
        warmup_epochs: Epochs of linear warm-up; the learning rate rises at every optimizer step.
        warmup_start_factor: Learning rate of the first warm-up step, as a share of the peak.
        warmup_inclusive: Whether the last warm-up step already has the peak learning rate (SwAV, DINO), not the next.
        end_lr_factor: Learning rate at the end, as a share of the peak; a cosine leads there.
        cosine_from_start: Whether the cosine counts from the first step, so that the warm-up takes the place of its
            beginning (timm), instead of from the end of the warm-up.
        decay_start: When the cosine begins; until then the learning rate stays at the peak (warm-up, stable, decay): an
            epoch, or below 1 a share of the training. None is the end of the warm-up.
        cosine_share: Share of that cosine that is run; with less than 1 the learning rate ends higher (CAPI).
        milestones: Shares of the training, from 0 to 1, after which the learning rate is multiplied by ``step_factor``;
            they replace the cosine.
        step_factor: Multiplies the learning rate at each milestone.
        per_epoch: Whether the cosine advances once per epoch (MoCo v2) instead of at every optimizer step.
        norm_and_bias_lr_scale: Learning-rate multiplier for tensors of fewer than two dimensions: biases and norms
            (Barlow Twins).
        part_lr_scale: Learning-rate multiplier of parts of the method, e.g. ``{predictor: 10}`` (BYOL, appendix on the
            importance of a near-optimal predictor).
        constant_lr: Parts of the method whose learning rate stays at the peak, without warm-up or schedule, e.g.
            ``[predictor]`` (SimSiam).
        extra: Further arguments of the optimizer, e.g. ``{betas: [0.9, 0.95]}``.
    """

    name: str = "lars"
    base_lr: float = 0.3
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    weight_decay: float = 1e-6
    end_weight_decay: float | None = None
    decay_norm_and_bias: bool = False
    momentum: float = 0.9
    warmup_epochs: float = 10.0
    warmup_start_factor: float = 0.0
    warmup_inclusive: bool = False
    end_lr_factor: float = 0.0
    cosine_from_start: bool = False
    decay_start: float | None = None
    cosine_share: float = 1.0
    milestones: tuple[float, ...] = ()
    step_factor: float = 0.1
    per_epoch: bool = False
    norm_and_bias_lr_scale: float = 1.0
    part_lr_scale: dict[str, float] = field(default_factory=dict)
    constant_lr: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Reject impossible values.

        Raises:
            UserError: A number is out of range, or the schedule has no cosine that could begin at ``decay_start``.
        """
        check_ranges("model.optim", vars(self))
        if not all(0 <= milestone <= 1 for milestone in self.milestones):
            raise UserError(
                f"--model.optim.milestones {list(self.milestones)}: give shares of the training from 0 to 1."
            )
        if self.decay_start is None:
            return
        if not self.decay_start >= 0:
            raise UserError(f"--model.optim.decay_start {self.decay_start}: give an epoch, or a share below 1.")
        if self.milestones or self.cosine_from_start:
            other = "milestones to []" if self.milestones else "cosine_from_start to false"
            raise UserError(f"--model.optim.decay_start says when the cosine begins; set --model.optim.{other}.")

    def peak_lr(self, global_batch: int) -> float:
        """Learning rate after warm-up.

        Args:
            global_batch: Images per optimizer step over all processes and accumulated batches.
        """
        factor = {"linear": global_batch / 256, "sqrt": global_batch**0.5, "none": 1.0}
        return self.base_lr * factor[self.lr_scaling]

    def lr_factor(self, step: int, total_steps: int, steps_per_epoch: float, held: int = 0) -> float:
        """Learning rate of a step, as a share of the peak.

        Args:
            step: Optimizer steps done so far.
            total_steps: Optimizer steps of the whole training.
            steps_per_epoch: Optimizer steps of an epoch.
            held: Steps at the start after which the cosine begins, if they are more than the warm-up's.
        """
        warmup_steps = self.warmup_steps(total_steps, steps_per_epoch)
        if self.per_epoch and step >= warmup_steps:
            step = max(warmup_steps, int(step // steps_per_epoch * steps_per_epoch))
        if step < warmup_steps:
            share = step / max(1, warmup_steps - self.warmup_inclusive)
            return self.warmup_start_factor + (1 - self.warmup_start_factor) * share
        if self.milestones:
            return self.step_factor ** sum(step >= round(share * total_steps) for share in self.milestones)
        begin = 0 if self.cosine_from_start and not held else max(warmup_steps, held)
        if self.decay_start is not None:
            length = total_steps if self.decay_start < 1 else steps_per_epoch
            begin = max(begin, round(self.decay_start * length))
        progress = self.cosine_share * (step - begin) / max(1, total_steps - begin)
        return cosine(1.0, self.end_lr_factor, progress)

    def warmup_steps(self, total_steps: float, steps_per_epoch: float) -> int:
        """Optimizer steps of the warm-up.

        Args:
            total_steps: Optimizer steps of the whole training.
            steps_per_epoch: Optimizer steps of an epoch.
        """
        return round(min(total_steps, self.warmup_epochs * steps_per_epoch)) if self.warmup_epochs else 0

    def set_weight_decay(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Set the weight decay of the decayed parameters, where it follows a schedule; 0 while they wait.

        Args:
            optimizer: What ``create`` built.
            progress: Share of the optimizer steps done.
        """
        for group in optimizer.param_groups:
            waits = group.get("waits", False)  # older checkpoints and other optimizers do not say
            if group.get("decayed", False) and (self.end_weight_decay is not None or waits):
                decay = group.get("decay_scale", 1.0) * self.weight_decay_at(progress)
                group["weight_decay"] = 0.0 if waits and group["lr"] == 0.0 else decay

    def weight_decay_at(self, progress: float) -> float:
        """Weight decay of the decayed parameters.

        Args:
            progress: Share of the optimizer steps done.
        """
        end = self.weight_decay if self.end_weight_decay is None else self.end_weight_decay
        return cosine(self.weight_decay, end, progress)

    def create(
        self, module: nn.Module, global_batch: int, lr_scale: Callable[[str], float] | None = None
    ) -> torch.optim.Optimizer:
        """Build the optimizer over the trainable parameters of a module, grouped by weight decay and learning rate.

        Args:
            module: The method; parameters named in its ``undecayed`` get no weight decay, and its ``continued`` says
                which parameters wait for the others.
            global_batch: Images per optimizer step over all processes and accumulated batches.
            lr_scale: Learning-rate multiplier for a parameter, given its name. None means 1 for every parameter.

        Raises:
            UserError: The name is unknown, the optimizer refuses an argument, or an option names an unknown part.
        """
        parts = [name for name, _ in module.named_children()]
        for option, named in {"constant_lr": self.constant_lr, "part_lr_scale": self.part_lr_scale}.items():
            if unknown := set(named) - set(parts):
                raise UserError(
                    f"--model.optim.{option}: no part {', '.join(unknown)}; choose from {', '.join(parts)}."
                )
        undecayed: tuple[str, ...] = getattr(module, "undecayed", ())
        continued: Any = getattr(module, "continued", None)
        joining: dict[str, int] = {} if continued is None else continued.joining(module)
        lr_scale = lr_scale if continued is None else continued.lr_scale(module, lr_scale)
        groups: dict[tuple[bool, float, bool, int], list[Tensor]] = {}
        for name, p in module.named_parameters():
            if p.requires_grad:
                decayed = (p.ndim > 1 and name.rpartition(".")[2] not in undecayed) or self.decay_norm_and_bias
                part = name.partition(".")[0]
                scale = (1.0 if p.ndim > 1 else self.norm_and_bias_lr_scale) * self.part_lr_scale.get(part, 1.0)
                scale *= lr_scale(name) if lr_scale else 1.0
                scheduled = part not in self.constant_lr
                groups.setdefault((decayed, scale, scheduled, joining.get(name, 0)), []).append(p)
        return self.build(
            [
                {
                    "params": groups[decayed, scale, scheduled, waits],
                    "weight_decay": self.weight_decay if decayed else 0.0,
                    "decayed": decayed,
                    "lr_scale": scale,
                    "scheduled": scheduled,
                    "waits": waits,
                }
                for decayed, scale, scheduled, waits in sorted(groups, reverse=True)
            ],
            global_batch,
        )

    def build(self, groups: list[dict[str, Any]], global_batch: int) -> torch.optim.Optimizer:
        """Build the optimizer over groups of parameters.

        Args:
            groups: Each has ``params`` and ``weight_decay``; optionally ``lr_scale``, a learning-rate multiplier, and
                ``scheduled``, False for a constant learning rate.
            global_batch: As for ``create``.

        Raises:
            UserError: As for ``create``.
        """
        build = _optimizer_class(self.name)
        peak = self.peak_lr(global_batch)
        arguments = {"lr": peak, **self.extra}
        groups = [{**group, "lr": peak * group.get("lr_scale", 1.0)} for group in groups if group["params"]]
        if "momentum" in inspect.signature(build).parameters:
            arguments.setdefault("momentum", self.momentum)
        if not arguments.keys() & {"foreach", "fused"}:  # all parameters in a handful of calls that do not wait
            if build in (torch.optim.Adam, torch.optim.AdamW):
                arguments["fused"] = True
            elif build is torch.optim.SGD:  # its fused version fails if a parameter was frozen at first
                arguments["foreach"] = True
        try:
            optimizer = build(groups, **arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer {self.name!r} refuses {arguments}: {error}; see --model.optim.extra") from error
        optimizer._step_supports_amp_scaling = False  # fused ones would unscale 16-mixed gradients after the clipping
        return optimizer

    def configure(
        self,
        module: L.LightningModule,
        create: Callable[[int], torch.optim.Optimizer] | None = None,
        lr_scale: Callable[[str], float] | None = None,
    ) -> Any:
        """Optimizer and schedule of a training, for the global batch over processes and accumulated batches.

        Args:
            module: The module that its trainer trains.
            create: Builds the optimizer for a global batch size; None uses this recipe's ``create``.
            lr_scale: As for ``create``.

        Returns:
            What ``configure_optimizers`` returns.

        Raises:
            UserError: The schedule needs the loader's length, and the loader has none.
        """
        trainer: Any = module.trainer
        trainer.fit_loop.setup_data()  # Lightning itself would do so later
        total_steps = trainer.estimated_stepping_batches
        source = trainer.datamodule or trainer.train_dataloader
        batch_size = getattr(source, "batch_size", None)
        if batch_size is None and self.lr_scaling != "none":
            rank_zero_warn("the loader has no batch_size to scale the learning rate with; assuming 256 images.")
        global_batch = (batch_size or 256) * trainer.world_size * trainer.accumulate_grad_batches
        optimizer = self.create(module, global_batch, lr_scale) if create is None else create(global_batch)
        if total_steps < 0:
            raise UserError("the loader has no length to plan the schedules by; set --trainer.max_steps.")
        continued = getattr(module, "continued", None)
        endless = total_steps == float("inf")  # such a run has no end to anneal to
        if endless and continued is None:
            return {"optimizer": optimizer}
        stages = Stages(0, 0, 0) if continued is None else continued.stages(total_steps)
        steps = steps_per_epoch(trainer)
        if steps == float("inf") and not endless:
            if self.warmup_epochs > 0 or self.per_epoch or (self.decay_start or 0) >= 1:
                raise UserError(
                    "the loader has no length to count epochs by; set --model.optim.warmup_epochs "
                    "to 0, --model.optim.per_epoch to false, and --model.optim.decay_start to a share below 1 or null."
                )
            steps = total_steps

        def factor_of(scheduled: bool, waits: int) -> Callable[[int], float]:
            def factor(step: int) -> float:
                multiplier = stages.multiplier(waits, step)
                if continued is not None and not waits and step < stages.frozen:
                    multiplier = continued.heads_lr
                if continued is not None and step >= stages.before_all:
                    multiplier *= continued.all_lr
                if not scheduled or endless:
                    return multiplier
                if waits and stages.end:  # the ramp is its warm-up
                    step = max(step, self.warmup_steps(total_steps, steps))
                return multiplier * self.lr_factor(step, int(total_steps), steps, stages.end)

            return factor

        groups = optimizer.param_groups
        factors = [factor_of(group.get("scheduled", True), group.get("waits", 0)) for group in groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


torch.serialization.add_safe_globals([Optim])  # a subclass may save it among its hyper-parameters


def _optimizer_class(name: str) -> Any:
    ours = {"lars": LARS, "larc": LARC, "lars_simclr": functools.partial(LARS, lr_in_momentum=True)}
    if name.lower() in ours:
        return ours[name.lower()]
    from timm.optim import get_optimizer_class, list_optimizers

    from ssl_lightning.muon import Muon

    torch_optimizers = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    torch_optimizers.pop("muon", None)  # it refuses convolutions, norms and biases; timm's does not
    if name.lower() in torch_optimizers:
        return torch_optimizers[name.lower()]
    if name.lower() in list_optimizers():
        found: Any = get_optimizer_class(name.lower(), bind_defaults=True)
        is_muon = getattr(found, "func", found) is Muon.__base__
        return functools.partial(Muon, **getattr(found, "keywords", {})) if is_muon else found
    near = difflib.get_close_matches(name.lower(), {*ours, *torch_optimizers, *map(str, list_optimizers())}, n=5)
    hint = f"did you mean {', '.join(near)}?" if near else "see torch.optim and timm.optim.list_optimizers()."
    raise UserError(f"unknown optimizer {name!r}; {hint}")
