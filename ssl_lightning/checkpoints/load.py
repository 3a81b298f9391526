"""Backbones out of checkpoints, whoever wrote them, and by name."""

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
"""Where files keep the weights; of DINO's and DINOv2's the teacher's, which their papers evaluate."""

_PREFIXES = ("encoder_q.", "base_encoder.", "backbone.", "encoder.", "")
"""Before the names of the weights: MoCo v2; MoCo v3; DINO, DINOv2, lightly; SimSiam; bare. Ours say it themselves."""

_HEADS = (
    *("fc", "head", "heads", "classifier", "projector", "projection_head", "predictor", "prototypes"),
    *("mask_token", "decoder", "dino_head", "ibot_head"),
)
"""What may be left over beside the backbone: parts of these names, or of one that goes on with ``_``."""


TEXT = ("backbone", "method", "data", "ssl_lightning_version")
"""What the metadata of an exported file tells as it is; everything else is JSON."""


class UnnamedBackboneError(UserError):
    """A source that does not say what its backbone is."""


@dataclass
class Pretrained:
    """A backbone and what is known of it.

    Args:
        backbone: Maps images ``(B, 3, S, S)`` to features ``(B, embed_dim)``; in eval mode.
        name: Name of the timm or torchvision model.
        backbone_kwargs: Arguments of its builder.
        image_transform: How its images are prepared: ``size``, ``crop_fraction``, ``interpolation``, ``mean``, ``std``.
        facts: What the file tells: ``method``, ``recipe``, ``data``, ``metrics``, ...
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
        """What tells these weights from others: 16 hexadecimal digits."""
        kwargs = json.dumps(self.backbone_kwargs, sort_keys=True, default=str)  # where a tuple is a list, as in files
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

    Reads checkpoints of this package, the official ones of MoCo v2 and v3, SimSiam, SwAV, DINO, DINOv2, MAE, Barlow
    Twins and VICReg, lightly's, and bare weights of timm and torchvision; ``.safetensors`` files as well. The format is
    found by the names of the weights. All weights of the backbone must be there; only heads may be left over.

    Args:
        path: The file.
        backbone: Name of the timm or torchvision model; None for a checkpoint or an exported ``.safetensors`` of this
            package, which know it.
        backbone_kwargs: Arguments of its builder, e.g. ``{img_size: 96}``.

    Raises:
        UserError: The file needs code to be read, or fits no format; says which weights are missing or left over.
    """
    return read_checkpoint(path, backbone, backbone_kwargs).backbone


def read_checkpoint(
    path: str | Path, backbone: str | None = None, backbone_kwargs: dict[str, Any] | None = None
) -> Pretrained:
    """The backbone of a checkpoint and what the file tells of it; see ``load_backbone``.

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
    of_moco_v3 = "MoCoV3" in checkpoint.get("method_bases", []) or any(name.startswith("base_enc") for name in weights)
    if backbone is None:
        if "backbone" not in hyper_parameters:
            raise UnnamedBackboneError(f"{path} does not say what its backbone is; give its name, e.g. resnet50.")
        backbone = str(hyper_parameters["backbone"])
    kwargs = {**(hyper_parameters.get("backbone_kwargs") or {}), **(backbone_kwargs or {})}
    kwargs.pop("pretrained", None)
    if of_moco_v3 and backbone.startswith("vit_small"):
        kwargs.setdefault("num_heads", 12)  # the paper's; no weight tells
    model = create_backbone(backbone, **kwargs).eval()
    model.to(memory_format=torch.channels_last)  # as in training
    own = checkpoint.get("evaluated_backbone")
    candidates = _PREFIXES if own is None else [f"{own}."]
    prefixes = [prefix for prefix in candidates if any(name.startswith(prefix) for name in weights)]
    misfits = []
    for prefix in prefixes:
        found = _as_timm_names(
            {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, model
        )
        misfit = _misfit(found, model.state_dict())
        if not misfit:
            model.load_state_dict(found, strict=False)
            of_mae_or_ijepa = any(name.startswith(("decoder_", "predictor_positions")) for name in weights)
            if isinstance(model, AnySizeViT) and (of_moco_v3 or of_mae_or_ijepa or checkpoint.get("fixed_positions")):
                model.tell_fixed_positions()  # which are known at other sizes, too
            transform = checkpoint.get("image_transform") or _image_transform(model)
            return Pretrained(model, backbone, kwargs, transform, _facts(checkpoint))
        misfits.append(f"{prefix or 'no prefix'}: {misfit}")
    looked = "; ".join(misfits) or f"none of {', '.join(filter(None, candidates))} begins a name in it"
    raise UserError(f"{path} does not hold a {backbone}. Looked for its weights after {looked}.")


def open_backbone(
    source: str, backbone: str | None = None, backbone_kwargs: dict[str, Any] | None = None
) -> Pretrained:
    """A backbone to evaluate: out of a checkpoint, with the pretrained weights of a library, or a baseline.

    Args:
        source: A checkpoint as for ``load_backbone``; the name of a timm or torchvision model, for the weights that its
            library offers; ``untrained``: the backbone as it is before training; or ``pixels``.
        backbone: Name of the timm or torchvision model, for ``untrained`` and checkpoints that do not tell it.
        backbone_kwargs: Arguments of its builder.

    Raises:
        UserError: There is no such file or model, or it does not fit.
    """
    if _is_file(source):
        return read_checkpoint(source, backbone, backbone_kwargs)
    kwargs = dict(backbone_kwargs or {})
    if source == "untrained" and backbone is None:
        raise UnnamedBackboneError("an untrained backbone needs its name: give backbone, e.g. resnet50.")
    pretrained = {} if source in ("untrained", "pixels") else {"pretrained": True}
    name = backbone if source == "untrained" and backbone else source
    model = create_backbone(name, **kwargs, **pretrained).eval()
    model.to(memory_format=torch.channels_last)
    return Pretrained(model, name, kwargs, _image_transform(model, own=bool(pretrained)))


def weights_for(source: str, backbone: str, backbone_kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a source, seen to give its features in a backbone.

    Args:
        source: As for ``open_backbone``.
        backbone: Name of the timm or torchvision model that shall have them.
        backbone_kwargs: Arguments of its builder.

    Raises:
        UserError: There is no such source, or it is of another backbone; says what differs.
    """
    kwargs = {key: value for key, value in backbone_kwargs.items() if key != "pretrained"}
    with torch.random.fork_rng(devices=[]):
        try:  # ours know their own arguments
            pretrained = open_backbone(source, None, None if _is_file(source) else kwargs)
        except UnnamedBackboneError:
            pretrained = open_backbone(source, backbone, kwargs)
        weights = pretrained.backbone.state_dict()
        reason = mismatch(pretrained, weights, backbone, kwargs)
    if reason:
        theirs = f"{pretrained.name} {pretrained.backbone_kwargs}"
        raise UserError(f"it is a {theirs}, wanted is a {backbone} {kwargs}: {reason}.")
    return weights


def _is_file(source: str) -> bool:
    return os.path.isfile(source) or Path(source).suffix in (".ckpt", ".pth", ".pt", ".safetensors")


def _image_transform(model: nn.Module, own: bool = False) -> dict[str, Any]:
    """How ImageNet's models want their images.

    Args:
        model: The backbone.
        own: Whether its weights are those that timm knows, and says how to use.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    told = (getattr(model, "pretrained_cfg", None) or {}) if own else {}
    return {
        "size": getattr(model, "img_size", None) or native_size(model) or int(told.get("input_size", (3, 224, 224))[1]),
        "crop_fraction": told.get("crop_pct", 0.875),
        "interpolation": "bilinear" if told.get("interpolation") == "bilinear" else "bicubic",
        "mean": tuple(told.get("mean", IMAGENET_DEFAULT_MEAN)),
        "std": tuple(told.get("std", IMAGENET_DEFAULT_STD)),
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

    Looks at features, too: weights do not tell everything, e.g. the number of heads or a stride.

    Args:
        pretrained: The backbone to compare with.
        weights: Its weights, named as the other wants them.
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
        features, found = pretrained.backbone(images), other(images)
    if features.shape != found.shape:
        return f"the features are {found.shape[1]} numbers, not {features.shape[1]}"
    apart = float((features - found).abs().max())
    return (
        ""
        if apart <= 1e-4 * float(features.abs().max())
        else f"the weights fit, but the features are {apart:.1e} apart"
    )


def _facts(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of this package tells of its training."""
    if "told" in checkpoint:
        return checkpoint["told"]
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
        UserError: There is none, or it needs code to be read.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist.")
    with reading(path):
        if Path(path).suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                return {"state_dict": {name: file.get_tensor(name) for name in file.keys()}, **_told(file.metadata())}  # noqa: SIM118
        with torch.serialization.safe_globals([argparse.Namespace]):  # what MAE's and DINO's files hold beside weights
            return torch.load(path, map_location="cpu", weights_only=True)


def _told(metadata: dict[str, str] | None) -> dict[str, Any]:
    """What an exported file of this package tells beside its weights, as a checkpoint would; of others nothing."""
    if metadata is None or "backbone_kwargs" not in metadata:
        return {}
    told: dict[str, Any] = {key: value if key in TEXT else json.loads(value) for key, value in metadata.items()}
    transform: dict[str, Any] = told.pop("image_transform")
    return {
        "hyper_parameters": {key: told.pop(key) for key in ("backbone", "backbone_kwargs")},
        "image_transform": {
            key: tuple(value) if isinstance(value, list) else value for key, value in transform.items()
        },
        "fixed_positions": told.pop("fixed_positions", False),
        "told": told,
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


def _misfit(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """Why these weights are not those of the model; nothing if they are."""
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    others = [name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape]
    left = [name for name in found if name not in wanted and not _of_a_head(name)]
    parts = []
    if missing:
        parts.append(f"{len(missing)} are missing, e.g. {missing[0]}")
    if others:
        name = sorted(others)[0]
        parts.append(f"{name} is {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}")
    if left:
        parts.append(f"{len(left)} are left over, e.g. {left[0]}")
    return ", ".join(parts)


def _of_a_head(name: str) -> bool:
    first = name.split(".")[0]
    return any(first == head or first.startswith(f"{head}_") for head in _HEADS)
