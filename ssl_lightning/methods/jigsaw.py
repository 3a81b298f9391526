"""Jigsaw."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.errors import UserError
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class Jigsaw(SSLModule):
    """Jigsaw: recognize in which order the nine patches of an image have been laid.

    Noroozi & Favaro 2016, Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles,
    https://arxiv.org/abs/1603.09246; for ResNets Goyal et al. 2019, https://arxiv.org/abs/1905.01235, whose recipe in
    VISSL this is. A view is cut into 3 x 3 cells and a patch is taken at a random place in each, so that lines do not
    go on from one to the next; two thirds of the images are gray, so that color fringes give nothing away. One
    ``backbone`` sees all patches. BatchNorm may be global or per process.

    The training forward sees only patches, so the linear probe learns from features of whole views at every
    ``probe_every``-th step, as with MAE.

    Args:
        num_permutations: Number of permutations to distinguish.
        patch_size: Side of the patches in pixels; the cells are a third of the view, 85 px for one of 255.
        hidden_dim: Width of the features kept of each patch.
        normalize_patches: Whether each patch is normalized by its own mean and standard deviation, as in Noroozi &
            Favaro (section 3.3); not in VISSL.
        probe_every: The probes get features of whole views once every this many steps.
        optim: Optimizer and learning-rate schedule; the milestones are for 105 epochs.
        kwargs: See SSLModule.
    """

    views = "jigsaw"
    remedies = "fewer permutations, patches large enough to show something, a lower learning rate"
    global_views = 1
    zero_init_residual = False
    permutations: Tensor

    def __init__(
        self,
        num_permutations: int = 2000,
        patch_size: int = 64,
        hidden_dim: int = 1000,
        normalize_patches: bool = False,
        probe_every: int = 32,
        optim: Optim = Optim(
            "sgd",
            base_lr=0.1,
            weight_decay=1e-4,
            warmup_epochs=5,
            warmup_start_factor=0.25,
            milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105),
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.patch_size, self.normalize_patches, self.probe_every = patch_size, normalize_patches, probe_every
        self.projector = nn.Sequential(
            nn.Linear(self.embed_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(9 * hidden_dim, num_permutations)
        self.register_buffer("permutations", distant_permutations(num_permutations))

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropy of the permutation of each image."""
        return losses.cross_entropy(*self._logits_and_orders(views[0]))

    def _logits_and_orders(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, K)`` and numbers ``(B,)`` of the permutations in which the patches were laid."""
        corners, orders = (self.random_to_device(drawn) for drawn in self._drawn(images))
        patches = cut(images, corners, self.patch_size)  # (B, 9, 3, P, P)
        if self.normalize_patches:
            deviation, mean = torch.std_mean(patches, dim=(2, 3, 4), keepdim=True)
            patches = (patches - mean) / (deviation + 1e-6)
        patches = shuffled(patches, self.permutations[orders])
        kept = self.projector(self.backbone(patches.flatten(0, 1)))  # (9B, hidden_dim)
        return self.head(kept.unflatten(0, (-1, 9)).flatten(1)), orders

    def _drawn(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Corners ``(B, 9, 2)`` of the patches, rows and columns, and numbers ``(B,)`` of permutations."""
        cell = images.shape[-1] // 3
        corners, orders = [], []
        for seed in self.seeds_of_images(len(images)):
            random = np.random.Generator(np.random.Philox(seed))
            corners.append(random.integers(cell - self.patch_size + 1, size=(9, 2)))
            orders.append(random.integers(len(self.permutations)))
        cells = np.stack(np.divmod(np.arange(9), 3), axis=1) * cell  # (9, 2), row by row
        return torch.from_numpy(np.stack(corners) + cells), torch.from_numpy(np.stack(orders))

    def check(self, sizes: list[int], global_batch: int) -> None:
        """Patches must fit into their cells, and the backbone's patches into them."""
        super().check(sizes, global_batch)
        cell, side = sizes[0] // 3, getattr(self.backbone, "patch_side", 1)
        if self.patch_size > cell:
            raise UserError(
                f"--model.patch_size={self.patch_size} is larger than the cells of {cell} px, a third of the view; set "
                f"it to about {round(cell * 64 / 85)}, or --data.image_size to {self.patch_size * 255 // 64}."
            )
        if self.patch_size % side:
            raise UserError(f"the backbone's patches of {side} px do not divide --model.patch_size={self.patch_size}.")

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Share of the permutations that are recognized."""
        return {"pretext_accuracy": losses.accuracy(*self._logits_and_orders(views[0]))}

    @property
    def chance_loss(self) -> float:
        """The entropy ln K: every permutation is as likely."""
        return math.log(len(self.permutations))


def cut(images: Tensor, corners: Tensor, patch_size: int) -> Tensor:
    """Take patches out of images.

    Args:
        images: ``(B, C, H, W)``.
        corners: ``(B, N, 2)`` first row and first column of each patch.
        patch_size: Side P of the patches in pixels.

    Returns:
        ``(B, N, C, P, P)``.
    """
    steps = torch.arange(patch_size, device=images.device)
    rows, columns = (corners[:, :, axis, None] + steps for axis in (0, 1))  # (B, N, P)
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    patches = images.permute(0, 2, 3, 1)[image, rows[:, :, :, None], columns[:, :, None, :]]  # (B, N, P, P, C)
    return patches.permute(0, 1, 4, 2, 3)


def shuffled(patches: Tensor, permutations: Tensor) -> Tensor:
    """Lay the patches of each image in an order.

    Args:
        patches: ``(B, N, ...)``.
        permutations: ``(B, N)``; patch ``permutations[b, i]`` comes to place i.
    """
    return patches[torch.arange(len(patches), device=patches.device)[:, None], permutations]


def distant_permutations(count: int) -> Tensor:
    """Permutations of nine that differ from each other in many places, always the same.

    Greedy, after Noroozi & Favaro 2016, algorithm 1: after the first, always the permutation that is farthest from the
    nearest chosen permutation (Hamming distance); ties go to the largest mean distance. The paper chooses among
    all 362,880; a random sample of them takes a second for 2,000.

    Args:
        count: How many.

    Returns:
        ``(count, 9)`` whole numbers, rows all different.

    Raises:
        UserError: There are fewer, or it would take long.
    """
    if not 2 <= count <= 10_000:
        raise UserError(f"--model.num_permutations={count} must be from 2 to 10,000.")
    random = np.random.Generator(np.random.Philox(0))
    pool = random.permuted(np.tile(np.arange(9, dtype=np.int8), (max(20_000, 5 * count), 1)), axis=1)
    places = np.ascontiguousarray(pool.T)  # (9, pool)
    nearest, total = np.full(len(pool), 10, dtype=np.int64), np.zeros(len(pool), dtype=np.int64)
    chosen = [0]
    while len(chosen) < count:
        distances = (places != places[:, chosen[-1], None]).sum(0, dtype=np.int8)  # (pool,)
        np.minimum(nearest, distances, out=nearest)  # 0 for those chosen
        total += distances
        chosen.append(int((nearest * 10 * count + total).argmax()))
    return torch.from_numpy(pool[chosen].astype(np.int64))
