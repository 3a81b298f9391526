"""Reading backbones from checkpoints of many sources, and building them by name."""

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from ssl_lightning.backbones.names import create_backbone, is_vit
from ssl_lightning.backbones.own import Backbone, is_own, name_of, without_wrapper
from ssl_lightning.checkpoints.encoders import choose, shown, tensors_in, under
from ssl_lightning.checkpoints.fitting import check_hidden, explained, fits_of, misfit
from ssl_lightning.checkpoints.guess import from_config, from_weights, is_mocos
from ssl_lightning.checkpoints.layouts import LAYOUTS, Weights
from ssl_lightning.checkpoints.pretrained import Pretrained, facts_of, image_transform_of, native_size
from ssl_lightning.checkpoints.resampling import resample
from ssl_lightning.checkpoints.sources import is_source, weights_in
from ssl_lightning.errors import UserError

_OF_FIXED_POSITIONS = re.compile(
    r"(state_dict\.|model\.)?(decoder_|decoder\.positions|predictor_positions|predictor\.(positions|mask_token))"
)
"""Beginnings of names that only checkpoints of MAE, I-JEPA and CAPI have; official files and earlier versions, too."""


class UnnamedBackboneError(UserError):
    """A source that does not say what its backbone is."""


def load_backbone(
    path: str | Path,
    backbone: Backbone | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    branch: str | None = None,
) -> nn.Module:
    """The backbone of a checkpoint, in eval mode: called with images it gives features ``(B, embed_dim)``.

    Reads checkpoints of this package, official checkpoints of other projects, and weights of timm, torchvision and
    transformers. The names of the weights identify the format. All weights of the backbone must be there; only heads
    may be left over. Positions, patches and the first layer of another size are resampled.

    Args:
        path: A file; a folder of timm or transformers, also with ``local-dir:`` before it; or ``hf-hub:NAME``.
        backbone: Name of the timm or torchvision model, or a network of your own: a module, or the path of its class.
            None if the file names it, or its shapes leave no doubt.
        backbone_kwargs: Arguments of its builder, e.g. ``{img_size: 96}``.
        branch: Which of several networks in the file to read, by a part of its name, e.g. ``student``; None reads the
            network that the project evaluates.

    Raises:
        UserError: The file cannot be read without running code, or fits no format; the message says which weights are
            missing or left over.
    """
    return read_checkpoint(path, backbone, backbone_kwargs, branch).backbone


def read_checkpoint(
    path: str | Path,
    backbone: Backbone | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    branch: str | None = None,
) -> Pretrained:
    """The backbone of a checkpoint with the metadata of the file; see ``load_backbone``.

    Args:
        path: A file, a folder or a repository of the hub.
        backbone: Name of the timm or torchvision model.
        backbone_kwargs: Arguments of its builder.
        branch: A part of the name of the network to read.

    Raises:
        UserError: As for ``load_backbone``.
    """
    return _read(path, weights_in(path), backbone, backbone_kwargs, branch)


def _read(
    path: str | Path,
    checkpoint: dict[str, Any],
    backbone: Backbone | None,
    backbone_kwargs: dict[str, Any] | None,
    branch: str | None,
) -> Pretrained:
    from ssl_lightning.backbones.vit import AnySizeViT

    tensors = tensors_in(checkpoint)
    is_ours = "method" in checkpoint or "saved_facts" in checkpoint
    is_moco_v3 = "MoCoV3" in checkpoint.get("method_bases", []) or any(
        ".base_encoder." in f".{name}" or (not is_ours and name.endswith("pos_embed") and is_mocos(value))
        for name, value in tensors.items()
    )
    named, kwargs = named_in(checkpoint)
    if backbone is None:
        backbone = named
    elif named not in (None, backbone) and "hyper_parameters" not in checkpoint:
        kwargs = {}  # of another model
    if backbone is None:
        backbone, kwargs = _guessed(path, checkpoint, tensors, branch)
    kwargs = {**kwargs, **(backbone_kwargs or {})}
    kwargs.pop("pretrained", None)
    if is_moco_v3 and is_vit(backbone) and backbone.startswith("vit_small"):
        kwargs.setdefault("num_heads", 12)  # the paper's number, which no weight reveals
    model = create_backbone(backbone, **kwargs).eval()
    model.to(memory_format=torch.channels_last)  # as in training
    backbone, network = name_of(backbone), without_wrapper(model)
    own = checkpoint.get("evaluated_backbone") if branch is None else None
    wrapper = "" if network is model else "network."
    fits, misfits = fits_of(network, tensors, None if own is None else f"state_dict.{own}.{wrapper}")
    if not fits:
        why = explained(path, checkpoint, tensors, misfits, network)
        if is_own(backbone):
            why += " Give the arguments of its class as backbone_kwargs, or, in Python, the network itself as backbone."
        raise UserError(f"{path} does not hold a {backbone}. {why}")
    prefix = choose(fits, tensors, branch, path)
    check_hidden(path, checkpoint, tensors, prefix)
    weights, changes = fits[prefix]
    if others := [shown(other) for other in fits if other != prefix]:
        rank_zero_info(f"{path}: read {shown(prefix)}, not {', '.join(others)}; --branch chooses another")
    if changes:
        rank_zero_info(f"{path}: resampled {'; '.join(changes)}")
    network.load_state_dict(weights, strict=False)
    if isinstance(model, AnySizeViT):
        is_fixed = any(_OF_FIXED_POSITIONS.match(name) for name in tensors)
        if is_moco_v3 or is_fixed or checkpoint.get("fixed_positions"):
            model.tell_fixed_positions()  # so they are computed, not interpolated, at other sizes
        model.antialiased = checkpoint.get("antialiased", model.reg_token is not None and not is_ours)
    transform = checkpoint.get("image_transform") or image_transform_of(model, described=checkpoint)
    return Pretrained(model, backbone, kwargs, transform, facts_of(checkpoint))


def named_in(checkpoint: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Name and arguments of the backbone as far as a checkpoint states them.

    Args:
        checkpoint: What ``weights_in`` gives.
    """
    parameters = checkpoint.get("hyper_parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("backbone"), str):
        kwargs = parameters.get("backbone_kwargs")
        return parameters["backbone"], dict(kwargs) if isinstance(kwargs, dict) else {}
    config = checkpoint.get("config.json", {})
    return (from_config(config) or (None, {})) if "architecture" in config else (None, {})


def _guessed(
    path: str | Path, checkpoint: dict[str, Any], tensors: Weights, branch: str | None
) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the backbone that the weights, or what describes them, leave no doubt about."""
    guess = from_config(checkpoint.get("config.json", {}))
    layouts = {prefix: layout for layout in LAYOUTS for prefix in layout.prefixes(tensors) if not layout.refused}
    if guess is None and layouts:
        prefix = choose(layouts, tensors, branch, path)
        guess = from_weights(layouts[prefix].rename(under(prefix, tensors)))
    if guess is None:
        raise UnnamedBackboneError(f"{path} does not name its backbone; give --backbone, e.g. resnet50.")
    rank_zero_info(f"{path} is taken for a {guess[0]} with {guess[1]}; --backbone names another")
    return guess


def open_backbone(
    source: str,
    backbone: Backbone | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    branch: str | None = None,
) -> Pretrained:
    """A backbone to evaluate: from a checkpoint, with pretrained weights of a library, or a baseline.

    Args:
        source: A checkpoint as for ``load_backbone``; the name of a timm or torchvision model, to use its pretrained
            weights; ``untrained``, the backbone with random weights; or ``pixels``, the image itself.
        backbone: Name of the timm or torchvision model, for ``untrained`` and checkpoints that do not name it.
        backbone_kwargs: Arguments of its builder.
        branch: As for ``load_backbone``.

    Raises:
        UserError: There is no such file or model, or it does not fit.
    """
    if is_source(source):
        return read_checkpoint(source, backbone, backbone_kwargs, branch)
    kwargs = dict(backbone_kwargs or {})
    if source == "untrained" and backbone is None:
        raise UnnamedBackboneError("an untrained backbone needs a name: give --backbone, e.g. resnet50.")
    pretrained = {} if source in ("untrained", "pixels") else {"pretrained": True}
    name = backbone if source == "untrained" and backbone else source
    model = create_backbone(name, **kwargs, **pretrained).eval()
    model.to(memory_format=torch.channels_last)
    return Pretrained(model, name_of(name), kwargs, image_transform_of(model, own=bool(pretrained)))


_SIZES = ("img_size", "patch_size", "in_chans", "window_size")
"""Arguments of a builder between which weights are resampled."""


def weights_for(source: str, backbone: Backbone, backbone_kwargs: dict[str, Any]) -> Weights:
    """The weights of a source, checked to give the same features in a backbone, or resampled to its size.

    Args:
        source: As for ``open_backbone``.
        backbone: Name of the timm or torchvision model that gets the weights.
        backbone_kwargs: Arguments of its builder.

    Raises:
        UserError: There is no such source, or it has another backbone; the message says what differs.
    """
    kwargs = {key: value for key, value in backbone_kwargs.items() if key != "pretrained"}
    if not isinstance(backbone, str):  # a network of one's own, of which nothing but its weights can differ
        own = open_backbone(source, backbone, kwargs).backbone
        return own.state_dict()
    with torch.random.fork_rng(devices=[]):
        checkpoint = weights_in(source) if is_source(source) else None
        if checkpoint is not None and named_in(checkpoint)[0] is None:
            return _read(source, checkpoint, backbone, kwargs, None).backbone.state_dict()
        if checkpoint is None:
            pretrained = open_backbone(source, None, {key: kwargs[key] for key in kwargs if key != "in_chans"})
        else:
            pretrained = _read(source, checkpoint, None, None, None)
        weights: Weights = dict(pretrained.backbone.state_dict())
        theirs = {key: value for key, value in pretrained.backbone_kwargs.items() if key in _SIZES}
        same_size = {**{key: value for key, value in kwargs.items() if key not in _SIZES}, **theirs}
        if reason := mismatch(pretrained, weights, backbone, same_size):
            found = f"{pretrained.name} {pretrained.backbone_kwargs}"
            raise UserError(f"it is a {found}, but a {backbone} {kwargs} is needed: {reason}.")
        model = create_backbone(backbone, **kwargs)
        if changes := resample(weights, model):
            rank_zero_info(f"{source}: resampled {'; '.join(changes)}")
        if reason := misfit(weights, model.state_dict()):
            raise UserError(f"a {backbone} {kwargs} is needed: {reason}.")
    return weights


def mismatch(pretrained: Pretrained, weights: Weights, backbone: str, backbone_kwargs: dict[str, Any]) -> str:
    """Why another backbone does not give the same features with some weights; nothing if it does.

    Compares features, too: weights do not determine everything, e.g. the number of heads or a stride.

    Args:
        pretrained: The backbone to compare with.
        weights: Its weights, under the names of the other backbone.
        backbone: Name of the other timm or torchvision model.
        backbone_kwargs: Arguments of its builder.
    """
    other = create_backbone(backbone, **backbone_kwargs).eval()
    if reason := misfit(weights, other.state_dict()):
        return reason
    other.load_state_dict(weights, strict=False)
    size = native_size(pretrained.backbone) or pretrained.image_transform["size"]
    images = torch.rand(2, pretrained.backbone_kwargs.get("in_chans", 3), size, size)
    with torch.no_grad():
        features, other_features = pretrained.backbone(images), other(images)
    if features.shape != other_features.shape:
        return f"the features are {other_features.shape[1]} numbers, not {features.shape[1]}"
    difference = float((features - other_features).abs().max())
    return (
        ""
        if difference <= 1e-4 * float(features.abs().max())
        else f"the weights fit, but the features differ by {difference:.1e}"
    )
