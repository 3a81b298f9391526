"""Low-rank updates of linear layers (LoRA).

Own code because peft's adapter changes the rows of timm's fused ``qkv`` together, and renames the weights of the layer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NAME = re.compile(r"((?:.*\.)?)lora_(?:(?:(q|k|v|all)_([ab]))|scale)")
_THIRDS = {"q": 0, "k": 1, "v": 2}
"""Places of queries, keys and values among the rows of timm's fused ``qkv``."""


class LowRankLinear(nn.Linear):
    """A linear layer, frozen, whose weight gets updates of low rank: W + scale * B A (Hu et al. 2021).

    The weights of the layer keep their names. Its ``lora_*`` come besides them.
    """

    lora_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Project ``(..., D)``."""
        y = super().forward(x)
        if hasattr(self, "lora_all_a"):
            return y + self._update(x, "all")
        thirds = list(y.chunk(3, dim=-1))
        for rows, place in _THIRDS.items():
            if hasattr(self, f"lora_{rows}_a"):
                thirds[place] = thirds[place] + self._update(x, rows)
        return torch.cat(thirds, dim=-1)

    def _update(self, x: Tensor, rows: str) -> Tensor:
        down, up = getattr(self, f"lora_{rows}_a"), getattr(self, f"lora_{rows}_b")
        return F.linear(F.linear(x, down), up) * self.lora_scale


def add_low_rank(layer: Any, rows: Sequence[str], rank: int, alpha: float) -> None:
    """Let a linear layer learn an update that starts at zero.

    Args:
        layer: Changed in place; its own weights are left as they are.
        rows: Which rows of its weight: of a fused ``qkv`` any of ``q``, ``k``, ``v``, each a third; otherwise ``all``.
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
    """
    layer.__class__ = LowRankLinear
    layer.lora_scale = nn.Buffer(torch.tensor(alpha / rank))
    for part in rows:
        down = nn.Parameter(torch.empty(rank, layer.in_features))
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        layer.register_parameter(f"lora_{part}_a", down)
        outputs = layer.out_features // (1 if part == "all" else 3)
        layer.register_parameter(f"lora_{part}_b", nn.Parameter(torch.zeros(outputs, rank)))


@torch.no_grad()
def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name, without low-rank updates: each is added to the weight of its layer.

    Args:
        weights: The state of a module; names may have any prefix.
    """
    whole = {name: value for name, value in weights.items() if not _NAME.fullmatch(name)}
    for name, down in weights.items():
        match = _NAME.fullmatch(name)
        if match is None or match[3] != "a" or f"{match[1]}weight" not in whole:
            continue
        layer, rows = match[1], match[2]
        weight = whole[f"{layer}weight"].clone()
        changed = weight if rows == "all" else weight.chunk(3)[_THIRDS[rows]]
        changed += weights[f"{layer}lora_scale"] * (weights[f"{layer}lora_{rows}_b"] @ down)
        whole[f"{layer}weight"] = weight
    return whole


def merge(module: nn.Module) -> nn.Module:
    """Add the low-rank updates of a module to its weights, in place: plain layers are left.

    Args:
        module: Any.
    """
    for part in module.modules():
        if isinstance(part, LowRankLinear):
            layer: Any = part
            weights = merged(layer.state_dict())
            for name in [name for name in layer.state_dict() if _NAME.fullmatch(name)]:
                delattr(layer, name)
            layer.__class__ = nn.Linear
            layer.load_state_dict(weights)
    return module
