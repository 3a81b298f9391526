"""Reading backbones from checkpoints of many sources, and building them by name."""

import argparse
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.checkpoints.files import reading
from ssl_lightning.errors import UserError

_CONTAINERS = ("state_dict", "teacher", "model", "student")
"""Keys under which files keep the weights; in DINO's and DINOv2's files the teacher, which the papers evaluate."""

_PREFIXES = ("encoder_q.", "base_encoder.", "backbone.", "encoder.", "")
"""Prefixes of the backbone's weights: MoCo v2; MoCo v3; DINO, DINOv2, lightly; SimSiam; bare. Ours are saved."""

_HEADS = (
    *("fc", "head", "heads", "classifier", "projector", "projection_head", "predictor", "prototypes"),
    *("mask_token", "decoder", "dino_head", "ibot_head"),
)
"""Parts that may be left over besides the backbone: of these names, or of these names followed by ``_``."""

_OF_MAE_AND_IJEPA = ("decoder_", "decoder.positions", "predictor_positions", "predictor.positions")
"""Beginnings of names that only checkpoints of MAE and I-JEPA have; official files and earlier versions included."""


TEXT = ("backbone", "method", "data", "ssl_lightning_version")
"""Keys whose metadata in an exported file is plain text; all other metadata is JSON."""


class UnnamedBackboneError(UserError):
    """A source that does not say what its backbone is."""


@dataclass
class Pretrained:
    """A backbone and what is known about it.

    Args:
        backbone: Maps images ``(B, 3, S, S)`` to features ``(B, embed_dim)``; in eval mode.
        name: Name of the timm or torchvision model.
        backbone_kwargs: Arguments that built it.
        image_transform: How its images are prepared: ``size``, ``crop_fraction``, ``interpolation``, ``mean``, ``std``;
            ``channels`` if they are not 3, and ``value_range`` if they have more than 8 bits.
        facts: Metadata of the file: ``method``, ``recipe``, ``data``, ``metrics``, ...
    """

    backbone: nn.Module
    name: str
    backbone_kwargs: dict[str, Any]
    image_transform: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def embed_dim(self) -> int:
        """Width of the features."""
        backbone: Any = self.backbone
        return int(backbone.num_features)

    @property
    def hash(self) -> str:
        """Identifies these weights: 16 hexadecimal digits."""
        kwargs = json.dumps(self.backbone_kwargs, sort_keys=True, default=str)  # tuples become lists, as in files
        digest = hashlib.sha256(f"{self.name} {kwargs}".encode())
        for name, value in self.backbone.state_dict().items():
            whole: Any = value.full_tensor() if isinstance(value, DTensor) else value
            digest.update(name.encode())
            digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def load_backbone(
    path: str | Path, backbone: str | None = None, backbone_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """The backbone of a checkpoint, in eval mode: called with images it gives features ``(B, embed_dim)``.

    Reads checkpoints of this package, the official checkpoints of MoCo v2 and v3, SimSiam, SwAV, DINO, DINOv2, MAE,
    Barlow Twins and VICReg, lightly's, and bare weights of timm and torchvision; ``.safetensors`` files as well. The
    names of the weights identify the format. All weights of the backbone must be there; only heads may be left over.

    Args:
        path: The file.
        backbone: Name of the timm or torchvision model; None for a checkpoint or an exported ``.safetensors`` file of
            this package, which name it.
        backbone_kwargs: Arguments of its builder, e.g. ``{img_size: 96}``.

    Raises:
        UserError: Reading the file would run code, or it fits no format; the message says which weights are missing or
            left over.
    """
    return read_checkpoint(path, backbone, backbone_kwargs).backbone


def read_checkpoint(
    path: str | Path, backbone: str | None = None, backbone_kwargs: dict[str, Any] | None = None
) -> Pretrained:
    """The backbone of a checkpoint with the metadata of the file; see ``load_backbone``.

    Args:
        path: The file.
        backbone: Name of the timm or torchvision model.
        backbone_kwargs: Arguments of its builder.

    Raises:
        UserError: As for ``load_backbone``.
    """
    from ssl_lightning.backbones.vit import AnySizeViT

    checkpoint = weights_in(path)
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    weights = _container(checkpoint)
    is_moco_v3 = "MoCoV3" in checkpoint.get("method_bases", []) or any(name.startswith("base_enc") for name in weights)
    if backbone is None:
        if "backbone" not in hyper_parameters:
            raise UnnamedBackboneError(f"{path} does not name its backbone; give --backbone, e.g. resnet50.")
        backbone = str(hyper_parameters["backbone"])
    kwargs = {**(hyper_parameters.get("backbone_kwargs") or {}), **(backbone_kwargs or {})}
    kwargs.pop("pretrained", None)
    if is_moco_v3 and backbone.startswith("vit_small"):
        kwargs.setdefault("num_heads", 12)  # the paper's number, which no weight reveals
    model = create_backbone(backbone, **kwargs).eval()
    model.to(memory_format=torch.channels_last)  # as in training
    own = checkpoint.get("evaluated_backbone")
    candidates = _PREFIXES if own is None else [f"{own}."]
    prefixes = [prefix for prefix in candidates if any(name.startswith(prefix) for name in weights)]
    misfits = []
    for prefix in prefixes:
        renamed = _as_timm_names(
            {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, model
        )
        misfit = _misfit(renamed, model.state_dict())
        if not misfit:
            model.load_state_dict(renamed, strict=False)
            is_mae_or_ijepa = any(name.startswith(_OF_MAE_AND_IJEPA) for name in weights)
            if isinstance(model, AnySizeViT) and (is_moco_v3 or is_mae_or_ijepa or checkpoint.get("fixed_positions")):
                model.tell_fixed_positions()  # so they are computed, not interpolated, at other sizes
            transform = checkpoint.get("image_transform") or _image_transform(model)
            return Pretrained(model, backbone, kwargs, transform, _facts(checkpoint))
        misfits.append(f"{prefix or 'no prefix'}: {misfit}")
    looked = "; ".join(misfits) or f"no name in it starts with {' or '.join(filter(None, candidates))}"
    raise UserError(f"{path} does not hold a {backbone}. Looked for its weights by prefix: {looked}.")


def open_backbone(
    source: str, backbone: str | None = None, backbone_kwargs: dict[str, Any] | None = None
) -> Pretrained:
    """A backbone to evaluate: from a checkpoint, with pretrained weights of a library, or a baseline.

    Args:
        source: A checkpoint as for ``load_backbone``; the name of a timm or torchvision model, to use its pretrained
            weights; ``untrained``, the backbone with random weights; or ``pixels``, the image itself.
        backbone: Name of the timm or torchvision model, for ``untrained`` and checkpoints that do not name it.
        backbone_kwargs: Arguments of its builder.

    Raises:
        UserError: There is no such file or model, or it does not fit.
    """
    if _is_file(source):
        return read_checkpoint(source, backbone, backbone_kwargs)
    kwargs = dict(backbone_kwargs or {})
    if source == "untrained" and backbone is None:
        raise UnnamedBackboneError("an untrained backbone needs a name: give --backbone, e.g. resnet50.")
    pretrained = {} if source in ("untrained", "pixels") else {"pretrained": True}
    name = backbone if source == "untrained" and backbone else source
    model = create_backbone(name, **kwargs, **pretrained).eval()
    model.to(memory_format=torch.channels_last)
    return Pretrained(model, name, kwargs, _image_transform(model, own=bool(pretrained)))


def weights_for(source: str, backbone: str, backbone_kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a source, checked to give the same features in a backbone.

    Args:
        source: As for ``open_backbone``.
        backbone: Name of the timm or torchvision model that gets the weights.
        backbone_kwargs: Arguments of its builder.

    Raises:
        UserError: There is no such source, or it has another backbone; the message says what differs.
    """
    kwargs = {key: value for key, value in backbone_kwargs.items() if key != "pretrained"}
    with torch.random.fork_rng(devices=[]):
        try:  # checkpoints of this package hold these arguments
            pretrained = open_backbone(source, None, None if _is_file(source) else kwargs)
        except UnnamedBackboneError:
            pretrained = open_backbone(source, backbone, kwargs)
        weights = pretrained.backbone.state_dict()
        reason = mismatch(pretrained, weights, backbone, kwargs)
    if reason:
        theirs = f"{pretrained.name} {pretrained.backbone_kwargs}"
        raise UserError(f"it is a {theirs}, but a {backbone} {kwargs} is needed: {reason}.")
    return weights


def _is_file(source: str) -> bool:
    return os.path.isfile(source) or Path(source).suffix in (".ckpt", ".pth", ".pt", ".safetensors")


def _image_transform(model: nn.Module, own: bool = False) -> dict[str, Any]:
    """How to prepare images as models for ImageNet expect.

    Args:
        model: The backbone.
        own: Whether its weights are timm's, for which timm gives the transform.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    config = (getattr(model, "pretrained_cfg", None) or {}) if own else {}
    return {
        "size": getattr(model, "img_size", None)
        or native_size(model)
        or int(config.get("input_size", (3, 224, 224))[1]),
        "crop_fraction": config.get("crop_pct", 0.875),
        "interpolation": "bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
        "mean": tuple(config.get("mean", IMAGENET_DEFAULT_MEAN)),
        "std": tuple(config.get("std", IMAGENET_DEFAULT_STD)),
    }


def native_size(model: nn.Module) -> int | None:
    """Side in pixels of the images that a ViT has positions for; None for a CNN.

    Args:
        model: Of timm or torchvision.
    """
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return int(sides[0]) if sides else getattr(model, "image_size", None)


def mismatch(pretrained: Pretrained, weights: dict[str, Tensor], backbone: str, backbone_kwargs: dict[str, Any]) -> str:
    """Why another backbone does not give the same features with some weights; nothing if it does.

    Compares features, too: weights do not determine everything, e.g. the number of heads or a stride.

    Args:
        pretrained: The backbone to compare with.
        weights: Its weights, under the names of the other backbone.
        backbone: Name of the other timm or torchvision model.
        backbone_kwargs: Arguments of its builder.
    """
    other = create_backbone(backbone, **backbone_kwargs).eval()
    if misfit := _misfit(weights, other.state_dict()):
        return misfit
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


def _facts(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of this package says about its training."""
    if "saved_facts" in checkpoint:
        return checkpoint["saved_facts"]
    if "method" not in checkpoint:
        return {}
    return {
        "method": checkpoint["method"],
        "recipe": checkpoint.get("hyper_parameters", {}),
        "epochs": checkpoint.get("epoch", -1) + 1,
        "steps": checkpoint.get("global_step", 0),
        "metrics": checkpoint.get("metrics", {}),
        "ssl_lightning_version": checkpoint.get("ssl_lightning_version"),
        **checkpoint.get("facts", {}),
    }


def weights_in(path: str | Path) -> dict[str, Any]:
    """What a checkpoint or a file of weights holds, on the CPU.

    Args:
        path: The file.

    Raises:
        UserError: There is no such file, or reading it would run code.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist.")
    with reading(path):
        if Path(path).suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                return {
                    "state_dict": {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
                    **_saved_facts(file.metadata()),
                }
        with torch.serialization.safe_globals([argparse.Namespace]):  # in MAE's and DINO's files, besides weights
            return torch.load(path, map_location="cpu", weights_only=True)


def _saved_facts(metadata: dict[str, str] | None) -> dict[str, Any]:
    """The metadata of a file that this package exported, in the form of a checkpoint; empty for other files."""
    if metadata is None or "backbone_kwargs" not in metadata:
        return {}
    facts: dict[str, Any] = {key: value if key in TEXT else json.loads(value) for key, value in metadata.items()}
    transform: dict[str, Any] = facts.pop("image_transform")
    return {
        "hyper_parameters": {key: facts.pop(key) for key in ("backbone", "backbone_kwargs")},
        "image_transform": {
            key: tuple(value) if isinstance(value, list) else value for key, value in transform.items()
        },
        "fixed_positions": facts.pop("fixed_positions", False),
        "saved_facts": facts,
    }


def _container(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, without what DistributedDataParallel puts before their names."""
    for key in _CONTAINERS:
        if isinstance(checkpoint.get(key), dict):
            return _container(checkpoint[key])
    tensors = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _as_timm_names(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """DINOv2's names as timm's: registers, and blocks that were trained in chunks (``blocks.0.5`` is ``blocks.5``)."""
    if "reg_token" in model.state_dict() and "register_tokens" in weights:
        weights["reg_token"] = weights.pop("register_tokens")
    chunked = any(part.isdigit() for name in weights if name.startswith("blocks.") for part in name.split(".")[2:3])
    if not chunked:
        return weights
    return {
        ".".join([parts[0], *parts[2:]]) if (parts := name.split("."))[0] == "blocks" else name: value
        for name, value in weights.items()
    }


def _misfit(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
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
    return any(first == head or first.startswith(f"{head}_") for head in _HEADS)
