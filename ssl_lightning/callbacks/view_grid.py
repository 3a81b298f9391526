"""A picture of the views, where people look."""

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ssl_lightning.drawing import show


class ViewGrid(L.Callback):
    """Draw the first images with their views when training starts: ``views.png`` in the run's folder, and the logger.

    TensorBoard and Weights & Biases show it under ``views``.

    Args:
        num_images: Images in the picture.
    """

    def __init__(self, num_images: int = 8) -> None:
        self.num_images = num_images

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, unless a resumed run has its picture."""
        preview = getattr(getattr(trainer, "datamodule", None), "preview", None)
        if preview is None or trainer.global_step > 0 or not trainer.loggers:
            return
        show(trainer, "views", preview(num_rows=self.num_images, num_images=self.num_images).sheet, "views.png")
