"""Swin: the official names, which SimMIM has as well, and mmpretrain's."""

from torch import nn

from ssl_lightning.checkpoints.layouts.layout import Layout, Weights
from ssl_lightning.checkpoints.layouts.vit import UNUSED

OFFICIAL = Layout(
    "the official Swin",
    first=r"patch_embed\.proj\.weight",
    sign=r"layers\.0\.downsample\.",  # at the end of the stage; timm's is at the beginning of the next
    renamed={
        **UNUSED,
        r"^layers\.(\d+)\.downsample\.": lambda match: f"layers.{int(match[1]) + 1}.downsample.",
    },
)

TIMM = Layout(
    "timm's Swin",
    first=r"patch_embed\.proj\.weight",
    sign=r"layers\.(1\.downsample|0\.blocks)\.",
    renamed=UNUSED,
)


def _sort_merged_patches(weights: Weights, _model: nn.Module, _outer: Weights) -> None:
    """Four neighboring patches: mmpretrain orders by channel, row and column, timm by column, row and channel."""
    for name, value in weights.items():
        if ".downsample." in name:
            weights[name] = value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)


MMPRETRAIN = Layout(
    "mmpretrain's Swin",
    first=r"patch_embed\.projection\.weight",
    sign=r"stages\.0\.blocks\.",
    renamed={
        **UNUSED,
        r"^patch_embed\.projection\.": "patch_embed.proj.",
        r"^stages\.(\d+)\.downsample\.": lambda match: f"layers.{int(match[1]) + 1}.downsample.",
        r"^stages\.": "layers.",
        r"\.attn\.w_msa\.": ".attn.",
        r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
        r"\.ffn\.layers\.1\.": ".mlp.fc2.",
        r"^norm\d+\.": "norm.",
    },
    finish=_sort_merged_patches,
)

LAYOUTS = (OFFICIAL, TIMM, MMPRETRAIN)
