"""SimMIM."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.backbones import initialization
from ssl_lightning.backbones.names import (
    BEIT_IN_PRETRAINING,
    Backbone,
    is_beit,
    is_dinov3,
    is_own,
    is_swin,
    is_vit,
    token_vit,
)
from ssl_lightning.backbones.tokens import as_map, called_blocks, masked_tokens
from ssl_lightning.errors import UserError
from ssl_lightning.masks import checked_ratio
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class SimMIM(SSLModule):
    """SimMIM: regress the pixels of masked patches with a single linear layer.

    Xie et al. 2022, SimMIM: A Simple Framework for Masked Image Modeling, https://arxiv.org/abs/2111.09886. The
    encoder is ``backbone``, which sees all patches, masked ones as a learned token: as in the paper timm's BEiT, a ViT
    with relative positions that all blocks share, or a Swin; or timm's plain ViT, which embeds absolute positions, then
    without a class token. Features are the mean of the patches. The paper's learning rate is for batches of 512 images,
    ours for 256, so ``base_lr`` is half the paper's; the released schedule lags a step behind ours. ViTs start as
    BEiT's, a Swin as timm's.

    The training forward sees masked images, so the linear probe learns from features of whole views at every
    ``probe_every``-th step, as with MAE.

    Args:
        mask_ratio: Share of the units that are masked, rounded up to whole ones.
        mask_unit: Side of the squares that are masked, in pixels: a multiple of the backbone's patch.
        probe_every: The probes get features of whole views once every this many steps.
        backbone: Name of a BEiT, Swin or ViT of timm. The first two take images of one size, ``img_size``.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 32, patch_size: 4}``.
        optim: Optimizer and learning-rate schedule; the milestone is for 800 epochs.
        kwargs: See SSLModule.
    """

    views = "simmim"
    remedies = "a lower learning rate or a longer warm-up, mask units of a sixth to an eighth of the view's side"
    global_views = 1
    undecayed: tuple[str, ...] = ("cls_token", "pos_embed")  # and the mask token of a Swin

    def __init__(
        self,
        mask_ratio: float = 0.6,
        mask_unit: int = 32,
        probe_every: int = 32,
        backbone: Backbone = "beit_base_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim(
            "adamw",
            base_lr=5e-5,
            weight_decay=0.05,
            warmup_epochs=10,
            warmup_start_factor=0.005,
            milestones=(700 / 800,),
        ),
        **kwargs: Any,
    ) -> None:

        if is_vit(backbone):
            defaults: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}
        elif is_beit(backbone):
            defaults = BEIT_IN_PRETRAINING
        elif is_swin(backbone):
            defaults = {"drop_path_rate": 0.0}
        elif is_dinov3(backbone) or is_own(backbone):
            defaults = {}
        else:
            raise UserError(
                f"SimMIM masks single patches, which backbone={backbone!r} cannot; set --model.backbone to a ViT, BEiT "
                "or Swin of timm, e.g. vit_base_patch16_224."
            )
        super().__init__(backbone, {**defaults, **(backbone_kwargs or {})}, optim, **kwargs)
        encoder: Any = self.backbone
        if is_own(backbone):
            self.patch_side = self.stride = token_vit("SimMIM", backbone, encoder).patch_side
            width = self.embed_dim
        else:
            self.patch_side, self.stride = encoder.patch_embed.patch_size[0], encoder.feature_info[-1]["reduction"]
            width = encoder.patch_embed.proj.out_channels
            if (sides := encoder.patch_embed.patch_size)[0] != sides[1]:
                raise UserError(f"SimMIM needs square patches, not {sides[0]} x {sides[1]} px; set patch_size.")
        if mask_unit % self.patch_side:
            raise UserError(
                f"--model.mask_unit={mask_unit} is not a multiple of the backbone's patches of {self.patch_side} px."
            )
        self.mask_ratio, self.mask_unit, self.probe_every = checked_ratio(mask_ratio), mask_unit, probe_every
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        if is_swin(backbone):
            nn.init.trunc_normal_(self.mask_token, std=0.02)
            self.undecayed = (*self.undecayed, "mask_token")
        elif self.pretrained:
            initialization.narrow(self.mask_token)
        else:
            initialization.beit(encoder, self.mask_token)
        self.decoder = nn.Sequential(
            nn.Conv2d(self.embed_dim, self.stride**2 * self.in_chans, 1), nn.PixelShuffle(self.stride)
        )

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of the encoder."""
        return called_blocks(self.backbone)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Distance of the masked pixels from the predicted ones (section 3.3)."""
        images = views[0]
        units = self._units(images)
        return losses.simmim(self.reconstruct(images, units), images, _enlarged(units, self.mask_unit))

    def reconstruct(self, images: Tensor, units: Tensor) -> Tensor:
        """Predict all pixels ``(B, 3, S, S)``.

        Args:
            images: ``(B, 3, S, S)``.
            units: ``(B, rows, columns)`` bool, true where a unit is masked.
        """
        mask = _enlarged(units, self.mask_unit // self.patch_side).flatten(1)  # (B, N) of patches
        tokens = masked_tokens(self.backbone, images, mask, self.mask_token)
        return self.decoder(as_map(self.backbone, tokens, images))

    def _units(self, images: Tensor) -> Tensor:
        """Which units to mask, ``(B, rows, columns)`` bool: as many in each image."""
        rows, columns = (side // self.mask_unit for side in images.shape[2:])
        noise = self.uniform(len(images), rows * columns)
        masked = noise.argsort(dim=1).argsort(dim=1) < math.ceil(self.mask_ratio * rows * columns)
        return self.random_to_device(masked.unflatten(1, (rows, columns)))

    def check(self, sizes: list[int], global_batch: int) -> None:
        """Views must be a whole number of units."""
        super().check(sizes, global_batch)
        if sizes[0] % self.mask_unit:
            raise UserError(
                f"units of --model.mask_unit={self.mask_unit} px do not divide views of {sizes[0]} px; change "
                "--model.mask_unit or --data.image_size."
            )

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """What the encoder sees of the images, and next to it the predictions of the rest."""
        units = self._units(images)
        hidden = _enlarged(units, self.mask_unit)[:, None]  # (B, 1, S, S)
        predicted = torch.where(hidden, self.reconstruct(images, units).to(images.dtype), images)
        return {"visible": images.masked_fill(hidden, 0.0), "predicted": predicted}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load; earlier versions kept the mask token, the first of all parameters, among the undecayed ones."""
        super().on_load_checkpoint(checkpoint)
        decayed = sum(group["decayed"] * len(group["params"]) for group in self.optim.create(self, 256).param_groups)
        for state in checkpoint.get("optimizer_states", ()):
            first, *others = state["param_groups"]
            if others and (token := len(first["params"])) + 1 == decayed:
                numbers = {token: 0, **{number: number + 1 for number in range(token)}}
                state["state"] = {numbers.get(number, number): value for number, value in state["state"].items()}
                first["params"], others[0]["params"] = [*range(token + 1)], others[0]["params"][1:]

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Error of the masked pixels without drop path."""
        return {"masked_patch_error": self.training_loss(views)}


def _enlarged(mask: Tensor, times: int) -> Tensor:
    """A mask ``(B, rows, columns)`` with each cell as a square of cells."""
    return mask.repeat_interleave(times, 1, output_size=mask.shape[1] * times).repeat_interleave(
        times, 2, output_size=mask.shape[2] * times
    )
