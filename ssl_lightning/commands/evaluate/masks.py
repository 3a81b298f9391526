"""Evaluation of the features of patches, on images with masks or depth maps."""

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from ssl_lightning.checkpoints import Pretrained
from ssl_lightning.commands.evaluate.evaluator import Evaluator
from ssl_lightning.data.dense import DenseData
from ssl_lightning.evaluation.patch_depth import DepthProtocol, PatchDepth
from ssl_lightning.evaluation.patch_features import PatchFeatures, check_splits
from ssl_lightning.evaluation.patch_segmenter import PatchProtocol, PatchSegmenter, segmenter_of
from ssl_lightning.evaluation.results import Results

_Judge = PatchSegmenter | PatchDepth


class PatchEvaluation(Evaluator):
    """Base of the evaluations of patches; see ``SegmentationEvaluation`` for the arguments."""

    def __init__(
        self,
        checkpoint: str,
        data: DenseData,
        backbone: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        branch: str | None = None,
        seed: int = 0,
        output: str | None = None,
        trainer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(checkpoint, backbone, backbone_kwargs, branch, seed, output, trainer)
        self.data = data

    def _judged(self, judge: Callable[[], _Judge], targets: Literal["masks", "depths"]) -> tuple[Any, Any, Any] | None:
        """What a judge measures, the judge, and facts about the data; None on processes other than the first."""
        trainer, module = self._trainer(), _Judging(self.pretrained, judge, targets)
        trainer.predict(module, self.data, return_predictions=False)
        if not trainer.is_global_zero:
            return None
        train, test = self.data.splits
        facts = {
            "data": type(self.data).__name__,
            "root": str(self.data.root),
            "train_images": len(train),
            "test_images": len(test),
            "classes": self.data.num_classes,
            "image_size": module.image_size,
        }
        return module.measures, module.judge, facts


class SegmentationEvaluation(PatchEvaluation):
    """What to evaluate: the patches of a backbone, on images with masks. The backbone is not trained.

    Args:
        checkpoint: A checkpoint file, a folder of weights or ``hf-hub:NAME``; or the name of a timm or torchvision
            model, to use its pretrained weights; or the baseline ``untrained`` (random weights).
        data: Training and validation images with masks, e.g. VOCSegmentationData.
        backbone: Name of the timm or torchvision model; only for ``untrained`` and for checkpoints that do not name it.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 96}``.
        branch: Which network of the checkpoint to read, by a part of its name, e.g. student; None follows the paper.
        seed: Seed for initial weights and the choice of patches.
        output: Folder in which ``PROTOCOL/results.json`` is written; None is ``evaluations`` in the checkpoint's run.
        trainer: Arguments of Lightning's Trainer, e.g. ``{devices: 2, precision: bf16-mixed}``; one device by default.
    """

    def segmentation_knn(
        self,
        protocol: Literal["hummingbird", "capi"] = "hummingbird",
        k: int | None = None,
        distance: Literal["cosine", "l2"] | None = None,
        temperature: float = 0.02,
        memory_size: int | None = 200_000,
        ignored: list[int] | None = None,
    ) -> Results | None:
        """Segmentation by the nearest training patches: mean intersection over union, and accuracy of pixels.

        ``hummingbird``: the nearest patches vote with the shares of their classes, and the votes are interpolated to
        the whole mask (Balazevic et al. 2023). Ignored pixels count as class 0 in the memory, as in the released code.
        ``capi``: features are standardized, and the nearest patches vote for each pixel of a patch, on masks resized
        like the images (Darcet et al. 2025).

        Args:
            protocol: ``hummingbird`` or ``capi``.
            k: Number of nearest patches. None is 30 for ``hummingbird``; ``capi`` chooses among 1, 3, 10 and 30 on a
                tenth of the training images.
            distance: Only for ``capi``: ``cosine`` or ``l2``; None chooses.
            temperature: Only for ``hummingbird``: divides the cosine similarities.
            memory_size: Largest number of training patches, the same of each image, rare classes first; None takes all.
            ignored: Labels that do not count; None is 255.
        """
        more = {"temperature": temperature} if protocol == "hummingbird" else {"distance": distance}
        ignored = [255] if ignored is None else ignored
        chosen = PatchProtocol(protocol, k, memory_size=memory_size, ignored=tuple(ignored), seed=self.seed, **more)
        return self._segmented("segmentation_knn", chosen, {"protocol": protocol, "k": k or 30, **more})

    def segmentation_linear(
        self, memory_size: int | None = 200_000, ignored: list[int] | None = None
    ) -> Results | None:
        """Segmentation by a linear classifier on patches: mean intersection over union, and accuracy of pixels.

        A logistic regression on the patches that ``segmentation_knn`` remembers, without augmentation; its outputs are
        interpolated to the whole mask. ``SemanticSegmenter`` trains on augmented images instead.

        Args:
            memory_size: Largest number of training patches, the same of each image, rare classes first; None takes all.
            ignored: Labels that do not count; None is 255.
        """
        ignored = [255] if ignored is None else ignored
        chosen = PatchProtocol("linear", memory_size=memory_size, ignored=tuple(ignored), seed=self.seed)
        return self._segmented("segmentation_linear", chosen, {})

    def _segmented(self, name: str, protocol: PatchProtocol, parameters: dict[str, Any]) -> Results | None:
        judged = self._judged(lambda: segmenter_of(protocol, self.data), "masks")
        if judged is None:
            return None
        measures, segmenter, facts = judged
        size = {"memory_size": segmenter.memory.size, "ignored": [*protocol.ignored]}
        parameters = {**parameters, **segmenter.chosen}
        row = {**parameters, "image size": facts["image_size"], "patches": segmenter.memory.size}
        row |= {"mIoU, %": 100 * measures["miou"], "pixels, %": 100 * measures["pixel_accuracy"]}
        return self._written(name, {**parameters, **size}, facts, [row], measures=measures)


class DepthEvaluation(PatchEvaluation):
    """What to evaluate: the patches of a backbone, on images with depth maps. The backbone is not trained.

    Args:
        checkpoint: A checkpoint file, a folder of weights or ``hf-hub:NAME``; or the name of a timm or torchvision
            model, to use its pretrained weights; or the baseline ``untrained`` (random weights).
        data: Training and validation images with depth maps, e.g. DepthData.
        backbone: Name of the timm or torchvision model; only for ``untrained`` and for checkpoints that do not name it.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 96}``.
        branch: Which network of the checkpoint to read, by a part of its name, e.g. student; None follows the paper.
        seed: Seed for initial weights and the choice of patches.
        output: Folder in which ``PROTOCOL/results.json`` is written; None is ``evaluations`` in the checkpoint's run.
        trainer: Arguments of Lightning's Trainer, e.g. ``{devices: 2, precision: bf16-mixed}``; one device by default.
    """

    def depth(
        self, bins: int = 64, max_depth: float | None = None, memory_size: int | None = 200_000
    ) -> Results | None:
        """Depth by a linear layer on patches: root mean squared error, mean relative error, and delta < 1.25.

        As in DINOv2 the layer weighs depths. Here they are evenly spread in their logarithm, and the layer is trained
        by cross-entropy, without augmentation, on patches that are extracted once. The depth of a patch is interpolated
        to the depth map. Delta < 1.25 is the share of the pixels within a factor of 1.25. All are means over images.

        Args:
            bins: Number of depths that the layer weighs.
            max_depth: Pixels that are deeper, in meters, do not count, e.g. 10 for NYU and 80 for KITTI; None counts
                all.
            memory_size: Largest number of training patches, the same of each image, at random; None takes all.

        Raises:
            UserError: No pixel counts.
        """
        protocol = DepthProtocol(bins, max_depth, memory_size, self.seed)
        judged = self._judged(lambda: _depth_of(protocol, self.data), "depths")
        if judged is None:
            return None
        measures, judge, facts = judged
        parameters = {"bins": bins, "max_depth": max_depth, "memory_size": judge.memory.size}
        row = {"bins": bins, "image size": facts["image_size"], "patches": judge.memory.size}
        row |= {"RMSE, m": measures["rmse"], "AbsRel": measures["abs_rel"], "delta < 1.25, %": 100 * measures["delta1"]}
        return self._written("depth", parameters, facts, [row], measures=measures)


def _depth_of(protocol: DepthProtocol, data: DenseData) -> PatchDepth:
    check_splits(data)
    return PatchDepth(protocol, len(data.splits[0]))


class _Judging(L.LightningModule):
    """Shows images to a judge of patches under ``Trainer.predict``."""

    judge: _Judge

    def __init__(self, pretrained: Pretrained, make: Callable[[], _Judge], targets: Literal["masks", "depths"]) -> None:
        super().__init__()
        self.backbone, self.make = pretrained.backbone.eval(), make
        self.features = PatchFeatures(self.backbone, pretrained.name, pretrained.image_transform, targets)
        self.measures: dict[str, float] = {}
        self.image_size = 0

    def on_predict_start(self) -> None:
        """Start with an empty memory."""
        self.judge = self.make()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Remember training images, then score validation images."""
        maps, targets, side = self.features(batch)
        self.image_size = batch[0].shape[-1]
        (self.judge.score if dataloader_idx else self.judge.remember)(maps, targets, side)
        return torch.empty(0)

    def on_predict_end(self) -> None:
        """Count over all processes."""
        self.measures = self.judge.measures()
