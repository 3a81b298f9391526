"""Evaluation of features: the same code online and offline."""

from ssl_lightning.evaluation.knn import knn_predict

__all__ = ["knn_predict"]
