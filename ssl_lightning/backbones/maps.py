"""Features of whole images and of their places, from a single pass through any backbone."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ssl_lightning.backbones.own import Pooled, name_of, pooled, without_wrapper
from ssl_lightning.backbones.tokens import only_size
from ssl_lightning.errors import UserError


def features_and_map(backbone: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features ``(B, D)``, and the map ``(B, D', rows, columns)`` that they are pooled from.

    The map is the last stage of a CNN, or the patch tokens of a ViT after its last norm, without class token and
    registers. It is None for a backbone that does not show it, e.g. of torchvision.

    Args:
        backbone: Given by ``create_backbone``.
        images: ``(B, C, H, W)``.
    """
    network: Any = backbone
    if isinstance(backbone, Pooled):
        output = backbone.forward_features(images)
        return pooled(backbone.network, output, len(images)), _map_in(backbone.network, output, images)
    if not hasattr(backbone, "forward_features") or not hasattr(backbone, "forward_head"):
        return backbone(images), None
    output = network.forward_features(images)
    return network.forward_head(output), _map_in(backbone, output, images)


def _map_in(network: nn.Module, output: Any, images: Tensor) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("last_hidden_state")
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else output
    if output.ndim == 3:
        patches = output[:, getattr(network, "num_prefix_tokens", 0) :]
        height, width = images.shape[2:]
        rows = round(math.sqrt(patches.shape[1] * height / width))
        if rows > 0 and rows * rows * width == patches.shape[1] * height:  # else some tokens are no patches
            return patches.mT.unflatten(2, (rows, -1))
    return None


def map_and_attention(backbone: nn.Module, images: Tensor, attention: bool = True) -> tuple[Tensor, Tensor | None]:
    """What there is to look at in a network: its last map, and the attention of the last block of a ViT.

    The map ``(B, D, rows, columns)`` is as ``features_and_map`` gives it, after the last norm of a ViT. Where a CNN has
    fewer than 4 x 4 places there, or a network does not show its map, e.g. of torchvision, it is the last larger map,
    or the last tokens, that any of its parts gives.

    The attention ``(B, heads, rows, columns)`` is from the class token to the patches; without a class token, the mean
    from all patches. It is None for other networks.

    Args:
        backbone: Given by ``create_backbone``, in eval mode.
        images: ``(B, C, H, W)``.
        attention: Whether to look at the attention, which takes memory for each pair of patches.

    Raises:
        UserError: There is no map.
    """
    network: Any = without_wrapper(backbone)
    with _kept_maps(backbone, images) as maps, _kept_attention(network, attention) as weights:
        grid = features_and_map(backbone, images)[1]
    is_small_cnn = grid is not None and min(grid.shape[2:]) < _FEWEST and not hasattr(network, "patch_embed")
    if maps and (grid is None or is_small_cnn):
        grid = maps[0]
    elif grid is None:
        raise UserError(
            f"backbone {name_of(network)!r} gives no map of at least {_FEWEST} x {_FEWEST} places for images of "
            f"{images.shape[3]}x{images.shape[2]} px; choose a CNN or a ViT, or larger images."
        )
    elif (norm := getattr(network, "fc_norm", None)) is not None:  # the last norm of ViTs that average their patches
        grid = norm(grid.movedim(1, -1)).movedim(-1, 1)
    return grid, _to_patches(network, weights[0], grid) if weights else None


_FEWEST = 4
_MOST_OTHER_TOKENS = 16
"""Most class tokens and registers before the patches."""


@contextmanager
def _kept_maps(backbone: nn.Module, images: Tensor) -> Iterator[list[Tensor]]:
    """Keep the last map, or the last tokens of its places, that any part of a network gives."""
    maps: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or len(output) != len(images):
            return
        if output.ndim == 4:
            maps[:] = [*_as_seen(output, images), *maps][:1]
        elif output.ndim == 3 and maps:
            rows, columns = maps[0].shape[2:]
            if 0 <= output.shape[1] - rows * columns <= _MOST_OTHER_TOKENS:
                maps[:] = [output[:, -rows * columns :].mT.unflatten(2, (rows, columns))]

    hooks = [part.register_forward_hook(keep) for part in backbone.modules()]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def _as_seen(output: Tensor, images: Tensor) -> list[Tensor]:
    """The output with channels before rows and columns, if it has the proportions of the images."""
    height, width = images.shape[2:]
    return [
        grid
        for grid in (output, output.permute(0, 3, 1, 2))
        if min(grid.shape[2:]) >= _FEWEST
        and abs(grid.shape[2] * width - grid.shape[3] * height) < max(height, width)  # sides are rounded
    ]


@contextmanager
def _kept_attention(network: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """Keep the attention ``(B, heads, N, N)`` of the last block of a ViT of timm, or of torch's layer."""
    weights: list[Tensor] = []
    blocks: Any = getattr(network, "blocks", ())
    of_timm: Any = getattr(blocks[-1], "attn", None) if len(blocks) else None
    of_torch = [part for part in network.modules() if isinstance(part, nn.MultiheadAttention)]
    hooks, fused = [], getattr(of_timm, "fused_attn", None)
    if wanted and fused is not None and hasattr(of_timm, "attn_drop"):
        of_timm.fused_attn = False  # which would not hold the weights
        hooks += [of_timm.attn_drop.register_forward_pre_hook(lambda _, inputs: weights.append(inputs[0]))]
    elif wanted and of_torch:
        asked = {"need_weights": True, "average_attn_weights": False}
        ask = of_torch[-1].register_forward_pre_hook(
            lambda _, inputs, kwargs: (inputs, kwargs | asked), with_kwargs=True
        )
        hooks += [ask, of_torch[-1].register_forward_hook(lambda *called: weights.append(called[2][1]))]
    try:
        yield weights
    finally:
        if fused is not None:
            of_timm.fused_attn = fused
        for hook in hooks:
            hook.remove()


def _to_patches(network: nn.Module, weights: Tensor, grid: Tensor) -> Tensor | None:
    """Attention ``(B, heads, rows, columns)`` to the patches; None if the weights are not between these patches."""
    rows, columns = grid.shape[2:]
    others = weights.shape[-1] - rows * columns
    known = getattr(network, "num_prefix_tokens", 1 if others else 0)
    if weights.ndim != 4 or weights.shape[-2] != weights.shape[-1] or others != known:
        return None
    names = ("cls_token", "class_token")
    has_class = others > 0 and any(getattr(network, name, None) is not None for name in names)
    attention = weights[:, :, 0, others:] if has_class else weights[:, :, others:, others:].mean(2)
    return attention.unflatten(2, (rows, columns))


def fitting_side(backbone: nn.Module, side: int) -> int:
    """The only side in pixels of the images that a backbone takes, else a side rounded to its patches.

    Args:
        backbone: Any.
        side: Side in pixels.
    """
    stated = getattr(backbone, "image_size", getattr(backbone, "img_size", None))
    if isinstance(only := only_size(backbone) or stated, int):
        return only
    patch: int = getattr(backbone, "patch_side", 1)
    return max(1, round(side / patch)) * patch
