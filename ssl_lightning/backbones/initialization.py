"""How the papers initialize their networks, where timm does otherwise.

The functions named after a method give timm's ViT the initialization of its released code; all change it in place.
"""

import math
from typing import Any

import torch
from torch import nn


def residual_branches(backbone: nn.Module, scale: float) -> None:
    """Set the last BatchNorm weight of each residual branch of a ResNet: 0 starts with the identity (Goyal 2017).

    Args:
        backbone: A ResNet of timm or torchvision; others stay as they are.
        scale: 0 or 1.
    """
    for block in backbone.modules():
        last = getattr(block, "bn3", None) or getattr(block, "bn2", None)
        if hasattr(block, "downsample") and isinstance(last, nn.BatchNorm2d):
            nn.init.constant_(last.weight, scale)


def moco_v3(vit: Any) -> None:
    """MoCo v3's ViT: a patch projection frozen at random values, fixed positions (section 4 and appendix).

    Args:
        vit: Built with ``weight_init="moco"``.
    """
    _patch_projection(vit)
    nn.init.zeros_(vit.patch_embed.proj.bias)
    vit.patch_embed.requires_grad_(False)
    vit.fix_positions(rows_first=True)


def dino(vit: Any) -> None:
    """DINO's and iBOT's ViT: a class token of deviation 0.02.

    Args:
        vit: With a class token.
    """
    nn.init.trunc_normal_(vit.cls_token, std=0.02)


def mae(vit: Any) -> None:
    """MAE's encoder: Xavier-uniform linear layers and patch projection, fixed positions.

    Args:
        vit: With a class token.
    """
    vit.apply(xavier_linear)
    _patch_projection(vit)
    nn.init.normal_(vit.cls_token, std=0.02)
    vit.fix_positions(rows_first=False)


def capi(vit: Any) -> None:
    """CAPI's encoder: MAE's, and registers of deviation 0.02.

    Args:
        vit: A ViT whose positions can be fixed.
    """
    vit.apply(xavier_linear)
    _patch_projection(vit)
    if getattr(vit, "reg_token", None) is not None:
        nn.init.normal_(vit.reg_token, std=0.02)
    vit.fix_positions(rows_first=False)


def ijepa(vit: Any, linear: bool = True) -> None:
    """I-JEPA's encoder: normal of deviation 0.02, fixed positions.

    Args:
        vit: Without a class token.
        linear: Whether to draw the weights; False keeps timm's.
    """
    if linear:
        vit.apply(normal_linear)
    vit.fix_positions(rows_first=False)


def beit(vit: Any, mask_token: nn.Parameter) -> None:
    """BEiT's encoder, and SimMIM's ViT: ``narrow_linear``, and residual branches that shrink with the depth.

    Args:
        vit: A ViT or BEiT of timm.
        mask_token: The method's.
    """
    vit.apply(narrow_linear)
    for token in (mask_token, vit.cls_token, vit.pos_embed):
        if token is not None:
            narrow(token)
    with torch.no_grad():
        for depth, block in enumerate(vit.blocks, start=1):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.div_(math.sqrt(2 * depth))


def xavier_linear(module: nn.Module) -> None:
    """Xavier uniform, biases zero (MAE).

    Args:
        module: Changed if it is a linear layer; for ``Module.apply``.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        _no_bias(module)


def normal_linear(module: nn.Module) -> None:
    """Normal of deviation 0.02, biases zero (I-JEPA).

    Args:
        module: Changed if it is a linear layer or a convolution; for ``Module.apply``.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        _no_bias(module)


def narrow_linear(module: nn.Module) -> None:
    """``narrow`` weights, biases zero (BEiT).

    Args:
        module: Changed if it is a linear layer or a convolution; for ``Module.apply``.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        narrow(module.weight)
        _no_bias(module)


def narrow(weights: Any) -> None:
    """Normal of deviation 0.02, truncated at 0.02, as in BEiT's released code: a deviation of 0.0108 is left.

    Args:
        weights: Tensor.
    """
    nn.init.trunc_normal_(weights, std=0.02, a=-0.02, b=0.02)


def _no_bias(module: Any) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _patch_projection(vit: Any) -> None:
    """Draw the patch projection as if it were a linear layer: Xavier uniform."""
    weight = vit.patch_embed.proj.weight  # (D, 3, P, P)
    bound = math.sqrt(6 / (len(weight) + weight[0].numel()))
    nn.init.uniform_(weight, -bound, bound)
