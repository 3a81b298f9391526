"""Blocks that are computed again in the backward pass instead of kept: less memory, a third more time."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_lightning.errors import UserError


class CheckpointedBlocks(nn.Sequential):
    """Blocks of a ViT of which only the inputs are kept for the backward pass."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(B, N, D)`` after all blocks."""
        if not torch.is_grad_enabled():
            return super().forward(tokens)
        for block in self:
            tokens = checkpoint(block, tokens, use_reentrant=False)
        return tokens


def checkpoint_blocks(backbone: Any) -> None:
    """Let a backbone keep only the inputs of its blocks in training.

    Args:
        backbone: A timm model without BatchNorm.

    Raises:
        UserError: It has BatchNorm, or no blocks.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()):
        raise UserError(
            "--model.checkpoint_blocks computes blocks twice, so BatchNorm would count every batch twice; set it to "
            "false, or set --model.backbone to a ViT."
        )
    if type(getattr(backbone, "blocks", None)) is nn.Sequential:  # timm would bypass the compiled call of the blocks
        backbone.blocks.__class__ = CheckpointedBlocks
        return
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise UserError(
            "the backbone has no blocks to compute again; set --model.checkpoint_blocks to false, or "
            "--model.backbone to a ViT of timm."
        ) from error
