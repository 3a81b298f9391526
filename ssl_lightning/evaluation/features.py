"""Features of a labeled data set: each image once over all processes, cached on disk."""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from ssl_lightning.backbones.tokens import input_channels
from ssl_lightning.cache import cache_file, write_arrays
from ssl_lightning.checkpoints import Pretrained
from ssl_lightning.distributed import gather_uneven, reduced, world_size
from ssl_lightning.errors import UserError, listed

Corruption = Callable[[Tensor, Tensor], Tensor]
"""Changes images ``(B, 3, S, S)`` in [0, 1], given their indices ``(B,)``."""


class LabelledFeatures(NamedTuple):
    """Features of N images."""

    features: Tensor
    """``(N, P, D)``, float32, on the CPU: P is 1 for the output of the backbone, else see ``Tokens``."""
    labels: Tensor
    """``(N,)`` classes."""


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
    def _labeled(self) -> "_LabeledImages":
        labeled = getattr(self.trainer, "datamodule", None)
        assert isinstance(labeled, _LabeledImages)
        return labeled

    def on_predict_start(self) -> None:
        """Start with an empty list for each data set."""
        self._size = self._labeled.data.image_size
        check_size(self, self._size)
        self.found, self._parts = [], [([], []) for _ in self._labeled.wanted]

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Keep the features of plain images."""
        images = batch.images
        if self.corruption is not None:
            prepared = self._labeled.data.image_transform
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
            self.found.append((rows[order.argsort()], order.sort().values))


def _gathered(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of all processes, on the CPU. The device gathers them in pieces."""
    if world_size() == 1:
        return rows
    pieces = int(reduced(torch.tensor(-(-len(rows) // _AT_ONCE), device=device), "max"))
    parts = [gather_uneven(rows[piece * _AT_ONCE : (piece + 1) * _AT_ONCE].to(device)).cpu() for piece in range(pieces)]
    return torch.cat(parts)


_AT_ONCE = 65_536
"""Number of rows that each process sends at once."""


class _LabeledImages(L.LightningDataModule):
    """The labeled training and validation images of a data module, without those whose features are cached.

    Args:
        data: The data module.
        key: Identifies the features in the cache, together with the images. None means that no features are cached.
        max_samples: Largest number of training images. None means all.
        test_only: Whether to skip the training images.
    """

    def __init__(self, data: L.LightningDataModule, key: str | None, max_samples: int | None, test_only: bool) -> None:
        super().__init__()
        self.data: Any = data
        self.key, self.max_samples, self.test_only = key, max_samples, test_only

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Look for cached features. The first process decides for all processes which features are missing."""
        data, trainer = self.data, self.trainer
        assert trainer is not None
        data.trainer = trainer
        data.setup(stage)
        if data.train_images is None or data.num_classes is None:
            raise UserError(
                "an evaluation needs labeled images with random access; give data with labels, and no stream."
            )
        if data.val_images is None or data.val_images.labels is None:
            raise UserError("an evaluation needs validation images with labels; give data with a validation split.")
        self.sets = [(data.train_images, data.labelled(self.max_samples))]
        self.sets.append((data.val_images, np.flatnonzero(data.val_images.labels >= 0)))
        labels, test_labels = (torch.from_numpy(images.labels[indices]) for images, indices in self.sets)
        self.numbers = shared_classes(labels, test_labels, data.classes, say=not self.test_only)
        self.files = [self._file(images, indices) if trainer.is_global_zero else None for images, indices in self.sets]
        self.known = [_read(file) for file in self.files]
        wanted = [
            number for number, known in enumerate(self.known) if known is None and not (self.test_only and number == 0)
        ]
        self.wanted: list[int] = trainer.strategy.broadcast(wanted)

    def _file(self, images: Any, indices: np.ndarray) -> Path | None:
        if self.key is None or (fingerprint := images.fingerprint()) is None:
            return None
        transform = sorted(self.data.image_transform.items())
        which = hashlib.sha256(indices.tobytes()).hexdigest()
        return cache_file(f"features {self.key} {transform} {fingerprint} {which}", ".npz")

    def predict_dataloader(self) -> list[Any]:
        """Plain images, each once over all processes."""
        data = self.data
        loaders = [lambda: data.train_labelled_dataloader(self.max_samples), data.val_dataloader]
        return [loaders[number]() for number in self.wanted]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalize on the device."""
        return self.data.on_after_batch_transfer(batch, dataloader_idx)


def _read(file: Path | None) -> tuple[Tensor, Tensor] | None:
    try:
        if file is not None:
            with np.load(file) as arrays:
                return torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["indices"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # the file is missing or damaged
        pass
    return None


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
    positions = getattr(pretrained.backbone, "rows_first", None)  # which the weights do not show
    if getattr(pretrained.backbone, "antialiased", False):
        positions = "antialiased"
    how = f"{positions} {last_blocks} {patch_mean} {trainer.precision}"
    key = f"{pretrained.hash} {how}" if corruption is None else None
    labeled = _LabeledImages(data, key, max_samples, test_only=corruption is not None)
    trainer.predict(extractor, labeled, return_predictions=False)
    if not trainer.is_global_zero:
        return None
    computed = dict(zip(labeled.wanted, extractor.found, strict=True))
    sets = []
    for number, (images, _) in enumerate(labeled.sets):
        features, indices = labeled.known[number] or computed.get(number) or (torch.empty(0), torch.empty(0).long())
        if (file := labeled.files[number]) is not None and number in computed:
            write_arrays(file, features=features.numpy(), indices=indices.numpy())
        labels = labeled.numbers[torch.from_numpy(images.labels)[indices]]
        sets.append(LabelledFeatures(features[labels >= 0], labels[labels >= 0]))
    return Features(sets[0], sets[1], int(labeled.numbers.max()) + 1)


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


def shared_classes(labels: Tensor, test_labels: Tensor, names: list[str] | None, say: bool = True) -> Tensor:
    """Number the classes that both training and test images have, and say which ones are left out.

    Args:
        labels: ``(N,)`` classes of the training images; -1 is unknown.
        test_labels: ``(M,)`` classes of the test images.
        names: Names of the classes. None means their numbers.
        say: Whether to say which classes are left out.

    Returns:
        ``(C + 1,)`` new number of each of the C classes. -1 is left out, and the last element is for unknown classes.

    Raises:
        UserError: Fewer than two classes are in both sets.
    """
    train, test = (set(part[part >= 0].tolist()) for part in (labels, test_labels))
    if not train or not test:
        raise UserError(f"there are no labeled {'test' if train else 'training'} images.")
    shared = sorted(train & test)
    if len(shared) < 2:
        raise UserError(
            f"training images have {len(train)} classes and test images {len(test)}, but {len(shared)} of them in "
            "common; an evaluation needs at least 2, so give both the same classes."
        )
    if say and (missing := sorted(train ^ test)):
        listing = listed([names[label] if names else str(label) for label in missing])
        rank_zero_info(f"Evaluating {len(shared)} classes. Left out, as only one of both sets has images: {listing}")
    numbers = torch.full((max(train | test) + 2,), -1)
    numbers[shared] = torch.arange(len(shared))
    return numbers
