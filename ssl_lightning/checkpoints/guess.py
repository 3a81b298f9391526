"""Which timm model weights belong to, where their shapes or a ``config.json`` leave no doubt."""

import math
from typing import Any

from ssl_lightning.backbones.tokens import sincos_positions
from ssl_lightning.checkpoints.layouts import Weights

Guess = tuple[str, dict[str, Any]]
"""Name and arguments of a model."""

_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
"""By blocks per stage, and whether they are bottlenecks."""

_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
"""By width and depth; each head has 64 numbers."""

_Sizes = dict[tuple[int, tuple[int, ...]], str]

_SWINS: _Sizes = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}

_CONVNEXTS: _Sizes = {
    (96, (3, 3, 9, 3)): "tiny",
    (96, (3, 3, 27, 3)): "small",
    (128, (3, 3, 27, 3)): "base",
    (192, (3, 3, 27, 3)): "large",
    (256, (3, 3, 27, 3)): "xlarge",
}

_NOT_DINOV3 = {("base", "_plus"), ("large", "_plus"), ("huge", "")}
"""Sizes that DINOv3 was not released in."""

_GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}
"""Arguments of I-JEPA's ViT."""


def from_config(config: dict[str, Any]) -> Guess | None:
    """The model that a ``config.json`` of timm or transformers describes; None if no model of timm is known for it.

    Args:
        config: Its content.
    """
    if isinstance(name := config.get("architecture"), str):
        arguments = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
        if isinstance(size := arguments.get("img_size"), list):
            arguments["img_size"] = size[0] if size[0] == size[-1] else tuple(size)
        return name, arguments
    kind = config.get("model_type")
    if kind == "resnet":
        bottleneck = config["layer_type"] == "bottleneck"
        name = _RESNETS.get((tuple(config["depths"]), bottleneck), "resnet50" if bottleneck else "resnet18")
        widths = [width // (4 if bottleneck else 1) for width in config["hidden_sizes"]]
        return name, _other({"layers": config["depths"], "channels": widths, **_channels(config)}, name)
    if kind in ("convnext", "convnextv2", "dinov3_convnext"):
        arguments = {"depths": config["depths"], "dims": config["hidden_sizes"], **_channels(config)}
        return f"{kind.removeprefix('dinov3_')}_tiny", arguments
    if kind == "swin":
        arguments = {name: config[name] for name in ("embed_dim", "depths", "num_heads", "window_size", "patch_size")}
        return "swin_tiny_patch4_window7_224", {"img_size": config["image_size"], **arguments, **_channels(config)}
    if kind not in ("vit", "vit_mae", "vit_msn", "ijepa", "dinov2", "dinov2_with_registers", "dinov3_vit", "beit"):
        return None if kind != "data2vec-vision" else from_config({**config, "model_type": "beit"})
    arguments = {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        **_channels(config),
    }
    if "intermediate_size" in config:
        arguments["mlp_ratio"] = config["intermediate_size"] / config["hidden_size"]
    if config.get("qkv_bias") is False:
        arguments["qkv_bias"] = False
    size = _VITS.get((arguments["embed_dim"], arguments["depth"]), "base")
    if kind == "beit":
        shared, pooled = config["use_shared_relative_position_bias"], config["use_mean_pooling"]
        positions = {"use_shared_rel_pos_bias": True} if shared else {}
        relative = config["use_relative_position_bias"]
        return f"beit_{'large' if size == 'large' else 'base'}_patch16_224", {
            **arguments,
            "init_values": config["layer_scale_init_value"] or None,
            "use_abs_pos_emb": config["use_absolute_position_embeddings"],
            "use_rel_pos_bias": relative,
            **positions,
            "use_fc_norm": pooled,
            "global_pool": "avg" if pooled else "token",
        }
    if kind == "dinov3_vit":
        gated = config["use_gated_mlp"]
        registers = {"num_reg_tokens": config["num_register_tokens"], "global_pool": "token"}
        return f"vit_small_{'plus_' if gated else ''}patch16_dinov3_qkvb", {**arguments, **registers}
    if kind.startswith("dinov2"):
        gated, registers = config["use_swiglu_ffn"], config.get("num_register_tokens", 0)
        if gated:
            ratio = arguments.get("mlp_ratio", config["mlp_ratio"])
            arguments["mlp_ratio"] = _swiglu_width(arguments["embed_dim"], ratio) / arguments["embed_dim"]
        else:
            arguments["mlp_ratio"] = config["mlp_ratio"]
        base = f"vit_{'giant' if gated else size if size in ('small', 'base', 'large') else 'base'}_patch14"
        return f"{base}{'_reg4' if registers else ''}_dinov2", {
            **arguments,
            **({"reg_tokens": registers} if registers else {}),
        }
    return "vit_base_patch16_224", {**arguments, **(_GAP if kind == "ijepa" else {})}


def _channels(config: dict[str, Any]) -> dict[str, int]:
    return {"in_chans": config["num_channels"]} if config.get("num_channels", 3) != 3 else {}


def _other(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments of a ResNet that differ from the model of that name."""
    usual = {"channels": [64, 128, 256, 512]}
    usual["layers"] = next((list(layers) for (layers, _), known in _RESNETS.items() if known == name), [])
    return {key: value for key, value in arguments.items() if _as_list(value) != usual.get(key)}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _swiglu_width(width: int, ratio: float) -> int:
    """Columns of both halves of DINOv2's first layer: two thirds of the usual width, rounded up to 8."""
    return 2 * ((int(width * ratio * 2 / 3) + 7) // 8 * 8)


def from_weights(weights: Weights) -> Guess | None:
    """The model that weights belong to, if their shapes leave no doubt.

    Args:
        weights: Under timm's names.
    """
    for family in (_resnet, _convnext, _swin, _vit):
        if (guess := family(weights)) is not None:
            return guess
    return None


def _count(weights: Weights, prefix: str) -> int:
    """How many parts are numbered after a prefix."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)}
    return len({number for number in numbers if number.isdigit()})


def _resnet(weights: Weights) -> Guess | None:
    if "conv1.weight" not in weights or "layer1.0.conv1.weight" not in weights:
        return None
    stem = weights["conv1.weight"].shape
    bottleneck = "layer1.0.conv3.weight" in weights
    name = _RESNETS.get((tuple(_count(weights, f"layer{stage}.") for stage in range(1, 5)), bottleneck))
    width, inner = weights["layer1.0.conv1.weight"].shape[0], weights["layer1.0.conv2.weight"].shape[1]
    if name is None or stem[0] != 64 or stem[2] != 7 or width != inner or width not in (64, 128):
        return None  # a smaller stem: its stride and padding are in no weight
    name = name if width == 64 else {"resnet50": "wide_resnet50_2", "resnet101": "wide_resnet101_2"}.get(name, "")
    return (name, {} if stem[1] == 3 else {"in_chans": stem[1]}) if name else None


def _convnext(weights: Weights) -> Guess | None:
    if "stem.0.weight" not in weights or "stages.0.blocks.0.conv_dw.weight" not in weights:
        return None
    depths = tuple(_count(weights, f"stages.{stage}.blocks.") for stage in range(4))
    size = _CONVNEXTS.get((weights["stem.0.weight"].shape[0], depths))
    version = "convnextv2" if "stages.0.blocks.0.mlp.grn.weight" in weights else "convnext"
    return (f"{version}_{size}", {}) if size else None


def _swin(weights: Weights) -> Guess | None:
    table = weights.get("layers.0.blocks.0.attn.relative_position_bias_table")
    if table is None:
        return None
    depths = tuple(_count(weights, f"layers.{stage}.blocks.") for stage in range(4))
    size = _SWINS.get((weights["patch_embed.proj.weight"].shape[0], depths))
    pixels = {169: "window7_224", 529: "window12_384"}.get(len(table))
    return (f"swin_{size}_patch4_{pixels}", {}) if size and pixels else None


def _vit(weights: Weights) -> Guess | None:
    patch = weights.get("patch_embed.proj.weight")
    if patch is None or "blocks.0.norm1.weight" not in weights:
        return None
    width, channels, side, _ = patch.shape
    size = _VITS.get((width, _count(weights, "blocks.")))
    gated = any(".mlp.gate_proj." in name or ".mlp.fc1_g." in name for name in weights)
    scaled = "blocks.0.ls1.gamma" in weights or "blocks.0.gamma_1" in weights
    positions, registers = weights.get("pos_embed"), weights.get("reg_token")
    arguments: dict[str, Any] = {} if channels == 3 else {"in_chans": channels}
    if any("relative_position_bias_table" in name for name in weights) or "patch_embed.norm.weight" in weights:
        return None  # how BEiT pools is in no weight
    if positions is None:
        if registers is None or size not in ("small", "base", "large", "huge") or side != 16:
            return None
        plus = "_plus" if gated else ""
        name = f"vit_{size}{plus}_patch16_dinov3_qkvb"
        return (name, {**arguments, "global_pool": "token"}) if (size, plus) not in _NOT_DINOV3 else None
    tokens = positions.shape[1]
    rows = math.isqrt(tokens) if math.isqrt(tokens) ** 2 == tokens else math.isqrt(tokens - 1)
    arguments["img_size"] = rows * side
    if width == 1536 and _count(weights, "blocks.") == 40 and scaled and side == 14:
        return f"vit_giant_patch14_{'reg4_' if registers is not None else ''}dinov2", arguments
    if size is None or gated or "norm_pre.weight" in weights:
        return None
    if scaled:
        known = size in ("small", "base", "large") and side == 14
        return (f"vit_{size}_patch14_{'reg4_' if registers is not None else ''}dinov2", arguments) if known else None
    if registers is not None:
        return None
    if size == "small" and is_mocos(weights["pos_embed"]):
        return None  # twelve heads or six
    if "cls_token" not in weights:
        arguments |= _GAP
    elif "fc_norm.weight" in weights and "norm.weight" not in weights:
        arguments["global_pool"] = "avg"
    return f"vit_{size}_patch{14 if size == 'huge' else 16}_224", {**arguments, "patch_size": side}


def is_mocos(positions: Any) -> bool:
    """Whether positions are fixed in the order that only MoCo v3 has.

    Args:
        positions: Of a ViT.
    """
    if positions.ndim != 3 or positions.shape[2] % 4:
        return False
    rows = math.isqrt(positions.shape[1] - 1)
    fixed = sincos_positions(positions.shape[2], (rows, rows), True)
    return positions.shape == fixed.shape and fixed.allclose(positions.float(), atol=0.01)
