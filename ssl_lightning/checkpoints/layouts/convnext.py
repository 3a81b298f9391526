"""ConvNeXt: the official names, which DINOv3 has as well, and transformers' names."""

from torch import nn

from ssl_lightning.checkpoints.layouts.layout import Layout, New, Weights, take_from_outside

BLOCKS: dict[str, New | None] = {
    r"\.(dwconv|depthwise_conv)\.": ".conv_dw.",
    r"\.(pwconv|pointwise_conv)([12])\.": r".mlp.fc\2.",
    r"\.grn\.(gamma|weight)$": ".mlp.grn.weight",
    r"\.grn\.(beta|bias)$": ".mlp.grn.bias",
    r"\.(layernorm|layer_norm)\.": ".norm.",
    r"\.layer_scale_parameter$": ".gamma",
    r"^(norm|layernorm|layer_norm)\.": "head.norm.",
}


def _finish(weights: Weights, model: nn.Module, outer: Weights) -> None:
    """The last norm may lie outside; some models of timm have convolutions for linear layers."""
    take_from_outside(weights, outer, "head.norm", "layer_norm")
    for name, value in model.state_dict().items():
        if ".mlp." in name and name in weights and weights[name].numel() == value.numel():
            weights[name] = weights[name].reshape(value.shape)


OFFICIAL = Layout(
    "the official ConvNeXt",
    first=r"downsample_layers\.0\.0\.weight",
    sign=r"stages\.0\.0\.",
    renamed={
        r"^norms\.": None,  # the last norm again, for dense tasks
        r"^downsample_layers\.0\.": "stem.",
        r"^downsample_layers\.(\d+)\.": r"stages.\1.downsample.",
        r"^stages\.(\d+)\.(\d+)\.": r"stages.\1.blocks.\2.",
        **BLOCKS,
    },
    finish=_finish,
)

TRANSFORMERS = Layout(
    "transformers' ConvNeXt",
    first=r"embeddings\.patch_embeddings\.weight",
    sign=r"encoder\.stages\.0\.",
    renamed={
        r"^embeddings\.patch_embeddings\.": "stem.0.",
        r"^embeddings\.layernorm\.": "stem.1.",
        r"^encoder\.": "",
        r"^stages\.(\d+)\.downsampling_layer\.": r"stages.\1.downsample.",
        r"^stages\.(\d+)\.layers\.": r"stages.\1.blocks.",
        **BLOCKS,
    },
    finish=_finish,
)

DINOV3_OF_TRANSFORMERS = Layout(
    "transformers' DINOv3 ConvNeXt",
    first=r"stages\.0\.downsample_layers\.0\.weight",
    renamed={
        r"^stages\.0\.downsample_layers\.": "stem.",
        r"^stages\.(\d+)\.downsample_layers\.": r"stages.\1.downsample.",
        r"^stages\.(\d+)\.layers\.": r"stages.\1.blocks.",
        **BLOCKS,
    },
    finish=_finish,
)

LAYOUTS = (OFFICIAL, TRANSFORMERS, DINOV3_OF_TRANSFORMERS)
