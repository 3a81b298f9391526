"""Few labels per class: logistic regression on frozen features."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.errors import UserError


def choose(labels: NDArray[np.int64], per_class: int | float, seed: int) -> NDArray[np.int64]:
    """Choose labeled images, the same number or fraction from each class.

    Args:
        labels: ``(N,)`` classes; -1 is unknown and not chosen.
        per_class: Number of images of each class. If below 1, the fraction of each class, and at least one image.
        seed: Seed of the choice.

    Returns:
        Sorted indices of the chosen images.

    Raises:
        UserError: A class has fewer images.
    """
    random, chosen = np.random.default_rng(seed), []
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        count = max(1, round(per_class * len(members))) if per_class < 1 else int(per_class)
        if count > len(members):
            raise UserError(
                f"class {label} has {len(members)} training images, not {count}; choose fewer images per class."
            )
        chosen.append(random.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def low_shot(
    train_features: Tensor, train_labels: Tensor, features: Tensor, shots: int, seed: int, strength: float = 10.0
) -> Tensor:
    """Classify by a logistic regression on the unit features of a few images of each class.

    Args:
        train_features: ``(N, D)``, any scale.
        train_labels: ``(N,)`` classes.
        features: ``(M, D)``, any scale.
        shots: Number of training images of each class.
        seed: Seed of the choice of images.
        strength: Inverse of the regularization (C of scikit-learn).

    Returns:
        ``(M,)`` predicted classes.
    """
    from sklearn.linear_model import LogisticRegression

    rows = torch.from_numpy(choose(train_labels.numpy(), shots, seed))
    few = F.normalize(train_features[rows].float(), dim=1).numpy()
    model = LogisticRegression(C=strength, max_iter=1000).fit(few, train_labels[rows].numpy())
    return torch.from_numpy(model.predict(F.normalize(features.float(), dim=1).numpy()))
