"""Backbones as folders of transformers: ViT, I-JEPA's ViT, DINOv2, DINOv3 and ResNet."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_lightning.checkpoints.layouts.layout import Weights, renamed
from ssl_lightning.checkpoints.pretrained import Pretrained
from ssl_lightning.errors import UserError

_TOKENS = {
    r"^(cls_token|mask_token)$": r"embeddings.\1",
    r"^reg_token$": "embeddings.register_tokens",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.attn\.([qkv])\.": lambda match: f".attention.attention.{ {'q': 'query', 'k': 'key', 'v': 'value'}[match[1]] }.",
    r"\.(?:ls|gamma_)([12])(?:\.gamma)?$": r".layer_scale\1.lambda1",
}

_DINOV2 = {
    **_TOKENS,
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^blocks\.": "encoder.layer.",
    r"^norm\.": "layernorm.",
}

_VIT = {
    **_DINOV2,
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}

_DINOV2_GATED = {**_DINOV2, r"\.mlp\.fc1\.": ".mlp.weights_in.", r"\.mlp\.fc2\.": ".mlp.weights_out."}

_DINOV3 = {
    **_TOKENS,
    r"\.attn\.([qkv])\.": r".attention.\1_proj.",
    r"\.attn\.proj\.": ".attention.o_proj.",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.",
    r"^blocks\.": "layer.",
    r"\.mlp\.fc1_g\.": ".mlp.gate_proj.",
    r"\.mlp\.(fc1|fc1_x)\.": ".mlp.up_proj.",
    r"\.mlp\.fc2\.": ".mlp.down_proj.",
}

_RESNET = {
    r"^conv1\.": "embedder.embedder.convolution.",
    r"^bn1\.": "embedder.embedder.normalization.",
    r"^layer(\d+)\.": lambda match: f"encoder.stages.{int(match[1]) - 1}.layers.",
    r"\.conv(\d+)\.": lambda match: f".layer.{int(match[1]) - 1}.convolution.",
    r"\.bn(\d+)\.": lambda match: f".layer.{int(match[1]) - 1}.normalization.",
    r"\.downsample\.0\.": ".shortcut.convolution.",
    r"\.downsample\.1\.": ".shortcut.normalization.",
}


def write_folder(pretrained: Pretrained, folder: Path, name: str, metadata: dict[str, str]) -> str:
    """Write the files of a folder that transformers loads, and check the features.

    Args:
        pretrained: The backbone.
        folder: Exists.
        name: What the folder is called in the lines that load it.
        metadata: For the file of weights.

    Returns:
        Lines that load it, and give ``features`` of ``images``.

    Raises:
        UserError: transformers has no such network.
    """
    from safetensors.torch import save_file

    try:
        from transformers import AutoModel
    except ImportError as error:
        raise UserError(
            "the format transformers needs more packages: pip install 'ssl_lightning[transformers]'."
        ) from error
    model: Any = pretrained.backbone
    config, table, features, read = _described(pretrained)
    weights = renamed(_separated(dict(model.state_dict()), config), table)
    weights = {key: value.contiguous() for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", {**metadata, "format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(_preparation(pretrained), indent=2))
    try:
        theirs = AutoModel.from_pretrained(folder).eval()
    except Exception as error:  # transformers checks configurations in many ways
        raise _no_twin(pretrained, str(error)) from error
    size = pretrained.image_transform["size"]
    images = torch.rand(2, config["num_channels"], size, size)
    with torch.no_grad():
        expected, outputs = model(images), theirs(images)
        given: Tensor = read(outputs)
    apart = float((given - expected).abs().max()) if given.shape == expected.shape else float("inf")
    if not apart <= 1e-4 * max(1.0, float(expected.abs().max())):
        raise _no_twin(pretrained, f"its features differ by {apart:.1e}")
    return (
        f'from transformers import AutoModel\n\nbackbone = AutoModel.from_pretrained("{name}").eval()\n'
        f"outputs = backbone(images)\nfeatures = {features}"
    )


def _no_twin(pretrained: Pretrained, reason: str) -> UserError:
    return UserError(
        f"transformers has no network that is {pretrained.name} as it was trained: {reason}; choose the format timm, "
        "safetensors or onnx."
    )


def _described(pretrained: Pretrained) -> tuple[dict[str, Any], dict[str, Any], str, Callable[[Any], Tensor]]:
    """The configuration of the same network in transformers, the table of its names, and its features, as code too."""
    model: Any = pretrained.backbone
    names = model.state_dict().keys()
    if "layer1.0.conv1.weight" in names and "conv1.weight" in names:
        stages = [getattr(model, f"layer{stage}") for stage in range(1, 5)]
        bottleneck = "layer1.0.conv3.weight" in names
        last = "conv3" if bottleneck else "conv2"
        config = {
            "model_type": "resnet",
            "architectures": ["ResNetModel"],
            "num_channels": model.conv1.in_channels,
            "embedding_size": model.conv1.out_channels,
            "hidden_sizes": [getattr(stage[0], last).out_channels for stage in stages],
            "depths": [len(stage) for stage in stages],
            "layer_type": "bottleneck" if bottleneck else "basic",
            "hidden_act": "relu",
        }
        return config, _RESNET, "outputs.pooler_output.flatten(1)", lambda outputs: outputs.pooler_output.flatten(1)
    if "blocks.0.attn.qkv.weight" not in names or "norm.weight" not in names:
        raise _no_twin(pretrained, "it is neither a ResNet nor a ViT")
    if not isinstance(getattr(model.patch_embed, "proj", None), torch.nn.Conv2d):
        raise _no_twin(pretrained, "more than one convolution embeds its patches")
    block, prefix = model.blocks[0], model.num_prefix_tokens
    hidden = block.mlp.fc2.in_features
    config = {
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": model.norm.eps,
        "hidden_act": "gelu",
        "qkv_bias": any(name.startswith("blocks.0.attn.q") and name.endswith("bias") for name in names),
    }
    pooled: tuple[str, Callable[[Any], Tensor]]
    if model.global_pool == "token":
        pooled = "outputs.last_hidden_state[:, 0]", lambda outputs: outputs.last_hidden_state[:, 0]
    else:
        pooled = (
            f"outputs.last_hidden_state[:, {prefix}:].mean(1)",
            lambda outputs: outputs.last_hidden_state[:, prefix:].mean(1),
        )
    if "pos_embed" not in names:
        gated = "blocks.0.mlp.fc1_g.weight" in names
        biases = {"query_bias": config["qkv_bias"], "value_bias": config["qkv_bias"], "key_bias": False}
        registers = {"num_register_tokens": prefix - 1, "intermediate_size": hidden, "use_gated_mlp": gated}
        config |= {"model_type": "dinov3_vit", "architectures": ["DINOv3ViTModel"], **biases, **registers}
        return {**config, "hidden_act": "silu" if gated else "gelu"}, _DINOV3, *pooled
    if "blocks.0.ls1.gamma" in names:
        gated = block.mlp.fc1.out_features != hidden
        kind, name = "dinov2", "Dinov2Model"
        if "reg_token" in names:
            kind, name = "dinov2_with_registers", "Dinov2WithRegistersModel"
            config["num_register_tokens"] = prefix - 1
        ratio = 4 if gated else hidden / model.embed_dim
        ratio = int(ratio) if ratio == int(ratio) else ratio
        config |= {"model_type": kind, "architectures": [name], "mlp_ratio": ratio, "use_swiglu_ffn": gated}
        return config, _DINOV2_GATED if gated else _DINOV2, *pooled
    config["intermediate_size"] = hidden
    if "cls_token" not in names:
        return {**config, "model_type": "ijepa", "architectures": ["IJepaModel"]}, _VIT, *pooled
    return {**config, "model_type": "vit", "architectures": ["ViTModel"]}, _VIT, *pooled


def _separated(weights: Weights, config: dict[str, Any]) -> Weights:
    """Queries, keys and values apart; the position of the class token, and a token for masked patches."""
    separate: Weights = {}
    for name, value in weights.items():
        attention, _, kind = name.rpartition("qkv.")
        if attention:
            separate |= {f"{attention}{part}.{kind}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        elif name.endswith((".attn.q_bias", ".attn.v_bias")):
            separate[name.replace("_bias", ".bias")] = value
        else:
            separate[name] = value
    kind, patches = (
        config["model_type"],
        (config["image_size"] // config["patch_size"]) ** 2 if "image_size" in config else 0,
    )
    if (positions := separate.get("pos_embed")) is not None and "cls_token" in separate:
        first = positions[:, :1] if positions.shape[1] > patches else torch.zeros_like(positions[:, :1])
        if "reg_token" in separate and positions.shape[1] > patches:  # transformers' have no positions
            separate["reg_token"] = separate["reg_token"] + positions[:, 1:-patches]
        separate["pos_embed"] = torch.cat([first, positions[:, -patches:]], dim=1)
    if kind.startswith("dinov"):
        shape = (1, 1, config["hidden_size"]) if kind == "dinov3_vit" else (1, config["hidden_size"])
        separate["mask_token"] = torch.zeros(shape)
    return separate


def _preparation(pretrained: Pretrained) -> dict[str, Any]:
    """How images are prepared, for the image processors of transformers."""
    transform = pretrained.image_transform
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(transform["size"] / transform["crop_fraction"])},
        "resample": 2 if transform["interpolation"] == "bilinear" else 3,
        "do_center_crop": True,
        "crop_size": {"height": transform["size"], "width": transform["size"]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(number) for number in transform["mean"]],
        "image_std": [float(number) for number in transform["std"]],
    }
