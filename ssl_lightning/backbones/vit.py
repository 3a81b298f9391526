"""The ViT of timm for images of any size."""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ssl_lightning.backbones.tokens import ViT, sincos_positions


class AnySizeViT(VisionTransformer, ViT):
    """timm's ViT, its positions interpolated to the size of the images as in DINO's released code.

    Own code because timm interpolates with antialiasing and to the exact grid, which gives small crops other
    positions than those the released weights were trained with.
    """

    pos_embed: nn.Parameter
    rows_first: bool | None = None  # of fixed sine-cosine positions; None where they are learned
    antialiased: bool = False  # whether positions are interpolated as in DINOv2's released code with registers

    @property
    def patch_side(self) -> int:  # type: ignore[override] # read only
        """Number that the sides of images must be divisible by."""
        return math.lcm(*self.patch_embed.patch_size)

    @property
    def is_plain(self) -> bool:
        """Whether it is the papers' ViT: a class token with a position, no other tokens, no norm before the blocks."""
        plain = self.cls_token is not None and self.num_prefix_tokens == 1 and not self.no_embed_class
        return plain and isinstance(self.norm_pre, nn.Identity)

    def fix_positions(self, rows_first: bool) -> None:
        """Replace the learned positions by fixed sine-cosine ones.

        Args:
            rows_first: As for ``sincos_positions``.
        """
        self.rows_first = rows_first
        self.pos_embed = nn.Parameter(
            self._fixed_positions(self.patch_embed.grid_size, rows_first).clone(), requires_grad=False
        )

    def _fixed_positions(self, grid: tuple[int, int], rows_first: bool, device: torch.device | None = None) -> Tensor:
        positions = sincos_positions(self.embed_dim, grid, rows_first, device)
        return positions if self.cls_token is not None else positions[:, 1:]

    def tell_fixed_positions(self) -> None:
        """See in which order the positions are sine-cosine ones, if they are."""
        table = self.pos_embed.full_tensor() if isinstance(self.pos_embed, DTensor) else self.pos_embed
        self.rows_first = None
        for rows_first in (True, False):
            fixed = self._fixed_positions(self.patch_embed.grid_size, rows_first, table.device)
            if fixed.shape == table.shape and torch.allclose(table.float(), fixed, atol=0.01):  # rounded to bfloat16
                self.rows_first = rows_first

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.rows_first is not None:  # learned ones may have taken their place
            self.tell_fixed_positions()

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings ``(1, prefix + height * width, D)`` of a grid of patches; the prefix is for other tokens.

        Args:
            height: Rows of patches.
            width: Columns of patches.
        """
        rows, columns = self.patch_embed.grid_size
        if (height, width) == (rows, columns):
            return self.pos_embed
        if self.rows_first is not None:
            positions = self._fixed_positions((height, width), self.rows_first, self.pos_embed.device)
            return positions.to(self.pos_embed.dtype)
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        grid = self.pos_embed[:, prefix:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        if self.antialiased:
            grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True)
            return torch.cat([self.pos_embed[:, :prefix], grid.flatten(2).mT], dim=1)
        # The released code adds 0.1 so that rounding never loses a row, and samples by this scale.
        scale = ((height + 0.1) / rows, (width + 0.1) / columns)
        exact = torch.are_deterministic_algorithms_enabled() and not grid.is_cpu
        resized = _resized(grid, scale) if exact else F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :prefix], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def class_attention(self, images: Tensor) -> Tensor:
        """Attention ``(B, heads, rows, columns)`` of the class token to the patches in the last block.

        Args:
            images: ``(B, 3, S, S)``.
        """
        attention: Any = self.blocks[-1].attn
        seen: list[Tensor] = []
        hook = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        fused, attention.fused_attn = attention.fused_attn, False  # which would not hold the weights
        try:
            self.forward_features(images)
        finally:
            attention.fused_attn = fused
            hook.remove()
        rows = images.shape[2] // self.patch_embed.patch_size[0]
        return seen[0][:, :, 0, self.num_prefix_tokens :].unflatten(2, (rows, -1))

    def _pos_embed(self, x: Tensor) -> Tensor:
        positions = self.positions(*x.shape[1:3])
        tokens = x.flatten(1, 2)  # (B, height * width, D)
        if self.no_embed_class:
            tokens = tokens + positions
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        tokens = torch.cat([*prefix, tokens], dim=1)
        return self.pos_drop(tokens if self.no_embed_class else tokens + positions)


def _resized(grid: Tensor, scale: tuple[float, float]) -> Tensor:
    """``F.interpolate(grid, scale_factor=scale, mode="bicubic")`` by matrix products.

    torch's backward pass of the former is not deterministic on a GPU, and fails if it must be.
    """
    rows, columns = (_bicubic_weights(old, factor).to(grid) for old, factor in zip(grid.shape[2:], scale, strict=True))
    with torch.autocast(grid.device.type, enabled=False):
        return rows @ grid @ columns.T


@functools.lru_cache(maxsize=64)
def _bicubic_weights(old: int, factor: float) -> Tensor:
    """``(new, old)`` weights of the old pixels in each new pixel."""
    with torch.inference_mode(False):  # what validation asks for first is used in training, too
        return F.interpolate(torch.eye(old)[None, :, :, None], scale_factor=(factor, 1.0), mode="bicubic")[0, :, :, 0].T
