"""Features of whole images and of their places, from a single pass through any backbone."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ssl_lightning.backbones.own import Pooled, pooled
from ssl_lightning.backbones.tokens import only_size


def features_and_map(backbone: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features ``(B, D)``, and the map ``(B, D', rows, columns)`` that they are pooled from.

    The map is the last stage of a CNN, or the patch tokens of a ViT after its last norm, without class token and
    registers. It is None for a backbone that does not show it, e.g. of torchvision.

    Args:
        backbone: Given by ``create_backbone``.
        images: ``(B, C, S, S)``.
    """
    network: Any = backbone
    if isinstance(backbone, Pooled):
        output = backbone.forward_features(images)
        return pooled(backbone.network, output, len(images)), _map_in(backbone.network, output)
    if not hasattr(backbone, "forward_features") or not hasattr(backbone, "forward_head"):
        return backbone(images), None
    output = network.forward_features(images)
    return network.forward_head(output), _map_in(backbone, output)


def _map_in(network: nn.Module, output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("last_hidden_state")
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else output
    if output.ndim == 3:
        patches = output[:, getattr(network, "num_prefix_tokens", 0) :]
        side = math.isqrt(patches.shape[1])
        if side * side == patches.shape[1] > 0:  # else some tokens are no patches
            return patches.mT.unflatten(2, (side, side))
    return None


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
