"""Small methods, data and trainers for real trainings of a second, and the parameters of tests of every method."""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import ssl_lightning
from ssl_lightning import (
    BYOL,
    CAPI,
    DINO,
    IBOT,
    IJEPA,
    MAE,
    NNCLR,
    NPID,
    BarlowTwins,
    BEiT,
    DeepClusterV2,
    DigitsData,
    DINOv2,
    Distillation,
    FakeData,
    GramAnchoring,
    ImageTokenizer,
    Jigsaw,
    LeJEPA,
    MoCoV2,
    MoCoV3,
    Optim,
    ReSA,
    SimCLR,
    SimDINO,
    SimDINOv2,
    SimMIM,
    SimSiam,
    SSLModule,
    SwAV,
    VICReg,
    ViewSpec,
    VISReg,
)

METHODS: list[type[SSLModule]] = [
    value
    for value in vars(ssl_lightning).values()
    if isinstance(value, type) and issubclass(value, SSLModule) and value is not SSLModule
]
"""All of the package."""

# 16 channels: from 8, torch 2.14 crashes in the backward pass of 1 x 1 convolutions of stride 2 (channels last, 56 px).
BACKBONE: dict[str, Any] = {
    "backbone": "resnet10_cifar",
    "backbone_kwargs": {"stem_stride": 2, "channels": (16, 16, 16, 16)},
}
VIT: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_kwargs": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3},
}
# Its layer scale of 1e-5 would make all images nearly alike, and BatchNorm would enlarge rounding errors.
DINOV3: dict[str, Any] = {
    **VIT,
    "backbone": "vit_small_patch16_dinov3",
    "backbone_kwargs": {**VIT["backbone_kwargs"], "init_values": 0.1},
}
LORA: dict[str, Any] = {**VIT, "trainable": "lora"}
SWIN: dict[str, Any] = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_kwargs": {"img_size": 32, "depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2), "window_size": 4},
}
TOKENS = {"num_tokens": 32, "token_dim": 8, "decoder_dim": 16}


def _untrained(name: str, method: type[SSLModule], **kwargs: Any) -> str:
    """Checkpoint of an untrained method, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = method(**kwargs)
    file = Path(tempfile.mkdtemp()) / f"{name}.ckpt"
    atexit.register(shutil.rmtree, file.parent, ignore_errors=True)
    described = {"hyper_parameters": dict(module.hparams), "pytorch-lightning_version": L.__version__}
    torch.save({"state_dict": module.state_dict(), **described}, file)
    return str(file)


TOKENIZER = _untrained("tokenizer", ImageTokenizer, **BACKBONE, **TOKENS)
TEACHER = _untrained("teacher", SimCLR, **BACKBONE)
HEADS: dict[type[SSLModule], dict[str, Any]] = {
    BarlowTwins: {"hidden_dim": 32, "projector_dim": 32},
    BYOL: {"hidden_dim": 32},
    CAPI: {**VIT, "num_prototypes": 16, "predicted_share": 0.25, "predictor_depth": 1},
    BEiT: {
        "tokenizer": TOKENIZER,
        "num_tokens": 32,
        "smallest_block": 2,
        "probe_every": 2,
        "backbone": VIT["backbone"],
        "backbone_kwargs": {**VIT["backbone_kwargs"], "drop_path_rate": 0.0},
    },
    DINO: {**BACKBONE, "num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
    DeepClusterV2: {"num_prototypes": 16, "prototype_sets": 3, "hidden_dim": 32, "projector_dim": 16},
    DINOv2: {**VIT, "num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
    Distillation: {"teacher": TEACHER},
    GramAnchoring: {**VIT, "num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16, "gram_start": 0.5},
    IBOT: {**VIT, "num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
    IJEPA: {**VIT, "predictor_dim": 24, "predictor_depth": 1, "min_context": 1},
    LeJEPA: {"hidden_dim": 32, "projection_dim": 16, "num_slices": 64},
    ImageTokenizer: {**TOKENS, "probe_every": 2},
    MAE: {**VIT, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, "probe_every": 2},
    MoCoV2: {"queue_length": 64, "bn_splits": 2},
    MoCoV3: {**BACKBONE, "hidden_dim": 32},
    NNCLR: {"queue_length": 64, "hidden_dim": 32, "predictor_dim": 32, "projector_dim": 32},
    ReSA: {"hidden_dim": 32, "projector_dim": 16, "predictor_dim": 32},
    SimSiam: {"hidden_dim": 32, "projector_dim": 32, "predictor_dim": 16},
    Jigsaw: {"num_permutations": 16, "patch_size": 8, "hidden_dim": 16, "probe_every": 2},
    NPID: {"nce_k": 32, "projector_dim": 16},
    SimDINO: {**BACKBONE, "hidden_dim": 32, "projector_dim": 16},
    SimDINOv2: {**VIT, "hidden_dim": 32, "projector_dim": 16},
    SimMIM: {**VIT, "mask_unit": 8, "probe_every": 2},
    SwAV: {"num_prototypes": 16, "hidden_dim": 32, "queue_length": 0, "freeze_prototypes_steps": 1},
    VICReg: {"hidden_dim": 32, "projector_dim": 32},
    VISReg: {"hidden_dim": 32, "projection_dim": 16, "num_slices": 64},
}
"""Arguments that make each method small; the others are small with a small backbone."""

VIT_ONLY: set[type[SSLModule]] = {CAPI, BEiT, IBOT, IJEPA, MAE, DINOv2, GramAnchoring, SimDINOv2, SimMIM}
"""Methods that train no CNN."""

CNN_AND_VIT: list[tuple[type[SSLModule], dict[str, Any]]] = [
    (method, net)
    for method in METHODS
    for net in ({}, VIT, DINOV3)
    if (net or method not in VIT_ONLY) and (net is not DINOV3 or method in {*VIT_ONLY, DINO, MoCoV3, SimDINO})
]
"""Each method with arguments for each kind of backbone that it trains; DINOv3's ViT where it differs from a ViT."""


class Endless(torch.utils.data.IterableDataset[Any]):
    """Batches of two views of random images, without an end or a length."""

    def __iter__(self) -> Any:
        while True:
            yield [torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32)], torch.zeros(8)


needs_fsdp2 = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reshard_after_forward"), reason="the strategy fsdp2 needs torch 2.8"
)


def slow_unless(plain: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test, marked slow unless ``plain`` of them is true."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, id=_name(row), marks=() if plain(*row) else pytest.mark.slow) for row in rows]


def _name(row: tuple[Any, ...]) -> str | None:
    """Such as SimCLR or SimCLR-vit; pytest finds a name for parameters of other kinds."""
    method, *nets = row
    if not isinstance(method, type) or not all(isinstance(net, dict) for net in nets):
        return None
    kinds = [
        "lora" if net is LORA else "dinov3" if net is DINOV3 else "vit" if "vit" in net.get("backbone", "") else "cnn"
        for net in nets
    ]
    return "-".join([method.__name__, *kinds])


every_method = pytest.mark.parametrize("method", slow_unless(lambda _: True, METHODS))
some_methods = pytest.mark.parametrize(
    "method", slow_unless(lambda method: method in (MoCoV2, SwAV, DINO, MAE), METHODS)
)
"""A queue, several sizes of crops, a teacher, and masked patches in the plain tests, all methods in the slow ones."""
every_backbone = pytest.mark.parametrize(
    ("method", "net"), slow_unless(lambda method, net: not net or (method in VIT_ONLY and net is VIT), CNN_AND_VIT)
)
"""One backbone of each method in the plain tests, all in the slow ones."""

CROPS = [ViewSpec(size=32, count=2), ViewSpec(size=16, count=2)]
DIGIT_VIEW = ViewSpec(size=16, count=2, scale=(0.5, 1), ratio=(0.9, 1.1), flip=0, jitter=0.8, brightness=0.4)
ADAMW = Optim("adamw", base_lr=1e-3, lr_scaling="none", warmup_epochs=0)


class Viewed(nn.Module):
    """For images of 32 px, with a ``view`` that an unusual layout of memory does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(1, 4, 8, stride=8), nn.Linear(64, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images).view(len(images), -1))


def small(method: type[SSLModule], *more: dict[str, Any], **kwargs: Any) -> Any:
    """A method of some ten thousand parameters."""
    heads = next((HEADS[base] for base in method.__mro__ if base in HEADS), {})
    arguments = {**BACKBONE, "optim": ADAMW, **heads}
    for part in (*more, kwargs):
        arguments |= part
    return method(**arguments)


def met(module: Any, images: int) -> Any:
    """A method that has met a batch of the first images, as within a training: for calls of ``training_loss``."""
    module.image_indices = torch.arange(images)
    if isinstance(module, NPID):
        module.remember(2 * images)
    if isinstance(module, DeepClusterV2):
        module.memory.resize(2 * images)
    return module


def simclr(**kwargs: Any) -> SimCLR:
    """SimCLR with a ResNet of 17 thousand parameters."""
    return SimCLR(**{**BACKBONE, "optim": ADAMW, **kwargs})


def data(method: type[SSLModule], **kwargs: Any) -> FakeData:
    """64 images in batches of 8, with local crops for the methods that take them."""
    return FakeData(**{"batch_size": 8, "seed": 0, "views": CROPS if method.local_views else None, **kwargs})


def digits(**kwargs: Any) -> DigitsData:
    """The digits in batches of 128: 11 steps an epoch."""
    return DigitsData(**{"batch_size": 128, "views": [DIGIT_VIEW], "seed": 0, **kwargs})


def trainer(folder: Path, **kwargs: Any) -> L.Trainer:
    """A quiet trainer on the CPU."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "default_root_dir": folder}
    return L.Trainer(**{**quiet, **defaults, **kwargs})
