"""Loss functions of the methods: pure functions of tensors, in float32 or wider, exact across processes.

Where a paper stops the gradient (keys, targets, assignments, the teacher), the function detaches its input. Own
code because lightly's losses hold state that checkpoints lack (memory bank, center) and wait for the device to compute
indices.
"""

from ssl_lightning.losses.classification import accuracy, beit, cross_entropy
from ssl_lightning.losses.clustering import (
    capi,
    cross_view,
    deepcluster_v2,
    dino,
    entropy,
    ibot,
    positionwise_sinkhorn,
    resa,
    self_assignments,
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
from ssl_lightning.losses.redundancy import (
    barlow_twins,
    coding_rate,
    collapsed_expansion,
    compression,
    expansion,
    simdino,
    simdino_patches,
    vicreg,
)
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
from ssl_lightning.losses.regularizers import gram, koleo, sigreg, visreg

__all__ = [
    "accuracy",
    "barlow_twins",
    "beit",
    "byol",
    "capi",
    "coding_rate",
    "collapsed_expansion",
    "compression",
    "cross_entropy",
    "cross_view",
    "deepcluster_v2",
    "dino",
    "distillation",
    "entropy",
    "expansion",
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
    "positionwise_sinkhorn",
    "resa",
    "self_assignments",
    "share_in_use",
    "sigreg",
    "simdino",
    "simdino_patches",
    "simmim",
    "sinkhorn",
    "swav",
    "vector_quantization",
    "vicreg",
    "visreg",
]
