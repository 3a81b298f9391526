"""Backbones by name: everything timm and torchvision know.

timm is imported where it is needed: help texts do not wait for it.
"""

import difflib
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from ssl_lightning.backbones.drop_path import DropPath
from ssl_lightning.backbones.tokens import ViT
from ssl_lightning.errors import UserError


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Build a backbone without its classifier, randomly initialized unless ``pretrained=True`` is given.

    ViTs of timm take images of any size that their patch divides.

    Args:
        name: A timm model name, else a torchvision one; ``torchvision/NAME`` asks for torchvision's. ``pixels`` is
            the flattened image, a baseline.
        kwargs: Passed to the builder, e.g. ``img_size`` and ``patch_size`` of a ViT.

    Returns:
        A module that maps images ``(B, 3, S, S)`` to features ``(B, num_features)``.

    Raises:
        UserError: The name is unknown, or the builder refuses an argument.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    from ssl_lightning.backbones import resnet  # noqa: F401 # makes its names known to timm
    from ssl_lightning.backbones.vit import AnySizeViT

    wanted = name.removeprefix("torchvision/")
    try:
        if name == "pixels":
            return Pixels(**kwargs)
        if wanted == name and timm.is_model(name):
            if is_vit(name):
                kwargs = {"dynamic_img_size": True, **kwargs}
            model = timm.create_model(name, num_classes=0, **kwargs)
            if type(model) is VisionTransformer and model.dynamic_img_size and model.pos_embed is not None:
                model.__class__ = AnySizeViT
            for module in model.modules():
                if type(module) is timm.layers.DropPath:
                    module.__class__ = DropPath  # type: ignore[assignment] # of the same attributes
            model.num_features = getattr(model, "head_hidden_size", None) or model.num_features  # what it gives
            return model
        if wanted in torchvision.models.list_models(module=torchvision.models):
            return _torchvision_backbone(wanted, **kwargs)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"backbone {name!r} does not accept backbone_kwargs {kwargs}: {error}") from error
    near = difflib.get_close_matches(name, {*timm.list_models(), *torchvision.models.list_models()}, n=5)
    hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models() for the names."
    raise UserError(f"unknown backbone {name!r}: neither timm nor torchvision has it; {hint}")


def _torchvision_backbone(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, **kwargs)
    for head in ("fc", "classifier", "heads", "head"):
        if hasattr(model, head):
            setattr(model, head, nn.Flatten(1))  # some classifiers flatten too
            break
    was_training = model.training
    with torch.no_grad():  # torchvision does not say the width of its features
        sizes = [model.image_size] if hasattr(model, "image_size") else [224, 288]
        widths = {model.eval()(torch.zeros(1, 3, size, size)).shape[1] for size in sizes}
    if len(widths) > 1 or getattr(model, "aux_logits", False):
        raise UserError(f"backbone 'torchvision/{name}' does not give one feature vector; choose timm's or another.")
    model.num_features = widths.pop()
    return model.train(was_training)


def is_vit(name: str) -> bool:
    """Whether a name is a plain ViT of timm, e.g. vit_small_patch16_224."""
    return _is_in(name, ["vision_transformer"])


def is_beit(name: str) -> bool:
    """Whether a name is timm's BEiT, a ViT with relative positions, e.g. beit_base_patch16_224."""
    return _is_in(name, ["beit"])


BEIT_IN_PRETRAINING = {"use_fc_norm": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
"""Arguments of timm's BEiT: all blocks share their positions, and tokens are normalized before they are pooled."""


def is_swin(name: str) -> bool:
    """Whether a name is a Swin of timm, e.g. swin_base_patch4_window7_224."""
    return _is_in(name, ["swin_transformer", "swin_transformer_v2"])


def _is_in(name: str, modules: list[str]) -> bool:
    from timm.models import is_model, is_model_in_modules

    return is_model(name) and is_model_in_modules(name, modules)


def vit_defaults(name: str, backbone_kwargs: dict[str, Any] | None, **defaults: Any) -> dict[str, Any]:
    """Arguments of the builder of a backbone, with defaults if it is a plain ViT.

    Args:
        name: Name of the backbone.
        backbone_kwargs: What was chosen; has precedence.
        defaults: A method's defaults for ViTs.
    """
    return {**(defaults if is_vit(name) else {}), **(backbone_kwargs or {})}


def plain_vit(method: str, name: str, backbone: nn.Module) -> ViT:
    """The backbone, if it is the papers' ViT: a class token and no other, learned positions, no norm before the blocks.

    Args:
        method: Name of the method, for the message.
        name: Name of the backbone, for the message.
        backbone: What ``create_backbone`` built.

    Raises:
        UserError: It is another kind of backbone.
    """
    from ssl_lightning.backbones.vit import AnySizeViT

    if isinstance(backbone, AnySizeViT) and backbone.is_plain:
        return backbone
    raise UserError(
        f"{method} needs a ViT of timm with a class token and no other tokens, which backbone={name!r} is not; set "
        "--model.backbone to a ViT, e.g. vit_base_patch16_224."
    )


def token_vit(method: str, name: str, backbone: nn.Module, class_token: bool) -> ViT:
    """The backbone, if it is a ViT whose patch tokens a method can read.

    Args:
        method: Name of the method, for the message.
        name: Name of the backbone, for the message.
        backbone: What ``create_backbone`` built.
        class_token: Whether its features are the class token, or the mean of its patches without any other token.

    Raises:
        UserError: It is another kind of backbone.
    """
    from ssl_lightning.backbones.vit import AnySizeViT

    pooling = "token" if class_token else "avg"
    if (
        isinstance(backbone, AnySizeViT)
        and (backbone.cls_token is not None) == class_token
        and (backbone.global_pool, type(backbone.fc_norm)) == (pooling, nn.Identity)
    ):
        return backbone
    tokens = "a class token that is its features" if class_token else "no class token and the mean of patches"
    raise UserError(
        f"{method} reads the patch tokens of a ViT with {tokens}, which backbone={name!r} is not; set --model.backbone "
        "to a ViT of timm, e.g. vit_base_patch16_224."
    )


class Pixels(nn.Module):
    """The image itself, flattened: what a backbone has to beat.

    Args:
        img_size: Side of the images in pixels.
        in_chans: Number of channels.
    """

    def __init__(self, img_size: int = 32, in_chans: int = 3) -> None:
        super().__init__()
        self.img_size, self.num_features = img_size, in_chans * img_size**2

    def forward(self, images: Tensor) -> Tensor:
        """Flatten images ``(B, C, S, S)`` to ``(B, C * S * S)``."""
        return images.flatten(1)
