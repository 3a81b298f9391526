"""The command ``preview``: how training sees the images."""

import lightning as L

from ssl_lightning.backbones.tokens import input_channels
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.errors import UserError
from ssl_lightning.methods.base import SSLModule


def run(
    _: L.Trainer,
    model: SSLModule,
    datamodule: SSLDataModule,
    output: str = "views.png",
    num_rows: int = 8,
    num_images: int = 256,
) -> None:
    """Draw images and their views as training sees them, and measure them.

    Args:
        model: The method.
        datamodule: The data.
        output: Image file to write, e.g. PNG.
        num_rows: Number of images in the picture, one per row.
        num_images: Number of images to measure.
    """
    datamodule.backbone_channels = input_channels(model)
    datamodule.method = model
    preview = datamodule.preview(num_rows, num_images)
    try:
        preview.sheet.save(output)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"--output {output}: {error}; give a file such as views.png in a folder that exists."
        ) from error
    print(f"{output}\n{preview}")
