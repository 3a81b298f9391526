"""Loss functions of the methods: pure functions of tensors, in float32 or wider, exact across processes.

What a paper stops the gradient at (keys, targets, assignments, the teacher) is detached here. Own code beside
lightly's: its losses carry state that is not saved (memory bank, centre), and wait on the device for indices.
"""

from ssl_lightning.losses.classification import accuracy, beit, cross_entropy
from ssl_lightning.losses.clustering import dino, entropy, share_in_use, sinkhorn, swav
from ssl_lightning.losses.contrastive import (
    info_nce,
    instance_discrimination,
    moco_v3,
    nce,
    nce_normalizer,
    nce_of,
    nt_xent,
)
from ssl_lightning.losses.regression import byol, mae, negative_cosine, simmim, vector_quantization

__all__ = [
    "accuracy",
    "beit",
    "byol",
    "cross_entropy",
    "dino",
    "entropy",
    "info_nce",
    "instance_discrimination",
    "mae",
    "moco_v3",
    "nce",
    "nce_normalizer",
    "nce_of",
    "negative_cosine",
    "nt_xent",
    "share_in_use",
    "simmim",
    "sinkhorn",
    "swav",
    "vector_quantization",
]
