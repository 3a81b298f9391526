"""Backbones by name: everything timm and torchvision know, and networks of one's own.

timm is imported where it is needed: help texts do not wait for it.
"""

import difflib
from typing import Any, Literal, TypeGuard

import torch
import torchvision
from torch import Tensor, nn

from ssl_lightning.backbones.own import Backbone, is_own, name_of, own_backbone
from ssl_lightning.backbones.tokens import OF_OWN_VITS, ViT
from ssl_lightning.errors import UserError


def create_backbone(name: Backbone, **kwargs: Any) -> nn.Module:
    """Build a backbone without its classifier, randomly initialized unless ``pretrained=True`` is given.

    With ``num_classes=N`` a model of timm keeps a linear layer, whose N outputs become its features (LeJEPA's example).

    ViTs of timm take images of any size that their patch divides. DINOv3's give their class token unless
    ``global_pool`` says otherwise.

    Args:
        name: A timm model name, else a torchvision one; ``torchvision/NAME`` asks for torchvision's. ``pixels`` is
            the flattened image, a baseline. ``my_module.MyNet`` is a class of one's own; a module, a class or a
            function that builds one may also be given itself.
        kwargs: Passed to the builder, e.g. ``img_size`` and ``patch_size`` of a ViT.

    Returns:
        A module that maps images ``(B, 3, S, S)`` to features ``(B, num_features)``.

    Raises:
        UserError: The name is unknown, or the builder refuses an argument.
    """
    import timm

    from ssl_lightning.backbones import resnet, whitened, whitened_vit  # noqa: F401 # make their names known to timm
    from ssl_lightning.backbones.vit import adapted

    if is_own(name):
        return own_backbone(name, **kwargs)
    assert isinstance(name, str)
    wanted = name.removeprefix("torchvision/")
    try:
        if name == "pixels":
            return Pixels(**kwargs)
        if wanted == name and timm.is_model(name):
            if is_vit(name):
                kwargs = {"dynamic_img_size": True, **kwargs}
            elif is_dinov3(name):
                kwargs = {"global_pool": "token", **kwargs}
            backbone = adapted(timm.create_model(name, **{"num_classes": 0, **kwargs}))
            backbone.num_features = kwargs.get("num_classes") or backbone.num_features
            return backbone
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


def is_vit(name: Any) -> TypeGuard[str]:
    """Whether a name is a plain ViT of timm, e.g. vit_small_patch16_224."""
    return _is_in(name, ["vision_transformer"])


def is_dinov3(name: Any) -> bool:
    """Whether a name is DINOv3's ViT of timm, with rotary positions, e.g. vit_small_patch16_dinov3."""
    return _is_in(name, ["eva"]) and "dinov3" in name


def is_beit(name: Any) -> bool:
    """Whether a name is timm's BEiT, a ViT with relative positions, e.g. beit_base_patch16_224."""
    return _is_in(name, ["beit"])


BEIT_IN_PRETRAINING = {"use_fc_norm": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
"""Arguments of timm's BEiT: all blocks share their positions, and tokens are normalized before they are pooled."""


def is_swin(name: Any) -> bool:
    """Whether a name is a Swin of timm, e.g. swin_base_patch4_window7_224."""
    return _is_in(name, ["swin_transformer", "swin_transformer_v2"])


def _is_in(name: Any, modules: list[str]) -> bool:
    from timm.models import is_model, is_model_in_modules

    return isinstance(name, str) and is_model(name) and is_model_in_modules(name, modules)


def vit_defaults(name: Backbone, backbone_kwargs: dict[str, Any] | None, **defaults: Any) -> dict[str, Any]:
    """Arguments of the builder of a backbone, with defaults if it is a ViT of timm.

    Args:
        name: The backbone.
        backbone_kwargs: What was chosen; has precedence.
        defaults: A method's defaults for plain ViTs. DINOv3's take those about depth; its tokens and pooling stay.
    """
    if is_dinov3(name):
        defaults = {key: value for key, value in defaults.items() if key in ("drop_path_rate", "init_values")}
    elif not is_vit(name):
        defaults = {}
    return {**defaults, **(backbone_kwargs or {})}


def token_vit(
    method: str,
    name: Backbone,
    backbone: nn.Module,
    tokens: Literal["class", "patches", "plain", "any"] = "any",
) -> ViT:
    """The backbone, if it is a ViT whose tokens a method can read.

    Args:
        method: Name of the method, for the message.
        name: The backbone as it was given, for the message.
        backbone: What ``create_backbone`` built.
        tokens: Of plain ViTs, whether the features are the class token, or the mean of patches without any other
            token; ``plain`` for a class token, no other and any pooling. DINOv3's ViTs have a class token, and one's
            own may do as they like.

    Raises:
        UserError: It is another kind of backbone.
    """
    from ssl_lightning.backbones.vit import AnySizeViT, RotaryViT

    if getattr(backbone, "num_classes", 0) and not is_own(name):
        raise UserError(f"{method} reads tokens, not classes; leave num_classes out of --model.backbone_kwargs.")
    needed = [attribute for attribute in OF_OWN_VITS if attribute != "encode" or method in ("CAPI", "MAE", "IJEPA")]
    has_class_token = getattr(backbone, "cls_token", None) is not None
    if isinstance(backbone, AnySizeViT):
        pooling = (backbone.global_pool, type(backbone.fc_norm))
        suits = {
            "class": has_class_token and pooling == ("token", nn.Identity),
            "patches": backbone.projects_patches and not has_class_token and pooling == ("avg", nn.Identity),
            "plain": backbone.projects_patches and backbone.is_plain,
            "any": backbone.projects_patches,
        }[tokens]
    elif isinstance(backbone, RotaryViT):
        suits = has_class_token
    else:
        suits = is_own(name) and all(hasattr(backbone, attribute) for attribute in needed)
    if suits:
        return backbone  # type: ignore[return-value] # or like it
    wanted = {
        "class": "a class token that is its features",
        "patches": "no class token and the mean of projected patches",
        "plain": "projected patches and one more token, the class token",
        "any": "projected patches",
    }
    raise UserError(
        f"{method} reads the patch tokens of a ViT with {wanted[tokens]}, which "
        f"backbone={name_of(name)!r} is not; set --model.backbone to a ViT of timm, e.g. vit_base_patch16_224, or to "
        f"one of your own that gives features (B, D) and has {', '.join(needed)} (see backbones.tokens.ViT)."
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
