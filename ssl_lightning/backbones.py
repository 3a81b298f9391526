"""Backbones by name: everything timm and torchvision know, ResNets with the CIFAR stem, ViTs of any image size."""

import difflib
import functools
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models import checkpoint_seq, is_model_in_modules, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ssl_lightning.distributed import rank, world_size
from ssl_lightning.errors import UserError


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Build a backbone without its classifier, randomly initialised unless ``pretrained=True`` is given.

    ViTs of timm take images of any size that their patch divides.

    Args:
        name: A timm model name, else a torchvision one; ``torchvision/NAME`` asks for torchvision's. ``pixels`` is
            the flattened image, a baseline.
        kwargs: Passed to the builder, e.g. ``img_size`` and ``patch_size`` of a ViT.

    Returns:
        A module that maps images ``(B, 3, S, S)`` to features ``(B, num_features)``.

    Raises:
        UserError: The name is unknown, or the builder refuses an argument.
    """
    wanted = name.removeprefix("torchvision/")
    try:
        if name == "pixels":
            return Pixels(**kwargs)
        if wanted == name and timm.is_model(name):
            if is_vit(name):
                kwargs = {"dynamic_img_size": True, **kwargs}
            model = timm.create_model(name, num_classes=0, **kwargs)
            if type(model) is VisionTransformer and model.dynamic_img_size and model.pos_embed is not None:
                model.__class__ = AnySizeViT
            for module in model.modules():
                if type(module) is timm.layers.DropPath:
                    module.__class__ = DropPath
            model.num_features = getattr(model, "head_hidden_size", None) or model.num_features  # what it gives
            return model
        if wanted in torchvision.models.list_models(module=torchvision.models):
            return _torchvision_backbone(wanted, **kwargs)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"backbone {name!r} does not accept backbone_kwargs {kwargs}: {error}") from error
    near = difflib.get_close_matches(name, {*timm.list_models(), *torchvision.models.list_models()}, n=5)
    hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models() for the names."
    raise UserError(f"unknown backbone {name!r}: neither timm nor torchvision has it; {hint}")


class DropPath(timm.layers.DropPath):
    """timm's stochastic depth, drawn for the global batch: the same for an image on any number of processes.

    Attributes:
        batch_size: Images of this process in the batch; rows beyond are further views. None is all rows.
    """

    batch_size: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Drop the branch ``(V * B, ...)`` of some rows, and scale that of the others."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        batch_size = self.batch_size if self.batch_size and len(x) % self.batch_size == 0 else len(x)
        noise = torch.rand(len(x) // batch_size, world_size() * batch_size, device=x.device)
        own = noise.unflatten(1, (world_size(), batch_size))[:, rank()]  # (V, B)
        kept = (own.flatten() >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob if self.scale_by_keep else 1)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def _torchvision_backbone(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, **kwargs)
    for head in ("fc", "classifier", "heads", "head"):
        if hasattr(model, head):
            setattr(model, head, nn.Flatten(1))  # some classifiers flatten too
            break
    was_training = model.training
    with torch.no_grad():  # torchvision does not tell the width of its features
        sizes = [model.image_size] if hasattr(model, "image_size") else [224, 288]
        widths = {model.eval()(torch.zeros(1, 3, size, size)).shape[1] for size in sizes}
    if len(widths) > 1 or getattr(model, "aux_logits", False):
        raise UserError(f"backbone 'torchvision/{name}' does not give one feature vector; choose timm's or another.")
    model.num_features = widths.pop()
    return model.train(was_training)


def is_vit(name: str) -> bool:
    """Whether a name is that of a plain ViT of timm, e.g. vit_small_patch16_224."""
    return timm.is_model(name) and is_model_in_modules(name, ["vision_transformer"])


def is_beit(name: str) -> bool:
    """Whether a name is that of timm's BEiT, a ViT with relative positions, e.g. beit_base_patch16_224."""
    return timm.is_model(name) and is_model_in_modules(name, ["beit"])


BEIT_IN_PRETRAINING = {"use_fc_norm": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
"""Arguments of timm's BEiT: all blocks share their positions, and tokens are normalised before they are pooled."""


def is_swin(name: str) -> bool:
    """Whether a name is that of a Swin of timm, e.g. swin_base_patch4_window7_224."""
    return timm.is_model(name) and is_model_in_modules(name, ["swin_transformer", "swin_transformer_v2"])


def only_size(backbone: nn.Module) -> int | None:
    """Side in pixels of the only images that a backbone takes, e.g. a BEiT or Swin; None if it takes others as well.

    Args:
        backbone: Any.
    """
    embedding: Any = getattr(backbone, "patch_embed", None)
    return embedding.img_size[0] if getattr(embedding, "strict_img_size", False) else None


def token_vit(method: str, name: str, backbone: nn.Module, class_token: bool) -> "AnySizeViT":
    """The backbone, which must be a ViT whose patch tokens a method can read.

    Args:
        method: Name of the method, for the message.
        name: Name of the backbone, for the message.
        backbone: What ``create_backbone`` built.
        class_token: Whether its features are the class token, or the mean of its patches without any other token.

    Raises:
        UserError: It is not.
    """
    wanted = "token" if class_token else "avg"
    if (
        isinstance(backbone, AnySizeViT)
        and (backbone.cls_token is not None) == class_token
        and (backbone.global_pool, type(backbone.fc_norm)) == (wanted, nn.Identity)
    ):
        return backbone
    tokens = "a class token that is its features" if class_token else "no class token and the mean of patches"
    raise UserError(
        f"{method} reads the patch tokens of a ViT with {tokens}, which backbone={name!r} is not; set model.backbone "
        "to a ViT of timm, e.g. vit_base_patch16_224."
    )


class AnySizeViT(VisionTransformer):
    """timm's ViT, its positions interpolated to the size of the images as in DINO's released code.

    Own code because timm interpolates with antialiasing and to the exact grid, which gives small crops other
    positions than those the released weights were trained with.
    """

    pos_embed: nn.Parameter
    rows_first: bool | None = None  # of fixed sine-cosine positions; None where they are learnt

    @property
    def patch_side(self) -> int:
        """Number that the sides of images must be divisible by."""
        return math.lcm(*self.patch_embed.patch_size)

    @property
    def is_plain(self) -> bool:
        """Whether it is the papers' ViT: a class token with a position, no other tokens, no norm before the blocks."""
        plain = self.cls_token is not None and self.num_prefix_tokens == 1 and not self.no_embed_class
        return plain and isinstance(self.norm_pre, nn.Identity)

    def fix_positions(self, rows_first: bool) -> None:
        """Replace the learnt positions by fixed sine-cosine ones.

        Args:
            rows_first: As for ``sincos_positions``.
        """
        self.rows_first = rows_first
        self.pos_embed = nn.Parameter(
            self._fixed_positions(self.patch_embed.grid_size, rows_first).clone(), requires_grad=False
        )

    def _fixed_positions(self, grid: tuple[int, int], rows_first: bool, device: torch.device | None = None) -> Tensor:
        positions = sincos_positions(self.embed_dim, grid, rows_first, device)
        return positions if self.cls_token is not None else positions[:, 1:]

    def tell_fixed_positions(self) -> None:
        """See in which order the positions are sine-cosine ones, if they are."""
        found = self.pos_embed.full_tensor() if isinstance(self.pos_embed, DTensor) else self.pos_embed
        self.rows_first = None
        for rows_first in (True, False):
            fixed = self._fixed_positions(self.patch_embed.grid_size, rows_first, found.device)
            if fixed.shape == found.shape and torch.allclose(found.float(), fixed, atol=0.01):  # rounded to bfloat16
                self.rows_first = rows_first

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.rows_first is not None:  # learnt ones may have taken their place
            self.tell_fixed_positions()

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings ``(1, prefix + height * width, D)`` for a grid of patches; the prefix is that of tokens.

        Args:
            height: Rows of patches.
            width: Columns of patches.
        """
        rows, columns = self.patch_embed.grid_size
        if (height, width) == (rows, columns):
            return self.pos_embed
        if self.rows_first is not None:
            positions = self._fixed_positions((height, width), self.rows_first, self.pos_embed.device)
            return positions.to(self.pos_embed.dtype)
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        grid = self.pos_embed[:, prefix:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        # The released code adds 0.1 so that rounding never loses a row, and samples by this scale.
        scale = ((height + 0.1) / rows, (width + 0.1) / columns)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([self.pos_embed[:, :prefix], grid], dim=1)

    def class_attention(self, images: Tensor) -> Tensor:
        """Attention ``(B, heads, rows, columns)`` of the class token to the patches in the last block.

        Args:
            images: ``(B, 3, S, S)``.
        """
        attention: Any = self.blocks[-1].attn
        seen: list[Tensor] = []
        hook = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        fused, attention.fused_attn = attention.fused_attn, False  # which would not hold the weights
        try:
            self.forward_features(images)
        finally:
            attention.fused_attn = fused
            hook.remove()
        rows = images.shape[2] // self.patch_embed.patch_size[0]
        return seen[0][:, :, 0, self.num_prefix_tokens :].unflatten(2, (rows, -1))

    def _pos_embed(self, x: Tensor) -> Tensor:
        positions = self.positions(*x.shape[1:3])
        tokens = x.flatten(1, 2)  # (B, height * width, D)
        if self.no_embed_class:
            tokens = tokens + positions
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        tokens = torch.cat([*prefix, tokens], dim=1)
        return self.pos_drop(tokens if self.no_embed_class else tokens + positions)


def masked_tokens(backbone: nn.Module, images: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """Tokens after the last norm, a learnt token in the place of masked patches.

    Args:
        backbone: A ViT, BEiT or Swin of timm.
        images: ``(B, 3, S, S)``.
        mask: ``(B, N)`` bool, row by row, true where masked.
        mask_token: ``(D,)``; takes the place of the patch's embedding before positions are added.

    Returns:
        ``(B, prefix + N, D)``; of a Swin, ``(B, rows, columns, D)`` of its last stage.
    """

    def hide(_module: nn.Module, _images: Any, patches: Tensor) -> Tensor:
        return torch.where(mask.view(*patches.shape[:-1], 1), mask_token.to(patches.dtype), patches)

    vit: Any = backbone
    with vit.patch_embed.register_forward_hook(hide):
        return vit.forward_features(images)


def as_map(backbone: nn.Module, features: Tensor, images: Tensor) -> Tensor:
    """What ``forward_features`` of a backbone of timm gives, as a map ``(B, D, rows, columns)``.

    Args:
        backbone: Whose features.
        features: ``(B, prefix + N, D)`` of a ViT or BEiT, ``(B, rows, columns, D)`` of a Swin, or a CNN's map.
        images: ``(B, 3, S, S)`` that they are of.
    """
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features
    vit: Any = backbone
    rows, columns = (side // patch for side, patch in zip(images.shape[2:], vit.patch_embed.patch_size, strict=True))
    return features[:, vit.num_prefix_tokens :].mT.unflatten(2, (rows, columns))


def called_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a ViT, BEiT or Swin of timm as far as they are called: their sequence, or each by itself.

    Args:
        backbone: Whose blocks.
    """
    blocks: Any = backbone.layers if hasattr(backbone, "layers") else backbone.blocks
    return list(blocks) if isinstance(blocks, nn.ModuleList) else [blocks]


def even_drop_path(vit: VisionTransformer, rate: float) -> None:
    """Give all blocks of a ViT the same stochastic depth, rather than one that rises with the depth (DINOv2).

    Args:
        vit: A ViT of timm.
        rate: Rate of each block.
    """
    for block in vit.blocks if rate > 0 else ():
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


def layer_scale(name: str, blocks: int, decay: float) -> float:
    """Share of the learning rate of a parameter of a ViT: that of each block is ``decay`` times that of the next.

    Embeddings come before the first block; norm, registers and whatever is no part of the ViT have the full rate, as in
    DINOv2's released code.

    Args:
        name: Of the parameter in the ViT.
        blocks: Number of blocks.
        decay: Share of the rate of the layer above.
    """
    layer = blocks + 1
    if name.startswith(("cls_token", "pos_embed", "patch_embed", "mask_token")):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    return decay ** (blocks + 1 - layer)


@functools.lru_cache(maxsize=16)
def sincos_positions(dim: int, grid: tuple[int, int], rows_first: bool, device: torch.device | None = None) -> Tensor:
    """Fixed two-dimensional sine and cosine positions, zero for the class token.

    Half of the width encodes the row, half the column, each as sines, then cosines, of D / 4 frequencies from 1 down
    to 1 / 10000. Own code because MoCo v3 and MAE order the halves differently, and timm and lightly know MAE's alone.

    Args:
        dim: Width D, divisible by 4.
        grid: Rows and columns of patches.
        rows_first: Whether the first half encodes the row (MoCo v3) or the column (MAE).
        device: Where they shall lie.

    Returns:
        ``(1, 1 + rows * columns, D)``.
    """
    with torch.inference_mode(False):  # what validation asks for first is used in training, too
        frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        sides = (torch.arange(side, dtype=torch.float64) for side in grid)
        rows, columns = (index.flatten()[:, None] * frequencies for index in torch.meshgrid(*sides, indexing="ij"))
        first, second = (rows, columns) if rows_first else (columns, rows)
        patches = torch.cat([first.sin(), first.cos(), second.sin(), second.cos()], dim=1)
        return torch.cat([torch.zeros(1, dim, dtype=torch.float64), patches])[None].float().to(device)


def init_patch_projection(vit: VisionTransformer) -> None:
    """Draw the patch projection of a ViT as if it were a linear layer (Xavier uniform; MoCo v3 and MAE).

    Args:
        vit: A ViT of timm.
    """
    weight = vit.patch_embed.proj.weight  # (D, 3, P, P)
    bound = math.sqrt(6 / (len(weight) + weight[0].numel()))
    nn.init.uniform_(weight, -bound, bound)


def multi_crop(backbone: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Features ``(V * B, embed_dim)`` of crops of several sizes, view by view.

    Neighbouring views of one size go through the backbone together and share their BatchNorm statistics, as in the
    released code of SwAV and DINO.

    Args:
        backbone: Maps images to features.
        views: ``(B, 3, S, S)`` each.
    """
    groups = [list(group) for _, group in groupby(views, key=lambda view: view.shape[-1])]
    return torch.cat([backbone(torch.cat(group)) for group in groups])


class CheckpointedBlocks(nn.Sequential):
    """Blocks of a ViT whose insides are computed again in the backward pass instead of kept."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(B, N, D)`` after all blocks."""
        return checkpoint_seq(self, tokens) if torch.is_grad_enabled() else super().forward(tokens)


def checkpoint_blocks(backbone: nn.Module) -> None:
    """Let a backbone keep the inputs of its blocks alone in training.

    Args:
        backbone: One of timm without BatchNorm.

    Raises:
        UserError: It cannot.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()):
        raise UserError(
            "model.checkpoint_blocks computes blocks twice, so BatchNorm would count every batch twice; set it to "
            "false, or model.backbone to a ViT."
        )
    if isinstance(backbone, AnySizeViT):  # timm would go past the compiled call of the blocks
        backbone.blocks.__class__ = CheckpointedBlocks
        return
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise UserError(
            "the backbone has no blocks to compute again; set model.checkpoint_blocks to false, or model.backbone to a "
            "ViT of timm."
        ) from error


def init_residual_branches(backbone: nn.Module, scale: float) -> None:
    """Set the last BatchNorm weight of each residual branch of a ResNet: 0 starts with the identity (Goyal 2017).

    Args:
        backbone: A ResNet of timm or torchvision; others are left alone.
        scale: 0 or 1.
    """
    for block in backbone.modules():
        last = getattr(block, "bn3", None) or getattr(block, "bn2", None)
        if hasattr(block, "downsample") and isinstance(last, nn.BatchNorm2d):
            nn.init.constant_(last.weight, scale)


def _cifar_resnet(block: Any, layers: tuple[int, ...], stem_stride: int = 1, **kwargs: Any) -> ResNet:
    """ResNet whose stem keeps the resolution: 3x3 convolution of stride 1, no max-pooling (SimCLR, appendix B.9).

    ``stem_stride=2`` halves the resolution instead: a quarter of the work, for recipes sized for CPUs.
    """
    kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None), kwargs.pop("cache_dir", None)
    if kwargs.pop("pretrained", False):
        raise UserError("ResNets with the CIFAR stem have no pretrained weights; leave out pretrained.")
    model: Any = ResNet(block, layers, **kwargs)
    width = model.bn1.num_features
    stem = nn.Conv2d(kwargs.get("in_chans", 3), width, kernel_size=3, stride=stem_stride, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = stem
    model.maxpool = nn.Identity()
    return model


@register_model
def resnet10_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-10 (one basic block per stage) with the CIFAR stem."""
    return _cifar_resnet(BasicBlock, (1, 1, 1, 1), pretrained=pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with the CIFAR stem: 11,168,832 parameters."""
    return _cifar_resnet(BasicBlock, (2, 2, 2, 2), pretrained=pretrained, **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-34 with the CIFAR stem."""
    return _cifar_resnet(BasicBlock, (3, 4, 6, 3), pretrained=pretrained, **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 with the CIFAR stem."""
    return _cifar_resnet(Bottleneck, (3, 4, 6, 3), pretrained=pretrained, **kwargs)


class Pixels(nn.Module):
    """The image itself, flattened: what a backbone has to beat.

    Args:
        img_size: Side of the images in pixels.
        in_chans: Number of channels.
    """

    def __init__(self, img_size: int = 32, in_chans: int = 3) -> None:
        super().__init__()
        self.img_size, self.num_features = img_size, in_chans * img_size**2

    def forward(self, images: Tensor) -> Tensor:
        """Flatten images ``(B, C, S, S)`` to ``(B, C * S * S)``."""
        return images.flatten(1)
