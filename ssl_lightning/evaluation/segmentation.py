"""Semantic segmentation on a pretrained backbone."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from ssl_lightning.evaluation.dense import DenseTask, stages
from ssl_lightning.optim import Optim

_IGNORED = 255


class SemanticSegmenter(DenseTask):
    """Classifies every pixel from the backbone's last feature map, upsampled bilinearly.

    The defaults are the linear evaluation of DINOv2 (Oquab et al. 2023, section 7.4): a frozen backbone, and a linear
    layer with BatchNorm on its patch tokens. Logs ``val/miou``, the mean over classes of intersection over union, and
    ``val/pixel_accuracy``; pixels of class 255 are ignored.

    Args:
        checkpoint: What to transfer: a checkpoint, the name of a model with its library's weights, or ``untrained``.
        backbone: Name of the timm or torchvision model, if ``untrained`` or if the checkpoint does not name it.
        backbone_kwargs: Arguments for building the backbone, e.g. ``{img_size: 96}``.
        num_classes: Number of classes, including the background. None takes the number from the data module.
        head: ``linear``: BatchNorm and a convolution of 1 px; ``fcn``: torchvision's FCN head.
        frozen: Whether the backbone is not trained, and stays in eval mode.
        optim: Optimizer and learning-rate schedule.
        branch: Which network of the checkpoint to read, by a part of its name, e.g. student; None follows the paper.
    """

    def __init__(
        self,
        checkpoint: str,
        backbone: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        num_classes: int | None = None,
        head: Literal["linear", "fcn"] = "linear",
        frozen: bool = True,
        optim: Optim = Optim("adamw", base_lr=1e-3, lr_scaling="none", weight_decay=1e-4, warmup_epochs=0.0),
        branch: str | None = None,
    ) -> None:
        super().__init__(checkpoint, backbone, backbone_kwargs, num_classes, frozen, optim, branch)
        self.backbone, self.head_name = stages(self.pretrained.backbone, self.pretrained.name, first=4), head
        self.configure_model()

    @property
    def body(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    def build(self, num_classes: int) -> None:
        """Build the head and the metrics.

        Args:
            num_classes: Number of classes.
        """
        from torchvision.models.segmentation.fcn import FCNHead

        width = self.pretrained.embed_dim
        linear = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, num_classes, kernel_size=1))
        self.head = linear if self.head_name == "linear" else FCNHead(width, num_classes)
        counted: dict[str, Any] = {"ignore_index": _IGNORED, "validate_args": False}  # checks wait for the device
        self.miou = MulticlassJaccardIndex(num_classes, **counted)
        self.pixel_accuracy = MulticlassAccuracy(num_classes, average="micro", **counted)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, num_classes, H, W)`` of images ``(B, 3, H, W)``, uint8 or in [0, 1]."""
        return _upsampled(self._logits(images), images.shape[-2:])

    def _logits(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(self.prepared(images))["0"])  # (B, num_classes, h, w)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the pixels.

        Args:
            batch: Images ``(B, 3, H, W)``, and masks ``(B, H, W)`` of classes.
            batch_idx: Unused.
        """
        images, masks = batch
        losses = F.cross_entropy(self(images), masks.long(), ignore_index=_IGNORED, reduction="sum")
        loss = losses / (masks != _IGNORED).sum().clamp(min=1)
        self.log("train/loss", loss.detach(), batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Sequence[Tensor]], batch_idx: int) -> None:
        """Compare with masks of any size, pixel by pixel.

        Args:
            batch: Images ``(B, 3, H, W)``, and for each image a mask ``(H', W')``.
            batch_idx: Unused.
        """
        images, masks = batch
        for logits, mask in zip(self._logits(images).split(1), masks, strict=True):
            predicted = _upsampled(logits, mask.shape[-2:]).argmax(dim=1)  # (1, H', W')
            self.miou.update(predicted, mask.long()[None])
            self.pixel_accuracy.update(predicted, mask.long()[None])

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all processes."""
        for name, metric in (("val/miou", self.miou), ("val/pixel_accuracy", self.pixel_accuracy)):
            self.log(name, metric.compute(), prog_bar=True, sync_dist=True)
            with torch.inference_mode(False):  # otherwise later training could not update it
                metric.reset()


def _upsampled(logits: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(logits.float(), size, mode="bilinear")
