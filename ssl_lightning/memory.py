"""A memory with the newest embedding of each image, and k-means clusters of embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning.errors import UserError

_ROWS_AT_A_TIME = 16384


class Memory(nn.Module):
    """The newest embedding of each image of a data set; the same on every process, saved with the method.

    It begins without images: ``resize`` makes room for them.

    Args:
        shape: Shape of the embedding of an image.

    Attributes:
        rows: ``(M, *shape)``; zero where an image was not seen yet.
    """

    rows: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, *shape))

    def resize(self, images: int) -> None:
        """Forget all embeddings, and make room for new ones.

        Args:
            images: Images of the data set.
        """
        self.rows = self.rows.new_zeros(images, *self.rows.shape[1:])

    def check(self, images: int) -> None:
        """Check that the memory has a row for each of these images.

        Args:
            images: Number of images of the data set, or of a checkpoint.

        Raises:
            UserError: The memory has another number of rows.
        """
        if len(self.rows) != images:
            raise UserError(
                f"the memory is of {len(self.rows):,} images, not of {images:,}; resume with the images that the run "
                "started with, or start a new run with --model.init_from."
            )

    def write(self, indices: Tensor, rows: Tensor) -> None:
        """Replace the embeddings of some images.

        Args:
            indices: ``(N,)`` of the images in the data set.
            rows: ``(N, *shape)``, the same on every process.
        """
        self.rows[indices] = rows

    @property
    def known(self) -> Tensor:
        """The rows of the images that were seen: ``(M', *shape)``."""
        return self.rows[self.rows.flatten(1).any(1)]


@torch.no_grad()
def spherical_kmeans(rows: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Centroids of unit norm, by cosine similarity.

    They start as random rows; rows repeat if there are fewer rows than clusters. A centroid without rows stays where it
    is. The same rows give the same bits, also on a GPU: sums are matrix products, not scatters.

    Args:
        rows: ``(M, D)`` of unit norm.
        clusters: Number of centroids K.
        iterations: How many times rows are assigned and centroids recomputed.
        generator: Draws the first centroids; on the CPU.

    Returns:
        ``(K, D)``.
    """
    first = torch.randperm(len(rows), generator=generator)[torch.arange(clusters) % len(rows)]
    centroids = rows[first.to(rows.device)]  # (K, D)
    for _ in range(iterations):
        sums = torch.zeros_like(centroids)
        for part in rows.split(_ROWS_AT_A_TIME):
            members = F.one_hot((part @ centroids.T).argmax(1), clusters).to(part.dtype)  # (part, K)
            sums += members.T @ part
        empty = ~sums.any(1, keepdim=True)
        centroids = torch.where(empty, centroids, F.normalize(sums, dim=1))
    return centroids
