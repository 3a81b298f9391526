"""What a family of names is: how its first weight is called, and a table that renames the others."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

Weights = dict[str, Tensor]

New = str | Callable[[re.Match[str]], str]
"""What takes the place of a part of a name: as for ``re.sub``."""


def as_they_are(_weights: Weights, _model: nn.Module, _outer: Weights) -> None:
    """Change nothing: the names say everything."""


@dataclass(frozen=True)
class Layout:
    """The names that a project gives to the weights of one kind of network.

    Args:
        name: What to call it in messages.
        first: Name of the first weight, as a regular expression. What stands before it is the prefix of the network.
        sign: A regular expression that another name matches from its beginning. It distinguishes layouts whose first
            weights have the same name.
        renamed: What takes the place of each part of a name, applied one after the other. None drops the weight.
        finish: What is no renaming. Changes the weights in place until they fit a model; it also gets the weights
            around the network.
        refused: Why no model gives the features of such a network; empty if one does.
    """

    name: str
    first: str
    sign: str = ""
    renamed: Mapping[str, New | None] = field(default_factory=dict)
    finish: Callable[[Weights, nn.Module, Weights], None] = as_they_are
    refused: str = ""

    def prefixes(self, names: Mapping[str, Tensor]) -> list[str]:
        """What stands before the networks of this layout, each empty or ending in a dot.

        Args:
            names: Weights by name.
        """
        first = re.compile(rf"(|.*\.)({self.first})")
        matches = [first.fullmatch(name) for name, value in names.items() if value.ndim == 4]
        prefixes = [match[1] for match in matches if match]
        sign = re.compile(self.sign)
        return [
            prefix
            for prefix in prefixes
            if any(sign.match(name, len(prefix)) for name in names if name.startswith(prefix))
        ]

    def rename(self, weights: Weights) -> Weights:
        """The weights under their new names.

        Args:
            weights: By name, without the prefix.
        """
        return renamed(weights, self.renamed)


def renamed(weights: Weights, table: Mapping[str, New | None]) -> Weights:
    """Weights under other names.

    Args:
        weights: By name.
        table: As ``Layout.renamed``.
    """
    result = {}
    for name, value in weights.items():
        new = name
        for old, replacement in table.items():
            if replacement is not None:
                new = re.sub(old, replacement, new)
            elif re.search(old, new):
                break
        else:
            result[new] = value
    return result


def take_from_outside(weights: Weights, outer: Weights, name: str, outer_name: str) -> None:
    """Take the last norm from around the network, where some projects have it.

    Args:
        weights: Of the network; changed in place.
        outer: Of what is around it.
        name: What the norm is called in the network.
        outer_name: What it is called around it.
    """
    for part in ("weight", "bias"):
        if f"{name}.{part}" not in weights and f"{outer_name}.{part}" in outer:
            weights[f"{name}.{part}"] = outer[f"{outer_name}.{part}"]
