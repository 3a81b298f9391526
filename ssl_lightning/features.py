"""Features of the training forward, kept for the probes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class FeatureRecorder:
    """Keeps the detached features that a backbone computes within a step, so that probes need no extra forward pass."""

    def __init__(self) -> None:
        self._features: list[Tensor] = []
        self._images = 0

    @contextmanager
    def recording(self, backbone: nn.Module, images: int) -> Iterator[list[Tensor]]:
        """Record what the backbone gives.

        Args:
            backbone: Maps images to features.
            images: How many images to record; they may come in several passes.
        """
        features, self._images = self._features, images
        hook = backbone.register_forward_hook(lambda _module, _inputs, output: self.record(output))
        try:
            yield features
        finally:
            hook.remove()
            self._features, self._images = [], 0

    def record(self, features: Tensor) -> None:
        """Keep features, unless all images already have some.

        Args:
            features: ``(B, embed_dim)``.
        """
        if sum(map(len, self._features)) < self._images:
            self._features.append(features.detach())


@torch.no_grad()
def whole_features(method: Any, images: Tensor) -> Tensor:
    """Features ``(B, embed_dim)`` in eval mode, within a step that trains.

    Args:
        method: Its ``evaluated_backbone`` is in train mode before and afterwards.
        images: ``(B, 3, S, S)``.
    """
    method.evaluated_backbone.eval()
    features = method(images)
    method.evaluated_backbone.train()
    return features
