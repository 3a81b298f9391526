"""The views of an image: a ViewSpec for each kind of view, and the presets of the papers."""

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ssl_lightning.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class ViewSpec:
    """A kind of random view: a crop, then flips, turns, color jitter, grayscale, blur, solarize and normalization.

    Probabilities are per view. A probability of 0 leaves the operation out.

    Args:
        size: Side of the view in pixels.
        count: Number of views of this kind for each image.
        scale: Smallest and largest area of the crop, as a fraction of the image.
        ratio: Smallest and largest width / height of the crop, drawn log-uniformly; with ``tensorflow_crop`` uniformly.
        single_draw: Draw area and ratio once and clamp the crop to the image (BYOL), instead of up to ten times until
            the crop fits (torchvision).
        tensorflow_crop: Draw the ratio, then the height among those whose area fits, and reject areas below a tenth of
            the image (SimCLR); after a hundred attempts the whole image.
        interpolation: Interpolation of the resize, always with antialiasing.
        flip: Probability of a horizontal flip.
        vertical_flip: Probability of a vertical flip.
        quarter_turn: Probability of a turn by 90, 180 or 270 degrees, each of them equally likely. With 0.75 all four
            orientations are equally likely.
        rotation: Probability of a rotation by any angle, bilinear. Corners from outside the crop become black.
        rotation_degrees: Smallest and largest angle of the rotation, counterclockwise.
        jitter: Probability of color jitter: the next four operations in random order.
        brightness: Largest relative change of brightness; with ``additive_brightness`` the largest shift, where white
            is 1.
        additive_brightness: Whether to add to all pixel values (DeepMind's BYOL) instead of multiplying them.
        contrast: Largest relative change of contrast.
        saturation: Largest relative change of saturation.
        hue: Largest shift of the hue, as a fraction of the color circle. 0.5 in both directions is the whole circle.
        grayscale: Probability of grayscale.
        grayscale_first: Whether grayscale comes before the jitter instead of after.
        blur: Probability of Gaussian blur.
        blur_sigma: Smallest and largest standard deviation of the blur, in pixels.
        blur_kernel: Size of the blur kernel in pixels, an odd number.
        solarize: Probability of inverting the pixel values at or above the threshold.
        solarize_threshold: Threshold of solarize, from 0 to 255.
        rand_augment: RandAugment after the crop, in timm's notation, e.g. rand-m9-mstd0.5-inc1. Empty for none.
        mean: Mean to subtract from pixel values in [0, 1]: a number for each channel, or a single number for all.
        std: Standard deviation to divide by: a number for each channel, or a single number for all.
        same_crop_as: Index, from 0, of an earlier view whose crop, flips and turns this view repeats, at its own size
            and with its own color operations. A ``count`` of n repeats n views from this index on. None draws a new
            crop.
    """

    size: int = 224
    count: int = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    single_draw: bool = False
    tensorflow_crop: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turn: float = 0.0
    rotation: float = 0.0
    rotation_degrees: tuple[float, float] = (-180.0, 180.0)
    jitter: float = 0.0
    brightness: float = 0.0
    additive_brightness: bool = False
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
        """Reject impossible values.

        Raises:
            UserError: A probability is outside [0, 1], a range is empty, a kernel size is even, ...
        """
        probabilities = ("flip", "vertical_flip", "quarter_turn", "rotation", "jitter", "grayscale", "blur", "solarize")
        for name in probabilities:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"view: {name}={getattr(self, name)} is a probability; give a number from 0 to 1.")
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"view: {name}={low, high} must be two positive numbers, the smaller one first.")
        if self.scale[1] > 1:
            raise UserError(f"view: scale={self.scale} is a fraction of the image's area; give numbers up to 1.")
        if self.single_draw and self.tensorflow_crop:
            raise UserError("view: single_draw and tensorflow_crop are two ways to draw a crop; set one of them.")
        if self.rotation_degrees[0] > self.rotation_degrees[1]:
            raise UserError(f"view: rotation_degrees={self.rotation_degrees} must have the smaller angle first.")
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"view: hue={self.hue} is a fraction of the color circle; give a number from 0 to 0.5.")
        if self.blur_kernel % 2 == 0:
            raise UserError(f"view: blur_kernel={self.blur_kernel} must be odd.")
        if self.blur > 0 and self.blur_kernel // 2 >= self.size:
            raise UserError(f"view: blur_kernel={self.blur_kernel} is too wide for size={self.size}; set it lower.")
        if self.size < 1 or self.count < 1:
            raise UserError(f"view: size={self.size} and count={self.count} must be at least 1.")

    def check_channels(self, channels: int) -> None:
        """Reject a mean or standard deviation for another number of channels than the images have.

        Args:
            channels: Number of channels of the images.

        Raises:
            UserError: The number differs.
        """
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, channels):
                raise UserError(
                    f"view: {name}={getattr(self, name)} is for {len(getattr(self, name))} channels, but the images "
                    f"have {channels}; give --data.views with a number for each channel, or a single number for all."
                )


_BARLOW = ViewSpec(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grayscale=0.2, blur=1.0)
_BYOL = replace(_BARLOW, single_draw=True, additive_brightness=True)
_MOCO_V3 = replace(_BARLOW, interpolation="bilinear")
_DINO = replace(_BARLOW, scale=(0.4, 1.0))
_DINO_LOCAL = replace(_BARLOW, size=96, count=8, scale=(0.05, 0.4), blur=0.5)
_IBOT = replace(_BARLOW, scale=(0.25, 1.0))
_DINOV2 = replace(_BARLOW, scale=(0.32, 1.0), blur_kernel=9)
_DINOV2_LOCAL = replace(_DINO_LOCAL, scale=(0.05, 0.32), blur_kernel=9)
_LEJEPA = replace(_BARLOW, count=2, scale=(0.3, 1.0), interpolation="bilinear", blur=0.5, solarize=0.2)
_VISREG = replace(_LEJEPA, count=4, interpolation="bicubic", hue=0.05)
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
# Without blur and solarize, which hide from a teacher what it could teach.
_DISTILLATION = replace(_BARLOW, scale=(0.25, 1.0), blur=0.0)
_NPID = replace(_MOCO_V2, count=1, jitter=1.0, hue=0.4, blur=0.0, grayscale_first=True)
_RESA_WEAK = ViewSpec(scale=(0.2, 1.0), interpolation="bilinear")
_RESA_STRONG = replace(_BARLOW, scale=(0.2, 1.0), blur=0.5, solarize=0.2)
_ROTNET = ViewSpec(interpolation="bilinear")
# The released code scales the shorter side to 256 px and crops a square of 255 px at a random position.
_JIGSAW = ViewSpec(size=255, scale=(0.6, 1.0), ratio=(1.0, 1.0), interpolation="bilinear", grayscale=0.66)
# Inputs stay in [0, 1].
_NNCLR = replace(_SWAV, scale=(0.08, 1.0), interpolation="bicubic", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
_SIMCLR = replace(_NNCLR, tensorflow_crop=True)


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
    "visreg": (_VISREG, replace(_VISREG, size=96, count=6, scale=(0.05, 0.3))),
    "nnclr": (_NNCLR,),
    "swav": (_SWAV, _SWAV_LOCAL),
    "deepcluster_v2": (_SWAV, _SWAV_LOCAL),
    "dino": (_DINO, _second(_DINO), _DINO_LOCAL),
    "ibot": (_IBOT, _second(_IBOT), replace(_DINO_LOCAL, count=10, scale=(0.05, 0.25))),  # for ViT-S
    "simdino": (_DINO, _second(_DINO), replace(_DINO_LOCAL, count=10)),
    # The released code swaps the probabilities of keeping and of blurring; these are the probabilities that result.
    "dinov2": (replace(_DINOV2, blur=0.0), replace(_DINOV2, blur=0.9, solarize=0.2), _DINOV2_LOCAL),
    "simdinov2": (
        replace(_DINOV2, scale=(0.4, 1.0), blur=0.0),
        replace(_DINOV2, scale=(0.4, 1.0), blur=0.9, solarize=0.2),
        replace(_DINOV2_LOCAL, count=10, scale=(0.05, 0.4)),
    ),
    # The anchor sees the global crops at twice the size, without color changes.
    "gram_anchoring": (
        replace(_DINOV2, blur=0.0),
        replace(_DINOV2, blur=0.9, solarize=0.2),
        _DINOV2_LOCAL,
        ViewSpec(size=448, count=2, same_crop_as=0),
    ),
    "resa": (_RESA_WEAK, _RESA_STRONG),
    # The released code's local crops have 98 px, for patches of 14.
    "lejepa": (_LEJEPA, replace(_LEJEPA, size=96, count=6, scale=(0.05, 0.3))),
    "capi": (ViewSpec(scale=(0.6, 1.0)),),
    "distillation": (_DISTILLATION,),
    "mae": (ViewSpec(scale=(0.2, 1.0)),),
    "rotnet": (_ROTNET,),
    "jigsaw": (_JIGSAW,),
    "simmim": (ViewSpec(size=192, scale=(0.67, 1.0), interpolation="bilinear"),),
    "ijepa": (ViewSpec(scale=(0.3, 1.0), interpolation="bilinear", flip=0.0),),
    # Jitter and flip come before the crop in the released code.
    "beit": (ViewSpec(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4),),
    "npid": (_NPID,),
    "linear": (ViewSpec(),),
    "finetune": (ViewSpec(rand_augment="rand-m9-mstd0.5-inc1"),),
}
"""Augmentation of each paper on ImageNet, from the official code. The last two presets are for evaluation."""


def _cifar(spec: ViewSpec) -> ViewSpec:
    return replace(spec, size=32, scale=(0.08, 1.0), interpolation="bicubic", mean=CIFAR_MEAN, std=CIFAR_STD)


_RESA_CIFAR_STRONG = replace(_cifar(_RESA_STRONG), scale=(0.2, 1.0), blur=0.0)
_RESA_CIFAR_WEAK = replace(_cifar(_RESA_WEAK), scale=(0.2, 1.0), interpolation="bilinear")
_CIFAR_SYMMETRIC = replace(_cifar(_MOCO_V2), blur=0.0)
_CIFAR_FIRST = replace(_cifar(_BARLOW), blur=0.0)
_CIFAR_SECOND = replace(_CIFAR_FIRST, solarize=0.2)

CIFAR_PRESETS: dict[str, tuple[ViewSpec, ...]] = {
    # Strength 0.5, no blur.
    "simclr": (replace(_CIFAR_SYMMETRIC, tensorflow_crop=True, mean=_SIMCLR.mean, std=_SIMCLR.std),),
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
    "simdino": (_CIFAR_FIRST, _CIFAR_SECOND),
    "resa": (_RESA_CIFAR_WEAK, _RESA_CIFAR_STRONG),
    "distillation": (replace(_CIFAR_FIRST, scale=(0.25, 1.0)),),
    "mae": (_cifar(ViewSpec()),),
    # The released code pads the image by 4 px and crops 32 px; here the crops have at least 28 px.
    "rotnet": (replace(_cifar(_ROTNET), scale=(0.77, 1.0), ratio=(1.0, 1.0)),),
    # From lemniscate's cifar.py, including its standard deviations.
    "npid": (replace(_NPID, size=32, grayscale_first=False, flip=0.0, mean=CIFAR_MEAN, std=(0.2023, 0.1994, 0.2010)),),
}
"""Augmentation for 32 px images: SimCLR's README, the authors' MoCo notebook, solo-learn's recipes for the rest."""


Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel."""


def color_operations(specs: Sequence[ViewSpec]) -> list[str]:
    """Names of the operations in these views that only images of three channels have."""
    return [name for name in _FOR_COLOR if any(getattr(spec, name) for spec in specs)]


_FOR_COLOR: dict[str, Any] = {"saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "rand_augment": ""}
"""Fields of operations on colors, with the value that leaves them out."""


@functools.cache  # called for every batch
def adapted(specs: tuple[ViewSpec, ...], channels: int, statistics: Statistics | None) -> tuple[ViewSpec, ...]:
    """Views for images of any number of channels: without color operations, unless there are three channels.

    Args:
        specs: The views.
        channels: Number of channels of the images.
        statistics: Mean and standard deviation of the images, in place of the views' own. None keeps those.
    """
    if channels != 3:
        specs = tuple(replace(spec, **_FOR_COLOR) for spec in specs)
    if statistics is not None:
        specs = tuple(replace(spec, mean=statistics[0], std=statistics[1]) for spec in specs)
    for spec in specs:
        spec.check_channels(channels)
    return specs


@functools.cache  # called for every batch; and it speaks once
def preset(name: str, image_size: int = 224, patch: int = 1) -> tuple[ViewSpec, ...]:
    """The views of a paper at an image size. A size up to 32 gives the CIFAR variant if there is one.

    Local crops keep their size relative to the global crops, rounded to a multiple of 16 px (8 px for global crops
    below 128 px), or of the backbone's patch if it does not divide that.

    Args:
        name: Key of ``PRESETS``.
        image_size: Side in pixels of the largest views.
        patch: Number of pixels that the backbone needs the sides of local crops to be divisible by.

    Raises:
        UserError: No preset has that name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown views {name!r}; {hint}The presets are {', '.join(PRESETS)}.")
    specs = CIFAR_PRESETS.get(name, PRESETS[name]) if image_size <= 32 else PRESETS[name]
    largest = max(spec.size for spec in specs if spec.same_crop_as is None)
    return tuple(_resized(spec, spec.size / largest, image_size, patch) for spec in specs)


def _resized(spec: ViewSpec, ratio: float, image_size: int, patch: int) -> ViewSpec:
    step = 16 if image_size >= 128 else 8
    size = image_size if ratio == 1 else _rounded(image_size * ratio, step)
    if ratio < 1 and size % patch:
        before, size = size, _rounded(image_size * ratio, patch)
        rank_zero_info(f"local crops have {size} px instead of {before}: the backbone has patches of {patch} px.")
    return with_side(spec, size)


def with_side(spec: ViewSpec, size: int) -> ViewSpec:
    """A view at another size, with a blur kernel that fits into it.

    Args:
        spec: The view.
        size: Side in pixels.
    """
    widest = 2 * ((size - 1) // 2) - 1  # a reflected border must be narrower than the image
    return replace(spec, size=size, blur_kernel=min(spec.blur_kernel, max(widest, 1)))


def _rounded(size: float, step: int) -> int:
    return max(step, round(size / step) * step)


def resolve(views: str | Sequence[ViewSpec], image_size: int, patch: int = 1) -> tuple[ViewSpec, ...]:
    """The views that a preset's name or a list stands for.

    Args:
        views: Name of a preset, or the views themselves. A list keeps its own sizes.
        image_size: Side in pixels of the largest views of a preset.
        patch: Number of pixels that the sides of a preset's local crops must be divisible by.

    Raises:
        UserError: No preset has that name, or ``same_crop_as`` names a view that does not come earlier.
    """
    specs = preset(views, image_size, patch) if isinstance(views, str) else tuple(views)
    earlier = 0
    for spec in specs:
        if spec.same_crop_as is not None and not 0 <= spec.same_crop_as <= earlier - spec.count:
            raise UserError(
                f"view: same_crop_as={spec.same_crop_as} with count={spec.count} asks for crops of views that do not "
                f"come before it; there are {earlier}, counted from 0."
            )
        earlier += spec.count
    return specs
