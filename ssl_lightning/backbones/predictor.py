"""What predicts tokens from others: MAE's decoder, I-JEPA's and CAPI's predictors."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_lightning.backbones.checkpointing import CheckpointedBlocks
from ssl_lightning.backbones.drop_path import DropPath
from ssl_lightning.backbones.tokens import sincos_positions
from ssl_lightning.errors import UserError


class TokenPredictor(nn.Module):
    """Blocks of a ViT between two linear layers, with fixed sine-cosine positions.

    ``embed`` makes the tokens narrow; the method adds positions and mask tokens; the module itself does the rest.

    Args:
        width_in: Width of the tokens.
        width: Width of the blocks.
        width_out: Width of the predictions.
        depth: Number of blocks.
        heads: Attention heads of each.
        grid: Rows and columns of patches.
        class_token: Whether a class token, whose position is zero, comes before the patches.
        checkpoint_blocks: Whether only the inputs of the blocks are kept for the backward pass.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        width_out: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        class_token: bool,
        checkpoint_blocks: bool = False,
    ) -> None:
        from timm.models.vision_transformer import Block  # only here: help texts do not wait for timm

        norm: Any = functools.partial(nn.LayerNorm, eps=1e-6)
        super().__init__()
        if width < 1 or width % 4 or width % heads:
            raise UserError(f"blocks of width {width} with {heads} heads: give a width that 4 and the heads divide.")
        self.embed = nn.Linear(width_in, width)
        self.grid, self.width, self.class_token = grid, width, class_token
        self.positions = nn.Parameter(self._fixed_positions(grid).clone(), requires_grad=False)
        blocks = [Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        self.blocks = (CheckpointedBlocks if checkpoint_blocks else nn.Sequential)(*blocks)
        self.norm = norm(width)
        self.projection = nn.Linear(width, width_out)

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Predictions ``(B, N, width_out)`` of tokens ``(B, N, width)``.

        Args:
            tokens: ``(B, N, width)``.
            last: Number of tokens at the end to predict; None is all.
        """
        tokens = self.norm(self.blocks(tokens))
        return self.projection(tokens if last is None else tokens[:, -last:])

    def positions_of(self, grid: tuple[int, int]) -> Tensor:
        """Positions ``(1, N, width)``; with a class token ``(1, 1 + N, width)``.

        Args:
            grid: Rows and columns of patches.
        """
        return self.positions if grid == self.grid else self._fixed_positions(grid, self.positions.device)

    def _fixed_positions(self, grid: tuple[int, int], device: Any = None) -> Tensor:
        positions = sincos_positions(self.width, grid, rows_first=False, device=device)
        return positions if self.class_token else positions[:, 1:]


class CrossAttention(nn.Module):
    """Attention of queries to other tokens, without biases.

    Args:
        width: Width of queries and tokens.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """What queries ``(B, M, D)`` take from tokens ``(B, N, D)``."""
        q = self.q(queries).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, M, D / heads)
        k, v = self.kv(tokens).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Cross attention, then an MLP, each a residual branch behind an RMSNorm.

    Args:
        width: Width of queries and tokens.
        heads: Attention heads.
        drop_path: Stochastic depth of both branches.
    """

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.attention = CrossAttention(width, heads)
        wide, narrow = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.mlp = nn.Sequential(wide, nn.GELU(), narrow)
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Queries ``(B, M, D)`` that have seen tokens ``(B, N, D)``, but not each other."""
        queries = queries + self.drop_path1(self.attention(self.norm1(queries), tokens))
        return queries + self.drop_path2(self.mlp(self.norm2(queries)))


class CrossPredictor(nn.Module):
    """Mask tokens that read the tokens of an encoder (CAPI): each prediction is independent of the others.

    Args:
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads of each.
        drop_path: Stochastic depth, the same for all blocks.
        checkpoint_blocks: Whether only the inputs of the blocks are kept for the backward pass.
    """

    def __init__(self, width: int, depth: int, heads: int, drop_path: float, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.blocks = nn.ModuleList(CrossBlock(width, heads, drop_path) for _ in range(depth))
        self.checkpoint_blocks = checkpoint_blocks

    def forward(self, tokens: Tensor, positions: Tensor, depth: int | None = None) -> Tensor:
        """Predictions ``(B, M, D)``, of unit mean square.

        Args:
            tokens: ``(B, N, D)`` of the encoder.
            positions: ``(B, M, D)`` of what to predict.
            depth: Number of blocks to run; None is all.
        """
        queries = self.mask_token.to(tokens.dtype) + positions.to(tokens.dtype)
        for block in self.blocks[:depth]:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                queries = checkpoint(block, queries, tokens, use_reentrant=False)
            else:
                queries = block(queries, tokens)
        return F.rms_norm(queries, queries.shape[-1:], eps=1e-5)
