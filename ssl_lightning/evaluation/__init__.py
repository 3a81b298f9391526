"""Evaluation of features: the same code online and offline."""

from ssl_lightning.evaluation.clusters import clustering_accuracy, kmeans, silhouette
from ssl_lightning.evaluation.finetune import FineTune
from ssl_lightning.evaluation.knn import knn_predict
from ssl_lightning.evaluation.linear import LinearClassifier
from ssl_lightning.evaluation.patches import hummingbird, knn_segmentation, mean_iou, patch_pca
from ssl_lightning.evaluation.quality import alignment, alpha_req, feature_std, lidar, rankme, uniformity

__all__ = [
    "FineTune",
    "LinearClassifier",
    "alignment",
    "alpha_req",
    "clustering_accuracy",
    "feature_std",
    "hummingbird",
    "kmeans",
    "knn_predict",
    "knn_segmentation",
    "lidar",
    "mean_iou",
    "patch_pca",
    "rankme",
    "silhouette",
    "uniformity",
]
