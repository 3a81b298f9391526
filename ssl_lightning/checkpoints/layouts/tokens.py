"""What ViTs, BEiTs and Swins of other projects need besides renaming: attention, gates, layer scale, positions."""

import math
import re
from typing import Any

import torch
from torch import nn

from ssl_lightning.checkpoints.layouts.layout import Weights


def fit_tokens(weights: Weights, model: nn.Module, _outer: Weights) -> None:
    """Change weights, named as in timm, to the parts that a model of timm has.

    Args:
        weights: Changed in place. Attention may also be ``attn.q``, ``attn.k`` and ``attn.v``, and a gated MLP
            ``mlp.gate_proj``, ``mlp.up_proj`` and ``mlp.down_proj``.
        model: The model.
    """
    wanted = model.state_dict().keys()
    for name in [name for name in weights if name.endswith((".attn.q.weight", ".attn.qkv.weight"))]:
        attention = name.rpartition("q")[0] if name.endswith("attn.q.weight") else name.removesuffix("qkv.weight")
        _join_attention(weights, attention, wanted)
    for name in [name for name in weights if ".mlp.up_proj." in name or ".mlp.down_proj." in name]:
        _name_gates(weights, name, wanted)
    for name in [name for name in weights if re.search(r"\.ls[12]\.gamma$|\.gamma_[12]$", name)]:
        other = re.sub(r"gamma_([12])$", r"ls\1.gamma", name)
        other = other if other != name else re.sub(r"ls([12])\.gamma$", r"gamma_\1", name)
        if name not in wanted and other in wanted:
            weights[other] = weights.pop(name)
    _place_class_position(weights, model)


def _join_attention(weights: Weights, attention: str, wanted: Any) -> None:
    """Queries, keys and values in one matrix; their biases as the model keeps them."""
    separate = [weights.pop(f"{attention}{part}.weight", None) for part in "qkv"]
    if all(part is not None for part in separate):
        weights[f"{attention}qkv.weight"] = torch.cat([part for part in separate if part is not None])
    masked = weights.pop(f"{attention}qkv.bias_mask", None) is not None
    if f"{attention}qkv.bias" in weights:
        if f"{attention}qkv.bias" in wanted and not masked:
            return
        query, key, value = weights.pop(f"{attention}qkv.bias").chunk(3)
    else:
        names = [(f"{attention}{part}_bias", f"{attention}{part}.bias") for part in "qkv"]
        found = [weights.pop(old, weights.pop(new, None)) for old, new in names]
        if found[0] is None or found[2] is None:
            return
        query, value = found[0], found[2]
        key = torch.zeros_like(query) if found[1] is None else found[1]
    if masked:
        key = torch.zeros_like(query)
    rotary = not any(name.endswith(("pos_embed", "relative_position_bias_table")) for name in weights)
    if f"{attention}qkv.bias" in wanted:
        weights[f"{attention}qkv.bias"] = torch.cat([query, key, value])
        return
    kept = {"q_bias": query, "v_bias": value, **({"k_bias": key} if rotary else {})}  # elsewhere softmax cancels it
    for name, bias in kept.items():
        if f"{attention}{name}" in wanted or bias.any():  # what the model lacks must be zero
            weights[f"{attention}{name}"] = bias


def _name_gates(weights: Weights, name: str, wanted: Any) -> None:
    """``up_proj`` and ``down_proj`` of an MLP, and its ``gate_proj`` if it has one."""
    mlp, part, kind = re.split(r"(up_proj|down_proj)", name)
    if part == "down_proj":
        weights[f"{mlp}fc2{kind}"] = weights.pop(name)
    elif (gate := weights.pop(f"{mlp}gate_proj{kind}", None)) is None:
        weights[f"{mlp}fc1{kind}"] = weights.pop(name)
    elif f"{mlp}fc1_g{kind}" in wanted:
        weights[f"{mlp}fc1_g{kind}"], weights[f"{mlp}fc1_x{kind}"] = gate, weights.pop(name)
    else:
        weights[f"{mlp}fc1{kind}"] = torch.cat([gate, weights.pop(name)])


def _place_class_position(weights: Weights, model: Any) -> None:
    """The position of the class token added to the token, if the model has positions of patches only.

    With registers, other projects have positions of the class token and the patches; a model of timm of the patches or
    of all tokens.
    """
    positions = weights.get("pos_embed")
    if positions is None or "cls_token" not in weights or not _is_square(positions.shape[1] - 1):
        return
    if getattr(model, "no_embed_class", False):
        weights["cls_token"] = weights["cls_token"] + positions[:, :1]
        weights["pos_embed"] = positions[:, 1:]
    elif "reg_token" in weights and getattr(model, "reg_token", None) is not None:
        none = torch.zeros_like(positions[:, :1]).expand(-1, weights["reg_token"].shape[1], -1)
        weights["pos_embed"] = torch.cat([positions[:, :1], none, positions[:, 1:]], dim=1)


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
