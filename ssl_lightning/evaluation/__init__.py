"""Evaluation of features: the same code online and offline."""

from ssl_lightning.evaluation.finetune import FineTune
from ssl_lightning.evaluation.knn import knn_predict
from ssl_lightning.evaluation.linear import LinearClassifier
from ssl_lightning.evaluation.quality import alignment, alpha_req, feature_std, rankme, uniformity

__all__ = [
    "FineTune",
    "LinearClassifier",
    "alignment",
    "alpha_req",
    "feature_std",
    "knn_predict",
    "rankme",
    "uniformity",
]
