"""SimDINOv2."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones.drop_path import even_drop_path
from ssl_lightning.backbones.names import Backbone, token_vit, vit_defaults
from ssl_lightning.backbones.tokens import ViT, called_blocks, grid_of, masked_tokens, multi_crop, patch_tokens
from ssl_lightning.distributed import world_size
from ssl_lightning.heads import gelu_mlp
from ssl_lightning.masks import checked_crop_masks, global_crop_masks, masked_patches
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim, by_layer, clip_parts
from ssl_lightning.schedules import cosine


class SimDINOv2(SSLModule):
    """SimDINOv2: DINOv2 without prototypes, centers and temperatures; the coding rate of the batch prevents collapse.

    Wu et al. 2025, Simplifying DINO via Coding Rate Regularization, https://arxiv.org/abs/2502.10385. For ViTs of timm.
    Class tokens follow SimDINO, masked patches the teacher's patches by their cosine, all through the same head. The
    probes read the teacher. The coding rate covers the images of all processes; see SimDINO for what the released code
    does. Defaults: the released ViT-L/16. A ViT of timm gets its four registers, unless ``backbone_kwargs`` states
    ``reg_tokens`` or ``pretrained``.

    Args:
        epsilon: Precision of the coding rate; smaller values push outputs apart more.
        coefficient: Weight of the cosine between the views of an image; the coding rate and the patches have weight 1.
        smooth: Whether the coding rate is taken of the mean of student and teacher, instead of the student.
        mask_ratio: Smallest and largest share of patches to mask in a masked crop.
        masked_share: Share of the batch's global crops that are masked.
        momentum: Share of the teacher that stays at the first step; it rises to 1 along a cosine.
        hidden_dim: Width of the projector's two hidden layers.
        projector_dim: Width D of the outputs; no more than the images of the batch, or not all directions can be used.
        clip_gradient: Largest gradient norm of the backbone and of the head, clipped separately; 0 for no clipping.
        drop_path: Stochastic depth of the student, the same for all blocks.
        layer_decay: Learning rate of each block, as a share of the next block's learning rate.
        patch_embed_lr: Further multiplier of the learning rate of the patch projection.
        backbone: Name of a ViT of timm, e.g. vit_small_patch14_reg4_dinov2.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 32, patch_size: 4}``.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views, global_views, local_views = "simdinov2", 2, True
    batch_norm = "global"
    remedies = "a smaller epsilon, smooth on, a batch larger than projector_dim, a lower learning rate"
    backbone: ViT
    teacher_backbone: ViT

    def __init__(
        self,
        epsilon: float = 0.05,
        coefficient: float = 1.0,
        smooth: bool = True,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        masked_share: float = 0.5,
        momentum: float = 0.9,
        hidden_dim: int = 2048,
        projector_dim: int = 256,
        clip_gradient: float = 3.0,
        drop_path: float = 0.2,
        layer_decay: float = 0.9,
        patch_embed_lr: float = 0.2,
        backbone: Backbone = "vit_large_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim(
            "adamw",
            base_lr=0.004 / 32,
            lr_scaling="sqrt",
            weight_decay=0.04,
            end_weight_decay=0.4,
            warmup_inclusive=True,
            end_lr_factor=2.5e-4,
        ),
        **kwargs: Any,
    ) -> None:
        chosen = (backbone_kwargs or {}).keys() & {"reg_tokens", "pretrained"}
        registers = {} if chosen else {"reg_tokens": 4, "no_embed_class": True}
        backbone_kwargs = vit_defaults(backbone, backbone_kwargs, init_values=0.1, **registers)
        super().__init__(backbone, backbone_kwargs, optim, **kwargs)
        even_drop_path(token_vit("SimDINOv2", backbone, self.backbone, tokens="class"), drop_path)
        checked_crop_masks(mask_ratio, masked_share)
        self.epsilon, self.coefficient, self.smooth = epsilon, coefficient, smooth
        self.mask_ratio, self.masked_share, self.momentum = mask_ratio, masked_share, momentum
        self.projector_dim, self.clip_gradient = projector_dim, clip_gradient
        self.layer_decay, self.patch_embed_lr = layer_decay, patch_embed_lr
        self.mask_token = nn.Parameter(torch.zeros(1, self.embed_dim))
        self.projector = gelu_mlp(self.embed_dim, hidden_dim, projector_dim)
        self.teacher_backbone, self.teacher_projector = ema.teacher_of(self.backbone), ema.teacher_of(self.projector)
        self.train()  # except the teachers

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """SimDINO's loss of class tokens, and the cosine of masked patches."""
        class_outputs, patch_outputs, counts = self._outputs(views)
        loss = losses.simdino(*class_outputs, self.epsilon, self.coefficient, self.smooth)
        return loss + losses.simdino_patches(*patch_outputs, counts)

    def _outputs(self, views: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """Of student and teacher: ``(V, B, D)`` and ``(2, B, D)`` of views, ``(M, D)`` each of patches; divisors."""
        crops = torch.cat(list(views[:2]))  # (2B, 3, S, S)
        mask = self.draw_masks(crops)  # (2B, N), on the CPU
        masked, counts = (self.random_to_device(part) for part in masked_patches(mask))  # (M,)
        with torch.no_grad():
            tokens = self.teacher_backbone.forward_features(crops)  # (2B, prefix + N, embed_dim)
            features = self.teacher_backbone.forward_head(tokens)
            self.record(features)
            teacher = self.teacher_projector(features)  # (2B, D)
            teacher_patches = self.teacher_projector(patch_tokens(self.backbone, tokens).flatten(0, 1)[masked])

        tokens = masked_tokens(self.backbone, crops, self.random_to_device(mask), self.mask_token)
        student = self.projector(self.backbone.forward_head(tokens))
        if len(views) > 2:
            student = torch.cat([student, self.projector(multi_crop(self.backbone, views[2:]))])  # (V * B, D)
        student_patches = self.projector(patch_tokens(self.backbone, tokens).flatten(0, 1)[masked])  # (M, D)
        outputs = student.unflatten(0, (len(views), -1)), teacher.unflatten(0, (2, -1))
        return outputs, (student_patches, teacher_patches), counts

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the step just taken."""
        ema.follow_all(self, self.teacher_momentum(self.progress))

    def edit_gradients(self) -> None:
        """Clip the gradient of the backbone and the gradient of the head, each by its own norm."""
        body = [*self.backbone.parameters(), self.mask_token]
        clip_parts([body, self.projector.parameters()], self.clip_gradient)

    def draw_masks(self, crops: Tensor) -> Tensor:
        """Masks ``(2B, N)`` on the CPU, true where masked; the share of masked crops is exact over all processes.

        Args:
            crops: ``(2B, 3, S, S)``.
        """
        rows, columns = grid_of(self.backbone, crops)
        images = len(crops) // 2
        return global_crop_masks((rows, columns), images, self.mask_ratio, self.masked_share, self.generator)

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a cosine."""
        return cosine(self.momentum, 1.0, progress)

    def configure_optimizers(self) -> Any:
        """The schedule of ``self.optim``, with a learning rate for each layer."""
        return self.optim.configure(self, lr_scale=by_layer(self))

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The teacher."""
        return self.teacher_backbone

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of student and teacher."""
        return [*called_blocks(self.backbone), *called_blocks(self.teacher_backbone)]

    def train(self, mode: bool = True) -> "SimDINOv2":
        """Set the mode of all but the teacher, which stays in eval mode, except its BatchNorm if it has any."""
        super().train(mode)
        ema.evaluate_teachers(self)
        return self

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """The parts of the loss, and what the expansion would be if the outputs had collapsed."""
        (student, teacher), patches, counts = self._outputs(views)
        images = student.shape[1] * world_size()
        return {
            "compression": losses.compression(student, teacher),
            "patch_compression": -losses.simdino_patches(*patches, counts),
            "expansion": losses.expansion(student, teacher, self.epsilon, self.smooth),
            "collapsed_expansion": losses.collapsed_expansion(images, self.projector_dim, self.epsilon),
        }

    @property
    def chance_loss(self) -> float | None:
        """The loss of outputs that are all the same; known once a batch has been seen."""
        if self.global_batch is None:
            return None
        collapsed = losses.collapsed_expansion(self.global_batch, self.projector_dim, self.epsilon)
        return -self.coefficient - self.masked_share - collapsed
