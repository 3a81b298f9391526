"""Depth from the features of patches: a linear layer on a memory of training patches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.distributed import gather_uneven
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.patch_features import PatchMemory, linear_layer, patches_of

_DELTA = 1.25


@dataclass(frozen=True)
class DepthProtocol:
    """How depth is predicted.

    Args:
        bins: Number of depths that the linear layer weighs.
        max_depth: Pixels that are deeper do not count, neither in training nor in evaluation. None counts all.
        memory_size: Largest number of training patches, the same from each image, at random. None takes all.
        seed: For the choice of patches.
    """

    bins: int = 64
    max_depth: float | None = None
    memory_size: int | None = 200_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bins < 2 or (self.memory_size is not None and self.memory_size < 1):
            raise UserError(f"--bins {self.bins} must be at least 2, and --memory_size {self.memory_size} at least 1.")
        if self.max_depth is not None and not self.max_depth > 0:
            raise UserError(f"--max_depth {self.max_depth} must be above 0.")


class PatchDepth:
    """Predicts the depth of pixels from the patches of training images, on any number of processes.

    Depths from the smallest to the largest mean of a training patch, evenly spread in their logarithm, are the bins. A
    linear layer gives logits for the bins of a patch. Its softmax weighs them, and the weighted mean is interpolated to
    the image. The layer is trained by cross-entropy with the two bins around the mean depth of each patch.

    Call ``remember`` with all training images, then ``score`` with all validation images, then ``measures``.

    Args:
        protocol: How depth is predicted.
        num_images: Number of training images over all processes.
    """

    def __init__(self, protocol: DepthProtocol, num_images: int) -> None:
        self.protocol, self.memory = protocol, PatchMemory(protocol.memory_size, num_images)
        self._predict: Callable[[Tensor], Tensor] | None = None
        self._scores: list[Tensor] = []

    def remember(self, maps: Tensor, depths: Sequence[Tensor], side: int) -> None:
        """Add the patches of the next training images of this process, or some of them, to the memory.

        Args:
            maps: ``(B, D, rows, columns)`` features.
            depths: The depth map ``(H, W)`` of each image; 0 is unknown.
            side: Side of a patch in pixels.
        """
        rows, columns = maps.shape[2:]
        kept = self.memory.room(rows * columns)
        for features, depth in zip(patches_of(maps), depths, strict=True):
            means, shares = self._of_patches(depth, rows, columns, side)
            known = (shares > 0).nonzero().flatten()
            if len(known) > kept:
                random = np.random.Generator(np.random.Philox(key=[self.protocol.seed, self.memory.index]))
                known = known[torch.from_numpy(np.sort(random.permutation(len(known))[:kept])).to(known.device)]
            self.memory.add(features[known], torch.stack([means[known], shares[known]], dim=1))

    def _of_patches(self, depth: Tensor, rows: int, columns: int, side: int) -> tuple[Tensor, Tensor]:
        """Mean depth of the pixels of each patch that count, and their share ``(rows * columns,)``."""
        resized = F.interpolate(depth[None, None], (rows * side, columns * side), mode="nearest-exact")
        counted = self._counted(resized)
        share = F.avg_pool2d(counted.float(), side)
        mean = F.avg_pool2d(resized.where(counted, 0), side) / share.clamp(min=1e-12)
        return mean.flatten(), share.flatten()

    def _counted(self, depth: Tensor) -> Tensor:
        """Whether each pixel counts."""
        return (depth > 0) & (depth <= (self.protocol.max_depth or torch.inf))

    def _fit(self) -> Callable[[Tensor], Tensor]:
        """Complete the memory with the patches of all processes, and learn from it."""
        features, targets, _ = self.memory.complete()
        if len(features) == 0:
            raise UserError(f"no pixel of the training depth maps counts: all are {self._not_counted}.")
        mean, share = targets.unbind(1)
        low, high = mean.min().log(), mean.max().log()
        bins = (low + (high - low) * torch.linspace(0, 1, self.protocol.bins, device=mean.device)).exp()
        upper = torch.searchsorted(bins, mean.contiguous()).clamp(1, len(bins) - 1)
        below, above = bins[upper - 1], bins[upper]
        weight = ((mean - below) / (above - below).clamp(min=1e-12)).clamp(
            0, 1
        )  # so that the weighted mean is the mean
        shares = features.new_zeros(len(mean), len(bins))
        shares.scatter_(1, upper[:, None] - 1, ((1 - weight) * share)[:, None])
        shares.scatter_(1, upper[:, None], (weight * share)[:, None])
        logits = linear_layer(features, shares)
        return lambda queries: (logits(queries).softmax(dim=1) * bins).sum(dim=1)

    def score(self, maps: Tensor, depths: Sequence[Tensor], side: int) -> None:
        """Predict the depth of the pixels of validation images, and measure the errors of each image.

        Args:
            maps: ``(B, D, rows, columns)`` features.
            depths: The depth map ``(H, W)`` of each image; 0 is unknown.
            side: Unused.
        """
        if self._predict is None:
            self._predict = self._fit()
        self._scores.append(torch.empty(0, 3, device=maps.device))
        grids = self._predict(patches_of(maps).flatten(0, 1)).view(len(maps), 1, 1, *maps.shape[2:])
        for grid, depth in zip(grids, depths, strict=True):
            predicted = F.interpolate(grid, depth.shape, mode="bilinear")[0, 0]
            counted = self._counted(depth)
            if counted.any():
                true, guess = depth[counted], predicted[counted]
                near = torch.maximum(true / guess, guess / true) < _DELTA
                errors = (guess - true).square().mean().sqrt(), ((guess - true).abs() / true).mean()
                self._scores.append(torch.stack([*errors, near.float().mean()])[None])

    def measures(self) -> dict[str, float]:
        """Means over the images of all processes: ``rmse`` in meters, ``abs_rel``, and ``delta1``, from 0 to 1.

        Raises:
            UserError: No pixel counts.
        """
        scores = gather_uneven(torch.cat(self._scores)).cpu().double()
        if len(scores) == 0:
            raise UserError(f"no pixel of the validation depth maps counts: all are {self._not_counted}.")
        return dict(zip(("rmse", "abs_rel", "delta1"), scores.mean(0).tolist(), strict=True))

    @property
    def _not_counted(self) -> str:
        limit = self.protocol.max_depth
        return "0" if limit is None else f"0, or above --max_depth {limit:g}"
