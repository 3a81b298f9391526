"""Weights of another image size, patch size or number of channels."""

import math
from typing import Any

from torch import Tensor, nn

from ssl_lightning.backbones.tokens import inflate_channels, sincos_positions
from ssl_lightning.checkpoints.layouts import Weights


def resample(weights: Weights, model: nn.Module) -> list[str]:
    """Give positions, patch projection and first layer the sizes of a model, in place.

    What timm does not resample stays as it is.

    Args:
        weights: Under the names of the model.
        model: From timm or torchvision.

    Returns:
        What was changed, in words.
    """
    changes = []
    wanted = model.state_dict()
    first = next((f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Conv2d)), "")
    for name in wanted.keys() & weights.keys():
        old, new = weights[name], wanted[name].shape
        if old.shape == new:
            continue
        if name == first:
            changed, what = _first_layer(old, new), "the first layer"
        elif name in ("pos_embed", "encoder.pos_embedding"):
            changed, what = _positions(old, model), "the positions"
        elif name.endswith("relative_position_bias_table"):
            changed, what = _relative_positions(old, model.get_submodule(name.rpartition(".")[0])), "relative positions"
        else:
            continue
        if changed is not None and changed.shape == new:
            weights[name] = changed
            changes.append(f"{what} from {tuple(old.shape)} to {tuple(new)}")
    return sorted(set(changes))


def _first_layer(old: Tensor, new: Any) -> Tensor | None:
    """Channels by ``inflate_channels``; kernels by the pseudo-inverse of their resize."""
    from timm.layers import resample_patch_embed

    if old.ndim != 4 or old.shape[0] != new[0] or (old.shape[1] != new[1] and old.shape[1] != 3):
        return None
    if old.shape[1] != new[1]:
        old = inflate_channels(old, new[1])
    return old if old.shape == new else resample_patch_embed(old, list(new[2:]))


def _positions(old: Tensor, model: Any) -> Tensor | None:
    """Sine-cosine positions computed again, others interpolated with antialiasing to the exact grid."""
    from timm.layers import resample_abs_pos_embed

    if hasattr(model, "patch_embed"):
        grid = model.patch_embed.grid_size
        prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
    else:
        grid, prefix = (model.image_size // model.patch_size,) * 2, 1
    side = math.isqrt(max(0, old.shape[1] - prefix))
    if old.ndim != 3 or side == 0 or side**2 != old.shape[1] - prefix:
        return None
    for rows_first in (True, False) if prefix < 2 and old.shape[2] % 4 == 0 else ():
        fixed = sincos_positions(old.shape[2], (side, side), rows_first)[:, 1 - prefix :]
        if fixed.allclose(old.float(), atol=0.01):  # rounded to bfloat16
            return sincos_positions(old.shape[2], tuple(grid), rows_first)[:, 1 - prefix :]
    return resample_abs_pos_embed(old, list(grid), [side, side], num_prefix_tokens=prefix)


def _relative_positions(old: Tensor, attention: Any) -> Tensor | None:
    from timm.layers import resize_rel_pos_bias_table

    shape = attention.relative_position_bias_table.shape
    if old.ndim != 2 or old.shape[1] != shape[1]:
        return None
    return resize_rel_pos_bias_table(old, attention.window_size, shape)
