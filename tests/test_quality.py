"""Quality of features without labels: worked numbers, and what collapse looks like."""

import math

import pytest
import torch
from torch import Tensor

from ssl_lightning import UserError
from ssl_lightning.evaluation import alignment, alpha_req, feature_std, lidar, rankme, uniformity


def test_rankme_of_known_spectra() -> None:
    assert rankme(torch.eye(8)) == pytest.approx(8, abs=1e-4)
    assert rankme(torch.diag(torch.tensor([2.0, 1, 1]))) == pytest.approx(2.828427, abs=1e-4)
    assert rankme(torch.ones(600, 512, dtype=torch.float64)) == pytest.approx(1.00082, abs=1e-4)


def test_lidar_counts_the_directions_in_which_images_differ() -> None:
    axes = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    spread = torch.tensor([0.9, 1.1])[:, None]  # of the views of an image, along its own axis
    assert lidar(axes[:, None] * spread) == pytest.approx(2, abs=1e-4)
    assert lidar(axes[[0, 1, 0, 1], None] * spread) == pytest.approx(1, abs=1e-4)
    images = torch.cat([torch.randn(200, 1, 3).expand(-1, 10, -1), torch.randn(200, 10, 5)], dim=2)
    images = images + 0.1 * torch.randn(200, 10, 8)
    assert lidar(images) == pytest.approx(3, abs=0.2)
    mixed = images.flatten(0, 1)[torch.randperm(2000)].view(200, 10, 8)
    assert lidar(mixed) > 7  # views of an image must stand together
    with pytest.raises(UserError, match="q at least 2"):
        lidar(images[:, :1])


def test_rankme_does_not_depend_on_scale_or_rotation() -> None:
    features = torch.randn(200, 16, dtype=torch.float64) @ torch.diag(torch.linspace(1, 3, 16, dtype=torch.float64))
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    assert rankme(7 * features @ rotation) == pytest.approx(rankme(features), rel=1e-6)


def power_law(alpha: float) -> Tensor:
    """Features whose covariance has the eigenvalues j ** -alpha."""
    left = torch.linalg.qr(torch.randn(400, 120, dtype=torch.float64)).Q
    left = torch.linalg.qr(left - left.mean(0)).Q  # centred, orthonormal
    return left * torch.arange(1, 121, dtype=torch.float64) ** (-alpha / 2)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.3, 2.5])
def test_alpha_req_finds_the_power(alpha: float) -> None:
    assert alpha_req(power_law(alpha)) == pytest.approx(alpha, abs=1e-6)


def test_alpha_req_asks_for_enough_directions() -> None:
    with pytest.raises(UserError, match="have 7 directions; use more images"):
        alpha_req(torch.randn(8, 64))


def test_feature_std_alignment_and_uniformity_of_the_axes() -> None:
    axes = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert feature_std(3 * axes) == pytest.approx(0.816497, abs=1e-6)
    assert uniformity(5 * axes) == pytest.approx(-4.396349, abs=1e-5)
    assert alignment(axes, 2 * axes) == pytest.approx(0, abs=1e-6)
    assert alignment(axes, -axes) == pytest.approx(4, abs=1e-6)
    assert alignment(axes, axes.flip(1)) == pytest.approx(2, abs=1e-6)


def test_collapsed_features_are_told_from_spread_ones() -> None:
    collapsed = torch.randn(1, 128) + 1e-4 * torch.randn(500, 128)
    spread = torch.randn(500, 128)
    assert feature_std(collapsed) < 1e-4
    assert feature_std(spread) == pytest.approx(1 / math.sqrt(128), rel=0.02)
    assert uniformity(collapsed) == pytest.approx(0, abs=1e-3)
    assert uniformity(spread) < -3
    assert rankme(collapsed) < 1.5
    assert rankme(spread) > 100


def test_many_features_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(100, 8, dtype=torch.float64)
    whole = uniformity(features)
    monkeypatch.setattr("ssl_lightning.evaluation.quality.SIMILARITIES_AT_ONCE", 700)
    assert uniformity(features) == pytest.approx(whole, abs=1e-12)


def test_half_precision_is_widened_and_one_row_refused() -> None:
    features = torch.randn(50, 16)
    assert rankme(features.bfloat16()) == pytest.approx(rankme(features), rel=0.05)
    with pytest.raises(UserError, match="at least 2 rows"):
        rankme(torch.randn(1, 4))
