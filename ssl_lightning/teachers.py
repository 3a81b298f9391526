"""Frozen teachers of any source, with their own size and normalization of images."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning.backbones.maps import features_and_map, fitting_side
from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.backbones.own import name_of
from ssl_lightning.backbones.tokens import input_channels
from ssl_lightning.checkpoints import Pretrained, open_backbone
from ssl_lightning.checkpoints.pretrained import image_transform_of
from ssl_lightning.checkpoints.sources import is_source
from ssl_lightning.errors import UserError
from ssl_lightning.losses.precision import wide


class FrozenTeacher:
    """A network in eval mode and without gradient that sees images as it was trained on them.

    No ``nn.Module``: it is no part of the method that learns from it, so neither checkpoints nor optimizers nor
    ``train()`` know it.

    Args:
        source: As for ``init_from``: a checkpoint, a folder, ``hf-hub:NAME``, or the name of a timm or torchvision
            model, with the weights of that library. Or a network of one's own.
        kwargs: Arguments that build the network; ``backbone`` names it where the file does not.
        size: Side in pixels of the images that it sees. None is the side of the images that it is given, rounded to its
            patches, or the only side that it takes.
        channels: Which channels of the images it sees, counted from 0; a single channel is repeated. None is all.

    Raises:
        UserError: There is no such teacher.
    """

    def __init__(
        self, source: str | nn.Module, kwargs: dict[str, Any], size: int | None, channels: Sequence[int] | None
    ) -> None:
        self.name, self.size, self.channels = name_of(source), size, channels
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the random numbers of the method stay the same
            pretrained = _opened(source, dict(kwargs))
        self.network: Any = pretrained.backbone.requires_grad_(False).eval()
        transform = pretrained.image_transform
        self.in_chans = input_channels(self.network) or len(transform["mean"])
        self.mean, self.std = (
            values if len(values) in (1, self.in_chans) else [sum(values) / len(values)]
            for values in (transform["mean"], transform["std"])
        )
        self._place: tuple[torch.device, torch.dtype] | None = None

    def size_of(self, side: int) -> int:
        """Side in pixels of the images that the teacher sees.

        Args:
            side: Side in pixels of the images that it is given.
        """
        return self.size or fitting_side(self.network, side)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, D)`` and map ``(B, D', rows, columns)`` or None, in float32 or wider.

        Args:
            images: ``(B, C, S, S)``, not normalized: values from 0 to 1.
        """
        features, grid = features_and_map(self.network, self.prepared(images))
        return wide(features), None if grid is None else wide(grid)

    def prepared(self, images: Tensor) -> Tensor:
        """The images as the teacher sees them.

        Args:
            images: As for the call.
        """
        place = images.device, images.dtype
        if self._place != place:  # the method has been moved
            self._place = place
            self.network.to(*place)
            self._statistics = [images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std)]
        if self.channels is not None:
            images = torch.stack([images[:, channel] for channel in self.channels], dim=1)
            images = images.expand(-1, self.in_chans, -1, -1) if len(self.channels) == 1 else images
        size = self.size_of(images.shape[-1])
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = self._statistics
        return (images - mean) / std

    def check(self, side: int, channels: int) -> tuple[int, int | None]:
        """Widths of its features and of its map, if it takes such images.

        Args:
            side: Side in pixels of the images that it is given.
            channels: Their number of channels.

        Raises:
            UserError: It does not; the message says which option to change.
        """
        if self.size is not None and self.size < 1:
            raise UserError(f"--model.teacher_size {self.size}: give a number of pixels, or null.")
        if (patch := getattr(self.network, "patch_side", 1)) > 1 and self.size_of(side) % patch:
            below = self.size_of(side) // patch * patch
            raise UserError(
                f"the patches of {patch} px of the teacher {self.name} do not divide --model.teacher_size "
                f"{self.size_of(side)}; set it to {f'{below} or ' if below else ''}{below + patch}."
            )
        seen = [*range(channels)] if self.channels is None else list(self.channels)
        if not seen or min(seen) < 0 or max(seen) >= channels:
            raise UserError(f"--model.teacher_channels {seen}: the images have the channels 0 to {channels - 1}.")
        if len(seen) != self.in_chans and not (self.channels is not None and len(seen) == 1):
            several = f"{self.in_chans} of the {channels} channels of the student's images, or "
            raise UserError(
                f"the teacher {self.name} takes images of {self.in_chans} channels, but gets {len(seen)}; set "
                f"--model.teacher_channels to {several if self.in_chans <= channels else ''}a single one, which is "
                "repeated, e.g. [0]."
            )
        weight = next(self.network.parameters(), torch.empty(0))
        images = torch.zeros(1, channels, side, side, dtype=weight.dtype, device=weight.device)
        try:
            features, grid = self(images)
        except Exception as error:  # of a network that anyone may have written
            raise UserError(
                f"the teacher {self.name} does not take images of {self.size_of(side)} px "
                f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); set --model.teacher_size."
            ) from error
        return features.shape[1], None if grid is None else grid.shape[1]


def _opened(source: str | nn.Module, kwargs: dict[str, Any]) -> Pretrained:
    """The network of a source."""
    backbone, branch = kwargs.pop("backbone", None), kwargs.pop("branch", None)
    if not isinstance(source, str):
        network = create_backbone(source, **kwargs)
        return Pretrained(network, name_of(source), kwargs, image_transform_of(network, own=True))
    try:
        opened = open_backbone(source, backbone, kwargs, branch)
    except UserError as error:
        text = str(error).replace("give --backbone, e.g. resnet50", "give --model.teacher_kwargs.backbone")
        raise UserError(f"--model.teacher {source}: {text}") from error
    except (OSError, RuntimeError, ValueError) as error:  # of a library that cannot get its weights
        reason = str(error).strip().partition(chr(10))[0]
        raise UserError(
            f"--model.teacher {source}: its weights cannot be read ({reason}); download them, and give the file."
        ) from error
    config = getattr(opened.backbone, "pretrained_cfg", None)
    if config is not None and not is_source(source) and not any(config.get(key) for key in _ORIGINS):
        raise UserError(f"--model.teacher {source}: the library has no weights for it; give a file of weights.")
    return opened


_ORIGINS = "url", "file", "hf_hub_id", "state_dict"
"""Where timm gets weights from."""
