"""Images as tokens: what methods do with a backbone at every step; needs torch only."""

import functools
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning.masks import taken


class ViT(nn.Module):
    """What methods on tokens use of a ViT. timm's are in ``vit``; one's own needs these attributes and methods, too.

    Attributes:
        patch_embed: Maps images to patches ``(B, rows, columns, D)`` or ``(B, N, D)``.
        blocks: The blocks, in a sequence or a list.
        num_prefix_tokens: Tokens before the patches: class token and registers.
        patch_side: Number of pixels that the sides of images must be divisible by.
    """

    patch_embed: Any
    cls_token: Any
    blocks: Any
    num_prefix_tokens: int
    patch_side: int
    any_grid: bool = False
    """Whether timm's compute positions by operations that an exported graph repeats for any grid, without a table."""

    def fix_positions(self, rows_first: bool) -> None:
        """Replace learned positions by fixed sine-cosine ones."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens ``(B, prefix + N, D)`` after the last norm."""
        raise NotImplementedError

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Features ``(B, D)`` of tokens ``(B, prefix + N, D)``."""
        raise NotImplementedError

    def encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """Tokens ``(B, prefix + M, D)`` after the last norm of the patches ``kept``, ``(B, M)``; no other is seen."""
        raise NotImplementedError


OF_OWN_VITS = "patch_embed", "patch_side", "num_prefix_tokens", "blocks", "forward_features", "forward_head", "encode"
"""What a ViT of one's own needs besides features ``(B, D)`` from its call; ``encode`` for MAE, I-JEPA and CAPI only."""


def multi_crop(backbone: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Features ``(V * B, embed_dim)`` of crops of several sizes, view by view.

    Consecutive views of the same size go through the backbone together and share their BatchNorm statistics, as in the
    released code of SwAV and DINO.

    Args:
        backbone: Maps images to features.
        views: ``(B, 3, S, S)`` each.
    """
    groups = [list(group) for _, group in groupby(views, key=lambda view: view.shape[-1])]
    return torch.cat([backbone(torch.cat(group)) for group in groups])


def full_size(views: Sequence[Tensor]) -> int:
    """Number of views at the start that have the size of the first: the global ones.

    Args:
        views: ``(B, 3, S, S)`` each.
    """
    return len(list(next(groupby(views, key=lambda view: view.shape[-1]))[1]))


def masked_tokens(backbone: nn.Module, images: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """Tokens after the last norm, a learned token in the place of masked patches.

    Args:
        backbone: A ViT, BEiT or Swin of timm.
        images: ``(B, 3, S, S)``.
        mask: ``(B, N)`` bool, row by row, true where masked.
        mask_token: ``(D,)``; takes the place of the patch's embedding before positions are added.

    Returns:
        ``(B, prefix + N, D)``; of a Swin, ``(B, rows, columns, D)`` of its last stage.
    """

    def hide(_module: nn.Module, _images: Any, patches: Tensor) -> Tensor:
        return torch.where(mask.view(*patches.shape[:-1], 1), mask_token.to(patches.dtype), patches)

    vit: Any = backbone
    with vit.patch_embed.register_forward_hook(hide):
        return vit.forward_features(images)


def kept_tokens(tokens: Tensor, kept: Tensor, prefix: int) -> Tensor:
    """The tokens before the patches, and the tokens of some patches, ``(B, prefix + M, D)``.

    Args:
        tokens: ``(B, prefix + N, D)``.
        kept: ``(B, M)`` indices of the patches.
        prefix: Number of tokens before the patches.
    """
    patches = taken(tokens[:, prefix:], kept)
    return torch.cat([tokens[:, :prefix], patches], dim=1) if prefix else patches


def patch_tokens(backbone: nn.Module, tokens: Tensor) -> Tensor:
    """The tokens ``(B, N, D)`` of the patches, without class token and registers.

    Args:
        backbone: A ViT or BEiT of timm.
        tokens: ``(B, prefix + N, D)``.
    """
    vit: Any = backbone
    return tokens[:, vit.num_prefix_tokens :]


def as_map(backbone: nn.Module, features: Tensor, images: Tensor) -> Tensor:
    """What ``forward_features`` of a backbone of timm gives, as a map ``(B, D, rows, columns)``.

    Args:
        backbone: Whose features.
        features: ``(B, prefix + N, D)`` of a ViT or BEiT, ``(B, rows, columns, D)`` of a Swin, or a CNN's map.
        images: ``(B, 3, S, S)`` that they are of.
    """
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features
    return patch_tokens(backbone, features).mT.unflatten(2, grid_of(backbone, images))


def grid_of(backbone: nn.Module, images: Tensor | None = None) -> tuple[int, int]:
    """Rows and columns of patches.

    Args:
        backbone: A ViT or BEiT of timm, or a ViT of one's own.
        images: ``(B, 3, S, S)``; None is of the size that it was built for, 14 x 14 patches if it does not say.
    """
    vit: Any = backbone
    if images is None:
        return getattr(vit.patch_embed, "grid_size", (14, 14))
    sides = getattr(vit.patch_embed, "patch_size", None)
    rows, columns = sides if isinstance(sides, tuple) else (vit.patch_side, vit.patch_side)
    return images.shape[2] // rows, images.shape[3] // columns


def number_of_patches(backbone: nn.Module, side: int) -> int:
    """Number of patches of a square image.

    Args:
        backbone: As for ``grid_of``.
        side: Side of the image in pixels.
    """
    return math.prod(grid_of(backbone, torch.empty(1, 1, side, side, device="meta")))


def called_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a ViT, BEiT or Swin of timm as far as they are called: their sequence, or each by itself.

    Args:
        backbone: Whose blocks.
    """
    blocks: Any = backbone.layers if hasattr(backbone, "layers") else backbone.blocks
    return list(blocks) if isinstance(blocks, nn.ModuleList) else [blocks]


def blocks_in(module: nn.Module) -> list[nn.Module]:
    """The blocks in a module, in order: of the children ``*blocks`` that are sequences or lists; none of a ResNet.

    What embeds the patches has none, even if it is a CNN (``whitened_vit``).

    Args:
        module: A ViT, BEiT, Swin or ConvNeXt of timm, or what holds one.
    """
    parts = [(name.split("."), part) for name, part in module.named_modules()]
    sequences = [part for words, part in parts if words[-1].endswith("blocks") and "patch_embed" not in words]
    return [block for part in sequences if isinstance(part, nn.Sequential | nn.ModuleList) for block in part]


def only_size(backbone: nn.Module) -> int | None:
    """Side in pixels of the only images that a backbone takes, e.g. a BEiT or Swin; None if it takes others as well.

    Args:
        backbone: Any.
    """
    embedding: Any = getattr(backbone, "patch_embed", None)
    return embedding.img_size[0] if getattr(embedding, "strict_img_size", False) else None


def layer_scale(name: str, blocks: int, decay: float, patch_embed_lr: float = 1.0) -> float:
    """Learning-rate multiplier of a parameter of a ViT: each block has ``decay`` times the rate of the next block.

    Embeddings and registers come before the first block; the norm and whatever is no part of the ViT have the full
    rate, as in DINOv2's released code (since October 2023; before, its registers had the full rate).

    Args:
        name: Name of the parameter, in the ViT or in a method with a ``backbone``.
        blocks: Number of blocks.
        decay: Share of the rate of the layer above.
        patch_embed_lr: Further multiplier of the patch projection.
    """
    name = name.removeprefix("backbone.")
    layer = blocks + 1
    if name.startswith(("cls_token", "pos_embed", "patch_embed", "mask_token", "reg_token")):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    further = patch_embed_lr if name.startswith("patch_embed") else 1.0
    return further * decay ** (blocks + 1 - layer)


def inflate_channels(weight: Tensor, channels: int) -> Tensor:
    """The weight of a first layer for images of another number of channels, as FINO does it.

    Filters are kept, each further channel gets their mean, and all are scaled so that images whose channels are equal
    give what they gave before. For fewer channels, each gets the mean.

    Args:
        weight: ``(O, C, k, k)``.
        channels: Number of channels of the result.

    Returns:
        ``(O, channels, k, k)``.

    Example:
        >>> inflate_channels(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1), 5).flatten()
        tensor([0.6000, 1.2000, 1.8000, 1.2000, 1.2000])
    """
    known = weight.shape[1]
    if channels < known:
        return weight.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels
    mean = weight.mean(1, keepdim=True).expand(-1, channels - known, -1, -1)
    return torch.cat([weight, mean], dim=1) * (known / channels)


@functools.lru_cache(maxsize=16)
def sincos_positions(dim: int, grid: tuple[int, int], rows_first: bool, device: torch.device | None = None) -> Tensor:
    """Fixed two-dimensional sine and cosine positions, zero for the class token.

    Half of the width encodes the row, half the column, each as sines, then cosines, of D / 4 frequencies from 1 down
    to 1 / 10000. Own code because MoCo v3 and MAE order the halves differently, and timm and lightly have only MAE's.

    Args:
        dim: Width D, divisible by 4.
        grid: Rows and columns of patches.
        rows_first: Whether the first half encodes the row (MoCo v3) or the column (MAE).
        device: Device of the result.

    Returns:
        ``(1, 1 + rows * columns, D)``.
    """
    with torch.inference_mode(False):  # what validation asks for first is used in training, too
        frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        sides = (torch.arange(side, dtype=torch.float64) for side in grid)
        rows, columns = (index.flatten()[:, None] * frequencies for index in torch.meshgrid(*sides, indexing="ij"))
        first, second = (rows, columns) if rows_first else (columns, rows)
        patches = torch.cat([first.sin(), first.cos(), second.sin(), second.cos()], dim=1)
        return torch.cat([torch.zeros(1, dim, dtype=torch.float64), patches])[None].float().to(device)


def interpolated(table: Tensor, grid: tuple[int, int], antialiased: bool = False) -> Tensor:
    """A table ``(rows, columns, D)`` of positions, interpolated to a grid, ``(height, width, D)``.

    The same as ``F.interpolate`` with DINO's scale or with antialiasing, or as the table itself for its own grid; by
    operations that a graph repeats for any grid.

    Args:
        table: Positions.
        grid: Rows and columns; unknown while a graph is exported.
        antialiased: Whether with antialiasing and to the exact grid.
    """
    sides = [torch.arange(side, dtype=torch.float32) for side in grid]
    counts = [torch.ones_like(places).sum() for places in sides]
    other = (counts[0] != table.shape[0]) | (counts[1] != table.shape[1])
    weights, added = (_antialiased_weights, 0.0) if antialiased else (_cubic_weights, 0.1)
    down, across = (
        weights(places, (count + added * other) / length, length)
        for places, count, length in zip(sides, counts, table.shape[:2], strict=True)
    )
    return torch.einsum("wc,hcd->hwd", across, torch.einsum("hr,rcd->hcd", down, table))


def _cubic_weights(places: Tensor, scale: Tensor, table: int) -> Tensor:
    """Weights ``(length, table)`` of the bicubic interpolation along one side, as torch's."""
    sources = (places + 0.5) / scale - 0.5  # (length,)
    first = sources.floor()
    weights = torch.zeros(1)
    for offset in (-1, 0, 1, 2):
        distance = (sources - first - offset).abs()
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        index = (first + offset).clamp(0, table - 1)
        here = (index[:, None] == torch.arange(table, dtype=torch.float32)).float()  # (length, table)
        weights = weights + torch.where(distance <= 1, near, far)[:, None] * here
    return weights


def _antialiased_weights(places: Tensor, scale: Tensor, table: int) -> Tensor:
    """Weights ``(length, table)`` of the bicubic interpolation along one side with antialiasing, as torch's."""
    offsets = torch.arange(table, dtype=torch.float32) + 0.5 - ((places + 0.5) / scale)[:, None]  # (length, table)
    distance = offsets.abs() * scale.clamp(max=1)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


def input_channels(module: Any) -> int | None:
    """Number of channels of the images that a module takes, by its first convolution; None if it has none.

    Args:
        module: A method or an evaluation; None if there is none.
    """
    layers = () if module is None else module.modules()
    return next((layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)), None)
