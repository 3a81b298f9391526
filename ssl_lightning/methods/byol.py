"""BYOL."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_lightning import ema, losses
from ssl_lightning.heads import mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim
from ssl_lightning.schedules import cosine


class BYOL(SSLModule):
    """BYOL: predict a slowly moving teacher's projection of another view, without negatives.

    Grill et al. 2020, Bootstrap Your Own Latent, https://arxiv.org/abs/2006.07733. The paper's online network is
    ``backbone``, ``projector`` and ``predictor``, its target network the teachers, which start as copies (in the
    released code they are drawn independently). BatchNorm is global. Its views add to the brightness, as released;
    contrast and saturation are PyTorch's (released: around the mean of each channel, and in HSV), and blur reflects the
    border (released: zeros).

    Args:
        momentum: Share of the teacher that stays at the first step; it rises to 1 along a cosine. 0.99 for 300
            epochs and fewer in the paper.
        hidden_dim: Width of the hidden layers of projector and predictor.
        projector_dim: Width of projections and predictions.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "byol"
    drops_tokens = True
    collapsed_loss = 0.0
    remedies = "a predictor, BatchNorm in projector and predictor, a momentum of 0.99 or more, a lower learning rate"
    global_views = 2
    batch_norm = "global"
    zero_init_residual = False  # the released code has zero, the paper's numbers were made without

    def __init__(
        self,
        momentum: float = 0.996,
        hidden_dim: int = 4096,
        projector_dim: int = 256,
        optim: Optim = Optim("lars", base_lr=0.2, weight_decay=1.5e-6),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.momentum = momentum
        self.projector = mlp([self.embed_dim, hidden_dim, projector_dim], bias=True)
        self.predictor = mlp([projector_dim, hidden_dim, projector_dim], bias=True)
        self.teacher_backbone = ema.teacher_of(self.backbone)
        self.teacher_projector = ema.teacher_of(self.projector)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Distance of predictions to the other view's targets, in both directions (eq. 2).

        Each view has its own forward pass and so its own BatchNorm statistics.
        """
        predictions = [self.predictor(self.projector(self.backbone(view))) for view in views]  # (B, projector_dim) each
        with torch.no_grad():
            targets = [self.teacher_projector(self.teacher_backbone(view)) for view in views]
        return losses.byol(predictions[0], targets[1]) + losses.byol(predictions[1], targets[0])

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a cosine."""
        return cosine(self.momentum, 1.0, progress)

    def update_teacher(self) -> None:
        """Move the teacher (eq. 1), with the momentum of the step just taken."""
        ema.follow_all(self, self.teacher_momentum(self.progress))
