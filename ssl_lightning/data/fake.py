"""Random images, for testing shapes and speed."""

from typing import Any

import numpy as np

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.images import ImageArray


class FakeData(SSLDataModule):
    """Noise with meaningless labels, for testing shapes: there is nothing to learn from it.

    Args:
        num_images: Number of training images. There are a quarter as many validation images.
        num_labels: Number of classes.
        kwargs: See SSLDataModule. By default ``image_size`` is 32.
    """

    default_image_size = 32

    def __init__(self, num_images: int = 64, num_labels: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_images, self.num_labels = num_images, num_labels

    def load(self) -> None:
        """Draw the images."""
        random = np.random.Generator(np.random.Philox(key=0))

        def noise(count: int) -> ImageArray:
            pixels = random.integers(256, size=(count, 3, self.image_size, self.image_size), dtype=np.uint8)
            return ImageArray(pixels, np.arange(count) % self.num_labels)

        self.train_images, self.val_images = noise(self.num_images), noise(max(1, self.num_images // 4))
