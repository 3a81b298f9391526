"""SimSiam."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.heads import mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class SimSiam(SSLModule):
    """SimSiam: predict the projection of another view, whose gradient is stopped: no negatives, no teacher.

    Chen & He 2021, Exploring Simple Siamese Representation Learning, https://arxiv.org/abs/2011.10566. The paper's
    encoder f is ``backbone`` and ``projector``, its h the ``predictor``, whose learning rate stays constant. BatchNorm
    is global.

    Args:
        projector_layers: Linear layers of the projector; 2 on CIFAR-10 in the paper.
        hidden_dim: Width of the projector's hidden layers; in the released code the width of the features, which is
            2048 for a ResNet-50.
        projector_dim: Width of projections and predictions.
        predictor_dim: Width of the predictor's hidden layer, a bottleneck.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "simsiam"
    drops_tokens = True
    collapsed_loss = -1.0
    remedies = (
        "BatchNorm in the projector's every layer, a predictor at a constant learning rate, a lower learning rate"
    )
    global_views = 2
    batch_norm = "global"

    def __init__(
        self,
        projector_layers: int = 3,
        hidden_dim: int = 2048,
        projector_dim: int = 2048,
        predictor_dim: int = 512,
        optim: Optim = Optim(
            "sgd",
            base_lr=0.05,
            weight_decay=1e-4,
            decay_norm_and_bias=True,
            warmup_epochs=0,
            per_epoch=True,
            constant_lr=("predictor",),
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        widths = [self.embed_dim] + [hidden_dim] * (projector_layers - 1) + [projector_dim]
        self.projector = mlp(widths, last_bias=True, last_norm=nn.BatchNorm1d(projector_dim, affine=False))
        self.projector[-2].bias.requires_grad_(False)  # it has no effect before BatchNorm; the released files hold it
        self.predictor = mlp([projector_dim, predictor_dim, projector_dim], last_bias=True)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Negative cosine of predictions and the other view's projections, over both directions (algorithm 1).

        Each view has its own forward pass and so its own BatchNorm statistics.
        """
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (B, projector_dim)
        p1, p2 = self.predictor(z1), self.predictor(z2)  # (B, projector_dim)
        return losses.negative_cosine(p1, z2) / 2 + losses.negative_cosine(p2, z1) / 2

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Deviation of the unit projections: 1 / sqrt(projector_dim) on all sides, 0 once collapsed (section 4.1)."""
        return {"projection_std": F.normalize(self.projector(self.backbone(views[0])), dim=1).std(0).mean()}
