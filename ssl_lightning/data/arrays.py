"""Images in memory, as notebooks have them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.folder import split
from ssl_lightning.data.images import ImageArray


class ArrayData(SSLDataModule):
    """Arrays of images, with or without labels.

    For other than three channels give views without colour operations, and a backbone with ``in_chans``.

    Args:
        images: ``(N, C, H, W)``, uint8: an array or a tensor.
        labels: ``(N,)`` class of each image; they serve the probes alone. -1 is unknown.
        val_images: ``(M, C, H, W)``, uint8: for validation.
        val_labels: ``(M,)`` class of each of them.
        val_fraction: Share of labelled images held out if there are no ``val_images``.
        kwargs: See SSLDataModule; ``image_size`` is that of the images by default.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | Tensor,
        labels: NDArray[np.int64] | Tensor | None = None,
        val_images: NDArray[np.uint8] | Tensor | None = None,
        val_labels: NDArray[np.int64] | Tensor | None = None,
        val_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.arrays = ImageArray(images, None if labels is None else np.asarray(labels))
        self.val_arrays = None
        if val_images is not None:
            self.val_arrays = ImageArray(val_images, None if val_labels is None else np.asarray(val_labels))
        self.val_fraction = val_fraction
        self.default_image_size = max(self.arrays.images.shape[2:])
        super().__init__(**kwargs)

    def load(self) -> None:
        """Take the arrays, and split off validation."""
        self.train_images, self.val_images = self.arrays, self.val_arrays
        if self.val_arrays is None:
            self.train_images, self.val_images = split(self.arrays, self.val_fraction)
