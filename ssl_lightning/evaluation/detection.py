"""Object detection on a pretrained backbone."""

import inspect
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from ssl_lightning.distributed import gather_objects
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.dense import DenseTask, PatchMap, stages
from ssl_lightning.optim import Optim

Objects = dict[str, Tensor]
_WIDTH = 256


class ObjectDetector(DenseTask):
    """Faster R-CNN (Ren et al. 2015) with a feature pyramid on a pretrained backbone, as torchvision builds it.

    A ResNet gets the FPN of Lin et al. 2017, a ViT the simple feature pyramid of ViTDet. The anchors of a level are
    eight times as large as its stride: 32 to 512 px for the usual strides. Logs ``val/map``, COCO's average precision
    as a mean over the overlaps 0.5 to 0.95, and ``val/map_50``, at the overlap 0.5. Needs
    ``pip install "ssl_lightning[detection]"``.

    Args:
        checkpoint: What to transfer: a checkpoint, the name of a model with its library's weights, or ``untrained``.
        backbone: Name of the timm or torchvision model, if ``untrained`` or if the checkpoint does not name it.
        backbone_kwargs: Arguments for building the backbone, e.g. ``{img_size: 96}``.
        num_classes: Number of classes, without the background. None takes the number from the data module.
        frozen: Whether the backbone is not trained, and stays in eval mode.
        frozen_batch_norm: Whether the backbone's BatchNorm keeps its statistics and weights even if the backbone is
            trained. None means true unless the backbone is untrained, as in torchvision.
        min_size: Shorter side that images are resized to, in pixels.
        max_size: Largest length of the longer side, in pixels.
        detector_kwargs: Further arguments of torchvision's ``FasterRCNN``, e.g. ``{box_detections_per_img: 300}``.
        optim: Optimizer and learning-rate schedule. The default has the learning rate of torchvision's reference, 0.02
            for 16 images.
        branch: Which network of the checkpoint to read, by a part of its name, e.g. student; None follows the paper.
    """

    def __init__(
        self,
        checkpoint: str,
        backbone: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        num_classes: int | None = None,
        frozen: bool = False,
        frozen_batch_norm: bool | None = None,
        min_size: int = 800,
        max_size: int = 1333,
        detector_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim("sgd", base_lr=0.32, weight_decay=1e-4, warmup_epochs=1.0),
        branch: str | None = None,
    ) -> None:
        super().__init__(checkpoint, backbone, backbone_kwargs, num_classes, frozen, optim, branch)
        if frozen_batch_norm is None:
            frozen_batch_norm = self.hparams["frozen_batch_norm"] = checkpoint != "untrained"
        sizes = {"min_size": min_size, "max_size": max_size}
        self.detector = self._detector(frozen_batch_norm, {**sizes, **(detector_kwargs or {})})
        self._compared: list[tuple[Objects, Objects]] = []
        self.configure_model()

    def _detector(self, frozen_batch_norm: bool, kwargs: dict[str, Any]) -> Any:
        """The detector, with a placeholder for its classifier of boxes."""
        from timm.layers import freeze_batch_norm_2d  # only here: reading help texts should not wait for timm
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        backbone: Any = self.pretrained.backbone
        if frozen_batch_norm:
            backbone = freeze_batch_norm_2d(backbone)
        body = stages(backbone, self.pretrained.name, first=1)
        patch = backbone.patch_side if isinstance(body, PatchMap) else 1
        if patch & (patch - 1):
            raise UserError(f"a detector needs patches of 8, 16 or 32 px, not {patch}: strides must be powers of two.")
        side = 8 * max(16, patch)
        with torch.no_grad():
            maps = body(torch.zeros(1, 3, side, side))
            widths = [level.shape[1] for level in maps.values()]
            if isinstance(body, PatchMap):
                fpn: nn.Module = SimpleFeaturePyramid(widths[0], _WIDTH)
            else:
                fpn = FeaturePyramidNetwork(widths, _WIDTH, LastLevelMaxPool())
            strides = [side // level.shape[-1] for level in fpn(maps).values()]
        pyramid: Any = nn.Sequential(OrderedDict(body=body, fpn=fpn))
        pyramid.out_channels = _WIDTH
        anchors = AnchorGenerator(tuple((8 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
        pyramid_kwargs = {"size_divisible": max(32, 2 * patch), "rpn_anchor_generator": anchors}
        plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}  # ``prepared`` normalizes
        if unknown := kwargs.keys() - inspect.signature(FasterRCNN).parameters.keys():  # FasterRCNN would ignore it
            raise UserError(f"torchvision's FasterRCNN has no argument {min(unknown)}; check --model.detector_kwargs.")
        return FasterRCNN(pyramid, **{"num_classes": 2, **pyramid_kwargs, **plain, **kwargs})

    @property
    def body(self) -> nn.Module:
        """The backbone, without the feature pyramid."""
        return self.detector.backbone.body

    def build(self, num_classes: int) -> None:
        """Build the classifier of boxes, and the metric.

        Args:
            num_classes: Number of classes.
        """
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

        heads, background = self.detector.roi_heads, 1
        heads.box_predictor = FastRCNNPredictor(heads.box_predictor.cls_score.in_features, num_classes + background)
        try:
            # its own synchronization would need equally many images on each process
            self.average_precision = MeanAveragePrecision(sync_on_compute=False)
        except ModuleNotFoundError as error:
            raise UserError('average precision needs pycocotools; pip install "ssl_lightning[detection]".') from error

    def forward(self, images: list[Tensor]) -> list[Objects]:
        """In eval mode: boxes, labels from 1 on and scores of the objects in images ``(3, H, W)``, uint8 or in [0, 1].

        Args:
            images: Images of any sizes.
        """
        return self.detector([self.prepared(image) for image in images])

    def training_step(self, batch: tuple[list[Tensor], list[Objects]], batch_idx: int) -> Tensor:
        """Sum of the four losses of Faster R-CNN.

        Args:
            batch: Images ``(3, H, W)`` of any sizes, and for each image ``boxes`` ``(N, 4)`` as x0, y0, x1, y1 in
                pixels and ``labels`` ``(N,)`` from 1 on.
            batch_idx: Unused.
        """
        images, targets = batch
        losses = self.detector([self.prepared(image) for image in images], targets)
        loss = torch.stack(list(losses.values())).sum()
        named = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict({"train/loss": loss.detach(), **named}, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[list[Tensor], list[Objects]], batch_idx: int) -> None:
        """Detect objects, and keep them for the average precision.

        Args:
            batch: As for training; ``iscrowd`` ``(N,)`` marks objects that do not count.
            batch_idx: Unused.
        """
        images, targets = batch
        for pair in zip(self(images), targets, strict=True):
            detected, actual = ({name: value.cpu() for name, value in objects.items()} for objects in pair)
            self._compared.append((detected, actual))

    def on_validation_epoch_end(self) -> None:
        """Log the average precision over the images of all processes."""
        detected, actual = zip(*gather_objects(self._compared), strict=True)
        self._compared.clear()
        self.average_precision.update([*detected], [*actual])
        values = self.average_precision.compute()
        self.average_precision.reset()
        self.log("val/map", values["map"], prog_bar=True, sync_dist=True)
        self.log("val/map_50", values["map_50"], prog_bar=True, sync_dist=True)


class SimpleFeaturePyramid(nn.Module):
    """Levels of strides P / 4, P / 2, P and 2 P from the single feature map of a ViT with patches of P px (ViTDet).

    Source: Li et al. 2022, Exploring Plain Vision Transformer Backbones for Object Detection, section 3. As in an FPN,
    a fifth level for the largest anchors is subsampled from the last one.

    Args:
        width: Channels of the map.
        out_channels: Channels of each level.
    """

    def __init__(self, width: int, out_channels: int) -> None:
        from timm.layers import LayerNorm2d

        super().__init__()
        half, quarter = width // 2, width // 4
        scales = [
            nn.Sequential(_double(width, half), LayerNorm2d(half), nn.GELU(), _double(half, quarter)),
            _double(width, half),
            nn.Identity(),
            nn.MaxPool2d(2),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for scale, channels in zip(scales, (quarter, half, width, width), strict=True)
        )

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Five levels ``(B, out_channels, h, w)``."""
        levels = {str(number): level(maps["0"]) for number, level in enumerate(self.levels)}
        return {**levels, "pool": F.max_pool2d(levels["3"], kernel_size=1, stride=2)}


def _double(width: int, out_channels: int) -> nn.Module:
    return nn.ConvTranspose2d(width, out_channels, kernel_size=2, stride=2)
