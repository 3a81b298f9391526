"""lightly's training step for a method, as in its examples and its benchmarks on ImageNet."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.methods.base import SSLModule

_Parts = tuple[Callable[[], Tensor], torch.optim.Optimizer]


def lightly_step(method: SSLModule, views: Sequence[Tensor]) -> tuple[Callable[[], None], list[Tensor]] | None:
    """A function that takes lightly's step, and its parameters; None where lightly lacks the method.

    lightly's heads are as wide as the method's.

    Args:
        method: Our method, whose backbone is copied.
        views: The views to train on.
    """
    compose = _COMPOSED.get(type(method).__name__)
    if compose is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about lightly's use of torch
        loss_of_step, optimizer = compose(method, views)

    def step() -> None:
        loss_of_step().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, [p for group in optimizer.param_groups for p in group["params"]]


def backbone_of(method: SSLModule) -> nn.Module:
    """A copy of the method's backbone, in the memory layout of lightly's examples.

    Args:
        method: Our method.
    """
    return copy.deepcopy(method.backbone).to(memory_format=torch.contiguous_format)


def teacher_of(student: nn.Module) -> nn.Module:
    """A copy that gets no gradients.

    Args:
        student: Backbone or head.
    """
    return copy.deepcopy(student).requires_grad_(False)


def _groups(modules: Sequence[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    from lightly.models.utils import get_weight_decay_parameters

    decayed, undecayed = get_weight_decay_parameters(modules)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


def _simclr(method: Any, views: Sequence[Tensor]) -> _Parts:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.utils.lars import LARS

    options = method.hparams
    width, backbone = method.embed_dim, backbone_of(method)
    head = SimCLRProjectionHead(width, width, options["projector_dim"], options["projector_layers"]).to(views[0].device)
    criterion = NTXentLoss(temperature=method.temperature)

    def loss() -> Tensor:
        return criterion(*head(backbone(torch.cat(list(views)))).chunk(2))

    return loss, LARS(_groups([backbone, head], 1e-6), lr=0.01, momentum=0.9)


def _moco_v2(method: Any, views: Sequence[Tensor]) -> _Parts:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

    options = method.hparams
    width, backbone = method.embed_dim, backbone_of(method)
    head = MoCoProjectionHead(width, width, options["projector_dim"]).to(views[0].device)
    key_backbone, key_head = teacher_of(backbone), teacher_of(head)
    bank = (options["queue_length"], options["projector_dim"])
    criterion = NTXentLoss(temperature=method.temperature, memory_bank_size=bank).to(views[0].device)

    def loss() -> Tensor:
        queries = head(backbone(views[0]))
        update_momentum(backbone, key_backbone, m=method.momentum)
        update_momentum(head, key_head, m=method.momentum)
        with torch.no_grad():
            images, shuffle = batch_shuffle(views[1])
            keys = batch_unshuffle(key_head(key_backbone(images)), shuffle)
        return criterion(queries, keys)

    return loss, torch.optim.SGD(_groups([backbone, head], 1e-4), lr=0.001, momentum=0.9)


def _byol(method: Any, views: Sequence[Tensor]) -> _Parts:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.utils.lars import LARS

    device, backbone = views[0].device, backbone_of(method)
    hidden, projected = method.hparams["hidden_dim"], method.hparams["projector_dim"]
    projector = BYOLProjectionHead(method.embed_dim, hidden, projected).to(device)
    predictor = BYOLPredictionHead(projected, hidden, projected).to(device)
    teacher_backbone, teacher_projector = teacher_of(backbone), teacher_of(projector)
    criterion = NegativeCosineSimilarity()

    def loss() -> Tensor:
        update_momentum(backbone, teacher_backbone, m=method.momentum)
        update_momentum(projector, teacher_projector, m=method.momentum)
        with torch.no_grad():
            targets = [teacher_projector(teacher_backbone(view)) for view in views]
        predictions = [predictor(projector(backbone(view))) for view in views]
        return 2 * criterion(targets[0], predictions[1]) + 2 * criterion(targets[1], predictions[0])

    return loss, LARS(_groups([backbone, projector, predictor], 1e-6), lr=0.01, momentum=0.9)


def _swav(method: Any, views: Sequence[Tensor]) -> _Parts:
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
    from lightly.utils.lars import LARS

    options, device, backbone = method.hparams, views[0].device, backbone_of(method)
    projector = SwaVProjectionHead(method.embed_dim, options["hidden_dim"], options["projector_dim"]).to(device)
    prototypes = SwaVPrototypes(options["projector_dim"], options["num_prototypes"]).to(device)
    criterion = SwaVLoss(method.temperature, method.sinkhorn_iterations, method.epsilon)

    def loss() -> Tensor:
        prototypes.normalize()
        scores = [prototypes(F.normalize(projector(backbone(view)), dim=1)) for view in views]
        return criterion(scores[:2], scores[2:])

    return loss, LARS(_groups([backbone, projector, prototypes], 1e-6), lr=0.01, momentum=0.9)


def _dino(method: Any, views: Sequence[Tensor]) -> _Parts:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum

    options, device, backbone = method.hparams, views[0].device, backbone_of(method)
    widths = (method.embed_dim, options["hidden_dim"], options["bottleneck_dim"], options["num_prototypes"])
    head, teacher_head = DINOProjectionHead(*widths).to(device), DINOProjectionHead(*widths).to(device)
    teacher_head.load_state_dict(head.state_dict())
    teacher_backbone = teacher_of(backbone)
    teacher_head.requires_grad_(False)
    criterion = DINOLoss(options["num_prototypes"]).to(device)
    sizes = [list(views[:2]), list(views[2:])] if len(views) > 2 else [list(views)]

    def loss() -> Tensor:
        with torch.no_grad():
            teacher = teacher_head(teacher_backbone(torch.cat(sizes[0])))
        student = torch.cat([head(backbone(torch.cat(same_size))) for same_size in sizes])
        loss = criterion(teacher.chunk(2), student.chunk(len(views)), epoch=0)
        update_momentum(backbone, teacher_backbone, m=method.momentum)
        update_momentum(head, teacher_head, m=method.momentum)
        return loss

    if hasattr(backbone, "cls_token"):  # SGD is for ResNets
        return loss, torch.optim.AdamW(_groups([backbone, head], 0.04), lr=1e-4)
    return loss, torch.optim.SGD(_groups([backbone, head], 1e-4), lr=0.001, momentum=0.9)


def _mae(method: Any, views: Sequence[Tensor]) -> _Parts:
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM

    options, images = method.hparams, views[0]
    dim, patch = options["decoder_dim"], method.patch_size
    vit = create_backbone(options["backbone"], **{**(options["backbone_kwargs"] or {}), "img_size": images.shape[-1]})
    backbone = MaskedVisionTransformerTIMM(vit=vit).to(images.device)
    decoder = MaskedVisionTransformerDecoderTIMM(
        num_patches=backbone.vit.patch_embed.num_patches,
        embed_dim=dim,
        depth=options["decoder_depth"],
        num_heads=options["decoder_heads"],
    )
    heads = nn.ModuleList([nn.Linear(method.embed_dim, dim), decoder, nn.Linear(dim, patch**2 * 3)]).to(images.device)
    size = (len(images), backbone.sequence_length)

    def loss() -> Tensor:
        keep, mask = utils.random_token_mask(size, method.mask_ratio, device=images.device)
        tokens = heads[0](backbone.encode(images, idx_keep=keep))
        tokens = utils.set_at_index(utils.repeat_token(decoder.mask_token, size), keep, tokens)
        predictions = heads[2](utils.get_at_index(decoder.decode(decoder.add_pos_embed(tokens)), mask))
        targets = utils.get_at_index(utils.patchify(images, patch), mask - 1)
        return F.mse_loss(predictions, targets)

    return loss, torch.optim.AdamW(_groups([backbone, heads], 0.05), lr=1e-4, betas=(0.9, 0.95))


_COMPOSED: dict[str, Callable[[Any, Sequence[Tensor]], _Parts]] = {
    "SimCLR": _simclr,
    "MoCoV2": _moco_v2,
    "BYOL": _byol,
    "SwAV": _swav,
    "DINO": _dino,
    "MAE": _mae,
}
