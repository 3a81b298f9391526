"""The features of patches of images with a target for each pixel, a bounded memory of them, and a linear layer."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_lightning.backbones.maps import features_and_map
from ssl_lightning.backbones.tokens import ViT, input_channels
from ssl_lightning.distributed import gather_uneven, rank, world_size
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.dense import stages

_STEPS, _DECAY = 100, 1e-4
"""Of the linear layer."""
_NEEDS = {
    "masks": "segmentation needs masks; give --data VOCSegmentationData.",
    "depths": "depth needs images with depth maps; give --data DepthData.",
}


class PatchFeatures:
    """Feature maps of images: the last map of any backbone that gives maps, after its last norm.

    Args:
        backbone: The backbone.
        name: Its name in messages.
        transform: How images are prepared: their ``mean`` and ``std``.
        targets: What each image comes with: ``masks`` or ``depths``.

    Raises:
        UserError: The backbone takes images of other channels.
    """

    def __init__(
        self,
        backbone: nn.Module,
        name: str,
        transform: dict[str, Any],
        targets: Literal["masks", "depths"] = "masks",
    ) -> None:
        import torchvision.models.resnet  # only here: help texts should not wait for it

        self.backbone, self.name, self.transform, self.targets = backbone, name, transform, targets
        self.channels = input_channels(backbone) or 3
        if self.channels not in (1, 3):
            raise UserError(f"the backbone takes images of {self.channels} channels, and images with {targets} have 3.")
        has_stages = isinstance(backbone, ViT | torchvision.models.resnet.ResNet)
        self.stages = stages(backbone, name, first=4) if has_stages else None

    def __call__(self, batch: Any) -> tuple[Tensor, Sequence[Tensor], int]:
        """Feature maps ``(B, D, rows, columns)``, targets, and the side of a patch in pixels.

        Args:
            batch: Images ``(B, 3, S, S)``, uint8, and a mask or a depth map ``(H, W)`` for each.

        Raises:
            UserError: There are no such targets, or no feature maps.
        """
        images, targets = batch
        is_map = isinstance(images, Tensor) and isinstance(targets[0], Tensor)
        if not is_map or targets[0].is_floating_point() != (self.targets == "depths"):
            raise UserError(_NEEDS[self.targets])
        if self.channels == 1:
            gray = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]  # as Pillow
            images = (images * gray).sum(1, keepdim=True)
        mean, std = (
            torch.tensor(self.transform[key], device=images.device)[: self.channels, None, None]
            for key in ("mean", "std")
        )
        prepared = (images / 255 - mean) / std
        maps = features_and_map(self.backbone, prepared)[1] if self.stages is None else self.stages(prepared)["0"]
        if maps is None:
            raise UserError(f"backbone {self.name!r} gives no feature maps here; choose a ResNet or a ViT.")
        return maps, targets, max(1, images.shape[-1] // maps.shape[-1])


class PatchMemory:
    """Patches of training images with their targets, of all processes; the same number of each image if there are many.

    Args:
        limit: Largest number of patches. None takes all.
        num_images: Number of training images over all processes.
    """

    def __init__(self, limit: int | None, num_images: int) -> None:
        self.limit, self.num_images = limit, num_images
        self.size = 0
        """Number of patches, once the memory is complete."""
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        """Features, targets, and the index of the image, for each image of this process so far."""

    @property
    def index(self) -> int:
        """Index of the next image of this process."""
        return rank() + len(self.parts) * world_size()

    def room(self, patches: int) -> int:
        """How many patches to take of an image.

        Args:
            patches: Number of patches of each image.
        """
        if self.limit is None or patches * self.num_images <= self.limit:
            return patches
        return max(1, self.limit // self.num_images)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add the patches of the next image of this process.

        Args:
            features: ``(N, D)``.
            targets: ``(N, P)``.
        """
        self.parts.append((features, targets, torch.full((len(targets),), self.index, device=features.device)))

    def complete(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features ``(N, D)``, targets ``(N, P)`` and images ``(N,)`` of all processes, in the order of the images."""
        features, targets, images = (gather_uneven(torch.cat(part)) for part in zip(*self.parts, strict=True))
        order = images.argsort(stable=True)  # whichever process had them
        self.parts, self.size = [], len(features)
        return features[order], targets[order], images[order]


def check_splits(data: Any) -> None:
    """Check that no image is in both splits.

    Args:
        data: A DenseData.

    Raises:
        UserError: Validation images are training images, too.
    """
    train, val = ({images.files.name(index) for index in range(len(images))} for images in data.splits)
    if train & val:
        raise UserError(
            f"{len(train & val)} of {len(val)} validation images are training images, too, e.g. {min(train & val)}; "
            "set --data.train_split and --data.val_split to splits without common images."
        )


def patches_of(maps: Tensor) -> Tensor:
    """The features of patches ``(B, rows * columns, D)``.

    Args:
        maps: ``(B, D, rows, columns)``.
    """
    return maps.float().flatten(2).mT


def standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each dimension; a deviation of 0 is 1.

    Args:
        features: ``(N, D)``.
    """
    deviation = features.std(0, unbiased=False)
    return features.mean(0), torch.where(deviation > 0, deviation, 1)


def linear_layer(features: Tensor, shares: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits ``(M, C)`` of features ``(M, D)``, by a logistic regression on standardized features.

    Args:
        features: ``(N, D)`` of training patches.
        shares: ``(N, C)`` shares of the classes. A patch weighs as much as its shares are in all.
    """
    with torch.inference_mode(False), torch.enable_grad():
        mean, scale = standard(features)
        inputs, shares = (features - mean) / scale, shares.clone()  # no inference tensors
        layer = nn.utils.skip_init(nn.Linear, inputs.shape[1], shares.shape[1], device=inputs.device)
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)  # not random: a training's random numbers stay
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -(shares * layer(inputs).log_softmax(1)).sum() / shares.sum().clamp(min=1)
            loss = loss + _DECAY * layer.weight.square().sum()
            loss.backward()
            return loss

        with torch.autocast(inputs.device.type, enabled=False):
            optimizer.step(closure)

    def logits(queries: Tensor) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            return layer((queries - mean) / scale).detach()

    return logits
