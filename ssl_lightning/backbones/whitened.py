"""A small CNN on whitened patches, for minutes of training; timm knows its name once this is imported."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from ssl_lightning.backbones.builder_arguments import builder_arguments
from ssl_lightning.distributed import sharded_like
from ssl_lightning.errors import UserError


class Whitening(nn.Conv2d):
    """Convolution that whitens the patches of images; its weights are computed once, only its bias learns.

    Its outputs are the principal components of the patches, each divided by its deviation, and the same with the other
    sign (Jordan 2024, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, section 3.2, https://arxiv.org/abs/2404.00498).

    Args:
        in_chans: Number of channels of the images.
        patch: Side of the patches in pixels.
        epsilon: Added to the variances.
    """

    whitened: Tensor

    def __init__(self, in_chans: int, patch: int = 2, epsilon: float = 5e-4) -> None:
        components = in_chans * patch**2
        super().__init__(in_chans, 2 * components, patch)
        self.patch, self.epsilon = patch, epsilon
        self.register_buffer("whitened", torch.tensor(False))
        unit = torch.eye(components).reshape(components, in_chans, patch, patch)  # until there are images
        self.weight.requires_grad_(False).copy_(torch.cat([unit, -unit]))
        nn.init.zeros_(self.bias)  # type: ignore[arg-type] # there is a bias

    @torch.no_grad()
    def begin_with_images(self, images: Tensor) -> None:
        """Compute the weights, unless they have been computed.

        Args:
            images: ``(B, in_chans, S, S)``.
        """
        if self.whitened:
            return
        # on the CPU: the GPUs of Macs have no float64
        patches = F.unfold(images.cpu().double(), self.patch).transpose(1, 2).flatten(0, 1)  # (B * places, components)
        patches = patches - patches.mean(0)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))  # the components in columns
        generic = torch.arange(1.0, len(components) + 1, dtype=torch.float64).sqrt()
        components = components * (generic @ components).sign()  # else the library would choose their signs
        rows = (components / (variances + self.epsilon).sqrt()).T.reshape(-1, *self.weight.shape[1:])
        self.weight.copy_(sharded_like(self.weight, torch.cat([rows, -rows])))
        self.whitened.fill_(True)


class WhitenedCNN(nn.Module):
    """Whitened patches, then blocks of convolution, max-pooling and convolution with BatchNorm and GELU.

    The network of Jordan 2024, https://arxiv.org/abs/2404.00498, sections 3.1 to 3.3, with the mean over the last map
    in place of its pooling and classifier.

    Args:
        channels: Width of each block, which halves the resolution.
        in_chans: Number of channels of the images.
        num_classes: 0; there is no classifier.
    """

    def __init__(self, channels: Sequence[int] = (48, 96, 192), in_chans: int = 3, num_classes: int = 0) -> None:
        super().__init__()
        if num_classes:
            raise UserError("whitened_cnn has no classifier; leave num_classes out of --model.backbone_kwargs.")
        if not channels:
            raise UserError("channels in --model.backbone_kwargs needs at least one number, the width of a block.")
        self.num_features, self.smallest_side = channels[-1], 2 ** len(channels) + 1  # of images
        self.whitening = Whitening(in_chans)
        widths = [self.whitening.out_channels, *channels]
        self.blocks = nn.Sequential(*(_block(before, width) for before, width in zip(widths, channels, strict=False)))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last map ``(B, num_features, rows, columns)`` of images ``(B, in_chans, S, S)``."""
        maps: Tensor = self.blocks(F.gelu(self.whitening(images)))
        return maps

    def forward_head(self, maps: Tensor) -> Tensor:
        """Features ``(B, num_features)``: the mean of a map."""
        return maps.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, num_features)`` of images ``(B, in_chans, S, S)``."""
        return self.forward_head(self.forward_features(images))


def _block(before: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        _convolution(before, width), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU(),
        _convolution(width, width), nn.BatchNorm2d(width), nn.GELU(),
    )  # fmt: skip


def _convolution(before: int, width: int) -> nn.Conv2d:
    """Its first filters copy the channels (section 3.3), the others are drawn as in ResNets (He et al. 2015)."""
    convolution = nn.Conv2d(before, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    nn.init.dirac_(convolution.weight[:before])
    return convolution


@register_model
def whitened_cnn(pretrained: bool = False, **kwargs: Any) -> WhitenedCNN:
    """Three blocks of 48, 96 and 192 channels: 0.65 million parameters."""
    return WhitenedCNN(**builder_arguments("whitened_cnn has", pretrained, **kwargs))
