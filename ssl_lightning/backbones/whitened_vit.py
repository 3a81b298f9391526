"""A small ViT on the maps of a small CNN, for minutes of training; timm knows its name once this is imported."""

import functools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_lightning.backbones.builder_arguments import builder_arguments
from ssl_lightning.backbones.whitened import WhitenedCNN
from ssl_lightning.errors import UserError


class WhitenedPatches(nn.Module):
    """Maps of a ``WhitenedCNN`` in place of projected patches; each knows some pixels of its neighbors.

    Convolutions make a ViT learn in fewer steps (Xiao et al. 2021, Early Convolutions Help Transformers See Better,
    https://arxiv.org/abs/2106.14881).

    Args:
        img_size: Side of the images in pixels, or their height and width.
        in_chans: Number of channels of the images.
        channels: Width of each block of the CNN, which halves the resolution.
        timm: What timm gives its own patch projection besides.
    """

    def __init__(self, img_size: int | tuple[int, int], in_chans: int, channels: Sequence[int], **timm: Any) -> None:
        super().__init__()
        side = 2 ** len(channels)
        height, width = to_2tuple(img_size)
        self.patch_size, self.grid_size = (side, side), (height // side, width // side)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.maps = WhitenedCNN(channels, in_chans)

    def forward(self, images: Tensor) -> Tensor:
        """Patches ``(B, rows, columns, channels[-1])`` of images ``(B, in_chans, S, S)``."""
        padded = F.pad(images, (0, 1, 0, 1), mode="replicate")  # whitening takes a row and a column
        return self.maps.forward_features(padded).permute(0, 2, 3, 1)


@register_model
def whitened_vit(pretrained: bool = False, channels: Sequence[int] = (16, 64, 192), **kwargs: Any) -> VisionTransformer:
    """One block of attention on patches of 8 px: 0.94 million parameters. Each of ``channels`` doubles their side."""
    kwargs = builder_arguments("whitened_vit has", pretrained, **kwargs)
    given = [name for name in ("patch_size", "embed_dim") if name in kwargs]
    if given:
        raise UserError(
            f"whitened_vit takes no {given[0]}; set channels in --model.backbone_kwargs: its length gives the size of "
            "the patches, 2 ** 3 = 8 px, and its last number the width."
        )
    own = {"patch_size": 2 ** len(channels), "embed_dim": channels[-1], "dynamic_img_size": True}
    patches: Any = functools.partial(WhitenedPatches, channels=channels)
    return VisionTransformer(**{"img_size": 32, "depth": 1, "num_heads": 3, **kwargs, **own}, embed_layer=patches)
