"""The networks in a checkpoint: found by the name of their first weight, and which of them is read."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ssl_lightning.backbones.low_rank import merged
from ssl_lightning.checkpoints.layouts import Weights
from ssl_lightning.checkpoints.pickles import full_name, tensors_of_module
from ssl_lightning.errors import UserError

_NOISE = {
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),  # of torch's wrappers
    *("_feature_blocks", "base_model"),  # of vissl
}
"""Parts of names that say nothing, at any depth."""


def tensors_in(checkpoint: dict[str, Any]) -> Weights:
    """All weights of a checkpoint under their full names: the keys that lead to them, without wrappers' parts.

    Low-rank updates are added to the weights that they are for.

    Args:
        checkpoint: Nested dicts; states of optimizers are passed over.
    """
    tensors: Weights = {}

    def collect(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Tensor):
            if value.numel():  # transformers saves no registers as an empty tensor
                tensors.setdefault(".".join(part for part in path if part not in _NOISE), value)
            return
        items = tensors_of_module(value) or (value if isinstance(value, dict) else {})
        for key, item in items.items():
            if isinstance(key, str) and not (path == () and re.match(r"optim|opt($|_)", key)):
                collect(item, (*path, *key.split(".")))

    collect(checkpoint, ())
    return merged(tensors)


def foreign_objects(value: Any) -> list[str]:
    """Names of the classes whose objects in a checkpoint were passed over, without classes of configurations.

    Args:
        value: What the file holds.
    """
    names: dict[str, None] = {}
    left = [value]
    while left:
        value = left.pop()
        if (name := full_name(value)) is not None:
            names[name] = None
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return list(names)


def under(prefix: str, tensors: Weights) -> Weights:
    """The weights whose names begin with a prefix, without it.

    Args:
        prefix: Empty, or ends in a dot.
        tensors: By full name.
    """
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def shown(prefix: str) -> str:
    """A prefix as messages show it.

    Args:
        prefix: Empty, or ends in a dot.
    """
    return prefix.removeprefix("state_dict.").removesuffix(".") or "no prefix"


def choose(prefixes: Iterable[str], tensors: Weights, branch: str | None, path: Any) -> str:
    """The prefix of the network that the project evaluates, of those that fit.

    Args:
        prefixes: Of the networks that fit.
        tensors: All weights by full name.
        branch: A part of the name of the wanted network; None follows the project.
        path: The file, for messages.

    Raises:
        UserError: There is no such branch, or several networks are equally likely.
    """
    prefixes = list(dict.fromkeys(prefixes))
    if branch is not None:
        wanted = ".".join(part for part in branch.split(".") if part and part not in _NOISE)
        named = [prefix for prefix in prefixes if wanted in (prefix[:-1], shown(prefix))]
        named = named or [prefix for prefix in prefixes if f".{wanted}." in f".{prefix}"]
        named = named or [prefix for prefix in prefixes if wanted.lower() in _words(prefix)]
        if not named:
            raise UserError(f"{path} has no branch {branch!r}; choose from {', '.join(map(shown, prefixes))}.")
        prefixes = named
    ranks = {prefix: _rank(prefix, prefixes, tensors) for prefix in prefixes}
    best = [prefix for prefix in prefixes if ranks[prefix] == max(ranks.values())]
    weights = under(best[0], tensors)
    for other in best[1:]:
        others = under(other, tensors)
        shared = weights.keys() & others.keys()
        if not shared or not all(torch.equal(weights[name], others[name]) for name in shared):
            raise UserError(
                f"{path} holds several networks whose names do not say which is evaluated: "
                f"{', '.join(map(shown, best))}. Choose with --branch, e.g. --branch {shown(best[0])}."
            )
    return best[0]


def _words(prefix: str) -> set[str]:
    """The words in a prefix, also ``teacher`` in ``teacherNet``."""
    return {word.lower() for word in re.split(r"[._]|(?<=[a-z])(?=[A-Z])", prefix) if word}


def _rank(prefix: str, prefixes: list[str], tensors: Weights) -> int:
    """How likely it is that the project evaluates a network, by the words in its name."""
    words, others = _words(prefix), {word for other in prefixes for word in _words(other)}
    rank = 0
    if words & {"ema", "averaged", "average", "avg", "swa"}:  # torchvision, timm and BEiT release the average
        rank += 3
    if "teacher" in words:
        rank += 2
    if "target" in words:  # I-JEPA evaluates the target, BYOL the online network
        is_vit = any("patch_embed" in name for name in under(prefix, tensors))
        is_ijepa = is_vit and "encoder" in words and "online" not in others
        rank += 2 if is_ijepa else -2
    if words & {"student", "anchor"}:
        rank -= 1
    if words & {"momentum", "key", "k", "m"}:
        rank -= 2
    if words & {"gram", "callbacks", "current", "raw"}:  # Lightning's WeightAveraging keeps the raw weights apart
        rank -= 4
    return rank
