"""Projection heads, images as patches, and the features of a teacher as targets."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning.distributed import reduced


def mlp(
    widths: Sequence[int],
    bias: bool = False,
    last_bias: bool = False,
    last_norm: nn.Module | None = None,
    gelu: bool = False,
) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between them: the projector and predictor of most methods.

    These are not lightly's heads because those differ from the papers' in biases and in the last BatchNorm.

    Args:
        widths: Input width, hidden widths, output width.
        bias: Whether the hidden linear layers have a bias.
        last_bias: Whether the last linear layer has a bias.
        last_norm: Module after the last linear layer, if the paper has one.
        gelu: Whether GELU takes the place of ReLU.

    Example:
        >>> projector = mlp([2048, 4096, 256], bias=True)  # BYOL's
        >>> sum(parameter.numel() for parameter in projector.parameters())
        9449472
    """
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths[:-1]):
        activation = nn.GELU() if gelu else nn.ReLU(inplace=True)
        layers += [nn.Linear(width_in, width_out, bias=bias), nn.BatchNorm1d(width_out), activation]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    if last_norm is not None:
        layers.append(last_norm)
    return nn.Sequential(*layers)


def gelu_mlp(embed_dim: int, hidden_dim: int, output_dim: int) -> nn.Sequential:
    """Three linear layers with GELU between them, initialized as in DINO's released code.

    Args:
        embed_dim: Width of the features.
        hidden_dim: Width of the two hidden layers.
        output_dim: Width of the output.

    Example:
        >>> sum(parameter.numel() for parameter in gelu_mlp(768, 2048, 256).parameters())  # SimDINO's head of a ViT-B
        6295808
    """
    layers = nn.Sequential(
        *(nn.Linear(embed_dim, hidden_dim), nn.GELU()),
        *(nn.Linear(hidden_dim, hidden_dim), nn.GELU()),
        nn.Linear(hidden_dim, output_dim),
    )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return layers


class DINOHead(nn.Module):
    """MLP with GELU, a bottleneck of unit norm, and similarities to prototypes of unit norm.

    Caron et al. 2021, DINO, section 3.1. This is not lightly's head because that one uses torch's old weight norm,
    which cannot be copied into a teacher once it has run; torch's new one cannot be pickled.

    Args:
        embed_dim: Width of the features.
        hidden_dim: Width of the two hidden layers.
        bottleneck_dim: Width of the bottleneck.
        num_prototypes: Number of outputs K.
        norm_last_layer: Whether the norms of the prototypes stay 1; otherwise they are learned.

    Example:
        >>> head = DINOHead(8, hidden_dim=16, bottleneck_dim=4, num_prototypes=32, norm_last_layer=True)
        >>> logits = head(torch.randn(2, 8))  # cosine similarities
        >>> logits.shape, bool(logits.abs().max() < 1.001)
        (torch.Size([2, 32]), True)
    """

    def __init__(
        self, embed_dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int, norm_last_layer: bool
    ) -> None:
        super().__init__()
        self.mlp = gelu_mlp(embed_dim, hidden_dim, bottleneck_dim)
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))  # their direction
        nn.init.kaiming_uniform_(self.prototypes, a=math.sqrt(5))  # as a linear layer of torch
        self.prototype_norms = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=not norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(..., K)`` of features ``(..., embed_dim)``."""
        return self._logits(features, self.prototypes, self.prototype_norms)

    def of_patches(self, features: Tensor) -> Tensor:
        """Logits ``(..., K)`` of patches ``(..., embed_dim)``: the same, as the head is shared."""
        return self(features)

    def drop_prototype_gradients(self) -> None:
        """Leave the prototypes out of the next optimizer step, including its weight decay."""
        for name, parameter in self.named_parameters():
            if "prototype" in name:
                parameter.grad = None

    def _logits(self, features: Tensor, prototypes: Tensor, prototype_norms: Tensor) -> Tensor:
        prototypes = F.normalize(prototypes, dim=1) * prototype_norms  # (K, bottleneck_dim)
        return F.linear(F.normalize(self.mlp(features), dim=-1), prototypes)


class IBOTHead(DINOHead):
    """DINO's head with a second set of prototypes, for patches.

    Zhou et al. 2022, iBOT, section 3.2: the head that is not shared. Only the last layer differs between class token
    and patches.

    Args:
        embed_dim: Width of the features.
        hidden_dim: Width of the two hidden layers.
        bottleneck_dim: Width of the bottleneck.
        num_prototypes: Number of outputs K, for the class token and for patches.
        norm_last_layer: Whether the norms of the prototypes stay 1; otherwise they are learned.

    Example:
        >>> head = IBOTHead(8, hidden_dim=16, bottleneck_dim=4, num_prototypes=32, norm_last_layer=True)
        >>> head(torch.randn(2, 8)).shape, head.of_patches(torch.randn(2, 9, 8)).shape
        (torch.Size([2, 32]), torch.Size([2, 9, 32]))
    """

    def __init__(
        self, embed_dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int, norm_last_layer: bool
    ) -> None:
        super().__init__(embed_dim, hidden_dim, bottleneck_dim, num_prototypes, norm_last_layer)
        self.patch_prototypes = nn.Parameter(torch.empty_like(self.prototypes))
        nn.init.kaiming_uniform_(self.patch_prototypes, a=math.sqrt(5))
        self.patch_prototype_norms = nn.Parameter(
            torch.ones_like(self.prototype_norms), requires_grad=not norm_last_layer
        )

    def of_patches(self, features: Tensor) -> Tensor:
        """Logits ``(..., K)`` of patches ``(..., embed_dim)``."""
        return self._logits(features, self.patch_prototypes, self.patch_prototype_norms)


class PrototypeHead(nn.Module):
    """Similarities of vectors, scaled to unit norm, to prototypes whose norms are learned.

    The head of CAPI's student: DINO's last layer without the layers before it.

    Args:
        embed_dim: Width of the vectors.
        num_prototypes: Number of outputs K.

    Example:
        >>> head = PrototypeHead(8, num_prototypes=32)
        >>> logits = head(torch.randn(2, 5, 8))  # cosine similarities, as the norms begin at 1
        >>> logits.shape, bool(logits.abs().max() < 1.001)
        (torch.Size([2, 5, 32]), True)
    """

    def __init__(self, embed_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, embed_dim))  # their direction
        nn.init.trunc_normal_(self.prototypes, std=0.02)
        self.prototype_norms = nn.Parameter(torch.ones(num_prototypes, 1))

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits ``(..., K)`` of vectors ``(..., embed_dim)``."""
        prototypes = F.normalize(self.prototypes, dim=1) * self.prototype_norms  # (K, embed_dim)
        return F.linear(F.normalize(vectors, dim=-1), prototypes)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, row by row; inside a patch the order is (row, column, channel).

    Args:
        images: ``(B, C, H, W)``, sides divisible by the patch size.
        patch_size: Side P of the patches in pixels.

    Returns:
        ``(B, N, P*P*C)``.

    Example:
        >>> patches = patchify(torch.arange(48).view(1, 3, 4, 4), patch_size=2)
        >>> patches.shape
        torch.Size([1, 4, 12])
        >>> patches[0, 0].tolist()
        [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    """
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size**2 * channels)


def unpatchify(patches: Tensor, patch_size: int, shape: Sequence[int]) -> Tensor:
    """Assemble images from patches: the inverse of ``patchify``.

    Args:
        patches: ``(B, N, P*P*C)``.
        patch_size: Side P of the patches in pixels.
        shape: Shape of the images, ``(B, C, H, W)``.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> torch.equal(unpatchify(patchify(images, 4), 4, images.shape), images)
        True
    """
    batch, channels, height, width = shape
    grid = patches.reshape(batch, height // patch_size, width // patch_size, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


def same_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps, both averaged to the coarser grid of the two, rows and columns apart: no detail is invented.

    As ``F.adaptive_avg_pool2d``, by matrix products, whose backward pass is deterministic on GPUs, too.

    Args:
        student: ``(B, D, rows, columns)``.
        teacher: ``(B, D', rows, columns)`` of the same images on any grid.

    Example:
        >>> student, teacher = torch.arange(16.0).view(1, 1, 4, 4), torch.ones(1, 1, 2, 2)
        >>> same_grid(student, teacher)[0][0, 0].tolist()
        [[2.5, 4.5], [10.5, 12.5]]
    """
    rows, columns = (min(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return _averaged(student, rows, columns), _averaged(teacher, rows, columns)


def _averaged(grid: Tensor, rows: int, columns: int) -> Tensor:
    grid = grid.float() if grid.dtype.itemsize < 4 else grid
    if grid.shape[2:] == (rows, columns):
        return grid
    down, across = (
        F.adaptive_avg_pool1d(torch.eye(old, dtype=grid.dtype, device=grid.device), new)  # (old, new)
        for old, new in zip(grid.shape[2:], (rows, columns), strict=True)
    )
    with torch.autocast(grid.device.type, enabled=False):
        return down.T @ grid @ across


def standardizer(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of features, and the number to divide all their dimensions by; over all processes.

    Dividing by a single number keeps directions apart as they are: up to a rotation the result is PHI-S (Ranzinger et
    al. 2024). Deviations of single dimensions would enlarge those that hardly vary.

    Args:
        features: ``(N, D)`` of this process.

    Returns:
        ``(D,)``, and the square root of the mean of the dimensions' unbiased variances.

    Example:
        >>> mean, scale = standardizer(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]))
        >>> mean.tolist(), round(scale.item(), 4)  # variances 4 and 0
        ([2.0, 1.0], 1.4142)
    """
    return _mean_and_scale(moments(features))


class Standardizer(nn.Module):
    """Standardizes features by the statistics of the batches that it was given; see ``standardizer``.

    Args:
        dim: Width D of the features.

    Example:
        >>> batches = torch.randn(3, 8, 4)
        >>> standardize = Standardizer(4)
        >>> for batch in batches:
        ...     standardize.add(moments(batch))
        >>> mean, scale = standardizer(batches.flatten(0, 1))
        >>> torch.allclose(standardize(batches[0]), (batches[0] - mean) / scale, atol=1e-6)
        True
    """

    moments: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("moments", torch.zeros(3, dim))  # as of ``moments``

    def add(self, batch: Tensor) -> None:
        """Count a batch.

        Args:
            batch: Its ``moments``.
        """
        self.moments.copy_(_merged(self.moments, batch.to(self.moments.dtype)))

    def forward(self, features: Tensor, batch: Tensor | None = None) -> Tensor:
        """Standardize features ``(..., D)``; ``batch``, the moments of one more batch, counts as well."""
        mean, scale = _mean_and_scale(self.moments if batch is None else _merged(self.moments, batch))
        return (features - mean) / scale

    @property
    def scale(self) -> Tensor:
        """The number that all dimensions are divided by."""
        return _mean_and_scale(self.moments)[1]


@torch.no_grad()
def moments(features: Tensor) -> Tensor:
    """Number of rows, mean and sum of squared deviations of each dimension, over all processes: ``(3, D)``.

    Args:
        features: ``(N, D)`` of this process.
    """
    features = features.detach().float() if features.dtype.itemsize < 4 else features.detach()
    sums = reduced(torch.stack([torch.full_like(features[0], len(features)), features.sum(0)]))
    mean = sums[1] / sums[0]
    return torch.stack([sums[0], mean, reduced((features - mean).square().sum(0))])


def _merged(first: Tensor, second: Tensor) -> Tensor:
    """The moments of the rows of two (Chan et al. 1979), which lose no digits to large means."""
    (count, mean, squares), (other_count, other_mean, other_squares) = first, second
    total, shift = count + other_count, other_mean - mean
    share = other_count / total.clamp(min=1)
    return torch.stack([total, mean + shift * share, squares + other_squares + shift.square() * count * share])


def _mean_and_scale(moments: Tensor) -> tuple[Tensor, Tensor]:
    count, mean, squares = moments
    variances = squares / (count - 1).clamp(min=1)
    scale = variances.mean().sqrt()
    return mean, torch.where(scale > 0, scale, torch.ones_like(scale))  # of no rows, or of rows that are all alike
