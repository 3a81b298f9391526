"""MAE."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.backbones.checkpointing import CheckpointedBlocks
from ssl_lightning.backbones.initialization import init_patch_projection
from ssl_lightning.backbones.names import is_vit
from ssl_lightning.backbones.tokens import sincos_positions
from ssl_lightning.distributed import own_part, world_size
from ssl_lightning.errors import UserError
from ssl_lightning.heads import patchify, unpatchify
from ssl_lightning.masks import taken
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class MAE(SSLModule):
    """MAE: reconstruct the pixels of masked patches from the visible ones.

    He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, https://arxiv.org/abs/2111.06377. The encoder is
    ``backbone``, a ViT of timm, and sees visible patches alone. Own masking and decoder because lightly's fill mask
    tokens in by index, and initialise otherwise than the released code.

    The training forward sees a quarter of the image, so the linear probe learns from features of the whole view,
    cropped and mirrored but not masked, in eval mode at every ``probe_every``-th step. Measured with ViT-B/16 at 224 px
    on a CPU, such a forward costs half a step: 1.5 % of the training at 32.

    Args:
        mask_ratio: Share of patches that are masked.
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        normalize_pixels: Whether each target patch is normalised by its own mean and deviation.
        probe_every: Steps between those with features for the probes.
        backbone: Name of a ViT of timm.
        backbone_kwargs: Arguments of the backbone's builder, e.g. ``{img_size: 32, patch_size: 4}``.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "mae"
    remedies = "a lower learning rate or a longer warm-up, smaller patches, a mask ratio of 0.5 to 0.75"
    global_views = 1

    def __init__(
        self,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalize_pixels: bool = True,
        probe_every: int = 32,
        backbone: str = "vit_base_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim(
            "adamw", base_lr=1.5e-4, weight_decay=0.05, warmup_epochs=40, extra={"betas": (0.9, 0.95)}
        ),
        **kwargs: Any,
    ) -> None:
        from timm.models.vision_transformer import Block

        from ssl_lightning.backbones.vit import AnySizeViT

        remedy = (
            f"MAE encodes single patches, which backbone={backbone!r} cannot; set model.backbone to a ViT of timm with "
            "a class token, e.g. vit_base_patch16_224."
        )
        if not is_vit(backbone):
            raise UserError(remedy)
        # fc_norm: tokens are normalised before they are pooled, also by global_pool=avg
        super().__init__(backbone, {"fc_norm": False, **(backbone_kwargs or {})}, optim, **kwargs)
        vit = self.backbone
        if not isinstance(vit, AnySizeViT) or not vit.is_plain:
            raise UserError(remedy)
        if not 0 < mask_ratio < 1:
            raise UserError(f"model.mask_ratio={mask_ratio} must lie between 0 and 1.")
        self.mask_ratio, self.normalize_pixels, self.probe_every = mask_ratio, normalize_pixels, probe_every
        self.patch_size = vit.patch_side
        if not (backbone_kwargs or {}).get("pretrained"):
            vit.apply(_init_linear)
            init_patch_projection(vit)
            nn.init.normal_(vit.cls_token, std=0.02)  # type: ignore[arg-type]
            vit.fix_positions(rows_first=False)

        self.decoder_embed = nn.Linear(self.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_positions = nn.Parameter(
            sincos_positions(decoder_dim, vit.patch_embed.grid_size, rows_first=False).clone(), requires_grad=False
        )
        norm: Any = functools.partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_dim, decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(decoder_depth))
        )
        self.decoder_norm = norm(decoder_dim)
        self.decoder_predictor = nn.Linear(decoder_dim, self.patch_size**2 * 3)
        if self.checkpoint_blocks:
            self.decoder_blocks.__class__ = CheckpointedBlocks
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_predictor):
            module.apply(_init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of encoder and decoder."""
        return [self.backbone.blocks, self.decoder_blocks]  # type: ignore[list-item]

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Squared error of the masked patches (section 3)."""
        images = views[0]
        predictions, mask = self.reconstruct(images, self._noise(images))
        return losses.mae(predictions, images, mask, self.patch_size, self.normalize_pixels)

    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Encode the visible patches and predict all.

        Args:
            images: ``(B, 3, S, S)``.
            noise: ``(B, N)``; the patches of the smallest values stay visible.

        Returns:
            Predicted pixels ``(B, N, P*P*3)`` and mask ``(B, N)``, 1 where a patch was masked.
        """
        visible, restore, mask = masked(noise, self.mask_ratio)
        grid = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        return self._decode(self._encode(images, visible), restore, grid), mask

    def _noise(self, images: Tensor) -> Tensor:
        """Random numbers ``(B, N)``: this process's rows of the global batch's, whatever the number of processes."""
        patches = images.shape[2] * images.shape[3] // self.patch_size**2
        noise = torch.rand(len(images) * world_size(), patches, generator=self.generator)
        return self.random_to_device(own_part(noise))

    def _encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Tokens ``(B, 1 + visible, embed_dim)`` of the class token and the visible patches."""
        vit: Any = self.backbone
        patches = vit.patch_embed(images)  # (B, rows, columns, embed_dim)
        positions = vit.positions(*patches.shape[1:3])
        patches = taken(patches.flatten(1, 2) + positions[:, 1:], visible)  # (B, visible, embed_dim)
        class_token = (vit.cls_token + positions[:, :1]).expand(len(images), -1, -1)
        return vit.norm(vit.blocks(torch.cat([class_token, patches], dim=1)))

    def _decode(self, tokens: Tensor, restore: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels ``(B, N, P*P*3)`` of all patches."""
        tokens = self.decoder_embed(tokens)  # (B, 1 + visible, decoder_dim)
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), restore.shape[1] + 1 - tokens.shape[1], -1)
        patches = torch.cat([tokens[:, 1:], hidden], dim=1)  # (B, N, decoder_dim), visible ones first
        patches = taken(patches, restore)
        positions: Tensor = self.decoder_positions
        if grid != self.backbone.patch_embed.grid_size:  # type: ignore[union-attr]
            positions = sincos_positions(positions.shape[2], grid, rows_first=False, device=positions.device)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + positions.to(tokens.dtype)
        return self.decoder_predictor(self.decoder_norm(self.decoder_blocks(tokens)))[:, 1:]

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """The visible patches, and beside them the predictions of the others.

        Where targets are normalised, so are the predictions: they get mean and deviation of the patch they stand for.
        """
        predictions, mask = self.reconstruct(images, self._noise(images))
        patches = patchify(images, self.patch_size)
        if self.normalize_pixels:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            predictions = predictions * (variance + 1e-6).sqrt() + mean
        hidden = mask[..., None].bool()
        both = {"visible": patches.masked_fill(hidden, 0.0), "predicted": torch.where(hidden, predictions, patches)}
        return {name: unpatchify(one.to(images.dtype), self.patch_size, images.shape) for name, one in both.items()}

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Error of the masked patches without drop path."""
        return {"masked_patch_error": self.training_loss(views)}

    @property
    def chance_loss(self) -> float | None:
        """Loss of predicting each patch's mean: (n - 1) / n for n values a patch, their variance being unbiased."""
        values = self.patch_size**2 * 3
        return (values - 1) / values if self.normalize_pixels else None


def masked(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the visible patches of each image.

    Args:
        noise: ``(B, N)``; the smallest values stay visible.
        mask_ratio: Share of patches that are masked; at least one stays.

    Returns:
        Indices ``(B, visible)`` of the visible patches, indices ``(B, N)`` that bring visible and masked patches back
        into their order, and the mask ``(B, N)``, 1 where masked.
    """
    visible = max(1, int(noise.shape[1] * (1 - mask_ratio)))
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return shuffle[:, :visible], restore, (restore >= visible).to(noise.dtype)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
