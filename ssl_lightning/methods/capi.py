"""CAPI."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones import initialization
from ssl_lightning.backbones.drop_path import even_drop_path
from ssl_lightning.backbones.names import Backbone, token_vit, vit_defaults
from ssl_lightning.backbones.predictor import CrossPredictor
from ssl_lightning.backbones.rotary import ReleasedCAPI
from ssl_lightning.backbones.tokens import (
    ViT,
    called_blocks,
    grid_of,
    number_of_patches,
    patch_tokens,
    sincos_positions,
)
from ssl_lightning.errors import UserError
from ssl_lightning.heads import PrototypeHead
from ssl_lightning.masks import checked_ratio, inverse_block_mask, taken
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim, steps_per_epoch
from ssl_lightning.schedules import truncated_cosine


class CAPI(SSLModule):
    """CAPI: predict, at masked positions, which cluster the teacher's patch belongs to.

    Darcet et al. 2025, Cluster and Predict Latent Patches for Improved Masked Image Modeling,
    https://arxiv.org/abs/2502.08769. For ViTs of timm, built as the authors' without a class token: registers, RMSNorm,
    no biases. Positions are fixed sine-cosine ones, where the authors rotate queries and keys. The clusters follow the
    teacher's patches with a learning rate and a decay of their own. The probes read the mean of the teacher's patches.
    Defaults: the released ViT-L/14, at a batch of 16,384 and 500,000 steps of which a tenth is warm-up.

    Args:
        num_prototypes: Number of clusters K; at most about twice the global batch, which each position is spread over.
        mask_ratio: Share of patches that are masked: all but a block.
        predicted_share: Share of the masked patches that are predicted.
        target_temperature: Divides the clusters' scores before they become assignments.
        temperature: Divides the scores of the clusters and of the student in their losses.
        sinkhorn_iterations: Iterations of Sinkhorn-Knopp, at each position over all processes.
        clustering_lr: Learning rate of the clusters after warm-up; it follows the schedule of ``optim``, not its scale.
        clustering_weight_decay: Weight decay of the clusters.
        predictor_depth: Blocks of the predictor, which is as wide as the backbone and has as many heads.
        momentum: Share of the teacher that stays at the end of the warm-up, before and after which it is nearer to 1.
        drop_path: Stochastic depth of the student, the same for all blocks.
        norm_weight_decay: Weight decay of the norms' weights, as a share of the decay of all others.
        patch_embed_lr: Multiplier of the learning rate of the patch projection.
        backbone: Name of a ViT of timm.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 32, patch_size: 4, reg_tokens: 4}``.
        optim: Optimizer and learning-rate schedule; also the optimizer of the clusters.
        kwargs: See SSLModule.
    """

    views, global_views, collapsed_loss = "capi", 1, 0.0
    remedies = "fewer prototypes than images in the batch, a longer warm-up, a momentum nearer to 1"
    backbone: ViT
    teacher_backbone: ViT

    def __init__(
        self,
        num_prototypes: int = 16384, mask_ratio: float = 0.65, predicted_share: float = 0.05,
        target_temperature: float = 0.06, temperature: float = 0.12, sinkhorn_iterations: int = 3,
        clustering_lr: float = 5e-4, clustering_weight_decay: float = 0.01, predictor_depth: int = 12,
        momentum: float = 0.999, drop_path: float = 0.2, norm_weight_decay: float = 0.1, patch_embed_lr: float = 0.2,
        backbone: Backbone = "vit_large_patch14_224", backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim("adamw", 1e-3, lr_scaling="none", weight_decay=0.1, warmup_epochs=10,
                             warmup_inclusive=True, cosine_share=0.8, extra={"betas": (0.9, 0.95)}),
        **kwargs: Any,
    ) -> None:  # fmt: skip
        plain = {"qkv_bias": False, "proj_bias": False, "norm_layer": "rmsnorm", "reg_tokens": 16}
        pooled = {"class_token": False, "global_pool": "avg", "fc_norm": False, "no_embed_class": True}
        super().__init__(backbone, vit_defaults(backbone, backbone_kwargs, **plain, **pooled), optim, **kwargs)
        vit = token_vit("CAPI", backbone, self.backbone, tokens="patches")
        if self.continued is not None:
            raise UserError("CAPI has no --model.continued; leave it out: --model.init_from begins with other weights.")
        unset = Optim()
        for name in ("decay_norm_and_bias", "norm_and_bias_lr_scale", "part_lr_scale", "constant_lr"):
            if getattr(self.optim, name) != getattr(unset, name):
                raise UserError(
                    f"CAPI has no --model.optim.{name}; use --model.norm_weight_decay, --model.patch_embed_lr and "
                    "--model.clustering_lr."
                )
        self.target_temperature, self.temperature = target_temperature, temperature
        self.mask_ratio, self.predicted_share = checked_ratio(mask_ratio), predicted_share
        self.sinkhorn_iterations, self.momentum = sinkhorn_iterations, momentum
        self.clustering_lr, self.clustering_weight_decay = clustering_lr, clustering_weight_decay
        self.norm_weight_decay, self.patch_embed_lr = norm_weight_decay, patch_embed_lr
        if not self.pretrained:
            initialization.capi(vit)
            vit.norm.requires_grad_(False)  # the last norm only normalizes
        even_drop_path(vit, drop_path)
        attention: Any = getattr(vit.blocks[0], "attn", None)
        heads = getattr(attention, "num_heads", None) or math.gcd(self.embed_dim, 12)
        self.predictor = CrossPredictor(self.embed_dim, predictor_depth, heads, drop_path, self.checkpoint_blocks)
        self.predictor.apply(initialization.xavier_linear)
        self.projector = PrototypeHead(self.embed_dim, num_prototypes)
        self.teacher_backbone, self.teacher_predictor = ema.teacher_of(vit), ema.teacher_of(self.predictor)
        self.teacher_projector = ema.teacher_of(self.projector)
        self.clusters = nn.Linear(self.embed_dim, num_prototypes)
        nn.init.normal_(self.clusters.weight)
        nn.init.zeros_(self.clusters.bias)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropy of the student at the predicted patches (section 3).

        The clusters' own loss adds its gradient, not its value. Each of the two reaches weights of its own, and AdamW
        steps per parameter: this is the same as two optimizers.
        """
        prediction, clustering, _ = self._parts(views[0])
        return prediction + (clustering - clustering.detach())

    def _parts(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of the student and of the clusters, and the assignments ``(N, B, K)``."""
        visible, predicted = self.draw_patches(images)  # (B, V), (B, M)
        with torch.no_grad():
            patches = self._teacher_patches(images)  # (B, N, embed_dim)
        scores = self.clusters(F.normalize(patches, dim=-1, eps=1e-7).transpose(0, 1))  # (N, B, K)
        assignments = losses.positionwise_sinkhorn(scores, self.target_temperature, self.sinkhorn_iterations)
        clustering = losses.capi(scores, assignments, self.temperature)

        predictions = self.projector(self.predict(images, visible, predicted))  # (B, M, K)
        targets = taken(assignments.transpose(0, 1), predicted)
        return losses.capi(predictions, targets, self.temperature), clustering, assignments

    def predict(self, images: Tensor, visible: Tensor, predicted: Tensor) -> Tensor:
        """Predictions ``(B, M, embed_dim)`` of some patches from others.

        Args:
            images: ``(B, 3, S, S)``.
            visible: Indices ``(B, V)`` of the patches that the student sees.
            predicted: Indices ``(B, M)`` of the patches to predict.
        """
        positions = self._positions(images).expand(len(images), -1, -1)  # (B, N, embed_dim)
        return self.predictor(self.backbone.encode(images, visible), taken(positions, predicted))

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the step just taken; the clusters are no part of it."""
        ema.follow_all(self, self.teacher_momentum(self.progress))

    def _teacher_patches(self, images: Tensor) -> Tensor:
        """Tokens ``(B, N, embed_dim)`` of all patches after the last norm."""
        tokens = self.teacher_backbone.forward_features(images)
        self.record(self.teacher_backbone.forward_head(tokens))
        return patch_tokens(self.backbone, tokens)

    def global_features(self, images: Tensor) -> Tensor:
        """The paper's other features ``(B, embed_dim)``: what the teacher's first predictor block says of all patches.

        Args:
            images: ``(B, 3, S, S)``.
        """
        positions = self._positions(images).expand(len(images), -1, -1)
        return self.teacher_predictor(self.teacher_backbone.forward_features(images), positions, depth=1).mean(1)

    def _positions(self, images: Tensor) -> Tensor:
        """Positions ``(1, N, embed_dim)`` of the mask tokens."""
        grid = grid_of(self.backbone, images)
        return sincos_positions(self.embed_dim, grid, rows_first=False, device=images.device)[:, 1:]

    def draw_patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Indices ``(B, V)`` of the visible patches and ``(B, M)`` of the masked patches to predict.

        Args:
            images: ``(B, 3, S, S)``.
        """
        grid = grid_of(self.backbone, images)
        count = int(math.prod(grid) * self.mask_ratio)
        masks = [inverse_block_mask(grid, count, seed).flatten() for seed in self.seeds_of_images(len(images))]
        order = torch.stack(masks).int().argsort(dim=1, stable=True)  # (B, N): visible, then masked
        visible, masked = order[:, : order.shape[1] - count], order[:, order.shape[1] - count :]
        chosen = self.uniform(len(images), count).argsort(1)[:, : max(1, int(count * self.predicted_share))]
        return self.random_to_device(visible), self.random_to_device(masked.gather(1, chosen))

    def configure_optimizers(self) -> Any:
        """The schedule of ``self.optim``, for the clusters with a learning rate of their own."""
        return self.optim.configure(self, self.create_optimizer)

    def create_optimizer(self, global_batch: int) -> torch.optim.Optimizer:
        """One optimizer: each group of parameters has its learning rate and decay, the clusters come last.

        Args:
            global_batch: Images per optimizer step over all processes and accumulated batches.
        """
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, p in self.named_parameters():
            if p.requires_grad and not name.startswith("clusters."):
                decay = 0.0 if name.endswith("bias") else 1.0 if p.ndim > 1 else self.norm_weight_decay
                lr_scale = self.patch_embed_lr if name.startswith("backbone.patch_embed") else 1.0
                groups.setdefault((lr_scale, decay), []).append(p)
        parts: list[dict[str, Any]] = [
            {"params": params, "lr_scale": lr_scale, "decay_scale": decay, "decayed": decay > 0,
             "weight_decay": decay * self.optim.weight_decay}
            for (lr_scale, decay), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        ]  # fmt: skip
        clusters = {"params": [*self.clusters.parameters()], "weight_decay": self.clustering_weight_decay}
        optimizer = self.optim.build([*parts, {**clusters, "decayed": False}], global_batch)
        optimizer.param_groups[-1]["lr"] = self.clustering_lr
        return optimizer

    def teacher_momentum(self, progress: float) -> float:
        """Falls from 1 during the warm-up, then rises towards 1: the student's learning rate upside down."""
        steps = 1 if self._trainer is None else self.trainer.estimated_stepping_batches
        if self._trainer is None or not 0 < steps < float("inf"):
            return self.momentum
        warmup = self.optim.warmup_steps(steps, steps_per_epoch(self.trainer))
        step = round(progress * steps)
        return truncated_cosine(step, steps, self.momentum, 1.0, warmup, start=1.0, share=0.8)

    def check(self, sizes: list[int], global_batch: int) -> None:
        """At least one patch must be masked; warn if the images of a batch cannot fill the clusters."""
        super().check(sizes, global_batch)
        patches = number_of_patches(self.backbone, sizes[0])
        if patches * self.mask_ratio < 1:
            raise UserError(f"--model.mask_ratio={self.mask_ratio} masks none of {patches} patches; set it higher.")
        if (clusters := self.clusters.out_features) > 2 * global_batch:
            rank_zero_warn(
                f"CAPI spreads {global_batch} images over {clusters} clusters at each position, so every image belongs "
                f"to several; set --model.num_prototypes to at most {2 * global_batch}."
            )

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The teacher."""
        return self.teacher_backbone

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of student, teacher and predictor."""
        return [*called_blocks(self.backbone), *called_blocks(self.teacher_backbone), *self.predictor.blocks]

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Both losses, the entropy of the assignments, at most ln K, and the share of clusters in use."""
        prediction, clustering, assignments = self._parts(views[0])
        assignments = assignments.flatten(0, 1)  # (N * B, K)
        return {
            "masked_patch_error": prediction,
            "clustering_error": clustering,
            "patch_entropy": losses.entropy(assignments),
            "prototypes_in_use": losses.share_in_use(assignments),
        }

    @property
    def chance_loss(self) -> float:
        """Every cluster is as likely: ln K."""
        return math.log(self.clusters.out_features)


def released_network(state: Mapping[str, Tensor], patch_size: int, num_heads: int) -> ReleasedCAPI:
    """The authors' network with their weights, e.g. for features of the released ViT-L/14.

    Args:
        state: What their files hold; names may begin with ``backbone.``.
        patch_size: Side of the patches in pixels; 14 of the released weights.
        num_heads: Attention heads; 16 of the released weights.
    """
    weights = {name.removeprefix("backbone."): weight for name, weight in state.items()}
    return ReleasedCAPI(weights, patch_size, num_heads)
