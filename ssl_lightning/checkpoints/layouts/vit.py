"""ViTs: the official names of DINO, MAE, DINOv2, DINOv3, BEiT and others, of mmpretrain, AIMv2 and torchvision."""

from torch import nn

from ssl_lightning.checkpoints.layouts.layout import Layout, Weights
from ssl_lightning.checkpoints.layouts.tokens import fit_tokens

UNUSED = {r"relative_position_index$|relative_coords_table$|attn_mask$|\.periods$|local_cls_norm\.": None}
"""Buffers that models compute by themselves, and what no evaluation reads."""

OFFICIAL = Layout(
    "timm's names",
    first=r"patch_embed\.proj\.weight",
    sign=r"blocks\.0\.",
    renamed={
        **UNUSED,
        r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",  # trained in chunks
        r"^(register|storage)_tokens$": "reg_token",
        r"\.mlp\.w12\.": ".mlp.fc1.",
        r"\.mlp\.w1\.": ".mlp.fc1_g.",
        r"\.mlp\.w2\.": ".mlp.fc1_x.",
        r"\.mlp\.w3\.": ".mlp.fc2.",
    },
    finish=fit_tokens,
)

MMPRETRAIN = Layout(
    "mmpretrain's ViT",
    first=r"patch_embed\.projection\.weight",
    sign=r"layers\.0\.",
    renamed={
        **UNUSED,
        r"^patch_embed\.projection\.": "patch_embed.proj.",
        r"^layers\.": "blocks.",
        r"\.ln([12])\.": r".norm\1.",
        r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
        r"\.ffn\.layers\.1\.": ".mlp.fc2.",
        r"\.ffn\.w12\.": ".mlp.fc1.",
        r"\.ffn\.w3\.": ".mlp.fc2.",
        r"\.(attn\.gamma1|ffn\.gamma2)\.weight$": lambda match: f".ls{match[1][-1]}.gamma",
        r"^pre_norm\.": "norm_pre.",
        r"^ln1\.": "norm.",
        r"^ln2\.": "fc_norm.",
    },
    finish=fit_tokens,
)

AIMV2 = Layout(
    "AIMv2",
    first=r"preprocessor\.patchifier\.proj\.weight",
    renamed={
        r"^preprocessor\.patchifier\.": "patch_embed.",
        r"^preprocessor\.pos_embed$": "pos_embed",
        r"^trunk\.": "",
        r"\.norm_([12])\.": r".norm\1.",
        r"\.mlp\.fc1\.": ".mlp.fc1_g.",
        r"\.mlp\.fc3\.": ".mlp.fc1_x.",
        r"^post_trunk_norm\.": "norm.",
    },
)


def _pool_by_mean(weights: Weights, model: nn.Module, outer: Weights) -> None:
    """Positions as timm's, and no attention of the head: the project evaluates the mean of patches."""
    weights["pos_embed"] = weights.pop("pos_embed")[None]
    fit_tokens(weights, model, outer)


AIMV2_OF_TRANSFORMERS = Layout(
    "transformers' AIMv2",
    first=r"embeddings\.patch_embed\.weight",
    sign=r"encoder\.layers\.0\.",
    renamed={
        r"^embeddings\.patch_embed\.": "patch_embed.proj.",
        r"^embeddings\.rms_norm\.": "patch_embed.norm.",
        r"^embeddings\.position_embedding\.weight$": "pos_embed",
        r"^encoder\.layers\.": "blocks.",
        r"\.rms_norm([12])\.": r".norm\1.",
        r"\.attention\.([qkv])_proj\.": r".attn.\1.",
        r"\.attention\.out_proj\.": ".attn.proj.",
        r"\.ffn\.": ".mlp.",
        r"^rms_norm\.": "norm.",
    },
    finish=_pool_by_mean,
)

PARTS_OF_TORCHVISION = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.": "conv_proj.",
    "blocks.": "encoder.layers.encoder_layer_",
    ".norm1.": ".ln_1.",
    ".attn.qkv.": ".self_attention.in_proj_",
    ".attn.proj.": ".self_attention.out_proj.",
    ".norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.0.",
    ".mlp.fc2.": ".mlp.3.",
    "norm.": "encoder.ln.",
}
"""Names of timm's ViT and of torchvision's."""

TORCHVISION = Layout(
    "torchvision's ViT",
    first=r"conv_proj\.weight",
    sign=r"encoder\.layers\.encoder_layer_0\.",
    renamed={old.replace(".", r"\."): new for new, old in [("norm.", "encoder.ln."), *PARTS_OF_TORCHVISION.items()]},
)

LAYOUTS = (OFFICIAL, MMPRETRAIN, AIMV2, AIMV2_OF_TRANSFORMERS, TORCHVISION)
