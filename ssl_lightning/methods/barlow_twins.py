"""Barlow Twins."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ssl_lightning import losses
from ssl_lightning.heads import mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class BarlowTwins(SSLModule):
    """Barlow Twins: each dimension agrees between two views of an image, and dimensions are uncorrelated.

    Zbontar et al. 2021, Barlow Twins: Self-Supervised Learning via Redundancy Reduction,
    https://arxiv.org/abs/2103.03230. BatchNorm is global, also in the loss. Biases and norms have their own learning
    rate: 0.0048 instead of 0.2. The released gradient is ours divided by the number of processes. LARS cancels that
    except for this rate and the weight decay; ``configs/barlow_twins/imagenet_resnet50.yaml`` makes up for it.

    Args:
        lambd: Weight of the correlations of different dimensions.
        hidden_dim: Width of the projector's hidden layers.
        projector_dim: Width of the projections D.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "barlow_twins"
    drops_tokens = True
    remedies = "wider projections, a lambd near 0.005, a lower learning rate, above all of biases and norms"
    global_views = 2
    batch_norm = "global"

    def __init__(
        self,
        lambd: float = 0.0051,
        hidden_dim: int = 8192,
        projector_dim: int = 8192,
        optim: Optim = Optim(
            "lars", base_lr=0.2, weight_decay=1e-6, end_lr_factor=0.001, norm_and_bias_lr_scale=0.0048 / 0.2
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.lambd, self.projector_dim = lambd, projector_dim
        self.projector = mlp([self.embed_dim, hidden_dim, hidden_dim, projector_dim])

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Distance of the cross-correlation of the projections from the identity (eq. 1).

        Each view has its own forward pass and so its own BatchNorm statistics.
        """
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (B, projector_dim)
        return losses.barlow_twins(z1, z2, self.lambd)

    @property
    def chance_loss(self) -> float:
        """The number of dimensions D: no correlations, as with constant projections."""
        return float(self.projector_dim)
