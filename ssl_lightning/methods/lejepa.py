"""LeJEPA."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_lightning import losses
from ssl_lightning.backbones.names import Backbone, vit_defaults
from ssl_lightning.backbones.tokens import full_size, multi_crop
from ssl_lightning.heads import mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class LeJEPA(SSLModule):
    """LeJEPA: all views predict the mean of the global ones, and embeddings become an isotropic Gaussian.

    Balestriero & LeCun 2025, LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics,
    https://arxiv.org/abs/2511.08544. For any backbone; no teacher, no stop-gradient. BatchNorm is global. The views of
    full size are the global ones, two or more. For ResNets the authors decay less: ``optim.weight_decay`` 5e-4. In
    their example on Imagenette the features come from a linear layer, ``backbone_kwargs: {num_classes: 512}``.

    Args:
        sigreg_weight: Weight of the regularizer; the prediction error has weight 1 minus it.
        num_slices: Random directions that the regularizer looks along, new ones at each step.
        knots: Points of the regularizer's integral, an odd number; 33 in the released code, half of them computed.
        limit: The integral runs from minus this to this; 3 in the released code, 5 in the paper.
        hidden_dim: Width of the projector's two hidden layers.
        projection_dim: Width of the embeddings.
        drop_path: Stochastic depth of a ViT: rate of the last block, rising linearly from 0.
        backbone: Name of a timm or torchvision model.
        backbone_kwargs: Arguments that build the backbone.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "lejepa"
    drops_tokens = True
    remedies = "a larger sigreg_weight (0.02 to 0.1), a larger batch, a lower learning rate"
    global_views = 2
    local_views = True
    batch_norm = "global"

    def __init__(
        self,
        sigreg_weight: float = 0.05,
        num_slices: int = 1024,
        knots: int = 17,
        limit: float = 5.0,
        hidden_dim: int = 2048,
        projection_dim: int = 128,
        drop_path: float = 0.1,
        backbone: Backbone = "vit_small_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim(
            "adamw",
            base_lr=5e-4,
            lr_scaling="none",
            weight_decay=0.05,
            warmup_epochs=1,
            warmup_start_factor=0.01,
            end_lr_factor=0.001,
        ),
        **kwargs: Any,
    ) -> None:

        super().__init__(backbone, vit_defaults(backbone, backbone_kwargs, drop_path_rate=drop_path), optim, **kwargs)
        self.sigreg_weight, self.num_slices, self.knots, self.limit = sigreg_weight, num_slices, knots, limit
        self.projector = mlp([self.embed_dim, hidden_dim, hidden_dim, projection_dim], bias=True, last_bias=True)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Squared distance from the center of the global views, and SIGReg of each view (algorithm 2)."""
        prediction, regularizer = self._parts(views)
        return (1 - self.sigreg_weight) * prediction + self.sigreg_weight * regularizer

    def _parts(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:

        embeddings = self.projector(multi_crop(self.backbone, views)).unflatten(0, (len(views), -1))  # (V, B, D)
        directions = torch.randn(embeddings.shape[2], self.num_slices, generator=self.generator)
        directions = self.random_to_device(directions)
        integral = directions, self.knots, self.limit
        regularizer = torch.stack([losses.sigreg(of_view, *integral) for of_view in embeddings]).mean()
        return losses.lejepa(embeddings, full_size(views)), regularizer

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Both parts of the loss."""
        prediction, regularizer = self._parts(views)
        return {"prediction_error": prediction, "sigreg": regularizer}

    @property
    def chance_loss(self) -> float | None:
        """The loss of embeddings that are all zero, in proportion to the batch; known once a batch has been seen."""
        if self.global_batch is None:
            return None
        statistic = math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))
        return self.sigreg_weight * statistic * self.global_batch
