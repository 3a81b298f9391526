"""ResNets with the CIFAR stem, which timm knows by name once this is imported."""

from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ssl_lightning.backbones.builder_arguments import builder_arguments


def _cifar_resnet(block: Any, layers: tuple[int, ...], stem_stride: int = 1, **kwargs: Any) -> ResNet:
    """ResNet whose stem keeps the resolution: 3x3 convolution of stride 1, no max-pooling (SimCLR, appendix B.9).

    ``stem_stride=2`` halves the resolution instead: a quarter of the work, for recipes sized for CPUs.
    """
    kwargs = builder_arguments("ResNets with the CIFAR stem have", **kwargs)
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
