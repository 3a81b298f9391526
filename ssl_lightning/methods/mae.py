"""MAE."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.backbones import initialization
from ssl_lightning.backbones.names import Backbone, token_vit, vit_defaults
from ssl_lightning.backbones.predictor import TokenPredictor
from ssl_lightning.backbones.tokens import ViT, called_blocks, grid_of, patch_tokens
from ssl_lightning.heads import patchify, unpatchify
from ssl_lightning.masks import checked_ratio, random_masking, taken
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class MAE(SSLModule):
    """MAE: reconstruct the pixels of masked patches from the visible ones.

    He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, https://arxiv.org/abs/2111.06377. The encoder is
    ``backbone``, a ViT of timm, and sees only the visible patches. Own masking and decoder because lightly's fill in
    mask tokens by index and initialize differently from the released code.

    The training forward sees a quarter of the image, so the linear probe learns from features of the whole view, not
    masked and in eval mode, at every ``probe_every``-th step. Measured with ViT-B/16 at 224 px on a CPU, such a forward
    costs half a step: 1.5 % of the training at 32.

    Args:
        mask_ratio: Share of patches that are masked.
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        normalize_pixels: Whether each target patch is normalized by its own mean and standard deviation.
        probe_every: The probes get features of whole views once every this many steps.
        backbone: Name of a ViT of timm.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 32, patch_size: 4}``.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "mae"
    remedies = "a lower learning rate or a longer warm-up, smaller patches, a mask ratio of 0.5 to 0.75"
    global_views, view_cost = 1, 1.5  # the encoder sees a quarter of the patches
    renamed = {  # noqa: RUF012
        **{f"decoder_{part}": f"decoder.{part}" for part in ("embed", "positions", "blocks", "norm")},
        "decoder_predictor": "decoder.projection",
    }
    backbone: ViT

    def __init__(
        self,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalize_pixels: bool = True,
        probe_every: int = 32,
        backbone: Backbone = "vit_base_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim("adamw", 1.5e-4, weight_decay=0.05, warmup_epochs=40, extra={"betas": (0.9, 0.95)}),
        **kwargs: Any,
    ) -> None:
        # fc_norm: tokens are normalized before they are pooled, also by global_pool=avg
        super().__init__(backbone, vit_defaults(backbone, backbone_kwargs, fc_norm=False), optim, **kwargs)
        vit = token_vit("MAE", backbone, self.backbone, tokens="plain")
        self.mask_ratio, self.normalize_pixels = checked_ratio(mask_ratio), normalize_pixels
        self.patch_size, self.probe_every = vit.patch_side, probe_every
        if not self.pretrained:
            initialization.mae(vit)
        self.decoder = TokenPredictor(
            *(self.embed_dim, decoder_dim, self.patch_size**2 * self.in_chans, decoder_depth, decoder_heads),
            grid=grid_of(vit),
            class_token=True,
            checkpoint_blocks=self.checkpoint_blocks,
        ).apply(initialization.xavier_linear)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim).normal_(std=0.02))

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Squared error of the masked patches (section 3)."""
        predictions, mask = self.reconstruct(views[0], self.noise(views[0]))
        return losses.mae(predictions, views[0], mask, self.patch_size, self.normalize_pixels)

    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Encode the visible patches and predict all.

        Args:
            images: ``(B, 3, S, S)``.
            noise: ``(B, N)``; the patches of the smallest values stay visible.

        Returns:
            Predicted pixels ``(B, N, P*P*3)`` and mask ``(B, N)``, 1 where a patch was masked.
        """
        visible, restore, mask = random_masking(noise, self.mask_ratio)
        grid = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        return self.decode(self.encode(images, visible), restore, grid), mask

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Tokens ``(B, prefix + M, embed_dim)`` of the class token and the visible patches.

        Args:
            images: ``(B, 3, S, S)``.
            visible: ``(B, M)`` indices of the patches.
        """
        return self.backbone.encode(images, visible)

    def decode(self, tokens: Tensor, restore: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels ``(B, N, P*P*3)`` of all patches, a mask token in the place of those that the encoder did not see.

        Args:
            tokens: ``(B, prefix + M, embed_dim)``; of the prefix only the class token is decoded.
            restore: ``(B, N)`` indices that bring visible, then masked patches into their order.
            grid: Rows and columns of patches.
        """
        if self.backbone.num_prefix_tokens > 1:
            tokens = torch.cat([tokens[:, :1], patch_tokens(self.backbone, tokens)], dim=1)
        tokens = self.decoder.embed(tokens)  # (B, 1 + M, decoder_dim)
        masked = self.mask_token.to(tokens.dtype).expand(len(tokens), restore.shape[1] + 1 - tokens.shape[1], -1)
        patches = taken(torch.cat([tokens[:, 1:], masked], dim=1), restore)  # (B, N, decoder_dim)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder.positions_of(grid).to(tokens.dtype)
        return self.decoder(tokens)[:, 1:]

    def noise(self, images: Tensor) -> Tensor:
        """Random numbers ``(B, N)`` that choose the visible patches.

        Args:
            images: ``(B, 3, S, S)``.
        """
        return self.random_to_device(self.uniform(len(images), images[0, 0].numel() // self.patch_size**2))

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of encoder and decoder."""
        return [*called_blocks(self.backbone), self.decoder.blocks]

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """The visible patches, and next to them the predictions of the others.

        Where targets are normalized, so are the predictions: they get mean and deviation of the patch they stand for.
        """
        predictions, mask = self.reconstruct(images, self.noise(images))
        patches = patchify(images, self.patch_size)
        if self.normalize_pixels:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            predictions = predictions * (variance + 1e-6).sqrt() + mean
        masked = mask[..., None].bool()
        both = {"visible": patches.masked_fill(masked, 0.0), "predicted": torch.where(masked, predictions, patches)}
        return {name: unpatchify(part.to(images.dtype), self.patch_size, images.shape) for name, part in both.items()}

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Error of the masked patches without drop path."""
        return {"masked_patch_error": self.training_loss(views)}

    @property
    def chance_loss(self) -> float | None:
        """Loss of predicting each patch's mean: (n - 1) / n for n values a patch, their variance being unbiased."""
        values = self.patch_size**2 * self.in_chans
        return (values - 1) / values if self.normalize_pixels else None
