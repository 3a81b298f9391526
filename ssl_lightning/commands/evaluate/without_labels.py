"""Evaluation that needs no labels: clusters, and measures of the quality of features."""

import sys
from importlib import import_module
from typing import Any

import torch

from ssl_lightning.commands.evaluate.evaluator import Evaluator
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.clusters import cluster_measures
from ssl_lightning.evaluation.features import extract_some, extract_views
from ssl_lightning.evaluation.quality import feature_measures, lidar
from ssl_lightning.evaluation.results import Results

_RANKME_IMAGES = 25_600
"""Number of images in the paper of RankMe."""


class WithoutLabels(Evaluator):
    """The part of ``Evaluation`` that needs no labels."""

    data: SSLDataModule
    max_samples: int | None

    def clusters(self, clusters: int | list[int] | None = None) -> Results | None:
        """K-means on the validation images: accuracy of the clusters and mutual information with classes, silhouette.

        The best of ten starts, on unit features. The accuracy is for the best assignment of clusters to classes, on the
        same images. Without labels, only the silhouette is measured. Without validation images, the training
        images are clustered. Reports the number of classes if it is tried, else the number with the largest silhouette.

        Args:
            clusters: Number of clusters, or a list to try; None is the number of classes, and without labels 5, 10, 20,
                50 and 100.

        Raises:
            UserError: There are fewer images than clusters.
        """
        found = extract_some(
            self.pretrained, self.data, self._trainer(), self.max_samples or sys.maxsize, held_out=True
        )
        if found is None:
            return None
        (images, features, indices), held_out = found
        size, classes = len(features), self.data.num_classes
        labels = torch.full((size,), -1) if images.labels is None else torch.from_numpy(images.labels)[indices]
        tried = as_list(clusters) or ([classes] if classes else [n for n in (5, 10, 20, 50, 100) if n <= size // 2])
        if not tried or not all(2 <= count <= size for count in tried):
            raise UserError(f"--clusters {tried} must lie between 2 and {size}, the number of images.")
        measures = {count: cluster_measures(features, labels, count, self.seed) for count in tried}
        best = classes if classes in measures else max(tried, key=lambda count: measures[count]["silhouette"])
        rows = [{"clusters": count, **values} for count, values in measures.items()]
        parameters = {"clusters": tried, "reported": {"clusters": best}, "max_samples": self.max_samples}
        sizes = (0, size) if held_out else (size, 0)
        facts = self._facts(self.data, *sizes, classes)
        return self._written("clusters", parameters, facts, rows, measures=measures[best])

    def quality(self, num_images: int = 1000, num_views: int = 10) -> Results | None:
        """Measures of the features of training images that need no labels: RankMe, alpha-ReQ, LiDAR and others.

        RankMe, alpha-ReQ, the standard deviation and the uniformity are measured as by the online HealthMonitor, on up
        to 25,600 plain images. LiDAR compares images with their own views, augmented as in the backbone's training: as
        ``data.views`` says, else as the method's preset, which is SimCLR's for weights from elsewhere.

        Args:
            num_images: Number of images for LiDAR, evenly spread, at least 2.
            num_views: Number of views of each image for LiDAR, at least 2.
        """
        if num_images < 2 or num_views < 2:
            raise UserError(f"--num_images {num_images} and --num_views {num_views} must be at least 2.")
        package = import_module("ssl_lightning")  # which imports this file
        method = getattr(package, str(self.pretrained.facts.get("method")), None)
        preset = getattr(method, "views", "simclr")
        count = self.max_samples or _RANKME_IMAGES
        found = extract_some(self.pretrained, self.data, self._trainer(), count, held_out=False)
        views = extract_views(self.pretrained, self.data, self._trainer(), num_images, num_views, preset)
        if found is None or views is None:
            return None
        features = found[0].features
        measures = feature_measures(features.to(self._device))
        if len(views) > 1:
            measures["lidar"] = lidar(views)
        rows = [{"measure": name, "value": value} for name, value in measures.items()]
        parameters = {"num_images": len(views), "num_views": num_views, "max_samples": self.max_samples}
        facts = self._facts(self.data, len(features), 0, self.data.num_classes)
        chief = {name: value for name, value in measures.items() if name in ("rankme", "alpha_req", "lidar")}
        return self._written("quality", parameters, facts, rows, measures=chief)

    def _facts(self, data: SSLDataModule, train: int, test: int, classes: int | None) -> dict[str, Any]:
        return {
            "data": type(data).__name__,
            "root": str(getattr(data, "root", "")) or None,
            "train_images": train,
            "test_images": test,
            "classes": classes,
            "image_transform": data.image_transform,
        }


def as_list(values: Any) -> list[Any]:
    """No value, a single value or several as a list.

    Args:
        values: None, a value, or a list.
    """
    return [] if values is None else list(values) if isinstance(values, list | tuple) else [values]
