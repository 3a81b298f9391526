"""A narrow ViT on tokens: MAE's decoder, I-JEPA's predictor."""

import functools
from typing import Any

from torch import Tensor, nn

from ssl_lightning.backbones.checkpointing import CheckpointedBlocks
from ssl_lightning.backbones.tokens import sincos_positions


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
