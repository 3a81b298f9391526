"""Images from arrays in memory, for notebooks."""

from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.images import ImageArray
from ssl_lightning.data.splits import split


class ArrayData(SSLDataModule):
    """Arrays of images, with or without labels.

    If the images do not have three channels, set the backbone's ``in_chans``.

    Args:
        images: ``(N, C, H, W)``: an array or a tensor of any real dtype.
        labels: ``(N,)`` class of each image, a whole number or a word; -1 and None are unknown. Only probes and
            evaluation use labels.
        val_images: ``(M, C, H, W)``: the validation images.
        val_labels: ``(M,)`` class of each validation image.
        val_fraction: Fraction of labeled images held out for validation if there are no ``val_images``.
        kwargs: See SSLDataModule. By default ``image_size`` is the longer side of the images.
    """

    def __init__(
        self,
        images: NDArray[Any] | Tensor,
        labels: Any = None,
        val_images: NDArray[Any] | Tensor | None = None,
        val_labels: Any = None,
        val_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.arrays = ImageArray(images, labels)
        self.val_arrays = None
        if val_images is not None:
            self.val_arrays = ImageArray(val_images, val_labels)
        self.val_fraction = val_fraction
        self.default_image_size = max(self.arrays.images.shape[2:])
        super().__init__(**kwargs)

    def load(self) -> None:
        """Take the arrays, and hold out images for validation."""
        self.train_images, self.val_images = self.arrays, self.val_arrays
        if self.val_arrays is None:
            self.train_images, self.val_images = split(self.arrays, self.val_fraction)
