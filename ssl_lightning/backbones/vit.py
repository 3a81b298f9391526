"""The ViTs of timm for images of any size."""

import functools
import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ssl_lightning.backbones.drop_path import DropPath
from ssl_lightning.backbones.tokens import ViT, interpolated, kept_tokens, sincos_positions


def adapted(model: Any) -> nn.Module:
    """A model of timm whose ViT takes images of any size and whose stochastic depth is drawn for the global batch.

    Args:
        model: Changed in place; its ``num_features`` becomes the width of what it gives.
    """
    if type(model) is VisionTransformer and model.dynamic_img_size and model.pos_embed is not None:
        model.__class__ = AnySizeViT
    if type(model) is Eva and hasattr(model.rope, "periods") and (model.pos_embed, model.patch_drop) == (None, None):
        model.__class__ = RotaryViT
    for module in model.modules():
        if type(module) is timm.layers.DropPath:
            module.__class__ = DropPath  # type: ignore[assignment] # of the same attributes
    model.num_features = getattr(model, "head_hidden_size", None) or model.num_features
    return model


def any_size(model: Any) -> None:
    """Let a ViT of timm keep the grid of its patches until positions are added, as ``dynamic_img_size`` does.

    Args:
        model: Changed in place; other models stay as they are.
    """
    if type(model) is VisionTransformer and type(model.patch_embed) is timm.layers.PatchEmbed:
        model.dynamic_img_size = True  # type: ignore[misc] # constant only for scripts
        model.patch_embed.strict_img_size, model.patch_embed.flatten = False, False
        model.patch_embed.output_fmt = timm.layers.Format.NHWC


class TimmViT(ViT):
    """What the ViTs of timm share."""

    patch_embed: Any
    blocks: Any
    reg_token: Any

    def _with_prefix(self, patches: Tensor) -> Tensor:
        """The class token and the registers, as far as there are any, before the patches ``(B, N, D)``."""
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        count = patches.shape[0]  # len() would fix it in an exported graph
        return torch.cat([*(token.expand(count, -1, -1) for token in tokens), patches], dim=1)

    @property
    def patch_side(self) -> int:  # type: ignore[override] # read only
        """Number that the sides of images must be divisible by."""
        return math.lcm(*self.patch_embed.patch_size)


class AnySizeViT(VisionTransformer, TimmViT):
    """timm's ViT, its positions interpolated to the size of the images as in DINO's released code.

    Own code because timm interpolates with antialiasing and to the exact grid, which gives small crops other
    positions than those the released weights were trained with.
    """

    pos_embed: nn.Parameter
    rows_first: bool | None = None  # of fixed sine-cosine positions; None where they are learned
    antialiased: bool = False  # whether positions are interpolated as in DINOv2's released code with registers

    @property
    def is_plain(self) -> bool:
        """Whether it is the papers' ViT: a class token with a position, no other tokens, no norm before the blocks."""
        plain = self.cls_token is not None and self.num_prefix_tokens == 1 and not self.no_embed_class
        return plain and isinstance(self.norm_pre, nn.Identity)

    @property
    def projects_patches(self) -> bool:
        """Whether a patch knows its own pixels only, unlike one of ``whitened_vit``: else masking would hide little."""
        return hasattr(self.patch_embed, "proj")

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
        if self.any_grid:
            return self._positions_in_graph(height, width)
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

    def _positions_in_graph(self, height: int, width: int) -> Tensor:
        """As ``positions``, on the CPU, by operations that a graph repeats for any grid."""
        if self.rows_first is not None:
            positions = sincos_positions.__wrapped__(self.embed_dim, (height, width), self.rows_first)
            return positions if self.cls_token is not None else positions[:, 1:]
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        rows, columns = self.patch_embed.grid_size
        table = self.pos_embed[0, prefix:].unflatten(0, (rows, columns))  # (rows, columns, D)
        grid = interpolated(table, (height, width), self.antialiased).flatten(0, 1)
        return torch.cat([self.pos_embed[:, :prefix], grid[None]], dim=1)

    def encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """Tokens of the prefix and some patches ``(B, prefix + M, D)`` after the last norm."""
        tokens = kept_tokens(self._pos_embed(self.patch_embed(images)), kept, self.num_prefix_tokens)
        return self.norm(self.blocks(self.norm_pre(tokens)))

    def _pos_embed(self, x: Tensor) -> Tensor:
        positions = self.positions(*x.shape[1:3])
        tokens = x.flatten(1, 2)  # (B, height * width, D)
        if self.no_embed_class:
            tokens = tokens + positions
        tokens = self._with_prefix(tokens)
        return self.pos_drop(tokens if self.no_embed_class else tokens + positions)


class RotaryViT(Eva, TimmViT):
    """DINOv3's ViT of timm: positions rotate queries and keys; registers follow the class token.

    Own code because timm computes the rotations on the CPU again at every step, and drops patches only at random.
    """

    def fix_positions(self, rows_first: bool) -> None:
        """Rotations are fixed already."""

    def encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """Tokens of the prefix and some patches ``(B, prefix + M, D)`` after the last norm, each with its rotation."""
        tokens, rotations = self._pos_embed(self.patch_embed(images))
        tokens = self.norm_pre(kept_tokens(tokens, kept, self.num_prefix_tokens))
        rotations = rotations[kept][:, None]  # (B, 1, M, 2 * D / heads)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, rope=rotations, use_reentrant=False)
            else:
                tokens = block(tokens, rope=rotations)
        return self.norm(tokens)

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens, rotations = self._with_prefix(x.flatten(1, 2)), self._rotations(*x.shape[1:3])
        dropout: Any = self.patch_drop  # None, or a TokenDropout
        if dropout is not None and (kept := dropout.drawn(tokens)) is not None:
            tokens, rotations = kept_tokens(tokens, kept, self.num_prefix_tokens), rotations[kept][:, None]
        return self.pos_drop(tokens), rotations

    def _rotations(self, rows: int, columns: int) -> Tensor:
        """Sines and cosines ``(rows * columns, 2 * D / heads)`` of a grid of patches."""
        rope: Any = self.rope
        if self.any_grid or (self.training and rope.aug_active):
            return rope.get_embed(shape=(rows, columns))
        known: dict[Any, Tensor] = self.__dict__.setdefault("_known_rotations", {})
        grid = (rows, columns, rope.periods.device)
        if grid not in known:
            with torch.inference_mode(False):  # what validation asks for first is used in training, too
                known[grid] = rope.get_embed(shape=(rows, columns))
        return known[grid]


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
