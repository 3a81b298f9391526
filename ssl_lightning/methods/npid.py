"""NPID."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.distributed import gather, own_part, world_size
from ssl_lightning.errors import UserError
from ssl_lightning.memory import Memory
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class NPID(SSLModule):
    """NPID: every image is its own class, distinguished from the others by a memory of their features.

    Wu et al. 2018, Unsupervised Feature Learning via Non-Parametric Instance Discrimination,
    https://arxiv.org/abs/1805.01978. The memory has a row for each training image, the same on every process; it is
    made when training starts, as then their number is known, and saved in checkpoints. The paper's proximal term is
    left out, as in the released code. BatchNorm may be global or per process.

    Args:
        temperature: Divides the cosine similarities.
        nce_k: Negatives per image, drawn at random (noise-contrastive estimation); 0 takes all images.
        momentum: Share of a row of the memory that stays when its image is seen.
        projector_dim: Width of the features in the memory.
        optim: Optimizer and learning-rate schedule; the milestones are for 200 epochs.
        kwargs: See SSLModule.
    """

    views = "npid"
    remedies = "a temperature near 0.07, more epochs (an image is seen once in each), nce_k of 0 for small data"
    global_views = 1
    zero_init_residual = False
    normalizer: Tensor

    def __init__(
        self,
        temperature: float = 0.07,
        nce_k: int = 4096,
        momentum: float = 0.5,
        projector_dim: int = 128,
        optim: Optim = Optim(
            "sgd",
            base_lr=0.03,
            weight_decay=1e-4,
            decay_norm_and_bias=True,
            warmup_epochs=0,
            milestones=(0.6, 0.8),
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.temperature, self.nce_k, self.momentum = temperature, nce_k, momentum
        self.projector = nn.Linear(self.embed_dim, projector_dim)
        self.memory = Memory(projector_dim)
        self.register_buffer("normalizer", torch.zeros(()))  # Z; 0 before the first batch

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Find the image of each view among those in the memory (eq. 2), or among some of them (eq. 7)."""
        indices = self._indices()
        features = F.normalize(self.projector(self.backbone(views[0])), dim=1)  # (B, projector_dim)
        normalizer = self.normalizer
        if self.nce_k == 0:
            loss = losses.instance_discrimination(features, self.memory.rows, indices, self.temperature)
        else:
            candidates = torch.cat([indices[:, None], self._drawn(len(indices))], dim=1)  # (B, 1 + nce_k)
            estimate = losses.nce_normalizer(features, self.memory.rows, candidates, self.temperature)
            normalizer = torch.where(normalizer == 0, estimate, normalizer)
            loss = losses.nce(features, self.memory.rows, candidates, self.temperature, normalizer)
        self.defer(indices=gather(indices), features=gather(features.detach()), normalizer=normalizer)
        return loss

    def _indices(self) -> Tensor:
        """Indices ``(B,)`` of the images of the batch, which are the rows of the memory."""
        if self.image_indices is None or not len(self.memory.rows):
            raise UserError(
                "NPID remembers every image by its index in the training set, which this loader does not give; train "
                "with a data module of this package whose images have indices, not a stream."
            )
        return self.image_indices

    def _drawn(self, images: int) -> Tensor:
        """Rows ``(B, nce_k)`` of the memory, any of them as likely; the image's own may be among them."""
        shape = images * world_size(), self.nce_k
        return self.random_to_device(own_part(torch.randint(len(self.memory.rows), shape, generator=self.generator)))

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the rows of the images that were seen towards their features; Z stays as the first batch gave it."""
        batches = (self.deferred(name) for name in ("indices", "features", "normalizer"))
        for indices, features, normalizer in zip(*batches, strict=True):
            remembered = self.memory.rows[indices]
            rows = self.momentum * remembered + (1 - self.momentum) * features.to(remembered.dtype)
            self.memory.write(indices, F.normalize(rows, dim=1))
            self.normalizer.copy_(torch.where(self.normalizer == 0, normalizer, self.normalizer))

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Mean cosine of features and the rows of their images."""
        features = F.normalize(self.projector(self.backbone(views[0])), dim=1)
        return {"memory_agreement": (features * F.normalize(self.memory.rows[self._indices()], dim=1)).sum(1).mean()}

    # The memory has a row for each training image, or for each image of the checkpoint

    def setup(self, stage: str) -> None:
        """Make the memory, where none has been read; a checkpoint to resume is read after this."""
        images = self.train_images
        if stage == "fit" and images is not None:
            if not len(self.memory.rows):
                self.remember(len(images))
            self.memory.check(len(images))

    def remember(self, images: int) -> None:
        """Begin a memory, uniform in a cube as in the released code; the same on every process.

        Args:
            images: Number of rows, one for each training image.
        """
        self.memory.resize(images)
        width = self.memory.rows.shape[1]
        bound = 1 / math.sqrt(width / 3)
        rows = torch.rand(images, width, generator=torch.Generator().manual_seed(0))
        self.memory.rows.copy_(2 * bound * rows - bound)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the memory as many rows as the checkpoint has.

        Raises:
            UserError: The number of training images differs from the checkpoint's.
        """
        saved = checkpoint["state_dict"].get("memory.rows")
        if saved is not None:
            if not len(self.memory.rows):
                self.memory.resize(len(saved))
            self.memory.check(len(saved))
        super().on_load_checkpoint(checkpoint)

    @property
    def chance_loss(self) -> float | None:
        """Loss where all M images are as likely: ln M, or of K drawn ones (K + 1) ln(K + 1) - K ln K.

        None before the training, when M is not known.
        """
        if self.nce_k:
            return (self.nce_k + 1) * math.log(self.nce_k + 1) - self.nce_k * math.log(self.nce_k)
        return math.log(len(self.memory.rows)) if len(self.memory.rows) else None
