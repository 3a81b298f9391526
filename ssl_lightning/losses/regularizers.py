"""Losses that spread features, or keep them as they were."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning.losses.precision import full_precision


@full_precision
def koleo(features: Tensor) -> Tensor:
    """Push each unit vector away from its nearest neighbour (Kozachenko-Leonenko estimate of the entropy, negated).

    Source: Sablayrolles et al. 2019, Spreading vectors for similarity search, as DINOv2's released code has it.

    Args:
        features: ``(B, D)``, any scale; of one view of each image.
    """
    features = F.normalize(features, eps=1e-8, dim=1)
    with torch.no_grad():
        nearest = (features @ features.T).fill_diagonal_(-1).argmax(1)  # (B,)
    distances = F.pairwise_distance(features, features[nearest], eps=1e-8)  # (B,)
    return -(distances + 1e-8).log().mean()
