"""Gram anchoring: the further stage of DINOv3."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones.tokens import as_map, called_blocks
from ssl_lightning.checkpoints import weights_in
from ssl_lightning.errors import UserError
from ssl_lightning.methods.dinov2 import DINOv2

View = TypeVar("View", Tensor, int)


class GramAnchoring(DINOv2):
    """DINOv2 whose patch similarities are anchored, late in training, to an earlier teacher.

    Siméoni et al. 2025, DINOv3, section 4.2, https://arxiv.org/abs/2508.10104. Late in a long training patch features
    grow noisy while class tokens still improve; the earlier teacher (here gram_backbone) anchors them. It sees the
    global crops, or crops of its own, the last two views if they are not smaller than the global ones: with
    ``data.views`` ``gram_anchoring`` the same crops at twice the size without color changes (section 4.3), whose
    features are interpolated to the student's grid. The anchor's loss begins with its whole weight, and crops are
    flipped (released: the weight rises along a cosine of 1,000 steps; no flips). The rest of DINOv3 is left out: its
    positions, schedules and data. The defaults are the shares of its 1,200,000 steps. As a stage of its own, with
    ``init_from`` a checkpoint of DINOv2 whose heads it goes on with, it begins at once: ``gram_snapshot`` and
    ``gram_start`` 0.

    Args:
        gram_weight: Weight of the mean squared difference between the similarities of patches.
        gram_snapshot: Share of the training, from 0 to 1, after which the teacher is first kept as the anchor.
        gram_start: Share of the training, from 0 to 1, after which the anchor's loss is added.
        gram_every: Number of steps after which the anchor is replaced by the current teacher.
        gram_updates: How many times the anchor is replaced.
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
        self.gram_backbone = ema.teacher_of(self.teacher_backbone)  # the anchor

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """DINOv2's loss, and the similarities of patches once the anchor holds (eq. 2 and 3)."""
        views, crops = _split(views)
        loss, patches = self.distillation(views)
        if self.global_step < self._step_of(self.gram_start):
            return loss
        return loss + self.gram_weight * losses.gram(patches, self._anchors(torch.cat(list(crops)), views[0].shape[-1]))

    def before_first_step(self) -> None:
        """Let the anchor begin as the teacher, whose weights may have come from ``init_from``."""
        if self.global_step == 0:
            ema.follow(self.gram_backbone, self.teacher_backbone, 0.0)

    def update_teacher(self) -> None:
        """Move the teacher, and keep it as the anchor where that is due."""
        super().update_teacher()
        done = self.global_step + 1
        held = done - self._step_of(self.gram_start)  # steps that the anchor has held
        again = held > 0 and held % self.gram_every == 0 and held // self.gram_every <= self.gram_updates
        if again or done == self._step_of(self.gram_snapshot):
            ema.follow(self.gram_backbone, self.teacher_backbone, 0.0)

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of student, teacher and anchor."""
        return [*super().compiled_parts, *called_blocks(self.gram_backbone)]

    @torch.no_grad()
    def _anchors(self, crops: Tensor, side: int) -> Tensor:
        """The anchor's features ``(2B, N, embed_dim)`` of the patches that crops of another side would have."""
        features = self.gram_backbone.forward_features(crops)
        grid = as_map(self.gram_backbone, features, crops)  # (2B, embed_dim, rows, columns)
        if crops.shape[-1] != side:
            grid = F.interpolate(grid, size=(side // self.backbone.patch_side,) * 2, mode="bicubic")
        return grid.flatten(2).mT

    def check(self, sizes: list[int], global_batch: int) -> None:
        """Views must be DINOv2's, and perhaps two for the anchor."""
        student_sizes, anchor_sizes = _split(sizes)
        super().check(list(student_sizes), global_batch)
        patch = self.backbone.patch_side
        if anchor_sizes[0] % patch:
            raise UserError(
                f"the backbone's patches of {patch} px do not divide the anchor's crops of {anchor_sizes[0]} px; set "
                "their size in --data.views, or the backbone's patches in --model.backbone_kwargs."
            )

    def _step_of(self, share: float) -> float:
        """The first step that is later than a share of the training."""
        if share == 0 or self._trainer is None:
            return 0.0
        return math.ceil(share * steps) if (steps := self.trainer.estimated_stepping_batches) < math.inf else math.inf

    def begin_with(self, source: str) -> None:
        """Give student and teacher the backbone of a source, and the heads and centers that DINOv2 saved with it.

        Args:
            source: See ``init_from``.

        Raises:
            UserError: The backbone or the heads differ; the message says how.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        super().begin_with(source)
        weights = weights_in(source).get("state_dict", {}) if Path(source).is_file() else {}
        if not any(name.startswith("teacher_projector.") for name in weights):
            rank_zero_warn(f"{source} has no heads of DINOv2, so they start from scratch.")
            return
        heads = {}
        for name, mine in self.state_dict().items():
            if name.partition(".")[0].endswith("backbone"):
                continue
            theirs = weights.get(f"teacher_{name}", weights.get(name))  # the student begins as the teacher
            if theirs is None or theirs.shape != mine.shape:
                raise UserError(
                    f"the heads of {source} differ in {name}, here {tuple(mine.shape)}, there "
                    f"{theirs if theirs is None else tuple(theirs.shape)}; set --model.num_prototypes, "
                    "--model.hidden_dim, --model.bottleneck_dim and --model.separate_heads to match."
                )
            heads[name] = theirs
        set_model_state_dict(self, heads, options=StateDictOptions(full_state_dict=True, strict=False))


def _split(views: Sequence[View]) -> tuple[Sequence[View], Sequence[View]]:
    """The views of DINOv2, and the anchor's two: the last if they are not smaller than the first, else the first."""
    sizes = [view if isinstance(view, int) else view.shape[-1] for view in views]
    return (views[:-2], views[-2:]) if len(views) > 3 and sizes[-1] >= sizes[0] else (views, views[:2])
