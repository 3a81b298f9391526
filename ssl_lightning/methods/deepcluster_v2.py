"""DeepCluster v2."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import losses
from ssl_lightning.backbones.tokens import multi_crop
from ssl_lightning.distributed import gather
from ssl_lightning.errors import UserError
from ssl_lightning.heads import mlp
from ssl_lightning.memory import Memory, spherical_kmeans
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class Clustering(L.Callback):
    """Makes the prototypes at the start of each epoch, but not when a training resumes within an epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Cluster the images."""
        if isinstance(pl_module, DeepClusterV2):
            pl_module.cluster()


class DeepClusterV2(SSLModule):
    """DeepCluster v2: predict the cluster of an image; all images are clustered at the start of each epoch.

    Caron et al. 2020, SwAV, appendix on DeepCluster-v2, https://arxiv.org/abs/2006.09882, and its released code. A
    memory holds the newest embeddings of the two global crops of each image; at the start of each epoch
    spherical k-means makes several sets of prototypes of it, alternately from the first and the second crops. No
    gradient moves them. All crops predict. One pass over the images fills the memory before training. BatchNorm is
    global.

    The memory is the same on every process: 1 kB per image with the defaults. It needs data modules that number their
    images: all of this package, except streams. An image that is not in the memory yet, because the last incomplete
    batch is left out, is assigned by its current embedding.

    Args:
        temperature: Divides the scores of the prediction.
        num_prototypes: Number of clusters K of a set.
        prototype_sets: How many times the images are clustered.
        kmeans_iterations: Iterations of k-means.
        hidden_dim: Width of the projector's hidden layer.
        projector_dim: Width of the embeddings.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "deepcluster_v2"
    remedies = "fewer prototypes than a tenth of the images, a lower learning rate, a temperature near 0.1"
    global_views = 2
    local_views = True
    batch_norm = "global"
    zero_init_residual = False
    shardable = False  # the memory is filled before the first step
    step_callbacks = (*SSLModule.step_callbacks, Clustering)
    prototypes: Tensor

    def __init__(
        self,
        temperature: float = 0.1,
        num_prototypes: int = 3000,
        prototype_sets: int = 3,
        kmeans_iterations: int = 10,
        hidden_dim: int = 2048,
        projector_dim: int = 128,
        optim: Optim = Optim(
            "larc",
            base_lr=0.3,
            weight_decay=1e-6,
            decay_norm_and_bias=True,
            warmup_start_factor=0.0625,
            warmup_inclusive=True,
            end_lr_factor=0.001,
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.temperature, self.kmeans_iterations = temperature, kmeans_iterations
        self.projector = mlp([self.embed_dim, hidden_dim, projector_dim], bias=True, last_bias=True)
        prototypes = F.normalize(torch.randn(prototype_sets, num_prototypes, projector_dim), dim=2)
        self.register_buffer("prototypes", prototypes)
        self.memory = Memory(2, projector_dim)
        # DistributedDataParallel would send them with every forward pass
        self._ddp_params_and_buffers_to_ignore = ["prototypes", "memory.rows"]

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropy of all crops with the image's cluster, mean over the sets of prototypes."""
        embeddings = self._embeddings(views)  # (V, B, projector_dim)
        scores = torch.einsum("vbd,hkd->hvbk", embeddings, self.prototypes.to(embeddings.dtype))
        of_global_crops = embeddings.detach()[:2].transpose(0, 1).to(self.memory.rows.dtype)  # (B, 2, projector_dim)
        loss = losses.deepcluster_v2(scores, self._clusters(of_global_crops), self.temperature)
        if self.image_indices is not None:
            self.defer(indices=self.image_indices, embeddings=of_global_crops)
        return loss

    def _embeddings(self, views: Sequence[Tensor]) -> Tensor:

        embeddings = F.normalize(self.projector(multi_crop(self.backbone, views)), dim=1)
        return embeddings.unflatten(0, (len(views), -1))

    @torch.no_grad()
    def _clusters(self, embeddings: Tensor) -> Tensor:
        """Clusters ``(H, B)`` of the images in each set, as of the start of the epoch.

        Args:
            embeddings: ``(B, 2, projector_dim)``, for images that the memory does not hold.
        """
        if self.image_indices is not None:
            remembered = self.memory.rows[self.image_indices]
            embeddings = torch.where(remembered.any(2, keepdim=True), remembered, embeddings)
        elif self._trainer is not None:
            raise UserError("DeepClusterV2 needs the index of each image; train on a data module of this package.")
        crops = torch.stack([embeddings[:, number % 2] for number in range(len(self.prototypes))])  # (H, B, ...)
        with torch.autocast(crops.device.type, enabled=False):
            return (crops @ self.prototypes.transpose(1, 2)).argmax(2)

    def update_teacher(self) -> None:
        """Let the embeddings of the step enter the memory."""
        for indices, embeddings in zip(self.deferred("indices"), self.deferred("embeddings"), strict=True):
            self.memory.write(gather(indices), gather(embeddings))

    def before_first_step(self) -> None:
        """Fill the memory, unless a checkpoint has done so."""
        if (images := self.train_images) is None:  # refused at the first batch
            return
        if len(self.memory.rows) == 0:
            self.memory.resize(len(images))
            self._fill()
        self.memory.check(len(images))

    @torch.no_grad()
    def _fill(self) -> None:
        """Embed the global crops of the first epoch."""
        trainer: Any = self.trainer
        for number, batch in enumerate(islice(trainer.train_dataloader, trainer.num_training_batches)):
            if getattr(batch, "indices", None) is None:  # refused at the first batch
                return
            batch = trainer.strategy.batch_to_device(batch)
            randomness = self.randomness.of_batch(self.global_step, number, len(batch[0][0]))
            with randomness, trainer.precision_plugin.train_step_context():
                embeddings = self._embeddings(batch[0][:2])  # (2, B, projector_dim)
            rows = embeddings.transpose(0, 1).to(self.memory.rows.dtype)
            self.memory.write(gather(batch.indices), gather(rows.contiguous()))

    @torch.no_grad()
    def cluster(self) -> None:
        """Make the prototypes of the epoch."""
        known = self.memory.known
        if len(known) == 0:
            return
        with self.randomness.of_batch(self.global_step, 0, 0):  # the same on every process
            for number, centroids in enumerate(self.prototypes):
                rows, clusters = known[:, number % 2], len(centroids)
                self.prototypes[number] = spherical_kmeans(rows, clusters, self.kmeans_iterations, self.generator)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the memory of the checkpoint."""
        if (rows := checkpoint["state_dict"].get("memory.rows")) is not None:
            self.memory.resize(len(rows))
        super().on_load_checkpoint(checkpoint)

    def check(self, sizes: list[int], global_batch: int) -> None:
        """The images must have indices, and there must be at least as many as prototypes."""
        super().check(sizes, global_batch)
        images, clusters = self.train_images, self.prototypes.shape[1]
        if images is None and getattr(self.trainer, "datamodule", None) is not None:
            raise UserError("DeepClusterV2 remembers every image, so it cannot train on a stream; choose other --data.")
        if images is not None and len(images) < clusters:
            raise UserError(f"{len(images)} images cannot form {clusters} clusters; lower --model.num_prototypes.")

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Share of the first set's prototypes that are nearest to a view."""
        embeddings = self._embeddings(views[:2]).flatten(0, 1)
        return {"prototypes_in_use": losses.share_in_use(embeddings.to(self.prototypes.dtype) @ self.prototypes[0].T)}

    @property
    def chance_loss(self) -> float:
        """The entropy ln K: every cluster is as likely."""
        return math.log(self.prototypes.shape[1])
