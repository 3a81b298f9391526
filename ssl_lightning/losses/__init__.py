"""Loss functions of the methods: pure functions of tensors, in float32 or wider, exact across processes.

What a paper stops the gradient at (keys, targets, assignments, the teacher) is detached here. Own code beside
lightly's: its losses carry state that is not saved (memory bank, centre), and wait on the device for indices.
"""

from ssl_lightning.losses.clustering import dino, entropy, ibot, share_in_use, sinkhorn, swav
from ssl_lightning.losses.contrastive import info_nce, moco_v3, nt_xent
from ssl_lightning.losses.regression import byol, ijepa, lejepa, mae, negative_cosine
from ssl_lightning.losses.regularizers import gram, koleo, sigreg

__all__ = [
    "byol",
    "dino",
    "entropy",
    "gram",
    "ibot",
    "ijepa",
    "info_nce",
    "koleo",
    "lejepa",
    "mae",
    "moco_v3",
    "negative_cosine",
    "nt_xent",
    "share_in_use",
    "sigreg",
    "sinkhorn",
    "swav",
]
