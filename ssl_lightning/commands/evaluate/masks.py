"""Evaluation of the features of patches, on images with masks."""

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from ssl_lightning.checkpoints import Pretrained
from ssl_lightning.commands.evaluate.evaluator import Evaluator
from ssl_lightning.data.dense import DenseData
from ssl_lightning.evaluation.patch_segmenter import PatchFeatures, PatchProtocol, PatchSegmenter, segmenter_of
from ssl_lightning.evaluation.results import Results


class SegmentationEvaluation(Evaluator):
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
        trainer, module = self._trainer(), _Segmenting(self.pretrained, protocol)
        trainer.predict(module, self.data, return_predictions=False)
        if not trainer.is_global_zero:
            return None
        measures, segmenter = module.measures, module.segmenter
        size = {"memory_size": segmenter.memory_size, "ignored": [*protocol.ignored]}
        train, test = self.data.splits
        facts = {
            "data": type(self.data).__name__,
            "root": str(self.data.root),
            "train_images": len(train),
            "test_images": len(test),
            "classes": self.data.num_classes,
            "image_size": module.image_size,
        }
        parameters = {**parameters, **segmenter.chosen}
        row = {**parameters, "image size": module.image_size, "patches": segmenter.memory_size}
        row |= {"mIoU, %": 100 * measures["miou"], "pixels, %": 100 * measures["pixel_accuracy"]}
        return self._written(name, {**parameters, **size}, facts, [row], measures=measures)


class _Segmenting(L.LightningModule):
    """Runs a ``PatchSegmenter`` under ``Trainer.predict``."""

    segmenter: PatchSegmenter

    def __init__(self, pretrained: Pretrained, protocol: PatchProtocol) -> None:
        super().__init__()
        self.backbone, self.protocol = pretrained.backbone.eval(), protocol
        self.features = PatchFeatures(self.backbone, pretrained.name, pretrained.image_transform)
        self.measures: dict[str, float] = {}
        self.image_size = 0

    def on_predict_start(self) -> None:
        """Start with an empty memory."""
        data: Any = getattr(self.trainer, "datamodule", None)
        self.segmenter = segmenter_of(self.protocol, data)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Remember training images, then score validation images."""
        maps, masks, side = self.features(batch)
        self.image_size = batch[0].shape[-1]
        (self.segmenter.score if dataloader_idx else self.segmenter.remember)(maps, masks, side)
        return torch.empty(0)

    def on_predict_end(self) -> None:
        """Count over all processes."""
        self.measures = self.segmenter.measures()
