"""Backbones by name: everything timm and torchvision know, and ResNets with the CIFAR stem."""

import difflib
from typing import Any

import timm
import torch
import torchvision
from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ssl_lightning.errors import UserError


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Build a backbone without its classifier, randomly initialised unless ``pretrained=True`` is given.

    Args:
        name: A timm model name, else a torchvision one; ``torchvision/NAME`` asks for torchvision's. ``pixels`` is
            the flattened image, a baseline.
        kwargs: Passed to the builder, e.g. ``img_size`` and ``patch_size`` of a ViT.

    Returns:
        A module that maps images ``(B, 3, S, S)`` to features ``(B, num_features)``.

    Raises:
        UserError: The name is unknown, or the builder refuses an argument.
    """
    wanted = name.removeprefix("torchvision/")
    try:
        if name == "pixels":
            return Pixels(**kwargs)
        if wanted == name and timm.is_model(name):
            model = timm.create_model(name, num_classes=0, **kwargs)
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
    with torch.no_grad():  # torchvision does not tell the width of its features
        sizes = [model.image_size] if hasattr(model, "image_size") else [224, 288]
        widths = {model.eval()(torch.zeros(1, 3, size, size)).shape[1] for size in sizes}
    if len(widths) > 1 or getattr(model, "aux_logits", False):
        raise UserError(f"backbone 'torchvision/{name}' does not give one feature vector; choose timm's or another.")
    model.num_features = widths.pop()
    return model.train(was_training)


def _cifar_resnet(block: Any, layers: tuple[int, ...], stem_stride: int = 1, **kwargs: Any) -> ResNet:
    """ResNet whose stem keeps the resolution: 3x3 convolution of stride 1, no max-pooling (SimCLR, appendix B.9).

    ``stem_stride=2`` halves the resolution instead: a quarter of the work, for recipes sized for CPUs.
    """
    kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None), kwargs.pop("cache_dir", None)
    if kwargs.pop("pretrained", False):
        raise UserError("ResNets with the CIFAR stem have no pretrained weights; leave out pretrained.")
    model: Any = ResNet(block, layers, **kwargs)
    width = model.bn1.num_features
    stem = nn.Conv2d(kwargs.get("in_chans", 3), width, kernel_size=3, stride=stem_stride, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = stem
    model.maxpool = nn.Identity()
    return model


@register_model
def resnet10_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-10 (one basic block per stage) with the CIFAR stem."""
    return _cifar_resnet(BasicBlock, (1, 1, 1, 1), pretrained=pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with the CIFAR stem: 11,168,832 parameters."""
    return _cifar_resnet(BasicBlock, (2, 2, 2, 2), pretrained=pretrained, **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-34 with the CIFAR stem."""
    return _cifar_resnet(BasicBlock, (3, 4, 6, 3), pretrained=pretrained, **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 with the CIFAR stem."""
    return _cifar_resnet(Bottleneck, (3, 4, 6, 3), pretrained=pretrained, **kwargs)


class Pixels(nn.Module):
    """The image itself, flattened: what a backbone has to beat.

    Args:
        img_size: Side of the images in pixels.
        in_chans: Number of channels.
    """

    def __init__(self, img_size: int = 32, in_chans: int = 3) -> None:
        super().__init__()
        self.num_features = in_chans * img_size**2

    def forward(self, images: Tensor) -> Tensor:
        """Flatten images ``(B, C, S, S)`` to ``(B, C * S * S)``."""
        return images.flatten(1)
