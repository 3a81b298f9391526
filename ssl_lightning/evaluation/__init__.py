"""Evaluation of features: the same code online and offline."""

from ssl_lightning.evaluation.knn import knn_predict
from ssl_lightning.evaluation.quality import alignment, alpha_req, feature_std, rankme, uniformity

__all__ = ["alignment", "alpha_req", "feature_std", "knn_predict", "rankme", "uniformity"]
