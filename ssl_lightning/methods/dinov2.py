"""DINOv2."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones.drop_path import even_drop_path
from ssl_lightning.backbones.names import is_vit, token_vit
from ssl_lightning.backbones.tokens import layer_scale, masked_tokens, multi_crop
from ssl_lightning.distributed import gather, own_part, reduced, world_size
from ssl_lightning.heads import DINOHead
from ssl_lightning.masks import block_mask, masked_patches
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim, clip_together, steps_per_epoch
from ssl_lightning.schedules import cosine, warmed_up


class DINOv2(SSLModule):
    """DINOv2: DINO on class tokens, iBOT on masked patches, and features spread evenly.

    Oquab et al. 2023, DINOv2: Learning Robust Visual Features without Supervision, https://arxiv.org/abs/2304.07193.
    For ViTs of timm, also those with registers, e.g. vit_small_patch14_reg4_dinov2. The probes read the teacher. The
    defaults are those of the released code's ViT-L/16 on ImageNet, whose base rate of 0.004 is that of a batch of 1,024
    and whose epoch has 1,250 steps. KoLeo looks for neighbours among the images of all processes, not of one, so that
    the number of processes does not matter.

    Args:
        num_prototypes: Number of outputs K of the head.
        separate_heads: Whether patches have a head of their own.
        patch_bottleneck_dim: Width of that head's bottleneck.
        centering: How the teacher's logits become distributions: minus a moving centre, or by Sinkhorn-Knopp.
        koleo_weight: Weight of the KoLeo regulariser of each global crop.
        mask_ratio: Smallest and largest share of patches to mask in a masked crop.
        masked_share: Share of the global crops of the batch that are masked.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.
        warmup_teacher_temperature: Teacher temperature of the first step.
        warmup_teacher_temperature_epochs: Epochs in which it rises linearly to its final value, step by step.
        momentum: Share of the teacher that stays at the first step; it rises to 1 along a cosine.
        center_momentum: Share of the centres that stays at each step.
        hidden_dim: Width of the heads' hidden layers.
        bottleneck_dim: Width of the head's bottleneck.
        freeze_last_layer: Epochs in which the prototypes stay as they are.
        clip_gradient: Largest norm of the gradient of the backbone, and of each head; 0 for none.
        drop_path: Stochastic depth of the student, the same for all blocks.
        layer_decay: Each block has this share of the learning rate of the next.
        patch_embed_lr: Further share of the learning rate that the patch projection has.
        backbone: Name of a ViT of timm.
        backbone_kwargs: Arguments of the backbone's builder; ``init_values``, the first LayerScale, is 1e-5.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "dinov2"
    remedies = "centering sinkhorn, a teacher temperature of 0.04 to 0.07 with its warm-up, a lower learning rate"
    global_views = 2
    local_views = True

    def __init__(
        self,
        num_prototypes: int = 65536,
        separate_heads: bool = False,
        patch_bottleneck_dim: int = 256,
        centering: Literal["moving", "sinkhorn"] = "moving",
        koleo_weight: float = 0.1,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        masked_share: float = 0.5,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_temperature_epochs: float = 30,
        momentum: float = 0.992,
        center_momentum: float = 0.9,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        freeze_last_layer: int = 1,
        clip_gradient: float = 3.0,
        drop_path: float = 0.3,
        layer_decay: float = 0.9,
        patch_embed_lr: float = 0.2,
        backbone: str = "vit_large_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim(
            "adamw",
            base_lr=0.004 / 32,
            lr_scaling="sqrt",
            weight_decay=0.04,
            end_weight_decay=0.4,
            warmup_inclusive=True,
            end_lr_factor=1.8e-4,
        ),
        **kwargs: Any,
    ) -> None:

        if is_vit(backbone):
            backbone_kwargs = {"init_values": 1e-5, **(backbone_kwargs or {})}
        super().__init__(backbone, backbone_kwargs, optim, **kwargs)
        vit = token_vit("DINOv2", backbone, self.backbone, class_token=True)
        even_drop_path(vit, drop_path)
        self.prefix, self.patch_side = vit.num_prefix_tokens, vit.patch_side
        self.centering, self.koleo_weight = centering, koleo_weight
        self.mask_ratio, self.masked_share = mask_ratio, masked_share
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.warmup_teacher_temperature = warmup_teacher_temperature
        self.warmup_teacher_temperature_epochs = warmup_teacher_temperature_epochs
        self.momentum, self.center_momentum = momentum, center_momentum
        self.freeze_last_layer, self.clip_gradient = freeze_last_layer, clip_gradient
        self.layer_decay, self.patch_embed_lr = layer_decay, patch_embed_lr
        self.mask_token = nn.Parameter(torch.zeros(1, self.embed_dim))
        self.projector = DINOHead(self.embed_dim, hidden_dim, bottleneck_dim, num_prototypes, norm_last_layer=False)
        if separate_heads:
            self.patch_projector = DINOHead(self.embed_dim, hidden_dim, patch_bottleneck_dim, num_prototypes, False)
        self.teacher_backbone = ema.teacher_of(self.backbone).eval()
        self.teacher_projector = ema.teacher_of(self.projector).eval()
        if separate_heads:
            self.teacher_patch_projector = ema.teacher_of(self.patch_projector).eval()
        self.center: Tensor
        self.patch_center: Tensor
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("patch_center", torch.zeros(num_prototypes))

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The teacher."""
        return self.teacher_backbone

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of student and teacher."""
        return [self.backbone.blocks, self.teacher_backbone.blocks]  # type: ignore[list-item]

    def train(self, mode: bool = True) -> "DINOv2":
        """Set the mode of all but the teacher, which stays in eval mode."""
        super().train(mode)
        for name, part in self.named_children():
            if name.startswith("teacher_"):
                part.eval()
        return self

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropies of class tokens and of masked patches, and KoLeo (section 4)."""
        return self.distillation(views)[0]

    def distillation(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, and the student's patch tokens ``(2B, N, embed_dim)`` of the masked global crops.

        Args:
            views: As for ``training_loss``.
        """
        crops = torch.cat(list(views[:2]))  # (2B, 3, S, S)
        mask = self._masks(crops)  # (2B, N), on the CPU
        masked, counts = (self.random_to_device(part) for part in masked_patches(mask))  # (M,)
        with torch.no_grad():
            teacher, teacher_patches = self._teacher_logits(crops, masked)  # (2B, K), (M, K)
            assignments = self._assigned(teacher, self.center).unflatten(0, (2, -1))  # (2, B, K)
            patch_assignments = self._assigned(teacher_patches, self.patch_center, uneven=True)
        if self.centering == "moving":
            sums = torch.cat([teacher.mean(0), teacher_patches.sum(0), teacher.new_tensor([len(masked)])])
            self._pending.append(sums.to(self.center.dtype))

        tokens = masked_tokens(self.backbone, crops, self.random_to_device(mask), self.mask_token)
        features = self.backbone.forward_head(tokens)  # type: ignore[operator] # (2B, embed_dim)
        patches = tokens[:, self.prefix :]  # (2B, N, embed_dim)
        student = self.projector(features)
        if len(views) > 2:
            student = torch.cat([student, self.projector(multi_crop(self.backbone, views[2:]))])  # (V * B, K)
        head = getattr(self, "patch_projector", self.projector)
        student_patches = head(patches.flatten(0, 1)[masked])  # (M, K)

        # The mean over all pairs of a global crop and another crop is what SwAV's loss is.
        loss = losses.swav(student.unflatten(0, (len(views), -1)), assignments, self.student_temperature)
        loss = loss + losses.ibot(student_patches, patch_assignments, counts, self.student_temperature)
        for of_view in features.chunk(2) if self.koleo_weight > 0 else ():
            loss = loss + self.koleo_weight * losses.koleo(gather(of_view))
        return loss, patches

    def _teacher_logits(self, crops: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(2B, K)`` of class tokens and ``(M, K)`` of masked patches."""
        tokens = self.teacher_backbone.forward_features(crops)  # type: ignore[operator] # (2B, prefix + N, embed_dim)
        features = self.teacher_backbone.forward_head(tokens)  # type: ignore[operator]
        self.record(features)
        patches = tokens[:, self.prefix :].flatten(0, 1)[masked]  # (M, embed_dim)
        head = getattr(self, "teacher_patch_projector", self.teacher_projector)
        return self.teacher_projector(features), head(patches)

    def _assigned(self, logits: Tensor, center: Tensor, uneven: bool = False) -> Tensor:
        """Distributions over prototypes, rows as in the logits."""
        temperature = self.current_teacher_temperature
        if self.centering == "sinkhorn":
            return losses.sinkhorn(logits, temperature, 3, uneven)
        return ((logits.to(center.dtype) - center) / temperature).softmax(-1)

    def _masks(self, crops: Tensor) -> Tensor:
        """Masks ``(2B, N)`` on the CPU, true where masked; the share of masked crops is exact over all processes."""
        rows, columns = (side // self.patch_side for side in crops.shape[2:])
        everywhere = len(crops) * world_size()
        bins = torch.linspace(*self.mask_ratio, int(everywhere * self.masked_share) + 1)
        ratios = bins[:-1] + torch.rand(len(bins) - 1, generator=self.generator) * bins.diff()  # one of each bin
        ratios = torch.cat([ratios, ratios.new_zeros(everywhere - len(ratios))])
        ratios = ratios[torch.randperm(everywhere, generator=self.generator)]
        masks = [
            block_mask((rows, columns), int(ratio * rows * columns), 4, rows * columns // 2, seed)
            for of_view in ratios.chunk(2)
            for ratio, seed in zip(own_part(of_view).tolist(), self.seeds_of_images(len(crops) // 2), strict=True)
        ]
        return torch.stack(masks).flatten(1)

    @property
    def current_teacher_temperature(self) -> float:
        """Teacher temperature of this step."""
        epoch = 1.0 if self._trainer is None else steps_per_epoch(self.trainer)
        return warmed_up(
            self.warmup_teacher_temperature,
            self.teacher_temperature,
            self.global_step,
            self.warmup_teacher_temperature_epochs * epoch,
        )

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a cosine."""
        return cosine(self.momentum, 1.0, progress)

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the step just taken, and the centres by the teacher's mean logits."""
        momentum = self.teacher_momentum(self.progress)
        for name, part in self.named_children():
            if name.startswith("teacher_"):
                ema.follow(part, getattr(self, name.removeprefix("teacher_")), momentum)
        if pending := self._take_pending():
            prototypes = len(self.center)
            ema.follow_mean(self.center, [sums[:prototypes] for sums in pending], self.center_momentum)
            of_patches = reduced(torch.stack([sums[prototypes:] for sums in pending]).sum(0))
            self.patch_center.lerp_(of_patches[:-1] / of_patches[-1].clamp(min=1), 1 - self.center_momentum)

    def configure_optimizers(self) -> Any:
        """The schedule of ``self.optim``, with a learning rate for each layer."""
        return self.optim.configure(self, lambda batch: self.optim.create(self, batch, self.lr_scale))

    def lr_scale(self, name: str) -> float:
        """Share of the learning rate that a parameter has.

        Args:
            name: Of the parameter.
        """
        blocks = len(self.backbone.blocks)  # type: ignore[arg-type]
        name = name.removeprefix("backbone.")
        further = self.patch_embed_lr if name.startswith("patch_embed") else 1.0
        return further * layer_scale(name, blocks, self.layer_decay)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient of backbone and heads, each on its own, then drop those of frozen prototypes."""
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        heads = [part for part in self.children() if isinstance(part, DINOHead) and part.training]
        for parameters in ([*self.backbone.parameters(), self.mask_token], *(head.parameters() for head in heads)):
            clip_together(parameters, self.clip_gradient)
        for head in heads if self.current_epoch < self.freeze_last_layer else ():
            head.drop_prototype_gradients()

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Entropies of the teacher's assignments, of views and of patches, and the share of prototypes in use."""
        crops = torch.cat(list(views[:2]))
        patches = len(crops) * crops[0, 0].numel() // self.patch_side**2
        logits, of_patches = self._teacher_logits(crops, torch.arange(patches, device=crops.device))
        assignments = self._assigned(logits, self.center)  # (2B, K)
        return {
            "teacher_entropy": losses.entropy(assignments),
            "patch_entropy": losses.entropy(self._assigned(of_patches, self.patch_center)),
            "prototypes_in_use": losses.share_in_use(assignments),
        }

    @property
    def chance_loss(self) -> float:
        """Every prototype is as likely: ln K of views, and of the patches of masked crops; KoLeo's share left out."""
        return (1 + self.masked_share) * math.log(len(self.center))
