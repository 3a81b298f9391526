"""Principal components of the patches of several images together, and which patches are foreground."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.evaluation.patches import patch_pca, pca_colors


class PatchColors(NamedTuple):
    """Colors ``(rows, columns, 3)`` uint8 of the patches of each image."""

    all: list[NDArray[np.uint8]]
    """By the components of all patches."""
    foreground: list[NDArray[np.uint8]]
    """By the components of the foreground; the background is black."""


def patch_colors(maps: Sequence[Tensor], components: Sequence[Tensor] | None = None) -> PatchColors:
    """The patches of several images as colors that can be compared across the images.

    Args:
        maps: ``(D, rows, columns)`` for each image.
        components: Those of ``joint_components``, if they are known.
    """
    values = joint_components(maps) if components is None else components
    masks = foreground(values)
    inner = foreground_components(maps, masks)
    return PatchColors(
        [_as_bytes(pca_colors(part)) for part in values],
        [_as_bytes(pca_colors(part) * mask[..., None]) for part, mask in zip(inner, masks, strict=True)],
    )


def _as_bytes(colors: Tensor) -> NDArray[np.uint8]:
    return (colors * 255).round().to(torch.uint8).cpu().numpy()


def joint_components(maps: Sequence[Tensor]) -> list[Tensor]:
    """The first three components of patches, the same directions in all images, so that colors can be compared.

    Args:
        maps: ``(D, rows, columns)`` for each image.

    Returns:
        ``(rows, columns, 3)`` for each image; see ``patch_pca``.
    """
    values = patch_pca(torch.cat([features.flatten(1).T for features in maps]))
    return _as_maps(values, maps)


def foreground(components: Sequence[Tensor]) -> list[Tensor]:
    """The patches on the side of the first component that holds fewer of the patches at the borders of images.

    Source of the threshold: Oquab et al. 2023, DINOv2, figure 1. The choice of the side is our own.

    Args:
        components: ``(rows, columns, 3)`` of ``joint_components`` for each image.

    Returns:
        ``(rows, columns)`` bool for each image.
    """
    first = [values[..., 0] for values in components]
    border = torch.cat([torch.cat([part[0], part[-1], part[1:-1, 0], part[1:-1, -1]]) for part in first])
    sign = 1 if (border > 0).sum() <= (border < 0).sum() else -1
    return [sign * part > 0 for part in first]


def foreground_components(maps: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """The first three components of the foreground, 0 elsewhere.

    Args:
        maps: ``(D, rows, columns)`` for each image.
        masks: ``(rows, columns)`` bool for each image.

    Returns:
        ``(rows, columns, 3)`` for each image.
    """
    rows = torch.cat([features.flatten(1).T for features in maps])
    inside = torch.cat([mask.flatten() for mask in masks])
    values = rows.new_zeros(len(rows), 3)
    if inside.any():
        values[inside] = patch_pca(rows[inside]).to(values.dtype)
    return _as_maps(values, maps)


def aligned(components: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    """Components of the same images at a later time; a nearly symmetric one keeps the sign that it had before.

    Without it, the sign of a skewness of nearly 0 changes by chance, and so do colors.

    Args:
        components: ``(rows, columns, 3)`` for each image.
        before: The earlier components; of other shapes they do not count.
    """
    if [values.shape for values in components] != [values.shape for values in before]:
        return [*components]
    now, then = (torch.cat([values.flatten(0, 1) for values in parts]) for parts in (components, before))
    opposite = (now * then.to(now)).sum(0) < 0
    flipped = opposite & (now.pow(3).mean(0).abs() < _SYMMETRIC)
    return [torch.where(flipped, -values, values) for values in components]


_SYMMETRIC = 0.2
"""Skewness below which a component counts as symmetric: about twice its error with 500 patches."""


def _as_maps(values: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    sizes = [features.shape[1] * features.shape[2] for features in maps]
    return [part.view(*features.shape[1:], -1) for part, features in zip(values.split(sizes), maps, strict=True)]
