"""Few labels per class: logistic regression on frozen features."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.errors import UserError


def choose(labels: NDArray[np.int64], per_class: int | float, seed: int) -> NDArray[np.int64]:
    """Choose labelled images, equally of each class.

    Args:
        labels: ``(N,)`` classes; -1 is unknown and not chosen.
        per_class: That many of each class, or the share of each class if below 1, and then at least one.
        seed: Seed of the choice.

    Returns:
        Their indices, sorted.

    Raises:
        UserError: A class has fewer.
    """
    random, chosen = np.random.default_rng(seed), []
    for label in np.unique(labels[labels >= 0]):
        of_class = np.flatnonzero(labels == label)
        count = max(1, round(per_class * len(of_class))) if per_class < 1 else int(per_class)
        if count > len(of_class):
            raise UserError(f"class {label} has {len(of_class)} training images, not {count}; choose fewer per class.")
        chosen.append(random.permutation(of_class)[:count])
    return np.sort(np.concatenate(chosen))


def low_shot(
    train_features: Tensor, train_labels: Tensor, features: Tensor, shots: int, seed: int, strength: float = 10.0
) -> Tensor:
    """Classify by a logistic regression on the unit features of a few images of each class.

    Args:
        train_features: ``(N, D)``, any scale.
        train_labels: ``(N,)`` classes.
        features: ``(M, D)``, any scale.
        shots: Images of each class.
        seed: Seed of the choice of images.
        strength: Inverse of the regularisation (C of scikit-learn).

    Returns:
        ``(M,)`` predicted classes.
    """
    from sklearn.linear_model import LogisticRegression

    rows = torch.from_numpy(choose(train_labels.numpy(), shots, seed))
    few = F.normalize(train_features[rows].float(), dim=1).numpy()
    model = LogisticRegression(C=strength, max_iter=1000).fit(few, train_labels[rows].numpy())
    return torch.from_numpy(model.predict(F.normalize(features.float(), dim=1).numpy()))
