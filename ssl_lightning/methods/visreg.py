"""VISReg."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_lightning import losses
from ssl_lightning.backbones.names import Backbone, vit_defaults
from ssl_lightning.backbones.tokens import full_size, multi_crop
from ssl_lightning.distributed import world_size
from ssl_lightning.errors import UserError
from ssl_lightning.heads import mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class VISReg(SSLModule):
    """VISReg: all views predict the mean of the global ones, and embeddings become Gaussian in scale and in shape.

    Wu, Balestriero & Levine 2026, VISReg, https://arxiv.org/abs/2606.02572. LeJEPA with another regularizer, whose
    gradient does not vanish at collapse. For any backbone; no teacher. BatchNorm is global. The views of full size are
    the global ones, two or more. Defaults: the authors' ViT-B/16, whose recipe also clips gradients to a norm of 1.

    Args:
        regularizer_weight: Weight of the regularizer; the prediction error has weight 1 minus it.
        num_slices: Random directions that the regularizer looks along, new ones at each step.
        hidden_dim: Width of the projector's two hidden layers.
        projection_dim: Width of the embeddings.
        drop_path: Stochastic depth of a ViT: rate of the last block, rising linearly from 0.
        backbone: Name of a timm or torchvision model.
        backbone_kwargs: Arguments that build the backbone.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "visreg"
    remedies = "a larger regularizer_weight (0.6 to 0.9), a larger batch, a lower learning rate"
    global_views = 2
    local_views = True
    batch_norm = "global"
    drops_tokens = True

    def __init__(
        self,
        regularizer_weight: float = 0.9,
        num_slices: int = 4096,
        hidden_dim: int = 2048,
        projection_dim: int = 256,
        drop_path: float = 0.1,
        backbone: Backbone = "vit_base_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim(
            "adamw",
            base_lr=9e-4,
            lr_scaling="none",
            weight_decay=0.05,
            warmup_epochs=5,
            warmup_start_factor=0.001,
            end_lr_factor=0.001,
        ),
        **kwargs: Any,
    ) -> None:

        super().__init__(backbone, vit_defaults(backbone, backbone_kwargs, drop_path_rate=drop_path), optim, **kwargs)
        self.regularizer_weight, self.num_slices = regularizer_weight, num_slices
        widths = [self.embed_dim, hidden_dim, hidden_dim, projection_dim]
        self.projector = mlp(widths, bias=True, last_bias=True, gelu=True)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Squared distance from the center of the global views, and the regularizer of each view (eq. 8)."""
        prediction, regularizer = self._parts(views)
        return (1 - self.regularizer_weight) * prediction + self.regularizer_weight * regularizer

    def _parts(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        embeddings = self.projector(multi_crop(self.backbone, views)).unflatten(0, (len(views), -1))  # (V, B, D)
        directions = torch.randn(embeddings.shape[2], self.num_slices, generator=self.generator)
        regularizer = losses.visreg(embeddings, self.random_to_device(directions))
        return losses.lejepa(embeddings, full_size(views)), regularizer

    def check(self, sizes: list[int], global_batch: int) -> None:
        """The quantiles of a handful of images are no distribution."""
        super().check(sizes, global_batch)
        if global_batch < 8:
            raise UserError(
                f"VISReg compares the distribution of a batch with a Gaussian, which {global_batch} images do not "
                f"show; set --data.batch_size to {-(-8 // world_size())} or more."
            )

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Both parts of the loss."""
        prediction, regularizer = self._parts(views)
        return {"prediction_error": prediction, "visreg": regularizer}

    @property
    def chance_loss(self) -> float | None:
        """The loss of embeddings that are all zero; known once a batch has been seen, whose quantiles it takes."""
        if self.global_batch is None:
            return None
        shape = losses.visreg(torch.zeros(1, self.global_batch, 1), torch.ones(1, 1))
        return self.regularizer_weight * float(shape)
