"""Gram anchoring: the further stage of DINOv3."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.methods.dinov2 import DINOv2


class GramAnchoring(DINOv2):
    """DINOv2, at whose end the patches of an image stay as similar to each other as they were to an earlier teacher.

    Siméoni et al. 2025, DINOv3, section 4.2, https://arxiv.org/abs/2508.10104. Late in a long training patch features
    grow noisy while class tokens still improve; the earlier teacher (here gram_backbone) anchors them. It sees the
    same global crops; the refinement with crops of twice the resolution is left out, and so is the rest of DINOv3: its
    positions, schedules and data. The defaults are the shares of its 1,200,000 steps. As a stage of its own, with
    ``init_from``, it begins at once: ``gram_snapshot`` and ``gram_start`` 0.

    Args:
        gram_weight: Weight of the mean squared difference of similarities.
        gram_snapshot: Share of the training after which the teacher is first kept as the anchor.
        gram_start: Share of the training after which the anchor holds.
        gram_every: Steps after which the anchor becomes the teacher of then.
        gram_updates: How often it does.
        kwargs: See DINOv2.
    """

    def __init__(
        self,
        gram_weight: float = 2.0,
        gram_snapshot: float = 1 / 6,
        gram_start: float = 5 / 6,
        gram_every: int = 10_000,
        gram_updates: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.gram_weight, self.gram_snapshot, self.gram_start = gram_weight, gram_snapshot, gram_start
        self.gram_every, self.gram_updates = gram_every, gram_updates
        self.gram_backbone = ema.teacher_of(self.teacher_backbone)

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of student, teacher and anchor."""
        return [*super().compiled_parts, self.gram_backbone.blocks]  # type: ignore[list-item]

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """DINOv2's loss, and the similarities of patches once the anchor holds (eq. 2 and 3)."""
        loss, patches = self.distillation(views)
        if self.global_step < self._step_of(self.gram_start):
            return loss
        with torch.no_grad():
            tokens = self.gram_backbone.forward_features(torch.cat(list(views[:2])))  # type: ignore[operator]
        return loss + self.gram_weight * losses.gram(patches, tokens[:, self.prefix :])

    def _step_of(self, share: float) -> float:
        """The first step that is later than a share of the training."""
        if share == 0 or self._trainer is None:
            return 0.0
        return math.ceil(share * steps) if (steps := self.trainer.estimated_stepping_batches) < math.inf else math.inf

    def on_train_start(self) -> None:
        """Begin with the weights of ``init_from``, the anchor included."""
        super().on_train_start()
        if self.global_step == 0:
            ema.follow(self.gram_backbone, self.teacher_backbone, 0.0)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, and keep the teacher as the anchor where that is due."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        done = self.global_step + 1
        held = done - self._step_of(self.gram_start)  # steps that the anchor has held
        again = held > 0 and held % self.gram_every == 0 and held // self.gram_every <= self.gram_updates
        if again or done == self._step_of(self.gram_snapshot):
            ema.follow(self.gram_backbone, self.teacher_backbone, 0.0)
