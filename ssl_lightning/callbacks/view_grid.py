"""A picture of the training views, drawn when training starts."""

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ssl_lightning.drawing import show
from ssl_lightning.runs import VIEWS_FILE


class ViewGrid(L.Callback):
    """Draws the first images with their views when training starts, as ``views.png`` in the run folder.

    TensorBoard and Weights & Biases show the picture under ``views``.

    Args:
        num_images: Number of images in the picture.
    """

    def __init__(self, num_images: int = 8) -> None:
        self.num_images = num_images

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the picture, unless the run was resumed and has one already."""
        preview = getattr(getattr(trainer, "datamodule", None), "preview", None)
        if preview is None or trainer.global_step > 0 or not trainer.loggers:
            return
        show(trainer, "views", preview(num_rows=self.num_images, num_images=self.num_images).sheet, VIEWS_FILE)
