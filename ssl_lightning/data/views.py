"""What views a method wants: one ViewSpec per kind of view, and the presets of the papers."""

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ssl_lightning.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class ViewSpec:
    """One kind of random view: a crop, then flip, colour jitter, grayscale, blur, solarize and normalise.

    Probabilities are per view; a probability of 0 leaves the operation out.

    Args:
        size: Side of the view in pixels.
        count: How many views of this kind an image gives.
        scale: Smallest and largest area of the crop, as a share of the image.
        ratio: Smallest and largest width / height of the crop, drawn log-uniformly.
        single_draw: Draw area and ratio once and clamp the crop to the image (BYOL), rather than up to ten times
            until it fits (torchvision).
        interpolation: Interpolation of the resize, always antialiased.
        flip: Probability of a horizontal flip.
        jitter: Probability of the colour jitter, its four operations in random order.
        brightness: Largest relative change of brightness.
        contrast: Largest relative change of contrast.
        saturation: Largest relative change of saturation.
        hue: Largest turn of the hue, in turns (0.5 is the whole circle).
        grayscale: Probability of grayscale.
        grayscale_first: Grayscale before the jitter rather than after.
        blur: Probability of the Gaussian blur.
        blur_sigma: Smallest and largest standard deviation of the blur, in pixels.
        blur_kernel: Taps of the blur's kernel, an odd number.
        solarize: Probability of inverting pixels above the threshold.
        solarize_threshold: Threshold of solarize, of 255.
        rand_augment: RandAugment right after the crop, in timm's words, e.g. rand-m9-mstd0.5-inc1; empty is none.
        mean: Mean that is subtracted, of 1: one number for each channel, or one for all.
        std: Deviation that divides, of 1: one number for each channel, or one for all.
        same_crop_as: Number of an earlier view, from 0, whose crop and flip this view has at its own size and with its
            own colours; with ``count``, the first of as many. None draws a crop of its own.
    """

    size: int = 224
    count: int = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    single_draw: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    grayscale_first: bool = False
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 23
    solarize: float = 0.0
    solarize_threshold: float = 128.0
    rand_augment: str = ""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    same_crop_as: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no view can have.

        Raises:
            UserError: A probability outside [0, 1], an empty range, an even kernel, ...
        """
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"view: {name}={getattr(self, name)} is a probability; give a number from 0 to 1.")
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"view: {name}={low, high} must be two positive numbers, the smaller one first.")
        if self.scale[1] > 1:
            raise UserError(f"view: scale={self.scale} is a share of the image's area; give numbers up to 1.")
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"view: hue={self.hue} is in turns; give a number from 0 to 0.5.")
        if self.blur_kernel % 2 == 0:
            raise UserError(f"view: blur_kernel={self.blur_kernel} must be odd.")
        if self.blur > 0 and self.blur_kernel // 2 >= self.size:
            raise UserError(f"view: blur_kernel={self.blur_kernel} is too wide for size={self.size}; set it lower.")
        if self.size < 1 or self.count < 1:
            raise UserError(f"view: size={self.size} and count={self.count} must be at least 1.")

    def check_channels(self, channels: int) -> None:
        """Refuse operations that images with so many channels cannot have.

        Raises:
            UserError: Colour operations on other than 3 channels, or a mean or deviation for another number.
        """
        if channels != 3 and (self.jitter > 0 or self.grayscale > 0 or self.rand_augment):
            raise UserError(
                f"view: jitter={self.jitter}, grayscale={self.grayscale} and rand_augment={self.rand_augment!r} need "
                f"images of 3 channels, not {channels}; give data.views without them."
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, channels):
                raise UserError(
                    f"view: {name}={getattr(self, name)} is for {len(getattr(self, name))} channels, and the images "
                    f"have {channels}; give data.views with one number for each channel, or one for all."
                )


_BARLOW = ViewSpec(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grayscale=0.2, blur=1.0)
_BYOL = replace(_BARLOW, single_draw=True)
_MOCO_V3 = replace(_BARLOW, interpolation="bilinear")
_DINO = replace(_BARLOW, scale=(0.4, 1.0))
_DINO_LOCAL = replace(_BARLOW, size=96, count=8, scale=(0.05, 0.4), blur=0.5)
_DINOV2 = replace(_BARLOW, scale=(0.32, 1.0), blur_kernel=9)
_DINOV2_LOCAL = replace(_DINO_LOCAL, scale=(0.05, 0.32), blur_kernel=9)
_LEJEPA = replace(_BARLOW, count=2, scale=(0.3, 1.0), interpolation="bilinear", blur=0.5, solarize=0.2)
_SWAV = ViewSpec(
    count=2,
    scale=(0.14, 1.0),
    interpolation="bilinear",
    jitter=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale=0.2,
    blur=0.5,
    std=(0.228, 0.224, 0.225),  # the released code's value, not ImageNet's
)
_SWAV_LOCAL = replace(_SWAV, size=96, count=6, scale=(0.05, 0.14))
_MOCO_V2 = ViewSpec(
    count=2,
    scale=(0.2, 1.0),
    interpolation="bilinear",
    jitter=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grayscale=0.2,
    blur=0.5,
)
_NPID = replace(_MOCO_V2, count=1, jitter=1.0, hue=0.4, blur=0.0, grayscale_first=True)
_ROTNET = ViewSpec(interpolation="bilinear")
# The released code scales the shorter side to 256 px and crops 255: a square of nearly that side at a random place.
_JIGSAW = ViewSpec(size=255, scale=(0.6, 1.0), ratio=(1.0, 1.0), interpolation="bilinear", grayscale=0.66)
# Inputs stay in [0, 1].
_SIMCLR = replace(_SWAV, scale=(0.08, 1.0), interpolation="bicubic", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _second(first: ViewSpec) -> ViewSpec:
    """The second view of the asymmetric recipes: hardly ever blurred, sometimes solarized."""
    return replace(first, blur=0.1, solarize=0.2)


PRESETS: dict[str, tuple[ViewSpec, ...]] = {
    "simclr": (_SIMCLR,),
    "moco_v1": (replace(_NPID, count=2),),
    "moco_v2": (_MOCO_V2,),
    "simsiam": (_MOCO_V2,),
    "moco_v3": (replace(_MOCO_V3, scale=(0.2, 1.0)), _second(replace(_MOCO_V3, scale=(0.2, 1.0)))),
    "moco_v3_vit": (_MOCO_V3, _second(_MOCO_V3)),
    "byol": (_BYOL, replace(_second(_BYOL), solarize_threshold=127.5)),
    "barlow_twins": (_BARLOW, _second(_BARLOW)),
    "vicreg": (_BARLOW, _second(_BARLOW)),
    "nnclr": (_SIMCLR,),
    "swav": (_SWAV, _SWAV_LOCAL),
    "deepcluster_v2": (_SWAV, _SWAV_LOCAL),
    "dino": (_DINO, _second(_DINO), _DINO_LOCAL),
    "ibot": (_DINO, _second(_DINO), _DINO_LOCAL),
    # The released code swaps keep and apply of the blur; these are the probabilities that result.
    "dinov2": (replace(_DINOV2, blur=0.0), replace(_DINOV2, blur=0.9, solarize=0.2), _DINOV2_LOCAL),
    # The anchor sees the global crops without colour changes at twice the size.
    "gram_anchoring": (
        replace(_DINOV2, blur=0.0),
        replace(_DINOV2, blur=0.9, solarize=0.2),
        _DINOV2_LOCAL,
        ViewSpec(size=448, count=2, same_crop_as=0),
    ),
    # The released code's local crops have 98 px, for patches of 14.
    "lejepa": (_LEJEPA, replace(_LEJEPA, size=96, count=6, scale=(0.05, 0.3))),
    "mae": (ViewSpec(scale=(0.2, 1.0)),),
    "rotnet": (_ROTNET,),
    "jigsaw": (_JIGSAW,),
    "simmim": (ViewSpec(size=192, scale=(0.67, 1.0), interpolation="bilinear"),),
    "ijepa": (ViewSpec(scale=(0.3, 1.0), interpolation="bilinear", flip=0.0),),
    # Jitter and flip come before the crop in the released code.
    "beit": (ViewSpec(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, mean=(0.5,) * 3, std=(0.5,) * 3),),
    "npid": (_NPID,),
    "linear": (ViewSpec(),),
    "finetune": (ViewSpec(rand_augment="rand-m9-mstd0.5-inc1"),),
}
"""Augmentation of each paper on ImageNet, read off the official code; the last two are those of evaluation."""


def _cifar(spec: ViewSpec) -> ViewSpec:
    return replace(spec, size=32, scale=(0.08, 1.0), interpolation="bicubic", mean=CIFAR_MEAN, std=CIFAR_STD)


_CIFAR_SYMMETRIC = replace(_cifar(_MOCO_V2), blur=0.0)
_CIFAR_FIRST = replace(_cifar(_BARLOW), blur=0.0)
_CIFAR_SECOND = replace(_CIFAR_FIRST, solarize=0.2)

CIFAR_PRESETS: dict[str, tuple[ViewSpec, ...]] = {
    "simclr": (replace(_CIFAR_SYMMETRIC, mean=_SIMCLR.mean, std=_SIMCLR.std),),  # strength 0.5, no blur
    "moco_v2": (_CIFAR_SYMMETRIC,),
    "simsiam": (replace(_CIFAR_SYMMETRIC, scale=(0.2, 1.0)),),
    "moco_v3": (_CIFAR_FIRST, _CIFAR_SECOND),
    "moco_v3_vit": (_CIFAR_FIRST, _CIFAR_SECOND),
    "byol": (_CIFAR_FIRST, _CIFAR_SECOND),
    "barlow_twins": (_CIFAR_FIRST, _CIFAR_SECOND),
    "nnclr": (_CIFAR_FIRST, _CIFAR_SECOND),
    "vicreg": (replace(_CIFAR_FIRST, count=2, scale=(0.2, 1.0), solarize=0.1),),
    "swav": (_cifar(_SWAV),),
    "deepcluster_v2": (_cifar(_SWAV),),
    "dino": (_CIFAR_FIRST, _CIFAR_SECOND),
    "mae": (_cifar(ViewSpec()),),
    # The released code crops 32 px out of the image with a border of 4 px; here are crops of 28 px and more.
    "rotnet": (replace(_cifar(_ROTNET), scale=(0.77, 1.0), ratio=(1.0, 1.0)),),
    # Of lemniscate's cifar.py, its deviations included.
    "npid": (replace(_NPID, size=32, grayscale_first=False, flip=0.0, mean=CIFAR_MEAN, std=(0.2023, 0.1994, 0.2010)),),
}
"""Augmentation for 32 px images: SimCLR's README, the authors' MoCo notebook, solo-learn's recipes for the rest."""


@functools.cache  # asked for with every batch
def preset(name: str, image_size: int = 224) -> tuple[ViewSpec, ...]:
    """The views of a paper at an image size; 32 and below give the CIFAR variant where there is one.

    Local crops keep their size relative to the global ones, rounded to what ViT patches divide (16 px, or 8 px for
    global crops below 128 px).

    Args:
        name: Key of ``PRESETS``.
        image_size: Side of the largest views in pixels.

    Raises:
        UserError: No preset has that name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown views {name!r}; {hint}The presets are {', '.join(PRESETS)}.")
    specs = CIFAR_PRESETS.get(name, PRESETS[name]) if image_size <= 32 else PRESETS[name]
    largest = max(spec.size for spec in specs if spec.same_crop_as is None)
    return tuple(_resized(spec, spec.size / largest, image_size) for spec in specs)


def _resized(spec: ViewSpec, share: float, image_size: int) -> ViewSpec:
    step = 16 if image_size >= 128 else 8
    size = image_size if share == 1 else max(step, round(image_size * share / step) * step)
    widest = 2 * ((size - 1) // 2) - 1  # a reflected border is narrower than the image
    return replace(spec, size=size, blur_kernel=min(spec.blur_kernel, max(widest, 1)))


def resolve(views: str | Sequence[ViewSpec], image_size: int) -> tuple[ViewSpec, ...]:
    """Views given as a preset's name or spelled out.

    Args:
        views: Name of a preset, or the views themselves, which then keep their own sizes.
        image_size: Side of the largest views of a preset in pixels.

    Raises:
        UserError: No preset has that name, or a view has the crop of one that does not come before it.
    """
    specs = preset(views, image_size) if isinstance(views, str) else tuple(views)
    earlier = 0
    for spec in specs:
        if spec.same_crop_as is not None and not 0 <= spec.same_crop_as <= earlier - spec.count:
            raise UserError(
                f"view: same_crop_as={spec.same_crop_as} with count={spec.count} asks for crops of views that do not "
                f"come before it; there are {earlier}, counted from 0."
            )
        earlier += spec.count
    return specs
