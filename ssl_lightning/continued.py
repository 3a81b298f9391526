"""Going on with the weights of another training: what waits, and for how long."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import lightning as L
from torch import nn

from ssl_lightning.backbones.tokens import layer_scale
from ssl_lightning.backbones.trainable import last_parts, of_first_layer
from ssl_lightning.errors import UserError
from ssl_lightning.schedules import ramp_after


class Stages(NamedTuple):
    """How many optimizer steps each stage takes.

    Args:
        frozen: Only the heads train.
        last_blocks: The last blocks train, too.
        ramp: The rate of what joins rises; for the last blocks these steps are the first of theirs.
    """

    frozen: int
    last_blocks: int
    ramp: int

    @property
    def before_all(self) -> int:
        """Steps before all of the backbone trains."""
        return self.frozen + self.last_blocks

    @property
    def end(self) -> int:
        """Steps after which all of it has its own rate."""
        return self.before_all + self.ramp

    def multiplier(self, stage: int, step: int) -> float:
        """What the rate of a parameter is multiplied with.

        Args:
            stage: When it joins: 0 at the first step, 1 with the last blocks, or if there are none with the backbone,
                2 with the remaining backbone.
            step: Optimizer steps done.
        """
        return ramp_after(step, (0, self.frozen, self.before_all)[stage], self.ramp)


@dataclass(frozen=True)
class Continued:
    """A training that goes on from a good backbone: the heads learn first, then the backbone joins slowly.

    As FINO does it, https://arxiv.org/abs/2606.05107. At first the backbone has a learning
    rate and a weight decay of 0, and its BatchNorm keeps its statistics: it does not change by a bit, nor does its
    teacher. Then its rate rises along a line, and the cosine of ``optim`` begins only after that. With
    ``last_blocks``, the last blocks of a ViT join first, and the rest of it later.

    Args:
        frozen_steps: Optimizer steps in which only the heads learn; 0 for none, and no ramp. None is a tenth of the
            training, at least 1,000 and at most 40 % of it.
        ramp_steps: Optimizer steps in which the rate of the backbone then rises to its own. None is 4 % of the
            training, at least 100.
        train_patch_embed: Whether the patch projection, or the first convolution, learns from the first step: for
            images of other channels than the weights are for. ``trainable`` does not freeze it then.
        last_blocks: Number of last blocks, with the norm after them, that join before the rest of a ViT. None lets all
            of the backbone join at once.
        last_blocks_steps: Optimizer steps between the two. None is half of ``frozen_steps``.
        all_lr: Learning-rate multiplier of everything, also the heads, once all of the backbone trains.
        layer_decay: Learning rate of each block of a ViT, as a share of the next block's rate. None is the method's
            own, or 0.9.
        patch_embed_lr: Further multiplier of the learning rate of the patch projection. None is the method's own, or
            0.2.
        heads_lr: Learning-rate multiplier of the heads while the backbone waits, e.g. 10 if that is short.
    """

    frozen_steps: int | None = None
    ramp_steps: int | None = None
    train_patch_embed: bool = False
    last_blocks: int | None = None
    last_blocks_steps: int | None = None
    all_lr: float = 1.0
    layer_decay: float | None = None
    patch_embed_lr: float | None = None
    heads_lr: float = 1.0

    def __post_init__(self) -> None:
        """Reject impossible values.

        Raises:
            UserError: A number of steps or blocks, or a multiplier, is too small.
        """
        for field in fields(self):
            value, least = getattr(self, field.name), 1 if field.name == "last_blocks" else 0
            if value is not None and not value >= least:
                raise UserError(f"--model.continued.{field.name} {value} must be at least {least}.")

    def stages(self, total_steps: float) -> Stages:
        """The lengths of the stages.

        Args:
            total_steps: Optimizer steps of the training; infinite if it has no end.

        Raises:
            UserError: They do not fit the training.
        """
        frozen, between, ramp = self.frozen_steps, self.last_blocks_steps, self.ramp_steps
        if total_steps == float("inf") and (frozen is None or ramp is None):
            raise UserError(
                "this training has no end to take shares of; set --model.continued.frozen_steps and "
                "--model.continued.ramp_steps, or --trainer.max_steps."
            )
        if frozen is None:
            frozen = round(min(max(1000, 0.1 * total_steps), 0.4 * total_steps))
        if self.last_blocks is None:
            between = 0
        elif between is None:
            between = frozen // 2
        if frozen + between >= total_steps:
            steps = f"--model.continued.frozen_steps {frozen:,}"
            if between:
                steps += f" and --model.continued.last_blocks_steps {between:,}"
            raise UserError(
                f"{steps}: the training has {total_steps:,.0f} steps, so its backbone would never train"
                f"{' as a whole' if between else ''}; lower {'them' if between else 'it'}, or raise "
                "--trainer.max_epochs."
            )
        if ramp is None:
            ramp = round(min(max(100, 0.04 * total_steps), total_steps - frozen - between))
        return Stages(frozen, between, ramp if frozen + between else 0)

    def joining(self, module: Any) -> dict[str, int]:
        """Stages in which the parameters of a method that wait join, by name: 1, or 2 for those after the last blocks.

        Args:
            module: The method.

        Raises:
            UserError: The backbone has fewer blocks.
        """
        first = of_first_layer(module.backbone) if self.train_patch_embed else set()
        names = [name for name, _ in module.backbone.named_parameters() if name not in first]
        if self.last_blocks is None:
            return {f"backbone.{name}": 1 for name in names}
        parts = last_parts(module.backbone, self.last_blocks, "--model.continued.last_blocks")
        last = {id(p) for part in parts for p in part.parameters()}
        parameters = dict(module.backbone.named_parameters())
        return {f"backbone.{name}": 1 if id(parameters[name]) in last else 2 for name in names}

    def lr_scale(self, module: Any, own: Callable[[str], float] | None) -> Callable[[str], float]:
        """Learning-rate multiplier of a parameter, given its name.

        Args:
            module: The method.
            own: The method's own multiplier of each parameter; None if it has none.
        """
        layer_decay, patch_embed_lr = (
            getattr(module, name, default) if value is None else value
            for name, value, default in (
                ("layer_decay", self.layer_decay, 0.9),
                ("patch_embed_lr", self.patch_embed_lr, 0.2),
            )
        )
        blocks = len(getattr(module.backbone, "blocks", ()))

        def scale(name: str) -> float:
            if not name.startswith("backbone."):
                return own(name) if own else 1.0
            return layer_scale(name, blocks, layer_decay if blocks else 1.0, patch_embed_lr)

        return scale


class Continuation(L.Callback):
    """Keeps the statistics of BatchNorm in backbone and teacher while any of the backbone waits."""

    def __init__(self) -> None:
        self._frozen, self._still = 0, False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look up how long it waits.

        Raises:
            UserError: The optimizer knows nothing of it.
        """
        if pl_module.continued is None:
            return
        if not any(group.get("waits", False) for optimizer in trainer.optimizers for group in optimizer.param_groups):
            raise UserError(
                f"{type(pl_module).__name__}.configure_optimizers must return self.optim.configure(self) for "
                "--model.continued."
            )
        self._frozen = pl_module.continued.stages(trainer.estimated_stepping_batches).before_all

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the mode of BatchNorm; once the backbone trains, it gets the mode of its network back."""
        still, before = trainer.global_step < self._frozen, self._still
        self._still = still
        for name, part in pl_module.named_children() if still or before else ():
            for layer in part.modules() if name.endswith("backbone") else ():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.train(part.training and not still)


def what_trains(module: Any, total_steps: float) -> dict[str, str]:
    """What trains and when, in words, where that is not everything from the first step.

    Args:
        module: The method.
        total_steps: Optimizer steps of the training.
    """
    rows = {}
    if getattr(module, "trainable", None) is not None:
        parameters = [*module.backbone.parameters()]
        learning = sum(p.numel() for p in parameters if p.requires_grad)
        share = learning / sum(p.numel() for p in parameters)
        rows["trains"] = f"{learning:,} parameters of the backbone, {share:.1%}, and the heads"
    if getattr(module, "continued", None) is not None:
        stages = module.continued.stages(total_steps)
        first = "the heads and the first layer" if module.continued.train_patch_embed else "the heads"
        parts = [f"{first} for {stages.frozen:,} steps"] if stages.frozen else []
        if stages.last_blocks:
            blocks = f"{module.continued.last_blocks} block{'s' * (module.continued.last_blocks != 1)}"
            parts.append(f"the last {blocks} for {stages.last_blocks:,}")
        parts.append(f"the backbone, its rate rising for {stages.ramp:,}")
        rows["stages"] = ", then ".join(parts) if stages.end else "everything from the first step"
    return rows
