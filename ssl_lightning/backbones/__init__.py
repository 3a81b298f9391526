"""Networks that methods train: by name, the ViT of any image size, its tokens, ResNets with the CIFAR stem.

What methods need at every step imports torch only; timm is imported when a backbone is built.
"""

from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.backbones.rotary import rope_2d
from ssl_lightning.backbones.tokens import inflate_channels

__all__ = ["create_backbone", "inflate_channels", "rope_2d"]
