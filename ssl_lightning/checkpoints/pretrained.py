"""A backbone with pretrained weights, and what is known about it."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


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


def image_transform_of(model: nn.Module, own: bool = False, described: dict[str, Any] | None = None) -> dict[str, Any]:
    """How to prepare images as models for ImageNet expect.

    Args:
        model: The backbone.
        own: Whether its weights are timm's, for which timm gives the transform.
        described: A checkpoint with what the files next to the weights say.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    config = (getattr(model, "pretrained_cfg", None) or {}) if own else {}
    if described is not None:
        config = described.get("config.json", {}).get("pretrained_cfg") or {}
        prepared = described.get("preprocessor_config.json", {})
        config = {**config, **{key: prepared[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in prepared}}
    stated = getattr(model, "img_size", None)  # a MaxViT has both sides
    return {
        "size": (stated[0] if isinstance(stated, tuple | list) else stated)
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


def facts_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
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
