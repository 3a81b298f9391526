"""Monitors the quality of the features during training, without labels."""

import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ssl_lightning.callbacks.blank_views import count_blank_views
from ssl_lightning.callbacks.features import in_eval_mode, plain_features
from ssl_lightning.callbacks.interval import EveryEpochs, Interval, counted_data
from ssl_lightning.distributed import gather
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.clusters import cluster_measures
from ssl_lightning.evaluation.quality import alignment, feature_measures, lidar

_WATCHING = 0.0025
"""Share of the training that ``auto`` allows."""
_CLUSTERS = 10
_LIDAR_IMAGES = 1024


class HealthMonitor(L.Callback):
    """Logs measures of the features that need no labels: rank, spectrum, spread, alignment, and the method's state.

    ``health/rankme``, ``health/alpha_req``, ``health/feature_std`` and ``health/uniformity`` are computed on some
    training images, prepared as for evaluation; if the data has no labels, also ``health/silhouette`` of 10 clusters.
    ``health/alignment``, ``health/lidar`` (of the first two views of at most 1,024 images) and
    ``health/teacher_agreement`` (mean cosine similarity of the teacher's and the student's features) are computed on
    the last training batch, as is ``health/blank_views``: the share of the views that show nothing, since the pixels of
    each channel, from 0 to 1, deviate by less than 0.02. Some of these views are kept for the page of the run. So few
    views bound LiDAR: compare it only between runs of the same batch size;
    ``evaluate quality`` takes more. The method's ``health`` adds its own. See ``ssl_lightning.evaluation`` for the
    formulas. This takes one pass over a small part of the data; its duration is printed once.

    Args:
        num_images: Number of training images to use, evenly spread. None means 1/32 of them, at least 64 and at most
            2,048.
        every_n_epochs: Run every this many epochs. ``auto`` runs after the first and the last epoch, and in between so
            often that it takes at most 0.25 % of the training. It counts images instead of measuring time, and says
            what it chose.
    """

    def __init__(self, num_images: int | None = None, every_n_epochs: EveryEpochs = "auto") -> None:
        self.interval = Interval(every_n_epochs, "--health_monitor.every_n_epochs", _WATCHING)
        if num_images is not None and num_images < 2:
            raise UserError(f"--health_monitor.num_images={num_images} must be at least 2.")
        self.num_images = num_images
        self.looked_in: int | None = None
        """The last epoch in which the monitor ran."""
        self._views: Sequence[Tensor] = []
        self._indices: Tensor | None = None
        self._epoch_start, self._reported = 0.0, False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Plan in which epochs to run."""
        if (data := counted_data(trainer)) is not None:
            networks = 2 if hasattr(pl_module, "teacher_backbone") else 1
            of_batch = 2 * networks * data.batch_size * trainer.world_size
            self.interval.plan(trainer, len(data.plain_indices(self.num_images)) + of_batch)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note when the epoch starts."""
        self._epoch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the last batch of views."""
        if trainer.is_last_batch:
            self._views, self._indices = batch[0], getattr(batch, "indices", None)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run before checkpoints are chosen."""
        self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run now if there was no validation."""
        with in_eval_mode(pl_module):
            self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: Any) -> None:
        views, self._views = self._views, []
        if not len(views) or not self.interval.is_due(trainer, last=False):
            return
        start, self.looked_in = time.perf_counter(), trainer.current_epoch
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), trainer.precision_plugin.val_step_context():
            metrics = self._feature_metrics(trainer, self._features(trainer, pl_module))
            metrics |= self._view_metrics(pl_module, views)
        blank = None if self._indices is None else count_blank_views(trainer, views, self._indices)
        metrics |= {} if blank is None else {"blank_views": blank}
        for name, value in metrics.items():
            pl_module.log(f"health/{name}", value)
        seconds, epoch = time.perf_counter() - start, start - self._epoch_start
        if not self._reported:
            self._reported = True
            rank_zero_info(f"HealthMonitor took {seconds:.2f} s, {seconds / epoch:.1%} of the epoch.")

    def _features(self, trainer: L.Trainer, pl_module: Any) -> Tensor:
        """Features ``(N, D)`` of the training images, gathered from all processes."""
        data: Any = getattr(trainer, "datamodule", None)
        loader = data.plain_dataloader(self.num_images) if hasattr(data, "plain_dataloader") else []
        return plain_features(trainer, pl_module, loader).features

    def _feature_metrics(self, trainer: L.Trainer, features: Tensor) -> dict[str, float]:
        metrics = feature_measures(features)
        labeled = getattr(getattr(trainer, "datamodule", None), "num_classes", None) is not None
        if labeled or len(features) <= _CLUSTERS:
            return metrics
        unlabeled = features.new_full((len(features),), -1, dtype=torch.long)
        clusters = cluster_measures(features, unlabeled, _CLUSTERS) if trainer.is_global_zero else {}
        return {**metrics, **trainer.strategy.broadcast(clusters)}

    def _view_metrics(self, pl_module: Any, views: Sequence[Tensor]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        same = [view for view in views[:2] if view.shape == views[0].shape]
        features = [pl_module(view).float() for view in same]
        if len(features) == 2:
            features = [gather(view) for view in features]
            metrics["alignment"] = alignment(*features)
            if len(features[0]) > 1:
                metrics["lidar"] = lidar(torch.stack(features, dim=1)[:_LIDAR_IMAGES].cpu())
        if hasattr(pl_module, "teacher_backbone"):
            student, teacher = (part(views[0]).float() for part in (pl_module.backbone, pl_module.teacher_backbone))
            metrics["teacher_agreement"] = float(gather(F.cosine_similarity(student, teacher)).mean())
        own = pl_module.health(views) if hasattr(pl_module, "health") else {}
        means = {name: float(gather(torch.as_tensor(value)[None]).float().mean()) for name, value in own.items()}
        return metrics | means
