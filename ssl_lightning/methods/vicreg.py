"""VICReg."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from ssl_lightning import losses
from ssl_lightning.heads import mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class VICReg(SSLModule):
    """VICReg: views of an image agree, each dimension keeps its variance, and dimensions are uncorrelated.

    Bardes, Ponce & LeCun 2022, VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning,
    https://arxiv.org/abs/2105.04906. The paper's expander is the ``projector``. BatchNorm is global, variance and
    covariance are taken over the global batch.

    Args:
        invariance: Weight of the squared distance between the views.
        variance: Weight of the variance term: how far each dimension's standard deviation falls short of 1.
        covariance: Weight of the squared covariances of different dimensions.
        variance_of_views: ``mean`` of the variance term over both views as in the released code, or their ``sum`` as in
            the paper.
        hidden_dim: Width of the projector's hidden layers.
        projector_dim: Width of the projections.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "vicreg"
    drops_tokens = True
    remedies = "a variance weight as large as the invariance weight, wider projections, a lower learning rate"
    global_views = 2
    batch_norm = "global"

    def __init__(
        self,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        variance_of_views: Literal["mean", "sum"] = "mean",
        hidden_dim: int = 8192,
        projector_dim: int = 8192,
        optim: Optim = Optim("lars", base_lr=0.2, weight_decay=1e-6, end_lr_factor=0.001),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance
        self.variance_of_views = variance_of_views
        self.projector = mlp([self.embed_dim, hidden_dim, hidden_dim, projector_dim], bias=True)
        self.collapsed_loss = 0.99 * variance * (1 if variance_of_views == "mean" else 2)  # 1 - sqrt(1e-4) is missing

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Invariance, variance and covariance of the projections (eq. 6).

        Each view has its own forward pass and so its own BatchNorm statistics.
        """
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (B, projector_dim)
        weights = self.invariance, self.variance, self.covariance
        return losses.vicreg(z1, z2, *weights, self.variance_of_views)
