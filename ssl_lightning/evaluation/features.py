"""Features of a labelled data set: each image once over all processes, kept on disk."""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from ssl_lightning.cache import cache_file, write_arrays
from ssl_lightning.checkpoints import Pretrained
from ssl_lightning.distributed import gather_uneven, reduced, world_size
from ssl_lightning.errors import UserError

Corruption = Callable[[Tensor, Tensor], Tensor]
"""Changes images ``(B, 3, S, S)`` in [0, 1], given their indices ``(B,)``."""


class LabelledFeatures(NamedTuple):
    """Features of N images."""

    features: Tensor
    """``(N, P, D)``, float32, on the CPU: P is 1 for the backbone's own output, else see ``Tokens``."""
    labels: Tensor
    """``(N,)`` classes."""


class Features(NamedTuple):
    """Features of the labelled images of a data module, in the order of the data."""

    train: LabelledFeatures
    test: LabelledFeatures
    num_classes: int


class Tokens(nn.Module):
    """What linear classifiers on ViTs read, one piece beside the other: class tokens and the mean of the patch tokens.

    The class tokens of the last blocks from the shallowest to the deepest, each after the final norm, then the mean of
    the patch tokens of the last block (Caron et al. 2021, DINO, appendix F.2; Oquab et al. 2023, DINOv2, section 7.1).

    Args:
        backbone: Maps images to features.
        last_blocks: How many blocks give their class token; 1 without ``patch_mean`` is the output of any backbone.
        patch_mean: Whether the mean of the patch tokens follows.

    Raises:
        UserError: The backbone has no such tokens.
    """

    def __init__(self, backbone: nn.Module, last_blocks: int = 1, patch_mean: bool = False) -> None:
        super().__init__()
        self.backbone, self.last_blocks, self.patch_mean = backbone, last_blocks, patch_mean
        depth = len(getattr(backbone, "blocks", [])) if getattr(backbone, "cls_token", None) is not None else 0
        if self.needs_blocks and last_blocks > depth:
            raise UserError(
                f"the class tokens of the last {last_blocks} blocks are wanted, but the backbone "
                f"{f'has {depth} blocks' if depth else 'is no ViT of timm'}; choose another protocol."
            )

    @property
    def needs_blocks(self) -> bool:
        """Whether the output of the backbone is not enough."""
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
    """Collects the features of a data module's labelled images under ``Trainer.predict``; see ``extract``.

    Args:
        pretrained: The backbone.
        last_blocks: See ``Tokens``.
        patch_mean: See ``Tokens``.
        corruption: Changes the images of the test set, which alone is visited.
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
    def _labelled(self) -> "_LabelledImages":
        labelled = getattr(self.trainer, "datamodule", None)
        assert isinstance(labelled, _LabelledImages)
        return labelled

    def on_predict_start(self) -> None:
        """Begin anew, one list for each data set."""
        self._size = self._labelled.data.image_size
        check_size(self, self._size)
        self.found, self._parts = [], [([], []) for _ in self._labelled.wanted]

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Keep the features of plain images."""
        images = batch.images
        if self.corruption is not None:
            prepared = self._labelled.data.image_transform
            mean, std = (images.new_tensor(prepared[key])[:, None, None] for key in ("mean", "std"))
            images = (self.corruption((images * std + mean).clamp(0, 1), batch.indices).clamp(0, 1) - mean) / std
        features, indices = self._parts[dataloader_idx]
        features.append(self.tokens(images).float().cpu())
        indices.append(batch.indices.cpu())
        return features[-1]

    def on_predict_end(self) -> None:
        """Bring the features of all processes together, in the order of the data."""
        for features, indices in self._parts:
            if not features:  # fewer images than processes
                features.append(
                    self.tokens(torch.zeros(1, 3, self._size, self._size, device=self.device)).float().cpu()[:0]
                )
                indices.append(torch.empty(0, dtype=torch.long))
            rows, order = (_gathered(torch.cat(parts), self.device) for parts in (features, indices))
            self.found.append((rows[order.argsort()], order.sort().values))


def _gathered(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of all processes, on the CPU; they pass through the device in pieces."""
    if world_size() == 1:
        return rows
    pieces = int(reduced(torch.tensor(-(-len(rows) // _AT_ONCE), device=device), "max"))
    parts = [gather_uneven(rows[piece * _AT_ONCE : (piece + 1) * _AT_ONCE].to(device)).cpu() for piece in range(pieces)]
    return torch.cat(parts)


_AT_ONCE = 65_536
"""Rows of a process that are sent at once."""


class _LabelledImages(L.LightningDataModule):
    """The labelled training images and the validation images of a data module, but for those whose features are known.

    Args:
        data: The data module.
        key: What tells the features of these images from others, but for the images; None knows none.
        max_samples: Training images at most.
        test_alone: Whether to pass over the training images.
    """

    def __init__(self, data: L.LightningDataModule, key: str | None, max_samples: int | None, test_alone: bool) -> None:
        super().__init__()
        self.data: Any = data
        self.key, self.max_samples, self.test_alone = key, max_samples, test_alone

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Look the features up; what the first process finds is what all go by."""
        data, trainer = self.data, self.trainer
        assert trainer is not None
        data.trainer = trainer
        data.setup(stage)
        if data.train_images is None or data.num_classes is None:
            raise UserError("an evaluation needs labelled images with random access; give data with labels, no stream.")
        if data.val_images is None or data.val_images.labels is None:
            raise UserError("an evaluation needs validation images with labels; give data with such a part.")
        self.sets = [(data.train_images, data.labelled(self.max_samples))]
        self.sets.append((data.val_images, np.flatnonzero(data.val_images.labels >= 0)))
        self.files = [self._file(*one) if trainer.is_global_zero else None for one in self.sets]
        self.known = [_read(file) for file in self.files]
        wanted = [
            number for number, known in enumerate(self.known) if known is None and not (self.test_alone and number == 0)
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
        """Normalise on the device."""
        return self.data.on_after_batch_transfer(batch, dataloader_idx)


def _read(file: Path | None) -> tuple[Tensor, Tensor] | None:
    try:
        if file is not None:
            with np.load(file) as arrays:
                return torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["indices"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or damaged
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
    """Features of the labelled images of a data module, prepared as the backbone wants them.

    They are kept in ``$SSL_LIGHTNING_CACHE`` under a hash of the weights, the images and their preparation.

    Args:
        pretrained: The backbone.
        data: An SSLDataModule with labels and a validation part.
        trainer: Says on which devices and with which precision.
        max_samples: Training images at most, evenly spread; None is all.
        last_blocks: See ``Tokens``.
        patch_mean: See ``Tokens``.
        corruption: Changes the test images; the features of the training set are then empty.

    Returns:
        The features on the first process, None on others.

    Raises:
        UserError: The data has no labels or no validation part, or the classes of the two differ.
    """
    extractor = FeatureExtractor(pretrained, last_blocks, patch_mean, corruption)
    positions = getattr(pretrained.backbone, "rows_first", None)  # which no weight tells
    how = f"{positions} {last_blocks} {patch_mean} {trainer.precision}"
    key = f"{pretrained.hash} {how}" if corruption is None else None
    labelled = _LabelledImages(data, key, max_samples, test_alone=corruption is not None)
    trainer.predict(extractor, labelled, return_predictions=False)
    if not trainer.is_global_zero:
        return None
    found = dict(zip(labelled.wanted, extractor.found, strict=True))
    sets = []
    for number, (images, _) in enumerate(labelled.sets):
        features, indices = labelled.known[number] or found.get(number) or (torch.empty(0), torch.empty(0).long())
        if (file := labelled.files[number]) is not None and number in found:
            write_arrays(file, features=features.numpy(), indices=indices.numpy())
        labels = torch.from_numpy(images.labels)[indices]
        sets.append(LabelledFeatures(features[labels >= 0], labels[labels >= 0]))
    if corruption is None:
        check_classes(sets[0].labels, sets[1].labels)
    return Features(sets[0], sets[1], labelled.data.num_classes)


def check_size(network: nn.Module, size: int) -> None:
    """See whether a network can take images of a size.

    Args:
        network: A backbone, or what holds one.
        size: Side of the images in pixels.

    Raises:
        UserError: The patches of a ViT do not divide it.
    """
    patch = max(getattr(part, "patch_side", 1) for part in network.modules())
    if size % patch:
        raise UserError(f"the backbone's patches of {patch} px do not divide images of {size} px; set data.image_size.")


def labels_of(data: Any) -> Features:
    """The labels of a data module that was set up, without features.

    Args:
        data: An SSLDataModule.

    Raises:
        UserError: As for ``extract``.
    """
    sets = []
    for images in (data.train_images, data.val_images):
        labels = torch.empty(0).long() if images is None or images.labels is None else torch.from_numpy(images.labels)
        sets.append(LabelledFeatures(torch.empty(0), labels[labels >= 0]))
    check_classes(sets[0].labels, sets[1].labels)
    return Features(sets[0], sets[1], data.num_classes)


def check_classes(train_labels: Tensor, test_labels: Tensor) -> None:
    """See whether training and test images are of the same classes.

    Args:
        train_labels: ``(N,)`` classes.
        test_labels: ``(M,)`` classes.

    Raises:
        UserError: They are not, or a class between others is empty.
    """
    train, test = set(train_labels.tolist()), set(test_labels.tolist())
    if not train or not test:
        raise UserError(f"there are no labelled {'test' if train else 'training'} images.")
    if missing := sorted(set(range(max(train | test) + 1)) - (train & test)):
        where = [f"{len(train)} classes in training", f"{len(test)} in the test set"]
        raise UserError(
            f"training and test images differ in their classes: {' and '.join(where)}; without images in one of them: "
            f"{', '.join(map(str, missing[:10]))}. Give both the same classes, or leave these out."
        )
