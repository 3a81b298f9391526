"""SimCLR."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.grad_cache import checked_chunk_size, encode_in_chunks
from ssl_lightning.heads import mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class SimCLR(SSLModule):
    """SimCLR: two views of an image attract each other, views of other images repel.

    Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations,
    https://arxiv.org/abs/2002.05709. BatchNorm is global: train with ``sync_batchnorm`` on several devices.
    Convolutions keep timm's initialization (fan-out normal; the released code has fan-in truncated normal). Views are
    cropped as TensorFlow does; contrast and saturation are PyTorch's (released: around the mean of each channel, and in
    HSV), the resize is antialiased (released: not), and blur reflects the border (released: zeros).

    Args:
        temperature: Divides the cosine similarities; 0.1 on ImageNet, 0.5 on CIFAR-10.
        projector_layers: Linear layers of the projector: 2 in v1, 3 in v2 and by default in the released scripts.
        projector_dim: Width of the projections.
        reduction: ``mean`` of the loss over both views as in the paper, or their ``sum`` as in the released code.
        optim: Optimizer and learning-rate schedule.
        chunk_size: Most images per backbone pass, for batches larger than memory: the loss still spans the whole batch.
            None takes the batch in one pass; chunks cost an extra forward pass.
        decoupled: Leave the positive out of the denominator (Yeh et al. 2022, https://arxiv.org/abs/2110.06848), for
            small batches.
        kwargs: See SSLModule.
    """

    views = "simclr"
    drops_tokens = True
    remedies = "a temperature of 0.1 to 0.5, a lower learning rate or a longer warm-up, crops that share content"
    global_views = 2
    batch_norm = "global"

    def __init__(
        self,
        temperature: float = 0.1,
        projector_layers: int = 2,
        projector_dim: int = 128,
        reduction: Literal["mean", "sum"] = "mean",
        optim: Optim = Optim("lars_simclr", base_lr=0.3, weight_decay=1e-6),
        chunk_size: int | None = None,
        decoupled: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.temperature, self.reduction, self.decoupled = temperature, reduction, decoupled
        self.chunk_size = checked_chunk_size(chunk_size)
        last_norm = nn.BatchNorm1d(projector_dim)
        last_norm.register_parameter("bias", None)  # scaled, but not shifted
        widths = [self.embed_dim] * projector_layers + [projector_dim]
        self.projector = mlp(widths, last_norm=last_norm)
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """NT-Xent between the two views of each image (algorithm 1)."""
        # (2B, embed_dim): in one chunk, both views share their BatchNorm statistics
        h = encode_in_chunks(self.backbone, views, self.chunk_size)
        z0, z1 = self.projector(h).chunk(2)  # (B, projector_dim)
        return losses.nt_xent(z0, z1, self.temperature, self.reduction, self.chunk_size, self.decoupled)

    @property
    def chance_loss(self) -> float | None:
        """ln(2N - 1), decoupled ln(2N - 2): all candidates are equally likely; known once a batch has been seen."""
        if self.global_batch is None:
            return None
        candidates = 2 * self.global_batch - (2 if self.decoupled else 1)
        return math.log(candidates) * (1 if self.reduction == "mean" else 2)
