"""Stochastic depth."""

from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning.distributed import rank, world_size


class DropPath(nn.Module):
    """timm's stochastic depth, drawn for the global batch: the same for an image on any number of processes.

    Takes the place of timm's, whose attributes it has; imports torch only.

    Args:
        drop_prob: Share of the branches that are dropped.
        scale_by_keep: Whether the others are scaled, so that their mean stays.

    Attributes:
        batch_size: Images of this process in the batch; rows beyond are further views. None is all rows.
    """

    batch_size: int | None = None

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """Drop the branch ``(V * B, ...)`` of some rows, and scale it for the others."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        batch_size = self.batch_size if self.batch_size and len(x) % self.batch_size == 0 else len(x)
        noise = torch.rand(len(x) // batch_size, world_size() * batch_size, device=x.device)
        own = noise.unflatten(1, (world_size(), batch_size))[:, rank()]  # (V, B)
        kept = (own.flatten() >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob if self.scale_by_keep else 1)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def even_drop_path(vit: Any, rate: float) -> None:
    """Give all blocks of a ViT the same stochastic depth, rather than one that rises with the depth (DINOv2).

    Args:
        vit: A ViT of timm.
        rate: Rate of each block.
    """
    for block in vit.blocks if rate > 0 else ():
        if not hasattr(block, "drop_path1"):  # one's own blocks have their own
            continue
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
