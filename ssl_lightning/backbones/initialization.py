"""The initialisations of the papers, where they differ from those of timm."""

import math
from typing import Any

from torch import nn


def init_patch_projection(vit: Any) -> None:
    """Draw the patch projection of a ViT as if it were a linear layer (Xavier uniform; MoCo v3 and MAE).

    Args:
        vit: A ViT of timm.
    """
    weight = vit.patch_embed.proj.weight  # (D, 3, P, P)
    bound = math.sqrt(6 / (len(weight) + weight[0].numel()))
    nn.init.uniform_(weight, -bound, bound)


def init_residual_branches(backbone: nn.Module, scale: float) -> None:
    """Set the last BatchNorm weight of each residual branch of a ResNet: 0 starts with the identity (Goyal 2017).

    Args:
        backbone: A ResNet of timm or torchvision; others are left alone.
        scale: 0 or 1.
    """
    for block in backbone.modules():
        last = getattr(block, "bn3", None) or getattr(block, "bn2", None)
        if hasattr(block, "downsample") and isinstance(last, nn.BatchNorm2d):
            nn.init.constant_(last.weight, scale)
