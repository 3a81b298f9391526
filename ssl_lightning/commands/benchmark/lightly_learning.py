"""How lightly trains each method on small images: the networks, losses, transforms and optimizers that it documents.

For CNNs these are the settings of its CIFAR-10 benchmark (docs/source/getting_started/benchmarks), which has neither
VICReg nor MAE: VICReg's projector is from its example, and optimizer and warm-up of both are from its Imagenette
benchmark. In four places lightly gets more than it documents: schedules advance at every step instead of every epoch,
DINO's teacher starts as a copy of the student and is what is evaluated, VICReg's views are not blurred, and MAE's
decoder has the size of ours, because the documented one belongs to a ViT-B.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.commands.benchmark.lightly_step import backbone_of, teacher_of
from ssl_lightning.methods.base import SSLModule

Loss = Callable[[Sequence[Tensor]], Tensor]
"""The loss of the views of a batch."""

_SMALL = 64
"""Images up to this size in pixels get the transforms of the CIFAR-10 benchmark; larger ones the default transforms."""


@dataclass(frozen=True)
class LightlyMethod:
    """lightly's way to train a method.

    Args:
        compose: Builds the networks and their loss, given our method and the side of images in pixels. The part
            ``backbone`` is what is evaluated.
        settings: The loss and the heads, in words.
        small_views: The transform for small images, in words.
        transform: Builds the transform for views of a size in pixels.
        optimizer: Builds the optimizer of some parameters for batches of some images.
        optimizer_text: The optimizer, in words.
        warmup: Share of the training in which the learning rate rises, before it falls to 0 along a cosine.
    """

    compose: Callable[[Any, int], tuple[nn.ModuleDict, Loss]]
    settings: str
    small_views: str
    transform: Callable[[int], Callable[[Any], Any]]
    optimizer: Callable[[Sequence[Tensor], int], torch.optim.Optimizer]
    optimizer_text: str
    warmup: float = 0.0

    def views(self, size: int) -> str:
        """The transform, in words.

        Args:
            size: Side of the views in pixels.
        """
        return self.small_views if size <= _SMALL else f"{type(self.transform(size)).__name__}, defaults"


def _simclr(method: SSLModule, _: int) -> tuple[nn.ModuleDict, Loss]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    backbone, head = backbone_of(method), SimCLRProjectionHead(method.embed_dim, 512, 128)
    criterion = NTXentLoss()

    def loss(views: Sequence[Tensor]) -> Tensor:
        return criterion(head(backbone(views[0])), head(backbone(views[1])))

    return nn.ModuleDict({"backbone": backbone, "head": head}), loss


def _moco_v2(method: SSLModule, _: int) -> tuple[nn.ModuleDict, Loss]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

    backbone, head = backbone_of(method), MoCoProjectionHead(method.embed_dim, 512, 128)
    key_backbone, key_head = teacher_of(backbone), teacher_of(head)
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))

    def one_way(query_images: Tensor, key_images: Tensor) -> Tensor:
        with torch.no_grad():
            shuffled, order = batch_shuffle(key_images)
            keys = batch_unshuffle(key_head(key_backbone(shuffled)), order)
        return criterion(head(backbone(query_images)), keys)

    def loss(views: Sequence[Tensor]) -> Tensor:
        update_momentum(backbone, key_backbone, m=0.99)
        update_momentum(head, key_head, m=0.99)
        return 0.5 * (one_way(views[0], views[1]) + one_way(views[1], views[0]))

    parts = {"backbone": backbone, "head": head, "key_backbone": key_backbone, "key_head": key_head}
    return nn.ModuleDict({**parts, "criterion": criterion}), loss


def _byol(method: SSLModule, _: int) -> tuple[nn.ModuleDict, Loss]:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum

    backbone, projector = backbone_of(method), BYOLProjectionHead(method.embed_dim, 1024, 256)
    predictor = BYOLPredictionHead(256, 1024, 256)
    teacher_backbone, teacher_projector = teacher_of(backbone), teacher_of(projector)
    criterion = NegativeCosineSimilarity()

    def loss(views: Sequence[Tensor]) -> Tensor:
        update_momentum(backbone, teacher_backbone, m=0.99)
        update_momentum(projector, teacher_projector, m=0.99)
        with torch.no_grad():
            targets = [teacher_projector(teacher_backbone(view)) for view in views]
        predictions = [predictor(projector(backbone(view))) for view in views]
        return 0.5 * (criterion(predictions[0], targets[1]) + criterion(predictions[1], targets[0]))

    parts = {"backbone": backbone, "projector": projector, "predictor": predictor}
    return nn.ModuleDict({**parts, "teacher": teacher_backbone, "teacher_projector": teacher_projector}), loss


def _swav(method: SSLModule, _: int) -> tuple[nn.ModuleDict, Loss]:
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

    backbone, projector = backbone_of(method), SwaVProjectionHead(method.embed_dim, 512, 128)
    prototypes, criterion = SwaVPrototypes(128, 512), SwaVLoss()

    def loss(views: Sequence[Tensor]) -> Tensor:
        prototypes.normalize()
        scores = [prototypes(F.normalize(projector(backbone(view)), dim=1)) for view in views]
        return criterion(scores[:2], scores[2:])

    return nn.ModuleDict({"backbone": backbone, "projector": projector, "prototypes": prototypes}), loss


def _dino(method: SSLModule, _: int) -> tuple[nn.ModuleDict, Loss]:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.modules.heads import ProjectionHead
    from lightly.models.utils import update_momentum

    def head() -> nn.Module:
        width = method.embed_dim
        blocks = [(width, 2048, nn.BatchNorm1d(2048), nn.GELU()), (2048, 256, None, None)]
        made = DINOProjectionHead(width, 2048, 256, 2048, batch_norm=True)
        made.layers = ProjectionHead(blocks).layers
        return made

    student, student_head, teacher_head = backbone_of(method), head(), head()
    teacher = teacher_of(student)
    teacher_head.load_state_dict(student_head.state_dict())
    teacher_head.requires_grad_(False)
    criterion = DINOLoss(output_dim=2048)

    def loss(views: Sequence[Tensor]) -> Tensor:
        update_momentum(student, teacher, m=0.99)
        update_momentum(student_head, teacher_head, m=0.99)
        with torch.no_grad():
            targets = [teacher_head(teacher(view)) for view in views[:2]]
        return criterion(targets, [student_head(student(view)) for view in views])

    parts = {"backbone": teacher, "student": student, "student_head": student_head, "teacher_head": teacher_head}
    return nn.ModuleDict({**parts, "criterion": criterion}), loss


def _barlow_twins(method: SSLModule, _: int) -> tuple[nn.ModuleDict, Loss]:
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules.heads import ProjectionHead

    blocks = [(method.embed_dim, 2048, nn.BatchNorm1d(2048), nn.ReLU(inplace=True)), (2048, 2048, None, None)]
    return _of_two_projections(method, ProjectionHead(blocks), BarlowTwinsLoss())


def _vicreg(method: SSLModule, _: int) -> tuple[nn.ModuleDict, Loss]:
    from lightly.loss import VICRegLoss
    from lightly.models.modules.heads import VICRegProjectionHead

    return _of_two_projections(method, VICRegProjectionHead(method.embed_dim, 2048, 2048, num_layers=2), VICRegLoss())


def _of_two_projections(method: SSLModule, head: nn.Module, criterion: nn.Module) -> tuple[nn.ModuleDict, Loss]:
    backbone = backbone_of(method)

    def loss(views: Sequence[Tensor]) -> Tensor:
        return criterion(head(backbone(views[0])), head(backbone(views[1])))

    return nn.ModuleDict({"backbone": backbone, "head": head}), loss


def _mae(method: Any, size: int) -> tuple[nn.ModuleDict, Loss]:
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
    from lightly.models.modules.masked_vision_transformer_timm import init_weights

    options, patch = method.hparams, method.patch_size
    dim = options["decoder_dim"]
    vit: Any = create_backbone(options["backbone"], **{**(options["backbone_kwargs"] or {}), "img_size": size})
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MaskedVisionTransformerDecoderTIMM(
        num_patches=vit.patch_embed.num_patches,
        embed_dim=dim,
        depth=options["decoder_depth"],
        num_heads=options["decoder_heads"],
        num_prefix_tokens=vit.num_prefix_tokens,
    )
    embed, predict = nn.Linear(method.embed_dim, dim), nn.Linear(dim, patch**2 * 3)
    embed.apply(init_weights)
    predict.apply(init_weights)

    def loss(views: Sequence[Tensor]) -> Tensor:
        images = views[0]
        whole = (len(images), backbone.sequence_length)
        kept, masked = utils.random_token_mask(whole, mask_ratio=0.75, device=images.device)
        encoded = embed(backbone.encode(images, idx_keep=kept))
        tokens = utils.set_at_index(encoded.new_zeros(*whole, dim), kept, encoded)
        predictions = predict(utils.get_at_index(decoder(tokens, idx_mask=masked), masked))
        return F.mse_loss(predictions, utils.get_at_index(utils.patchify(images, patch), masked - 1))

    return nn.ModuleDict({"backbone": backbone, "embed": embed, "decoder": decoder, "predict": predict}), loss


# Transforms


def _simclr_transform(size: int) -> Callable[[Any], Any]:
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(size, cj_strength=0.5, gaussian_blur=0.0) if size <= _SMALL else SimCLRTransform(size)


def _moco_v2_transform(size: int) -> Callable[[Any], Any]:
    from lightly.transforms import MoCoV2Transform

    return MoCoV2Transform(size) if size > _SMALL else _simclr_transform(size)


def _byol_transform(size: int) -> Callable[[Any], Any]:
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    blur: dict[str, Any] = {"gaussian_blur": 0.0} if size <= _SMALL else {}
    return BYOLTransform(BYOLView1Transform(size, **blur), BYOLView2Transform(size, **blur))


def _swav_transform(size: int) -> Callable[[Any], Any]:
    from lightly.transforms import SwaVTransform

    if size > _SMALL:
        return SwaVTransform(crop_sizes=(size, _local(size)))
    one_kind: Any = {"crop_sizes": [size], "crop_counts": [2], "crop_min_scales": [0.14], "crop_max_scales": [1.0]}
    return SwaVTransform(**one_kind, cj_strength=0.5, gaussian_blur=0.0)


def _dino_transform(size: int) -> Callable[[Any], Any]:
    from lightly.transforms import DINOTransform

    if size > _SMALL:
        return DINOTransform(global_crop_size=size, local_crop_size=_local(size))
    return DINOTransform(global_crop_size=size, n_local_views=0, gaussian_blur=(0.0, 0.0, 0.0))


def _vicreg_transform(size: int) -> Callable[[Any], Any]:
    from lightly.transforms import VICRegTransform

    return VICRegTransform(size, gaussian_blur=0.0) if size <= _SMALL else VICRegTransform(size)


def _mae_transform(size: int) -> Callable[[Any], Any]:
    from lightly.transforms import MAETransform

    return MAETransform(size)


def _local(size: int) -> int:
    """Size of local crops in pixels: 96 for 224, and a multiple of the usual patches."""
    return max(16, round(size * 96 / 224 / 16) * 16)


# Optimizers


def _sgd(parameters: Sequence[Tensor], batch: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.06 * batch / 128, momentum=0.9, weight_decay=5e-4)


def _adam(parameters: Sequence[Tensor], batch: int) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3 * batch / 128, weight_decay=1e-6)


def _lars(parameters: Sequence[Tensor], batch: int) -> torch.optim.Optimizer:
    from lightly.utils.lars import LARS

    return LARS(parameters, lr=0.3 * batch / 256, momentum=0.9, weight_decay=1e-4)


def _adamw(parameters: Sequence[Tensor], batch: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1.5e-4 * batch / 256, betas=(0.9, 0.95), weight_decay=0.05)


_SGD = _sgd, "SGD, 0.06 per 128 images, momentum 0.9, weight decay 5e-4"
_ADAM = _adam, "Adam, 1e-3 per 128 images, weight decay 1e-6"
_LARS = _lars, "LARS, 0.3 per 256 images, weight decay 1e-4", 0.1
_ADAMW = _adamw, "AdamW, 1.5e-4 per 256 images, betas 0.9 and 0.95, weight decay 0.05", 0.1
_HALF_JITTER = "cj_strength 0.5, no blur"

LIGHTLY = {
    "SimCLR": LightlyMethod(
        _simclr, "temperature 0.5, projector 512-128", f"SimCLRTransform, {_HALF_JITTER}", _simclr_transform, *_SGD
    ),
    "MoCoV2": LightlyMethod(
        _moco_v2,
        "loss in both directions, temperature 0.1, momentum 0.99, queue of 4096, projector 512-128",
        f"SimCLRTransform, {_HALF_JITTER}",
        _moco_v2_transform,
        *_SGD,
    ),
    "BYOL": LightlyMethod(
        _byol, "momentum 0.99, projector and predictor 1024-256", "BYOLTransform, no blur", _byol_transform, *_SGD
    ),
    "SwAV": LightlyMethod(
        _swav,
        "temperature 0.1, epsilon 0.05, projector 512-128, 512 prototypes",
        f"SwaVTransform, two crops of the full size, {_HALF_JITTER}",
        _swav_transform,
        *_ADAM,
    ),
    "DINO": LightlyMethod(
        _dino,
        "temperatures 0.1 and 0.04, momentum 0.99, projector 2048-256, 2048 prototypes",
        f"DINOTransform, no local crops, {_HALF_JITTER}",
        _dino_transform,
        *_SGD,
    ),
    "BarlowTwins": LightlyMethod(
        _barlow_twins, "lambda 5e-3, projector 2048-2048", "BYOLTransform, no blur", _byol_transform, *_SGD
    ),
    "VICReg": LightlyMethod(
        _vicreg, "weights 25, 25 and 1, projector 2048-2048", "VICRegTransform, no blur", _vicreg_transform, *_LARS
    ),
    "MAE": LightlyMethod(
        _mae, "3/4 masked, pixels as they are, our decoder", "MAETransform, defaults", _mae_transform, *_ADAMW
    ),
}
"""lightly's way to train each method, by the name of our class."""
