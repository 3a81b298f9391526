"""Segmentation by nearest patches, and principal components of patches."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier

from ssl_lightning import UserError
from ssl_lightning.evaluation import hummingbird, knn_segmentation, mean_iou, patch_pca
from ssl_lightning.evaluation.components import aligned, foreground, joint_components, patch_colors
from ssl_lightning.evaluation.patches import pca_colors


def patches(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``(N, 6)`` near the center of their class, and labels ``(N, 4)``, some of them wrong."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (count,), generator=random)
    features = 2 * torch.eye(6)[classes] + 0.4 * torch.randn(count, 6, generator=random)
    noise = torch.randint(3, (count, 4), generator=random)
    return features, torch.where(torch.rand(count, 4, generator=random) < 0.2, noise, classes[:, None])


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_each_pixel_gets_the_most_frequent_label_of_its_place(distance: str) -> None:
    (bank, labels), (queries, _) = patches(300, 0), patches(40, 1)
    found = knn_segmentation(bank, labels, queries, k=5, distance=distance)  # type: ignore[arg-type]
    metric = "cosine" if distance == "cosine" else "euclidean"
    for pixel in range(4):  # ties go to the smallest label there, too
        neighbors = KNeighborsClassifier(5, metric=metric).fit(bank.numpy(), labels[:, pixel].numpy())
        np.testing.assert_array_equal(found[:, pixel], neighbors.predict(queries.numpy()))


def test_training_patches_that_are_mostly_ignored_are_left_out() -> None:
    bank, labels = torch.eye(3), torch.tensor([[255, 255, 1], [2, 2, 255], [1, 1, 1]])
    assert knn_segmentation(bank, labels, bank[:1], k=1).tolist() == [[2, 2, 255]]
    assert knn_segmentation(bank, labels, bank[:1], k=1, ignored=[2, 255]).tolist() == [[1, 1, 1]]
    with pytest.raises(UserError, match="not ignored"):
        knn_segmentation(bank, labels, bank, ignored=[1, 2, 255])


def test_hummingbird_weighs_shares_by_cosine() -> None:
    memory, shares = torch.tensor([[2.0, 0.0], [0.6, 0.8], [-1.0, 0.0]]), torch.tensor([[1.0, 0], [0.25, 0.75], [0, 1]])
    found = hummingbird(memory, shares, torch.tensor([[5.0, 0.0]]), k=2, temperature=0.4)
    weight = 1 / (1 + np.exp(-(1 - 0.6) / 0.4))
    np.testing.assert_allclose(found, [[weight + (1 - weight) / 4, (1 - weight) * 3 / 4]], rtol=1e-6)


def test_mean_iou_is_sklearns_over_what_is_not_ignored() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (2, 30, 30), generator=random)
    predictions = torch.where(torch.rand(2, 30, 30, generator=random) < 0.3, 5, labels)
    labels[0, :5] = 255
    counted = labels != 255
    expected = jaccard_score(labels[counted], predictions[counted], average="macro")
    assert mean_iou(labels, predictions) == pytest.approx(expected)
    assert mean_iou(torch.tensor([0, 0, 1]), torch.tensor([0, 255, 1])) == 0.5  # a predicted ignored class is a class


def test_components_are_those_of_a_whitened_pca_with_positive_skewness() -> None:
    random = np.random.Generator(np.random.Philox(key=0))
    features = random.exponential(size=(400, 8)) @ random.normal(size=(8, 8)) + 5
    found = patch_pca(torch.from_numpy(features))
    expected = PCA(3, whiten=True).fit_transform(features)
    expected *= np.sign((expected**3).mean(0)) / expected.std(0)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    np.testing.assert_allclose(patch_pca(torch.from_numpy(-features)).abs(), found.abs(), atol=1e-8)
    colors = pca_colors(found)
    assert (colors.min(), colors.max()) == (0, 1)
    assert 0.3 < colors.mean() < 0.6
    assert patch_pca(torch.ones(5, 2)).abs().max() == 0  # no variance, no colors


def test_the_foreground_is_the_side_with_fewer_patches_at_the_borders() -> None:
    torch.manual_seed(0)
    maps = [0.1 * torch.randn(6, *shape) for shape in ((6, 8), (7, 5))]
    for features in maps:
        features[0, 2:-2, 2:-2] += 3  # an object in the middle
    masks = foreground(joint_components(maps))
    for mask, features in zip(masks, maps, strict=True):
        assert torch.equal(mask, features[0] > 1.5)
    colors = patch_colors(maps)
    for inner, mask in zip(colors.foreground, masks, strict=True):
        np.testing.assert_array_equal(inner.any(axis=2), mask.numpy())
    blank = patch_colors([torch.ones(3, 4, 4)])  # all equal: no foreground
    assert blank.foreground[0].max() == 0


def test_nearly_symmetric_components_keep_their_sign() -> None:
    values = torch.linspace(-1, 1, 12).view(3, 4, 1).expand(3, 4, 3).clone()
    values[..., 1] = values[..., 1].exp() - 1.5  # of clear skewness
    now, before = [torch.stack([-values[..., 0], -values[..., 1], values[..., 2]], dim=2)], [values]
    assert torch.equal(aligned(now, before)[0], torch.stack([values[..., 0], -values[..., 1], values[..., 2]], dim=2))
    assert torch.equal(aligned(now, [values[:2]])[0], now[0])  # of other images


@pytest.mark.parametrize("shape", [(5, 12), (60_000, 4)])
def test_few_and_many_patches_have_the_components_of_a_whitened_pca(shape: tuple[int, int]) -> None:
    features = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double() ** 2
    features *= torch.arange(1, shape[1] + 1)
    expected = PCA(2, whiten=True).fit_transform(features.numpy())
    found = patch_pca(features, 2).numpy()
    tolerance = 1e-9 if len(features) < 50_000 else 0.2  # some determine the components
    deviation = np.sqrt(len(features) / (len(features) - 1))  # of scikit-learn
    np.testing.assert_allclose(np.abs(found), np.abs(expected) * deviation, atol=tolerance)
