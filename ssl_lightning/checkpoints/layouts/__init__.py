"""Names that projects give to the weights of their networks: one file per family, one table per layout."""

from ssl_lightning.checkpoints.layouts import convnext, resnet, swin, transformers, vit
from ssl_lightning.checkpoints.layouts.layout import Layout, Weights

LAYOUTS: tuple[Layout, ...] = (
    *vit.LAYOUTS,
    *swin.LAYOUTS,
    *resnet.LAYOUTS,
    *convnext.LAYOUTS,
    *transformers.LAYOUTS,
)
"""Every layout that files may have, besides the names of the model itself."""

__all__ = ["LAYOUTS", "Layout", "Weights"]
