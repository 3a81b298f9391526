"""Whether the networks in a checkpoint fit a model, and if not, why."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssl_lightning.checkpoints.encoders import foreign_objects, shown, under
from ssl_lightning.checkpoints.layouts import LAYOUTS, Layout, Weights
from ssl_lightning.checkpoints.layouts.vit import UNUSED
from ssl_lightning.checkpoints.resampling import resample
from ssl_lightning.errors import UserError

_OF_HEADS = {
    *("fc", "head", "heads", "classifier", "linear", "projector", "projection", "proj", "predictor", "prediction"),
    *("prototypes", "decoder", "mask", "masked", "neck", "loss", "center", "queue", "pooler", "lm", "pt", "probe"),
    *("averaged", "coefficient"),
}
"""Words in the first part of names that may be left over besides the backbone."""


def fits_of(
    model: nn.Module, tensors: Weights, only: str | None
) -> tuple[dict[str, tuple[Weights, list[str]]], dict[str, str]]:
    """By prefix, the weights that fit a model and how they were resampled; and why others do not fit.

    Args:
        model: The model.
        tensors: All weights by full name.
        only: The only prefix to look at; None finds them.
    """
    first = next((f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Conv2d)), "")
    own = Layout("the model's names", re.escape(first or next(iter(model.state_dict()))), renamed=UNUSED)
    wanted = model.state_dict()
    fits: dict[str, tuple[Weights, list[str]]] = {}
    misfits: dict[str, str] = {}
    for layout in (own, *(() if only else LAYOUTS)):
        for prefix in layout.prefixes(tensors) if only is None else [only]:
            weights = layout.rename(under(prefix, tensors))
            parent = prefix[:-1].rpartition(".")[0]
            try:
                layout.finish(weights, model, under(f"{parent}." if parent else "", tensors))
                changes = resample(weights, model)
            except (RuntimeError, ValueError, IndexError) as error:  # shapes that the layout does not have
                why = str(error)
            else:
                why = layout.refused or misfit(weights, wanted)
            if not why:
                fits.setdefault(prefix, (weights, changes))
            elif prefix not in misfits or len(why) < len(misfits[prefix]):
                misfits[prefix] = why
    return fits, misfits


def explained(
    path: str | Path, checkpoint: dict[str, Any], tensors: Weights, misfits: dict[str, str], model: nn.Module
) -> str:
    """Why no network in a file fits."""
    if misfits:
        looked = [f"{shown(prefix)}: {misfits[prefix]}" for prefix in sorted(misfits, key=len)[:3]]
        return f"Looked for its weights by prefix: {'; '.join(looked)}."
    foreign = foreign_objects(checkpoint)
    if any("_flat_param" in name for name in tensors) or any("Shard" in name or "DTensor" in name for name in foreign):
        return "It is one of several shards; save the whole weights with FSDP's FULL_STATE_DICT."
    if not tensors and foreign:
        return (
            f"Its weights are in an object of {foreign[0]}, which cannot be read without running its code. Save them "
            f"where it can: torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), 'weights.pth')."
        )
    first = next(iter(model.state_dict()), "")
    names = f"The file has {', '.join(list(tensors)[:3])}{', ...' * (len(tensors) > 3)}" if tensors else "It has none"
    return f"{len(model.state_dict())} weights are missing, e.g. {first}. {names}."


def check_hidden(path: str | Path, checkpoint: dict[str, Any], tensors: Weights, prefix: str) -> None:
    """Refuse networks that differ from timm's in what no weight says.

    Raises:
        UserError: The file says so elsewhere.
    """
    config = checkpoint.get("config.json", {})
    kinds = {"resnet": "relu", "aimv2": "silu", "aimv2_vision_model": "silu"}
    usual = kinds.get(config.get("model_type", ""), "silu" if config.get("use_gated_mlp") else "gelu")
    if (activation := config.get("hidden_act", usual)) != usual:
        raise UserError(f"{path} holds a network with the activation {activation}; timm's has {usual}.")
    stem = tensors.get(f"{prefix}conv1.weight")
    if stem is None:
        stem = tensors.get(f"{prefix}embedder.embedder.convolution.weight")
    if stem is None:
        return
    meta = checkpoint.get("meta")
    caffe = isinstance(meta, dict) and re.search(r"style\W+caffe", str(meta.get("cfg")))
    if caffe or config.get("downsample_in_bottleneck"):
        raise UserError(
            f"{path} holds a ResNet with strides in its first 1x1 convolutions (style='caffe'), which timm and "
            "torchvision do not have."
        )
    parts = {name.split(".")[1] for name in tensors if name.startswith("state_dict.")}
    is_of_solo = "classifier" in parts and parts & {"projector", "momentum_backbone"}
    if stem.shape[-1] == 3 and is_of_solo and not checkpoint.keys() & {"evaluated_backbone", "method"}:
        raise UserError(
            f"{path} looks like a checkpoint of solo-learn, whose 3x3 stem has a padding of 2. No model of timm has "
            "such a stem, and with a padding of 1 the same weights give other features. If yours has 1, save only the "
            "weights of the backbone, and load those."
        )


def misfit(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """Why these weights do not fit the model; empty if they fit."""
    missing = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    others = [name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape]
    left = [name for name in weights if name not in wanted and not _of_a_head(name)]
    parts = []
    if missing:
        parts.append(f"{len(missing)} are missing, e.g. {missing[0]}")
    if others:
        name = sorted(others)[0]
        parts.append(f"{name} is {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}")
    if left:
        parts.append(f"{len(left)} are left over, e.g. {left[0]}")
    return ", ".join(parts)


def _of_a_head(name: str) -> bool:
    first = name.split(".")[0]
    return first != "fc_norm" and not _OF_HEADS.isdisjoint(first.split("_"))
