"""Near-duplicates, diverse subsets, sizes of clusters, and clusters against classes."""

import pytest
import torch
import torch.nn.functional as F

from ssl_lightning.curation import balanced_sizes, k_center, semantic_duplicates
from ssl_lightning.evaluation import clustering_accuracy


def test_duplicates_of_earlier_images_are_removed_even_if_those_are_removed() -> None:
    angles = torch.tensor([0, 0.28, 0.56])
    assert semantic_duplicates(torch.stack([angles.cos(), angles.sin()], 1), 0.05).tolist() == [False, True, True]


def test_blocks_change_nothing() -> None:
    embeddings = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))  # more than a block
    unit = F.normalize(embeddings, dim=1)
    expected = (unit @ unit.T > 0.9995).tril(-1).any(1)
    assert 0 < expected.sum() < 5000
    assert torch.equal(semantic_duplicates(embeddings, 0.0005), expected)


def test_the_farthest_image_is_chosen_next() -> None:
    points = torch.tensor([[0, 0], [1, 0], [0, 3], [5, 5], [5.5, 5], [-4, 0]])
    assert k_center(points, 4, first=0).tolist() == [0, 4, 5, 2]
    assert k_center(points, 1).tolist() == [2]  # the nearest to the mean
    assert k_center(torch.zeros(3, 2), 5).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("sizes", "target", "taken"),
    [
        ((10, 5, 2, 1), 9, [3, 3, 2, 1]),
        ((10, 5, 2, 1), 11, [4, 4, 2, 1]),
        ((100, 3, 3), 20, [14, 3, 3]),
        ((3, 3), 100, [3, 3]),
    ],
)
def test_clusters_give_as_equal_numbers_as_they_can(sizes: tuple[int, ...], target: int, taken: list[int]) -> None:
    assert balanced_sizes(sizes, target) == taken


def test_the_remainder_comes_from_clusters_that_have_more() -> None:
    assert sorted(balanced_sizes((9, 9, 9, 1), 12)) == [1, 3, 4, 4]


def test_clusters_are_assigned_to_at_most_a_class_each() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    assert clustering_accuracy((labels + 1) % 3 + 7, labels) == 1
    assert clustering_accuracy(torch.tensor([0, 0, 4, 1, 1, 1]), labels) == pytest.approx(4 / 6)  # 4 has no class left
