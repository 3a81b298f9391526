"""Features of a labeled data set: each image once over all processes, cached on disk."""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from ssl_lightning.backbones.tokens import input_channels
from ssl_lightning.checkpoints import Pretrained
from ssl_lightning.distributed import gather_uneven, reduced, world_size
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.sets import LabeledImages, PlainSets, SomeImages, SomeViews

Corruption = Callable[[Tensor, Tensor], Tensor]
"""Changes images ``(B, 3, S, S)`` in [0, 1], given their indices ``(B,)``."""


class LabelledFeatures(NamedTuple):
    """Features of N images."""

    features: Tensor
    """``(N, P, D)``, float32, on the CPU: P is 1 for the output of the backbone, else see ``Tokens``."""
    labels: Tensor
    """``(N,)`` classes."""


class ImageFeatures(NamedTuple):
    """Features of all images of a set that can be read, in the order of the data."""

    images: Any
    features: Tensor
    """``(N, D)``, float32, on the CPU."""
    indices: Tensor
    """``(N,)`` indices of the images; unreadable images are missing."""


class Features(NamedTuple):
    """Features of the labeled images of a data module, in the order of the data."""

    train: LabelledFeatures
    test: LabelledFeatures
    num_classes: int


class Tokens(nn.Module):
    """Inputs of linear classifiers on ViTs, as separate pieces: class tokens and the mean of the patch tokens.

    First the class tokens of the last blocks, from the shallowest to the deepest, each after the final norm, then the
    mean of the patch tokens of the last block. Source: Caron et al. 2021, DINO, appendix F.2; Oquab et al. 2023,
    DINOv2, section 7.1.

    Args:
        backbone: Maps images to features.
        last_blocks: Number of last blocks whose class tokens to return. 1 without ``patch_mean`` means the output of
            the backbone, which need not be a ViT then.
        patch_mean: Whether to append the mean of the patch tokens.

    Raises:
        UserError: The backbone has no such tokens.
    """

    def __init__(self, backbone: nn.Module, last_blocks: int = 1, patch_mean: bool = False) -> None:
        super().__init__()
        self.backbone, self.last_blocks, self.patch_mean = backbone, last_blocks, patch_mean
        depth = len(getattr(backbone, "blocks", [])) if getattr(backbone, "cls_token", None) is not None else 0
        if self.needs_blocks and last_blocks > depth:
            raise UserError(
                f"the class tokens of the last {last_blocks} blocks are needed, but the backbone "
                f"{f'has {depth} blocks' if depth else 'is no ViT from timm'}; choose another protocol."
            )

    @property
    def needs_blocks(self) -> bool:
        """Whether the tokens of single blocks are needed, instead of the output of the backbone."""
        return self.last_blocks > 1 or self.patch_mean

    def forward(self, images: Tensor) -> Tensor:
        """Pieces ``(B, P, D)`` of images ``(B, 3, S, S)``."""
        if not self.needs_blocks:
            return self.backbone(images)[:, None]
        vit: Any = self.backbone
        blocks = vit.forward_intermediates(
            images, self.last_blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        pieces = [prefix[:, 0] for _, prefix in blocks]
        return torch.stack([*pieces, blocks[-1][0].mean(1)] if self.patch_mean else pieces, dim=1)


class FeatureExtractor(L.LightningModule):
    """Collects the features of a data module's labeled images under ``Trainer.predict``; see ``extract``.

    Args:
        pretrained: The backbone.
        last_blocks: See ``Tokens``.
        patch_mean: See ``Tokens``.
        corruption: Changes the test images; the training images are then skipped.
    """

    views = "linear"

    def __init__(
        self,
        pretrained: Pretrained,
        last_blocks: int = 1,
        patch_mean: bool = False,
        corruption: Corruption | None = None,
    ) -> None:
        super().__init__()
        self.image_transform, self.corruption = pretrained.image_transform, corruption
        self.tokens = Tokens(pretrained.backbone, last_blocks, patch_mean).eval()
        self.found: list[tuple[Tensor, Tensor]] = []
        self._parts: list[tuple[list[Tensor], list[Tensor]]] = []

    @property
    def _sets(self) -> "PlainSets":
        sets = getattr(self.trainer, "datamodule", None)
        assert isinstance(sets, PlainSets)
        return sets

    def on_predict_start(self) -> None:
        """Start with an empty list for each data set."""
        self._size = self._sets.data.image_size
        check_size(self, self._size)
        self.found, self._parts = [], [([], []) for _ in self._sets.wanted]

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Keep the features of plain images."""
        images = batch.images
        if self.corruption is not None:
            prepared = self._sets.data.image_transform
            mean, std = (images.new_tensor(prepared[key])[:, None, None] for key in ("mean", "std"))
            images = (self.corruption((images * std + mean).clamp(0, 1), batch.indices).clamp(0, 1) - mean) / std
        features, indices = self._parts[dataloader_idx]
        features.append(self.tokens(images).float().cpu())
        indices.append(batch.indices.cpu())
        return features[-1]

    def on_predict_end(self) -> None:
        """Gather the features of all processes, in the order of the data."""
        for features, indices in self._parts:
            if not features:  # fewer images than processes
                channels = input_channels(self) or 3
                blank = torch.zeros(1, channels, self._size, self._size, device=self.device)
                features.append(self.tokens(blank).float().cpu()[:0])
                indices.append(torch.empty(0, dtype=torch.long))
            rows, order = (_gathered(torch.cat(parts), self.device) for parts in (features, indices))
            self.found.append((rows[order.argsort(stable=True)], order.sort().values))


class ViewFeatureExtractor(FeatureExtractor):
    """Collects the features of full-size training views, image by image; see ``extract_views``.

    Args:
        pretrained: The backbone.
        views: The views of the method.
    """

    def __init__(self, pretrained: Pretrained, views: Any) -> None:
        super().__init__(pretrained)
        self.views = views

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Keep the features of the views of full size."""
        side = max(view.shape[-1] for view in batch.views)
        views = torch.stack([self.tokens(view) for view in batch.views if view.shape[-1] == side], dim=1)
        features, indices = self._parts[dataloader_idx]
        features.append(views.flatten(0, 1).float().cpu())  # (B * V, 1, D)
        indices.append(batch.indices.repeat_interleave(views.shape[1]).cpu())
        return features[-1]


def _gathered(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of all processes, on the CPU. The device gathers them in pieces."""
    if world_size() == 1:
        return rows
    pieces = int(reduced(torch.tensor(-(-len(rows) // _AT_ONCE), device=device), "max"))
    parts = [gather_uneven(rows[piece * _AT_ONCE : (piece + 1) * _AT_ONCE].to(device)).cpu() for piece in range(pieces)]
    return torch.cat(parts)


_AT_ONCE = 65_536
"""Number of rows that each process sends at once."""


def _computed(extractor: FeatureExtractor, sets: PlainSets, trainer: L.Trainer) -> dict[int, Any] | None:
    """Features and indices of the sets that were not in the cache, by number; None on all processes but the first."""
    trainer.predict(extractor, sets, return_predictions=False)
    return dict(zip(sets.wanted, extractor.found, strict=True)) if trainer.is_global_zero else None


def extract(
    pretrained: Pretrained,
    data: L.LightningDataModule,
    trainer: L.Trainer,
    max_samples: int | None = None,
    last_blocks: int = 1,
    patch_mean: bool = False,
    corruption: Corruption | None = None,
) -> Features | None:
    """Features of the labeled images of a data module, prepared as the backbone expects them.

    The features are cached in ``$SSL_LIGHTNING_CACHE`` under a hash of the weights, the images and their preparation.

    Args:
        pretrained: The backbone.
        data: An SSLDataModule with labels and validation images.
        trainer: Determines devices and precision.
        max_samples: Largest number of training images, evenly spread. None means all.
        last_blocks: See ``Tokens``.
        patch_mean: See ``Tokens``.
        corruption: Changes the test images; the features of the training set are then empty.

    Returns:
        The features on the first process, None on the other processes.

    Raises:
        UserError: The data has no labels or no validation images, or fewer than two classes are in both sets.
    """
    extractor = FeatureExtractor(pretrained, last_blocks, patch_mean, corruption)
    key = _key(pretrained, trainer, last_blocks, patch_mean) if corruption is None else None
    labeled = LabeledImages(data, key, max_samples, test_only=corruption is not None)
    if (computed := _computed(extractor, labeled, trainer)) is None:
        return None
    sets = []
    for number, (images, _) in enumerate(labeled.sets):
        features, indices = labeled.features_of(number, computed)
        assert images.labels is not None
        labels = labeled.numbers[torch.from_numpy(images.labels)[indices]]
        sets.append(LabelledFeatures(features[labels >= 0], labels[labels >= 0]))
    return Features(sets[0], sets[1], int(labeled.numbers.max()) + 1)


def extract_all(pretrained: Pretrained, data: L.LightningDataModule, trainer: L.Trainer) -> list[ImageFeatures] | None:
    """Features of all images of a data module, with or without labels: of the training set, then any validation set.

    Cached as by ``extract``.

    Args:
        pretrained: The backbone.
        data: An SSLDataModule, and no stream.
        trainer: Determines devices and precision.

    Returns:
        The features on the first process, None on the other processes.
    """
    extractor, sets = FeatureExtractor(pretrained), PlainSets(data, _key(pretrained, trainer, 1, False))
    if (computed := _computed(extractor, sets, trainer)) is None:
        return None
    numbered = [(images, *sets.features_of(number, computed)) for number, (images, _) in enumerate(sets.sets)]
    return [ImageFeatures(images, features.flatten(1), indices) for images, features, indices in numbered]


def extract_some(
    pretrained: Pretrained, data: L.LightningDataModule, trainer: L.Trainer, max_samples: int, held_out: bool
) -> tuple[ImageFeatures, bool] | None:
    """Features of the validation images, or of some training images, with or without labels. Cached as by ``extract``.

    Args:
        pretrained: The backbone.
        data: An SSLDataModule, and no stream.
        trainer: Determines devices and precision.
        max_samples: Largest number of training images, evenly spread.
        held_out: Whether to take the validation images, if there are any.

    Returns:
        On the first process the features, and whether they are of validation images; None on the other processes.
    """
    extractor = FeatureExtractor(pretrained)
    some = SomeImages(data, _key(pretrained, trainer, 1, False), max_samples, held_out)
    if (computed := _computed(extractor, some, trainer)) is None:
        return None
    features, indices = some.features_of(0, computed)
    return ImageFeatures(some.sets[0][0], features.flatten(1), indices), some.is_validation


def extract_views(
    pretrained: Pretrained, data: L.LightningDataModule, trainer: L.Trainer, count: int, num_views: int, views: Any
) -> Tensor | None:
    """Features of several views of some training images, augmented as in training. Cached as by ``extract``.

    Args:
        pretrained: The backbone.
        data: An SSLDataModule, and no stream.
        trainer: Determines devices and precision.
        count: Number of images, evenly spread.
        num_views: Number of views of each image.
        views: The views of the method, for data that states none.

    Returns:
        ``(n, num_views, D)`` on the first process, without unreadable images; None on the other processes.
    """
    extractor = ViewFeatureExtractor(pretrained, views)
    some = SomeViews(data, _key(pretrained, trainer, 1, False), count, num_views)
    if (computed := _computed(extractor, some, trainer)) is None:
        return None
    features, indices = some.features_of(0, computed)
    _, inverse, counts = indices.unique(return_inverse=True, return_counts=True)
    per_image = some.per_epoch * some.epochs
    complete = (counts == per_image)[inverse]  # another image takes the place of an unreadable one
    return features[complete].flatten(1).unflatten(0, (-1, per_image))[:, :num_views]


def _key(pretrained: Pretrained, trainer: L.Trainer, last_blocks: int, patch_mean: bool) -> str:
    """Identifies how features are computed."""
    positions = getattr(pretrained.backbone, "rows_first", None)  # which the weights do not show
    if getattr(pretrained.backbone, "antialiased", False):
        positions = "antialiased"
    return f"{pretrained.hash} {positions} {last_blocks} {patch_mean} {trainer.precision}"


def check_size(network: nn.Module, size: int) -> None:
    """Check that a network can take images of a size.

    Args:
        network: A backbone, or a module that contains one.
        size: Side of the images in pixels.

    Raises:
        UserError: The patches of a ViT do not divide the images.
    """
    patch = max(getattr(part, "patch_side", 1) for part in network.modules())
    if size % patch:
        raise UserError(
            f"the backbone's patches of {patch} px do not divide images of {size} px; set --data.image_size."
        )


def labels_of(data: Any) -> Features:
    """The labels of a data module that is set up, with empty features.

    Args:
        data: An SSLDataModule.

    """
    sets = []
    for images in (data.train_images, data.val_images):
        labels = torch.empty(0).long() if images is None or images.labels is None else torch.from_numpy(images.labels)
        sets.append(LabelledFeatures(torch.empty(0), labels[labels >= 0]))
    return Features(sets[0], sets[1], data.num_classes)
