"""DINOv2."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones.drop_path import even_drop_path
from ssl_lightning.backbones.names import Backbone, token_vit, vit_defaults
from ssl_lightning.backbones.tokens import ViT, called_blocks, grid_of, masked_tokens, multi_crop, patch_tokens
from ssl_lightning.distributed import gather, reduced
from ssl_lightning.errors import UserError
from ssl_lightning.heads import DINOHead
from ssl_lightning.masks import checked_crop_masks, global_crop_masks, masked_patches
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim, by_layer, clip_parts, steps_per_epoch
from ssl_lightning.schedules import Warmup, cosine


class DINOv2(SSLModule):
    """DINOv2: DINO on class tokens, iBOT on masked patches, and features spread evenly.

    Oquab et al. 2023, Learning Robust Visual Features without Supervision, https://arxiv.org/abs/2304.07193. For ViTs
    of timm. The probes read the teacher. Defaults: the released code's ViT-L/16, whose epoch has 1,250 steps; it drops
    paths of an exact share of the batch, we by chance.

    Args:
        num_prototypes: Number of outputs K of the head.
        separate_heads: Whether patches have a separate head.
        patch_bottleneck_dim: Width of the bottleneck of the patches' separate head.
        centering: How the teacher's logits become distributions: softmax around a moving center, or Sinkhorn-Knopp.
        koleo_weight: Weight of the KoLeo regularizer of each global crop; neighbors come from all processes.
        mask_ratio: Smallest and largest share of patches to mask in a masked crop.
        masked_share: Share of the batch's global crops that are masked.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.
        warmup_teacher_temperature: Teacher temperature of the first step.
        warmup_teacher_temperature_epochs: Epochs in which it rises linearly, step by step, to ``teacher_temperature``.
        momentum: Share of the teacher that stays at the first step; it rises to 1 along a cosine.
        center_momentum: Share of the centers that stays at each step.
        hidden_dim: Width of the heads' hidden layers.
        bottleneck_dim: Width of the head's bottleneck.
        freeze_last_layer: Number of epochs at the start in which the prototypes have a learning rate of 0.
        clip_gradient: Largest gradient norm of the backbone and of each head, clipped separately; 0 for no clipping.
        drop_path: Stochastic depth of the student, the same for all blocks.
        layer_decay: Learning rate of each block, as a share of the next block's learning rate.
        patch_embed_lr: Further multiplier of the learning rate of the patch projection.
        backbone: Name of a ViT of timm, e.g. vit_small_patch14_reg4_dinov2.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 32, patch_size: 4}``.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views, global_views, local_views = "dinov2", 2, True
    batch_norm = "global"
    remedies = "centering sinkhorn, a teacher temperature of 0.04 to 0.07 with its warm-up, a lower learning rate"
    backbone: ViT
    teacher_backbone: ViT

    def __init__(
        self,
        num_prototypes: int = 65536, separate_heads: bool = False, patch_bottleneck_dim: int = 256,
        centering: Literal["moving", "sinkhorn"] = "moving", koleo_weight: float = 0.1,
        mask_ratio: tuple[float, float] = (0.1, 0.5), masked_share: float = 0.5,
        student_temperature: float = 0.1, teacher_temperature: float = 0.07, warmup_teacher_temperature: float = 0.04,
        warmup_teacher_temperature_epochs: float = 30, momentum: float = 0.992, center_momentum: float = 0.9,
        hidden_dim: int = 2048, bottleneck_dim: int = 256, freeze_last_layer: int = 1, clip_gradient: float = 3.0,
        drop_path: float = 0.3, layer_decay: float = 0.9, patch_embed_lr: float = 0.2,
        backbone: Backbone = "vit_large_patch16_224", backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim("adamw", 0.004 / 32, lr_scaling="sqrt", weight_decay=0.04, end_weight_decay=0.4,
                             warmup_inclusive=True, end_lr_factor=1.8e-4), **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(backbone, vit_defaults(backbone, backbone_kwargs, init_values=1e-5), optim, **kwargs)
        even_drop_path(token_vit("DINOv2", backbone, self.backbone, tokens="class"), drop_path)
        checked_crop_masks(mask_ratio, masked_share)
        self.centering, self.koleo_weight = centering, koleo_weight
        self.mask_ratio, self.masked_share, self.student_temperature = mask_ratio, masked_share, student_temperature
        self.temperatures = Warmup(warmup_teacher_temperature, teacher_temperature, warmup_teacher_temperature_epochs)
        self.momentum, self.center_momentum, self.clip_gradient = momentum, center_momentum, clip_gradient
        self.freeze_last_layer, self.layer_decay, self.patch_embed_lr = freeze_last_layer, layer_decay, patch_embed_lr
        self.mask_token = nn.Parameter(torch.zeros(1, self.embed_dim))
        self.projector = DINOHead(self.embed_dim, hidden_dim, bottleneck_dim, num_prototypes, norm_last_layer=False)
        if separate_heads:
            self.patch_projector = DINOHead(self.embed_dim, hidden_dim, patch_bottleneck_dim, num_prototypes, False)
        self.teacher_backbone, self.teacher_projector = ema.teacher_of(self.backbone), ema.teacher_of(self.projector)
        if separate_heads:
            self.teacher_patch_projector = ema.teacher_of(self.patch_projector)
        self.center, self.patch_center = (nn.Buffer(torch.zeros(num_prototypes)) for _ in range(2))
        self.train()  # except the teachers

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropies of class tokens and of masked patches, and KoLeo (section 4)."""
        return self.distillation(views)[0]

    def distillation(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, and the student's patch tokens ``(2B, N, embed_dim)`` of the masked global crops.

        Args:
            views: As for ``training_loss``.
        """
        crops = torch.cat(list(views[:2]))  # (2B, 3, S, S)
        mask = self.draw_masks(crops)  # (2B, N), on the CPU
        masked, counts = (self.random_to_device(part) for part in masked_patches(mask))  # (M,)
        with torch.no_grad():
            teacher, teacher_patches = self._teacher_logits(crops, masked)  # (2B, K), (M, K)
            targets = self._targets(teacher, self.center).unflatten(0, (2, -1))  # (2, B, K)
            patch_targets = self._targets(teacher_patches, self.patch_center, uneven=True)  # (M, K)
        if self.centering == "moving":
            patch_sums = torch.cat([teacher_patches.sum(0), teacher_patches.new_full((1,), len(masked))])
            self.defer(means=teacher.mean(0).to(self.center.dtype), patch_sums=patch_sums.to(self.center.dtype))

        tokens = masked_tokens(self.backbone, crops, self.random_to_device(mask), self.mask_token)
        features = self.backbone.forward_head(tokens)  # (2B, D)
        patches = patch_tokens(self.backbone, tokens)  # (2B, N, D)
        student = self.projector(features)
        if len(views) > 2:
            student = torch.cat([student, self.projector(multi_crop(self.backbone, views[2:]))])  # (V * B, K)
        student_patches = getattr(self, "patch_projector", self.projector)(patches.flatten(0, 1)[masked])  # (M, K)

        loss = losses.cross_view(student.unflatten(0, (len(views), -1)), targets, self.student_temperature)
        loss = loss + losses.ibot(student_patches, patch_targets, counts, self.student_temperature)
        for view in features.chunk(2) if self.koleo_weight > 0 else ():
            loss = loss + self.koleo_weight * losses.koleo(gather(view))
        return loss, patches

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the step just taken, and the centers by the teacher's mean logits."""
        for prototypes, before in zip(self._prototypes(), self.deferred("frozen"), strict=False):
            prototypes.detach().copy_(before)
        ema.follow_all(self, self.teacher_momentum(self.progress))
        ema.follow_mean(self.center, self.deferred("means"), self.center_momentum)
        if sums := self.deferred("patch_sums"):  # means over all masked patches, whose number differs by process
            total = reduced(torch.stack(sums).sum(0))
            self.patch_center.lerp_(total[:-1] / total[-1].clamp(min=1), 1 - self.center_momentum)

    def edit_gradients(self) -> None:
        """Clip the gradient of backbone and heads, each on its own, and note frozen prototypes.

        ``update_teacher`` puts them back. In effect their learning rate is 0, as in the released code: unlike DINO's,
        their gradients enter the moments of Adam.
        """
        heads = [part for part in self.children() if isinstance(part, DINOHead) and part.training]
        body = [*self.backbone.parameters(), self.mask_token]
        clip_parts([body, *(head.parameters() for head in heads)], self.clip_gradient)
        for prototypes in self._prototypes() if self.current_epoch < self.freeze_last_layer else ():
            self.defer(frozen=prototypes.detach().clone())

    def _prototypes(self) -> list[nn.Parameter]:
        """Directions and norms of the student's prototypes."""
        heads = [part for part in self.children() if isinstance(part, DINOHead) and part.training]
        return [parameter for head in heads for parameter in (head.prototypes, head.prototype_norms)]

    def _teacher_logits(self, crops: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(2B, K)`` of class tokens and ``(M, K)`` of masked patches."""
        tokens = self.teacher_backbone.forward_features(crops)  # (2B, prefix + N, embed_dim)
        features = self.teacher_backbone.forward_head(tokens)
        self.record(features)
        patch_head = getattr(self, "teacher_patch_projector", self.teacher_projector)
        return self.teacher_projector(features), patch_head(patch_tokens(self.backbone, tokens).flatten(0, 1)[masked])

    def _targets(self, logits: Tensor, center: Tensor, uneven: bool = False) -> Tensor:
        """Distributions over prototypes, rows as in the logits."""
        temperature = self.current_teacher_temperature
        if self.centering == "sinkhorn":
            return losses.sinkhorn(logits, temperature, 3, uneven)
        return ((logits.to(center.dtype) - center) / temperature).softmax(-1)

    def draw_masks(self, crops: Tensor) -> Tensor:
        """Masks ``(2B, N)`` on the CPU, true where masked; the share of masked crops is exact over all processes.

        Args:
            crops: ``(2B, 3, S, S)``.
        """
        rows, columns = grid_of(self.backbone, crops)
        images = len(crops) // 2
        return global_crop_masks((rows, columns), images, self.mask_ratio, self.masked_share, self.generator)

    @property
    def current_teacher_temperature(self) -> float:
        """Teacher temperature of this step."""
        warmup = self.temperatures  # in epochs
        epoch = 1.0 if self._trainer is None else steps_per_epoch(self.trainer)
        return Warmup(warmup.start, warmup.end, warmup.length * epoch if warmup.length else 0.0)(self.global_step)

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a cosine."""
        return cosine(self.momentum, 1.0, progress)

    def configure_optimizers(self) -> Any:
        """The schedule of ``self.optim``, with a learning rate for each layer."""
        configured = self.optim.configure(self, lr_scale=by_layer(self))
        if self.temperatures.length and steps_per_epoch(self.trainer) == math.inf:
            raise UserError(
                "the loader has no length to count epochs by; set --model.warmup_teacher_temperature_epochs to 0."
            )
        return configured

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The teacher."""
        return self.teacher_backbone

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of student and teacher."""
        return [*called_blocks(self.backbone), *called_blocks(self.teacher_backbone)]

    def train(self, mode: bool = True) -> "DINOv2":
        """Set the mode of all but the teacher, which stays in eval mode, except its BatchNorm if it has any."""
        super().train(mode)
        ema.evaluate_teachers(self)
        return self

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Entropies of the teacher's assignments, of views and of patches, and the share of prototypes in use."""
        crops = torch.cat(list(views[:2]))
        patches = len(crops) * math.prod(grid_of(self.backbone, crops))
        logits, patch_logits = self._teacher_logits(crops, torch.arange(patches, device=crops.device))
        assignments = self._targets(logits, self.center)  # (2B, K)
        return {
            "teacher_entropy": losses.entropy(assignments),
            "patch_entropy": losses.entropy(self._targets(patch_logits, self.patch_center)),
            "prototypes_in_use": losses.share_in_use(assignments),
        }

    @property
    def chance_loss(self) -> float:
        """Every prototype is as likely: ln K of views, and of the patches of masked crops; without KoLeo."""
        return (1 + self.masked_share) * math.log(len(self.center))
