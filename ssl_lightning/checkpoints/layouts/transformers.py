"""Networks on tokens of transformers: ViT, MAE, I-JEPA, DINOv2, DINOv3, BEiT, Data2Vec and Swin.

The names of its files, and the other ones that ``state_dict()`` gives since version 5.
"""

from torch import nn

from ssl_lightning.checkpoints.layouts.layout import Layout, New, Weights, take_from_outside
from ssl_lightning.checkpoints.layouts.tokens import fit_tokens

BLOCKS: dict[str, New | None] = {
    r"relative_position_index$": None,
    r"^embeddings\.patch_embeddings\.(projection\.)?": "patch_embed.proj.",
    r"\.attention\.(attention|self)\.": ".attention.",
    r"\.attention\.(query|q_proj)\.": ".attn.q.",
    r"\.attention\.(key|k_proj)\.": ".attn.k.",
    r"\.attention\.(value|v_proj)\.": ".attn.v.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.(attention\.)?(relative_position_bias\.)?relative_position_bias_table$": ".attn.relative_position_bias_table",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"^layernorm\.": "norm.",
}

TOKENS: dict[str, New | None] = {
    r"^embeddings\.cls_token$": "cls_token",
    r"^embeddings\.distillation_token$": "dist_token",
    r"^embeddings\.mask_token$": "mask_token",
    r"^embeddings\.register_tokens$": "reg_token",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^(encoder\.relative_position_bias|shared_position_bias)\.": "rel_pos_bias.shared_",
    r"^(encoder\.|model\.)?layers?\.": "blocks.",
    r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
    r"\.lambda_([12])$": r".gamma_\1",
    r"\.mlp\.weights_in\.": ".mlp.fc1.",
    r"\.mlp\.weights_out\.": ".mlp.fc2.",
    r"^pooler\.layernorm\.": "fc_norm.",
}


def _with_last_norm(weights: Weights, model: nn.Module, outer: Weights) -> None:
    """The last norm may lie outside: in BEiT for masked images."""
    take_from_outside(weights, outer, "norm", "layernorm")
    fit_tokens(weights, model, outer)


VIT = Layout(
    "transformers' ViT",
    first=r"embeddings\.patch_embeddings\.(projection\.)?weight",
    sign=r"(encoder\.|model\.)?layers?\.0\.(?!blocks\.)",
    renamed={**TOKENS, **BLOCKS, r"^rel_pos_bias\.(shared_|attn\.)+": "rel_pos_bias."},
    finish=_with_last_norm,
)

SWIN = Layout(
    "transformers' Swin",
    first=r"embeddings\.patch_embeddings\.projection\.weight",
    sign=r"encoder\.layers\.0\.blocks\.",
    renamed={
        r"^embeddings\.norm\.": "patch_embed.norm.",
        r"^embeddings\.mask_token$": "mask_token",
        r"^encoder\.": "",
        r"^layers\.(\d+)\.downsample\.": lambda match: f"layers.{int(match[1]) + 1}.downsample.",
        **BLOCKS,
    },
    finish=fit_tokens,
)

LAYOUTS = (VIT, SWIN)
