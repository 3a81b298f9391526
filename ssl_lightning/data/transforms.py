"""Augmentation of one's own: any callable from an image to its views, run in the workers."""

import functools
import inspect
import itertools
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssl_lightning.data.decoding import OpenedImage
from ssl_lightning.data.images import Images
from ssl_lightning.data.pairs import view_sources
from ssl_lightning.data.randomness import Augmentation
from ssl_lightning.data.views import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from ssl_lightning.errors import UserError
from ssl_lightning.seeding import seed_of, seeded


class OwnViews:
    """A callable that makes the views of an image, and what is known of these views from a first call.

    Args:
        transform: Takes a Pillow image; a tensor ``(C, H, W)`` if the image has neither 1 nor 3 channels, with values
            in [0, 1] if it has more than 8 bits; albumentations get an array. Returns views: a list, or a single one.
        image: The image ``(C, H, W)`` of the first call.
        wanted: How often to call a transform that returns a single view.

    Attributes:
        specs: Sizes and normalization of the views.
        left_out: What else the transform returns, described.
    """

    def __init__(self, transform: Callable[..., Any], image: Tensor, wanted: int = 2) -> None:
        self.transform = transform
        self.as_array = any(kind.__module__.startswith("albumentations.") for kind in type(transform).__mro__)
        parts = [*_parts(transform)]
        kinds = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
        self.generators = [part for part in parts if isinstance(part, kinds)]
        with seeded(0):
            made = self._called(image)
        self.single = not isinstance(made, list)
        values = [made] * wanted if self.single else made
        views = [(place, view) for place, value in enumerate(values) if (view := _view(value, len(image))) is not None]
        if not views:
            raise UserError(
                f"--data.transform {self.name} returned no view but {_kinds(values) or 'nothing'}; it must return a "
                f"list of images or tensors (C, S, S) with {len(image)} channels, as the images."
            )
        self.places = [place for place, _ in views]
        self.left_out = _kinds([value for place, value in enumerate(values) if place not in self.places])
        self.shapes = [tuple(view.shape) for _, view in views]
        for shape in self.shapes:
            if shape[1] != shape[2]:
                raise UserError(
                    f"--data.transform {self.name} returned a view of {shape[2]}x{shape[1]} px; views must be square: "
                    "let it crop or resize them."
                )
        mean, std = _normalization(parts, [view for _, view in views])
        self.specs: tuple[ViewSpec, ...] = ()
        for _, size, _ in self.shapes:
            count = self.specs[-1].count if self.specs and self.specs[-1].size == size else 0
            spec = ViewSpec(size=size, count=count + 1, mean=mean, std=std)
            self.specs = (*self.specs[: -1 if count else None], spec)

    @property
    def name(self) -> str:
        """The name of the callable."""
        return getattr(self.transform, "__name__", type(self.transform).__name__)

    def __str__(self) -> str:
        sizes = ", ".join(f"{spec.count} of {spec.size} px" for spec in self.specs)
        return f"--data.transform {self.name} makes {sizes}" + (
            f"; left out what is no view: {self.left_out}" if self.left_out else ""
        )

    def views(self, images: Sequence[Tensor], sources: NDArray[np.int64], *numbers: int) -> list[Tensor]:
        """The views of an image, or of an image and its partner, ``(C, S, S)``.

        Args:
            images: The image, and its partner if there is one.
            sources: ``(V,)`` position in ``images`` of the image that each view shows.
            numbers: Numbers that determine the randomness.
        """
        if self.single:
            with self._seeded(numbers):
                made = [self._called(images[source]) for source in sources]
        else:
            calls = []
            for image in images:
                with self._seeded(numbers):
                    calls.append(self._called(image))
            made = [calls[source][place] for source, place in zip(sources, self.places, strict=True)]
        views = [_view(value, len(images[0])) for value in made]
        shapes = [None if view is None else tuple(view.shape) for view in views]
        if shapes != self.shapes:
            raise UserError(
                f"--data.transform {self.name} returned views of {shapes} for an image of {tuple(images[0].shape)}, "
                f"but of {self.shapes} for the first image; the views of all images must have the same sizes."
            )
        return [view for view in views if view is not None]

    def _seeded(self, numbers: Sequence[int]) -> Any:
        for position, generator in enumerate(self.generators):
            _reseed(generator, seed_of(*numbers, position))
        return seeded(*numbers)

    def _called(self, image: Tensor) -> Any:
        """What the transform returns for an image: a flat list, or a single value."""
        try:
            if self.as_array:
                pixels = image if image.dtype == torch.uint8 else image / 255
                return _flat(self.transform(image=pixels.permute(1, 2, 0).numpy()))
            return _flat(self.transform(_picture(image)))
        except UserError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"--data.transform {self.name} failed: {type(error).__name__}: {error} ({place.filename}, line "
                f"{place.lineno})"
            ) from error


class OwnViewMaker:
    """Makes the views of a batch with a callable; stands where ``ViewMaker`` stands otherwise.

    Args:
        own: The callable.
        seed: Seed of all random decisions.
        paired: Whether each image comes with a partner, which other views show.
    """

    needs_pixels = True

    def __init__(self, own: OwnViews, seed: int, paired: bool = False) -> None:
        self.own, self.seed = own, seed
        self.sources = view_sources(own.specs) * paired

    def sizes(self, epoch: int) -> list[int]:
        """Side in pixels of the views of each ViewSpec: the same in every epoch."""
        return [spec.size for spec in self.own.specs]

    def crop(
        self, epoch: int, indices: NDArray[np.int64], images: Sequence[OpenedImage]
    ) -> tuple[list[Tensor], list[Augmentation]]:
        """Views ``(count * B, C, S, S)`` of each ViewSpec, and no augmentation: nothing is left for the device.

        Args:
            epoch: Epoch.
            indices: ``(B,)`` indices of the images in the data set, which determine the random numbers.
            images: The B images; with partners followed by the B partners.
        """
        samples = []
        for number, index in enumerate(indices.tolist()):
            pixels = [image.decode(image.height) for image in images[number :: len(indices)]]
            samples.append(self.own.views(pixels, self.sources, self.seed, epoch, index))
        views = [torch.stack(batch) for batch in zip(*samples, strict=True)]
        firsts = np.cumsum([0, *(spec.count for spec in self.own.specs)]).tolist()
        return [torch.cat(views[first:end]) for first, end in itertools.pairwise(firsts)], []


def first_image(images: Images) -> Tensor:
    """The first image that can be read, of the first ten; ``(C, H, W)``.

    Args:
        images: The images.

    Raises:
        UserError: None of them can be read.
    """
    for index in range(min(10, len(images))):
        with suppress(OSError, ValueError, SyntaxError):
            return images.read(index)
    raise UserError("none of the first 10 images can be read, so --data.transform cannot be tried; remove them.")


def _picture(image: Tensor) -> Any:
    """An image ``(C, H, W)``, uint8 or float32 from 0 to 255, as most transforms expect it."""
    if image.dtype != torch.uint8:
        return image / 255
    if len(image) not in (1, 3):
        return image
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return Image.fromarray(pixels if len(image) == 3 else pixels[..., 0])


def _flat(made: Any) -> Any:
    """Nested lists and dictionaries of views as a flat list; anything else as it is."""
    if isinstance(made, dict):
        return _flat(made["image"] if "image" in made else [*made.values()])  # albumentations returns {"image": ...}
    if isinstance(made, Tensor) and made.ndim == 4:
        return [*made]
    if not isinstance(made, list | tuple):
        return made
    flat: list[Any] = []
    for value in made:
        value = value if isinstance(value, Tensor) else _flat(value)
        flat += value if isinstance(value, list) else [value]
    return flat


def _view(value: Any, channels: int) -> Tensor | None:
    """A view ``(C, S, S)``, uint8 or float32; None if the value is not an image of that many channels."""
    if isinstance(value, Image.Image):
        value = np.array(value.convert("RGB" if channels == 3 else "L") if channels in (1, 3) else value)
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
        if value.ndim == 2:
            value = value[None]
        elif value.ndim == 3 and value.shape[2] == channels:
            value = value.permute(2, 0, 1)
    if not isinstance(value, Tensor) or value.ndim != 3 or len(value) != channels or min(value.shape[1:]) < _SMALLEST:
        return None
    value = value.detach().as_subclass(Tensor)
    if value.dtype == torch.uint8:
        return value
    return value.to(torch.float32) if value.is_floating_point() else None


_SMALLEST = 4
"""Side in pixels of the smallest view: the grids of positions that VICRegL's transform also returns are smaller."""


def _kinds(values: Sequence[Any]) -> str:
    """What some values are, described."""
    kinds = [
        f"{str(value.dtype).rpartition('.')[2]} {tuple(value.shape)}"
        if isinstance(value, Tensor | np.ndarray)
        else type(value).__name__
        for value in values
    ]
    return ", ".join(dict.fromkeys(kinds))


def _normalization(parts: Sequence[Any], views: Sequence[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the transform normalizes with, so that evaluation does the same.

    Args:
        parts: Everything that the transform holds.
        views: The views that it made of an image.
    """
    for part in parts:
        if type(part).__name__ == "Normalize":
            mean, std = (tuple(np.atleast_1d(getattr(part, name, ())).tolist()) for name in ("mean", "std"))
            if mean and std:
                return mean, std
    floats = [view for view in views if view.is_floating_point()]
    if len(views[0]) != 3 or (floats and all(view.min() >= 0 and view.max() <= 1 for view in floats)):
        return (0.0,), (1.0,)  # the inputs stay in [0, 1]
    return IMAGENET_MEAN, IMAGENET_STD


def _reseed(generator: Any, seed: int) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    else:
        generator.seed(seed % 2**32)


def _parts(root: Any) -> Iterator[Any]:
    """A callable and what it holds: attributes, items, and what its functions refer to. At most 10,000 parts."""
    home = getattr(root, "__module__", None)
    seen: dict[int, Any] = {}
    left = [root, *vars(type(root)).values()]
    while left and len(seen) < 10_000:
        part = left.pop()
        if id(part) in seen or isinstance(part, str | bytes | int | float | type | ModuleType | Tensor | np.ndarray):
            continue
        seen[id(part)] = part
        yield part
        if isinstance(part, dict):
            left += part.values()
        elif isinstance(part, list | tuple | set):
            left += part
        elif isinstance(part, functools.partial):
            left += [part.func, part.args, part.keywords]
        elif isinstance(part, MethodType):
            left += [part.__self__, part.__func__]
        elif isinstance(part, FunctionType):
            if part.__module__ == home:  # not into the functions of libraries
                left += inspect.getclosurevars(part)[:2]  # what it takes from outer functions, and from its file
        else:
            left += vars(part).values() if hasattr(part, "__dict__") else ()
