"""RotNet."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class RotNet(SSLModule):
    """RotNet: recognize by how many quarter turns an image has been rotated.

    Gidaris et al. 2018, Unsupervised Representation Learning by Predicting Image Rotations,
    https://arxiv.org/abs/1803.07728. All four rotations of every image are in the batch, so a step costs four images
    each. They are made last, after crop and flip: of a mirror image, a quarter turn to the left is one to the right.
    Optimizer and schedule are VISSL's for the ResNet-50. BatchNorm may be global or per process.

    Images need an upright position: rotations of round or symmetric objects cannot be recognized.

    Args:
        optim: Optimizer and learning-rate schedule; the milestones are for 105 epochs.
        kwargs: See SSLModule.
    """

    views = "rotnet"
    remedies = "images with an upright position, milder crops, a lower learning rate or a warm-up"
    global_views = 1
    zero_init_residual = False

    def __init__(
        self,
        optim: Optim = Optim(
            "sgd",
            base_lr=0.1,
            weight_decay=1e-4,
            warmup_epochs=0,
            milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105),
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.head = nn.Linear(self.embed_dim, 4)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropy of the four rotations of each image (eq. 2 and 3)."""
        return losses.cross_entropy(*self._logits_and_turns(views[0]))

    def _logits_and_turns(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(4B, 4)`` and quarter turns ``(4B,)`` of the rotations, image by image."""
        images, turns = rotations(images)
        return self.head(self.backbone(images)), turns

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Loss of a batch; the probes learn from the features of the upright images.

        Args:
            batch: ``(views, labels, ...)``; the labels are not used.
            batch_idx: Number of the batch.
        """
        outputs = super().training_step(batch, batch_idx)
        return {**outputs, "features": outputs["features"][::4]}

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Share of the rotations that are recognized; a quarter by chance."""
        return {"pretext_accuracy": losses.accuracy(*self._logits_and_turns(views[0]))}

    @property
    def chance_loss(self) -> float:
        """The entropy ln 4: every rotation is as likely."""
        return math.log(4)


def rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """All rotations of images by quarter turns, counter-clockwise.

    Args:
        images: ``(B, C, S, S)``.

    Returns:
        ``(4B, C, S, S)``: the four of the first image, of the second, ...; and the quarter turns ``(4B,)``: 0, 1, 2, 3,
        0, ...
    """
    rotated = torch.stack([torch.rot90(images, turns, (2, 3)) for turns in range(4)], dim=1)  # (B, 4, C, S, S)
    return rotated.flatten(0, 1), torch.arange(4, device=images.device).repeat(len(images))
