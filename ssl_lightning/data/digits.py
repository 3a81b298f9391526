"""Scikit-learn's digits, a data set that needs no download."""

from typing import Any

import numpy as np

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.images import ImageArray


class DigitsData(SSLDataModule):
    """1,797 real handwritten digits of 8 px that come with scikit-learn: nothing to download.

    One fifth is held out for validation.

    Args:
        kwargs: See SSLDataModule. By default ``image_size`` is 16.
    """

    default_image_size = 16

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def load(self) -> None:
        """Read the digits, whose gray levels are 0 to 16, as RGB, and hold out every fifth."""
        from sklearn.datasets import load_digits  # only here: the command line starts without it

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None].repeat(3, axis=1)
        held_out = np.arange(len(images)) % 5 == 0
        self.train_images = ImageArray(images[~held_out], digits.target[~held_out].astype(np.int64))
        self.val_images = ImageArray(images[held_out], digits.target[held_out].astype(np.int64))
