"""Rotary positions in two dimensions, and the network of CAPI's released weights; needs torch only."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.losses.precision import full_precision


@full_precision
def rope_2d(
    x: Tensor, coordinates: Tensor, max_frequency: float, min_frequency: float, crossed: bool = False
) -> Tensor:
    """Rotate queries or keys by their place, so that their products depend on the distance only.

    The first half of the width follows the first coordinate, the second half the second. Each half has D / 4 pairs of
    channels that turn at geometrically spaced frequencies. Source: Darcet et al. 2025, CAPI, and its released code.

    Args:
        x: ``(..., N, D)`` queries or keys of N tokens, D divisible by 4.
        coordinates: ``(..., N, 2)``, from 0 to 1 over the image.
        max_frequency: Largest number of turns from 0 to 1.
        min_frequency: Smallest number of turns.
        crossed: Whether each channel of the first half is paired with a channel of the second half, whose angle
            differs. This is no rotation; CAPI's released weights are trained with it.

    Example:
        >>> x = torch.tensor([[1.0, 1.0, 0.0, 0.0]])  # both pairs of the only frequency lie within a half
        >>> rope_2d(x, torch.tensor([[0.25, 0.0]]), 1.0, 0.1)  # a quarter turn of the first pair
        tensor([[-1.0000,  1.0000,  0.0000,  0.0000]])
    """
    steps = torch.linspace(0, -1, x.shape[-1] // 4, dtype=x.dtype, device=x.device)
    frequencies = 2 * math.pi * max_frequency * (max_frequency / min_frequency) ** steps
    return _turned(x, coordinates, frequencies, crossed)


def _turned(x: Tensor, coordinates: Tensor, frequencies: Tensor, crossed: bool) -> Tensor:
    """As ``rope_2d``, for frequencies ``(D / 4,)`` in radians."""
    angles = coordinates.to(x.dtype)[..., None] * frequencies  # (..., N, 2, D / 4)
    angles = torch.cat([angles, angles], dim=-1).flatten(-2)  # (..., N, D)
    first, second = x.unflatten(-1, (1, -1) if crossed else (2, -1)).chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1).flatten(-2)  # (..., N, D)
    return x * angles.cos() + turned * angles.sin()


class ReleasedCAPI:
    """The encoder and predictor of CAPI's released weights: registers, rotary positions, RMSNorm, no biases.

    Registers lie on the edge of the square around the visible patches.

    Args:
        weights: By their names in the released files.
        patch_size: Side of the patches in pixels.
        num_heads: Attention heads.
    """

    def __init__(self, weights: Mapping[str, Tensor], patch_size: int, num_heads: int) -> None:
        self.weights, self.patch_size, self.num_heads = weights, patch_size, num_heads

    def encode(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Patches ``(B, V, D)`` after the last norm.

        Args:
            images: ``(B, 3, S, S)``.
            visible: Indices of the visible patches among all ``B * N``, as many of each image; None is all.
        """
        tokens, coordinates = self._encoded(images, visible)
        return tokens[:, tokens.shape[1] - (coordinates.shape[1] - self.weights["registers"].shape[1]) :]

    def predict(self, images: Tensor, visible: Tensor | None, predict: Tensor) -> Tensor:
        """Predictions ``(M, D)`` of some patches from others.

        Args:
            images: ``(B, 3, S, S)``.
            visible: As for ``encode``.
            predict: Indices ``(M,)`` of the patches to predict among all ``B * N``, as many of each image.
        """
        tokens, coordinates = self._encoded(images, visible)
        places = self._places(images).flatten(0, 1)[predict].unflatten(0, (len(images), -1))  # (B, M / B, 2)
        x = self.weights["mask_token"].expand(*places.shape[:2], -1)
        return self._blocks("decoder", x, places, tokens, coordinates).flatten(0, 1)

    def _places(self, images: Tensor) -> Tensor:
        """Coordinates ``(B, N, 2)`` of all patches, the corners of the square included."""
        sides = (torch.linspace(0, 1, side // self.patch_size).to(images) for side in images.shape[2:])
        return torch.cartesian_prod(*sides).expand(len(images), -1, -1)

    def _encoded(self, images: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """Registers and visible patches ``(B, R + V, D)``, and their coordinates."""
        weight, bias = self.weights["patch_embed.weight"], self.weights["patch_embed.bias"]
        patches = F.conv2d(images, weight, bias, stride=self.patch_size).flatten(2).mT  # (B, N, D)
        places = self._places(images)
        if visible is not None:
            parts = (part.flatten(0, 1)[visible].unflatten(0, (len(images), -1)) for part in (patches, places))
            patches, places = parts
        low, high = places.amin(1, keepdim=True), places.amax(1, keepdim=True)
        edge = low + self._edge(places) * (high - low)
        tokens = torch.cat([self.weights["registers"].expand(len(images), -1, -1), patches], dim=1)
        places = torch.cat([edge, places], dim=1)
        return self._blocks("encoder", tokens, places, None, places), places

    def _edge(self, places: Tensor) -> Tensor:
        """Coordinates ``(R, 2)`` of the registers, at even distances around the unit square."""
        per_side = self.weights["registers"].shape[1] // 4
        steps = torch.arange(per_side).to(places) / per_side
        zeros, ones = torch.zeros_like(steps), torch.ones_like(steps)
        sides = [(steps, zeros), (ones, steps), (1 - steps, ones), (zeros, 1 - steps)]
        return torch.cat([torch.stack(side, dim=1) for side in sides])

    def _blocks(self, part: str, x: Tensor, places: Tensor, context: Tensor | None, others: Tensor) -> Tensor:
        """Tokens ``(B, N, D)`` after the blocks and the norm; without context they attend to themselves."""
        numbers = {int(name.split(".")[2]) for name in self.weights if name.startswith(f"{part}.blocks.")}
        for name in (f"{part}.blocks.{number}" for number in sorted(numbers)):
            normed = self._norm(x, f"{name}.residual1.norm.weight")
            attended = self._attention(
                f"{name}.residual1.fn", normed, places, normed if context is None else context, others
            )
            x = x + attended
            hidden = F.gelu(self._linear(self._norm(x, f"{name}.residual2.norm.weight"), f"{name}.residual2.fn.fc1"))
            x = x + self._linear(hidden, f"{name}.residual2.fn.fc2")
        return self._norm(x)

    def _attention(self, name: str, x: Tensor, places: Tensor, context: Tensor, others: Tensor) -> Tensor:
        q, k, v = (
            self._linear(source, f"{name}.{part}_proj").unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part, source in (("q", x), ("k", context), ("v", context))
        )
        frequencies = self.weights[f"{name}.rope.freqs"][0, : q.shape[-1] // 4]
        q, k = _turned(q, places[:, None], frequencies, True), _turned(k, others[:, None], frequencies, True)
        return self._linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), f"{name}.proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _norm(self, x: Tensor, name: str | None = None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None if name is None else self.weights[name], eps=1e-5)
