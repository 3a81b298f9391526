"""Loss functions of the methods: pure functions of tensors, in float32 or wider, exact across processes.

Where a paper stops the gradient (keys, targets, assignments, the teacher), the function detaches its input. Own
code because lightly's losses hold state that checkpoints lack (memory bank, center) and wait for the device to compute
indices.
"""

from ssl_lightning.losses.classification import accuracy, beit, cross_entropy
from ssl_lightning.losses.clustering import (
    cross_view,
    deepcluster_v2,
    dino,
    entropy,
    ibot,
    share_in_use,
    sinkhorn,
    swav,
)
from ssl_lightning.losses.contrastive import (
    info_nce,
    instance_discrimination,
    moco_v3,
    nce,
    nce_normalizer,
    nce_of,
    nnclr,
    nt_xent,
)
from ssl_lightning.losses.redundancy import barlow_twins, vicreg
from ssl_lightning.losses.regression import (
    byol,
    distillation,
    ijepa,
    lejepa,
    mae,
    negative_cosine,
    simmim,
    vector_quantization,
)
from ssl_lightning.losses.regularizers import gram, koleo, sigreg

__all__ = [
    "accuracy",
    "barlow_twins",
    "beit",
    "byol",
    "cross_entropy",
    "cross_view",
    "deepcluster_v2",
    "dino",
    "distillation",
    "entropy",
    "gram",
    "ibot",
    "ijepa",
    "info_nce",
    "instance_discrimination",
    "koleo",
    "lejepa",
    "mae",
    "moco_v3",
    "nce",
    "nce_normalizer",
    "nce_of",
    "negative_cosine",
    "nnclr",
    "nt_xent",
    "share_in_use",
    "sigreg",
    "simmim",
    "sinkhorn",
    "swav",
    "vector_quantization",
    "vicreg",
]
