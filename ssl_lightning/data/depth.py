"""Images with depth maps."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.data.dense import DenseData, SquareImages
from ssl_lightning.data.formats import is_image
from ssl_lightning.data.images import ImageFiles
from ssl_lightning.data.walk import walk
from ssl_lightning.errors import UserError

_SAME = 0.02
"""Largest relative difference between the proportions of an image and its depth map."""


class DepthData(DenseData):
    """Images with depth maps: ``images/NAME.jpg`` and ``depths/NAME.png``, with any suffixes.

    ``<split>.txt`` lists the names of a split, with or without suffixes. Without such a file a split is the folder
    ``images/<split>``, whose depth maps lie in ``depths/<split>``. Depth maps are PNGs of 16 bits, TIFFs, ``.npy``
    files, or what else holds a single number for each pixel. They may be smaller or larger than their images. A depth
    that is 0, negative or no number is unknown, and does not count.

    Args:
        root: Folder that contains ``images`` and ``depths``.
        depth_scale: Meters for each unit of the numbers in the files, e.g. 0.001 for millimeters, or 0.00390625 for
            KITTI. None takes floats for meters, and refuses whole numbers, whose unit no file says.
        image_size: Side in pixels that random crops are resized to in training, and whole images in evaluation.
        min_crop: Smallest area of a random crop, as a fraction of the image.
        kwargs: See DenseData.
    """

    def __init__(
        self,
        root: str,
        depth_scale: float | None = None,
        image_size: int = 448,
        min_crop: float = 0.25,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if depth_scale is not None and not depth_scale > 0:
            raise UserError(f"--data.depth_scale={depth_scale} must be above 0.")
        self.depth_scale, self.image_size, self.min_crop = depth_scale, image_size, min_crop

    def read(self, split: str, seed: int | None) -> "DepthImages":
        """Find images and depth maps."""
        names = self._names(split)
        images, depths = ([self._of_name(folder, name, split) for name in names] for folder in ("images", "depths"))
        return DepthImages(images, depths, self.depth_scale, self.image_size, self.min_crop, seed)

    def _names(self, split: str) -> list[str]:
        """Names of the images of a split, without suffixes."""
        listing = self.root / f"{split}.txt"
        if listing.is_file():
            lines = [line.strip() for line in listing.read_text().splitlines()]
            names = [_stem(line) if is_image(line) else line for line in lines if line]
            where = str(listing)
        else:
            start, where = f"{split}{os.sep}", f"{self.root / 'images' / split}"
            names = sorted(name for name in self._files_by_name["images"] if name.startswith(start))
        if not names:
            raise UserError(
                f"{where} has no images, and {listing} does not list any; --data.root must be a folder as in the help "
                "of DepthData."
            )
        return names

    def _of_name(self, folder: str, name: str, split: str) -> Path:
        path = self._files_by_name[folder].get(os.path.normpath(name))
        if path is None:
            raise UserError(
                f"{self.root / folder} has no file named {name}, which the split {split} needs; --data.root must be a "
                "folder as in the help of DepthData."
            )
        return path

    @cached_property
    def _files_by_name(self) -> dict[str, dict[str, Path]]:
        """The files of both folders, by their path without suffix."""
        return {
            folder: {
                _stem(os.path.join(inner, name)): self.root / folder / inner / name
                for inner, names in walk(self.root / folder)
                for name in sorted(names)
                if is_image(name)
            }
            for folder in ("images", "depths")
        }


class DepthImages(SquareImages):
    """Images with depth maps in meters, float32.

    Args:
        paths: The images.
        depths: Their depth maps.
        scale: Meters for each unit. None takes floats for meters.
        size: See SquareImages.
        min_crop: See SquareImages.
        seed: See DenseImages.
    """

    def __init__(
        self,
        paths: list[Path],
        depths: list[Path],
        scale: float | None,
        size: int,
        min_crop: float,
        seed: int | None,
    ) -> None:
        super().__init__(paths, 0, size, min_crop, seed)
        self.depths, self.scale = ImageFiles(depths), scale

    def target(self, index: int, shape: tuple[int, int]) -> Tensor:
        """The depth of the pixels; 0 is unknown."""
        name = self.depths.name(index)
        try:
            values = self.depths.read(index)  # (C, H, W)
        except UserError:
            raise
        except Exception as error:  # its type depends on the format
            raise UserError(f"{name} cannot be read ({error}); fix or remove it.") from error
        depth = values[0].float()
        if any((channel.float() != depth).any() for channel in values[1:]):  # gray of 8 bits is read as RGB
            raise UserError(f"{name} has {len(values)} channels; a depth map has a single number for each pixel.")
        if self.scale is None and not values.is_floating_point():
            raise UserError(
                f"{name} holds whole numbers; set --data.depth_scale to the meters of a unit, e.g. 0.001 for "
                "millimeters."
            )
        height, width = depth.shape
        if abs(height * shape[1] / (width * shape[0]) - 1) > _SAME:
            raise UserError(
                f"{name} is of {width}x{height} px, its image of {shape[1]}x{shape[0]}; they must have the same "
                "proportions."
            )
        depth = torch.where((depth > 0) & depth.isfinite(), depth * (self.scale or 1.0), 0.0)
        if self.seed is not None and depth.shape != shape:  # which are cropped together
            depth = F.interpolate(depth[None, None], shape, mode="nearest-exact")[0, 0]
        return depth


def _stem(path: str) -> str:
    """A path without its suffix."""
    return os.path.normpath(os.path.splitext(path)[0])
