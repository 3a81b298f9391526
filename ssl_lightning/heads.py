"""Projection heads."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(
    widths: Sequence[int], bias: bool = False, last_bias: bool = False, last_norm: nn.Module | None = None
) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between them: the projector and predictor of most methods.

    Own code because lightly's heads differ from the papers' in biases and in the last BatchNorm.

    Args:
        widths: Input width, hidden widths, output width.
        bias: Whether the hidden linear layers have a bias.
        last_bias: Whether the last linear layer has a bias.
        last_norm: Module after the last linear layer, if the paper has one.
    """
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths[:-1]):
        layers += [nn.Linear(width_in, width_out, bias=bias), nn.BatchNorm1d(width_out), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    if last_norm is not None:
        layers.append(last_norm)
    return nn.Sequential(*layers)
