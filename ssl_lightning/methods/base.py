"""SSLModule: what all methods share."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ssl_lightning.errors import UserError
from ssl_lightning.optim import Optim
from ssl_lightning.schedules import warmup_cosine


class SSLModule(L.LightningModule):
    """Base of all methods: subclass it and write ``training_loss``.

    It builds the backbone, the optimizer with its schedule, and hands the features of the training forward to the
    probes. ``SimCLR`` is the example to read.

    Args:
        backbone: Name of a timm or torchvision model, e.g. resnet50, resnet18_cifar, vit_small_patch16_224.
        backbone_kwargs: Arguments of the backbone's builder, e.g. ``{img_size: 96}``.
        optim: Optimizer and learning-rate schedule.
    """

    views: Any = "simclr"
    """The paper's augmentation: the name of a preset, or a sequence of ViewSpecs. The data module reads it."""

    embed_dim: int
    """Width of the features that ``forward`` gives."""

    def __init__(
        self, backbone: str = "resnet50", backbone_kwargs: dict[str, Any] | None = None, optim: Optim = Optim()
    ) -> None:
        from ssl_lightning.backbones import create_backbone  # only here: reading help texts should not wait for timm

        super().__init__()
        self.optim = Optim(**optim) if isinstance(optim, dict) else optim  # a checkpoint holds a dict
        self.save_hyperparameters(ignore=["optim"])
        self.save_hyperparameters({"optim": asdict(self.optim)})
        self.backbone = create_backbone(backbone, **(backbone_kwargs or {}))
        self.backbone.to(memory_format=torch.channels_last)
        self.embed_dim = int(self.backbone.num_features)  # type: ignore[arg-type]
        self._pending_losses: list[tuple[Tensor, torch.Event | None]] = []

    # The contract of a method

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """The loss of a batch: the one method a subclass writes.

        Args:
            views: One ``(B, 3, S, S)`` tensor per view, global crops first.

        Returns:
            Scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} must define training_loss(views)")

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, embed_dim)`` of images ``(B, 3, S, S)``, from the branch that the paper evaluates."""
        return self.evaluated_backbone(images)

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The backbone that the paper evaluates: the probes read its features."""
        return self.backbone

    def update_teacher(self) -> None:
        """Move the teacher, if there is one; called once after each optimizer step."""

    @property
    def chance_loss(self) -> float | None:
        """The loss of a model that has learnt nothing, or None where there is no such value."""
        return None

    @property
    def progress(self) -> float:
        """Optimizer steps done, as a share of those planned, in [0, 1]; 0 outside a training."""
        if self._trainer is None:
            return 0.0
        planned = self.trainer.estimated_stepping_batches
        return min(1.0, self.trainer.global_step / max(1, planned))

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Loss of a batch, and the features that the probes learn from.

        Args:
            batch: ``(views, labels, ...)``; the labels are not looked at.
            batch_idx: Unused.
        """
        views = batch[0]
        with self._recording() as features:
            loss = self.training_loss(views)
        self._pending_losses.append(_to_host(loss.detach().float()))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(views[0]))
        return {"loss": loss, "features": features[0] if features else None}

    @contextmanager
    def _recording(self) -> Iterator[list[Tensor]]:
        """Record the detached features of the evaluated backbone, so that probes need no forward of their own."""
        features: list[Tensor] = []
        hook = self.evaluated_backbone.register_forward_hook(
            lambda _module, _inputs, output: features.append(output.detach()) if not features else None
        )
        try:
            yield features
        finally:
            hook.remove()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop at a loss that is not finite, before it reaches the weights.

        Raises:
            UserError: The loss is nan or infinite.
        """
        pending, self._pending_losses = self._pending_losses, []
        for value, copied in pending:
            if copied is not None:
                copied.synchronize()  # waits for the forward pass; the backward pass is queued behind and runs on
            loss = value.numpy()
            if not abs(loss) < float("inf"):
                raise UserError(
                    f"the loss is {loss} at step {self.trainer.global_step} (epoch {self.current_epoch}); the weights "
                    "are as before that step. Lower model.optim.base_lr or lengthen the warm-up, and under 16-mixed "
                    "try trainer.precision bf16-mixed or 32."
                )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the teacher."""
        super().optimizer_step(*args, **kwargs)
        self.update_teacher()

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of ``self.optim``, for the global batch over processes and accumulated batches."""
        trainer, optim = self.trainer, self.optim
        total_steps = trainer.estimated_stepping_batches
        source = trainer.datamodule or trainer.train_dataloader  # type: ignore[attr-defined]
        batch_size = getattr(source, "batch_size", None)
        if batch_size is None and optim.lr_scaling != "none":
            rank_zero_warn("the loader has no batch_size to scale the learning rate by; assuming 256.")
        global_batch = (batch_size or 256) * trainer.world_size * trainer.accumulate_grad_batches
        optimizer = optim.create(self, global_batch)
        if total_steps == float("inf"):  # an endless run has no end to anneal to
            return {"optimizer": optimizer}
        warmup_steps = 0
        if optim.warmup_epochs > 0:
            if trainer.num_training_batches == float("inf"):
                raise UserError("the loader has no length to count epochs of warm-up by; set optim.warmup_epochs to 0.")
            steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            warmup_steps = round(min(total_steps, optim.warmup_epochs * steps_per_epoch))

        def factor(step: int) -> float:
            return warmup_cosine(step, warmup_steps, int(total_steps), optim.end_lr_factor)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Evaluation: the features once, for every probe

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Features of plain images; the probes read them.

        Args:
            batch: ``(images, labels, ...)``.
            batch_idx: Unused.
        """
        return self(batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Features of plain images; the probes read them."""
        return self(batch[0])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Features ``(B, embed_dim)`` of plain images."""
        return self(batch[0])


def _to_host(loss: Tensor) -> tuple[Tensor, "torch.Event | None"]:
    """Start copying a loss to the host; the device does not wait."""
    if not loss.is_cuda:
        return loss.cpu(), None
    host = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss, non_blocking=True)
    copied = torch.Event(loss.device)
    copied.record()
    return host, copied
