"""DeepCluster v2: clusters, the memory and its checkpoints, and whole steps against a plain restatement."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_lightning import DeepClusterV2, FakeData, Optim, UserError, ViewSpec, losses
from ssl_lightning.memory import Memory, spherical_kmeans
from tests.oracle import Weights, compare, larc, parameters, random_views, relu_mlp, run, unit
from tests.small import BACKBONE, HEADS, small, trainer

CROPS = [ViewSpec(size=32, count=2), ViewSpec(size=16, count=2)]


def images(**kwargs: Any) -> FakeData:
    return FakeData(**{"batch_size": 8, "seed": 0, "views": CROPS, "num_workers": 0, **kwargs})


def test_head_and_defaults_are_the_papers() -> None:
    method = DeepClusterV2()
    assert parameters(method.projector) == 4_462_720
    assert method.prototypes.shape == (3, 3000, 128)
    assert (method.temperature, method.kmeans_iterations, method.views) == (0.1, 10, "deepcluster_v2")
    assert method.chance_loss == pytest.approx(8.0064, abs=1e-4)
    factors = [method.optim.lr_factor(step, 100, 1) for step in (0, 9, 10, 99, 100)]
    assert [4.8 * factor for factor in factors] == pytest.approx([0.3, 4.8, 4.8, 0.0063, 0.0048], abs=1e-4)


def test_loss_is_the_mean_cross_entropy_of_all_crops_and_sets() -> None:
    torch.manual_seed(0)
    scores, clusters = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randint(6, (3, 5))
    expected = [F.cross_entropy(scores[h].flatten(0, 1) / 0.1, clusters[h].repeat(4)) for h in range(3)]
    loss = losses.deepcluster_v2(scores, clusters, 0.1)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert losses.deepcluster_v2(torch.ones(1, 2, 3, 6), clusters[:1, :3], 0.1).item() == pytest.approx(math.log(6))


def test_kmeans_finds_the_clusters_that_there_are() -> None:
    torch.manual_seed(0)
    centers = torch.eye(4, 8, dtype=torch.float64)
    rows = unit(centers.repeat_interleave(50, 0) + 0.05 * torch.randn(200, 8, dtype=torch.float64))
    seeds = [
        seed for seed in range(40) if len(set((torch.randperm(200, generator=seeded(seed))[:4] // 50).tolist())) == 4
    ]
    found = spherical_kmeans(rows, 4, 10, seeded(seeds[0]))  # one first centroid in each
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4, dtype=torch.float64))
    means = unit(rows.view(4, 50, 8).sum(1))
    order = (found @ centers.T).argmax(0)
    torch.testing.assert_close(found[order], means)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kmeans_keeps_empty_clusters_and_draws_from_its_generator_alone() -> None:
    rows = unit(torch.randn(20, 4, generator=seeded(1)))
    first = spherical_kmeans(rows, 6, 3, seeded(0))
    torch.manual_seed(7)
    assert torch.equal(first, spherical_kmeans(rows, 6, 3, seeded(0)))
    assert not torch.equal(first, spherical_kmeans(rows, 6, 3, seeded(2)))
    same = spherical_kmeans(rows[:1].expand(3, 4), 5, 3, seeded(0))
    torch.testing.assert_close(same, rows[:1].expand(5, 4))


def test_memory_holds_rows_by_image() -> None:
    memory = Memory(2, 3)
    memory.resize(5)
    memory.write(torch.tensor([3, 1]), torch.ones(2, 2, 3) * torch.tensor([1.0, 2.0])[:, None, None])
    assert memory.rows[:, 0, 0].tolist() == [0, 2, 0, 1, 0]
    assert memory.known.shape == (2, 2, 3)


class Watch(L.Callback):
    """Prototypes and size of the memory before each step."""

    def __init__(self) -> None:
        self.prototypes: list[Tensor] = []
        self.known: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.prototypes.append(pl_module.prototypes.clone())
        self.known.append(len(pl_module.memory.known))


def test_prototypes_are_made_once_an_epoch_of_a_memory_that_is_full_from_the_start(tmp_path: Path) -> None:
    watch = Watch()
    method = small(DeepClusterV2)
    trainer(tmp_path, max_epochs=2, callbacks=[watch]).fit(method, images(num_images=66))
    assert watch.known[0] == 64, "the last two images are left out"
    assert len(method.memory.rows) == 66
    torch.testing.assert_close(method.memory.known.norm(dim=2), torch.ones(len(method.memory.known), 2))
    made = [not torch.equal(now, then) for then, now in zip(watch.prototypes, watch.prototypes[1:], strict=False)]
    assert made == [step == 8 for step in range(1, 16)]
    torch.testing.assert_close(watch.prototypes[0].norm(dim=2), torch.ones(3, 16))


def test_images_keep_the_cluster_of_the_start_of_the_epoch() -> None:
    method = small(DeepClusterV2)
    method.memory.resize(6)
    rows = unit(torch.randn(6, 2, 16))
    method.memory.write(torch.arange(5), rows[:5])
    method.image_indices = torch.tensor([4, 0, 5])  # the last is not in the memory
    at_hand = unit(torch.randn(3, 2, 16))
    found = method._clusters(at_hand)
    used = torch.stack([rows[4], rows[0], at_hand[2]])
    for number, crop in enumerate([0, 1, 0]):
        assert torch.equal(found[number], (used[:, crop] @ method.prototypes[number].T).argmax(1))


def test_a_checkpoint_brings_its_memory(tmp_path: Path) -> None:
    method = small(DeepClusterV2)
    running = trainer(tmp_path, limit_train_batches=3)
    running.fit(method, images())
    running.save_checkpoint(tmp_path / "x.ckpt")
    again = DeepClusterV2.load_from_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(again.memory.rows, method.memory.rows)
    assert torch.equal(again.prototypes, method.prototypes)
    with pytest.raises(UserError, match=r"the memory is of 64 images, not of 48"):
        trainer(tmp_path, max_epochs=2).fit(small(DeepClusterV2), images(num_images=48), ckpt_path=tmp_path / "x.ckpt")


def test_what_cannot_be_remembered_is_refused(tmp_path: Path) -> None:
    batch = ([torch.rand(4, 3, 32, 32)] * 2, torch.zeros(4))
    loader = DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs the index of each image"):
        trainer(tmp_path).fit(small(DeepClusterV2), loader)
    with pytest.raises(UserError, match=r"64 images cannot form 65 clusters; lower --model.num_prototypes"):
        trainer(tmp_path).fit(small(DeepClusterV2, num_prototypes=65), images())
    stream = images()
    stream.setup()
    stream.train_images, stream.train_stream = None, stream.train_images  # type: ignore[assignment]
    with pytest.raises(UserError, match="cannot train on a stream"):
        trainer(tmp_path).fit(small(DeepClusterV2), stream)


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    optim = Optim("larc", base_lr=3.0, weight_decay=1e-2, decay_norm_and_bias=True)
    method = DeepClusterV2(**BACKBONE, **{**HEADS[DeepClusterV2], "num_prototypes": 5}, optim=optim).double()
    method.memory.resize(4)
    method.image_indices = torch.tensor([2, 0, 3, 1])
    memory: dict[tuple[int, int], Tensor] = {}

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        large = run(method.backbone, weights, "backbone.", torch.cat(views[:2]))
        local = run(method.backbone, weights, "backbone.", torch.cat(views[2:]))
        z = unit(relu_mlp(torch.cat([large, local]), weights, "projector", (1,))).view(4, 4, -1)
        total = z.new_zeros(())
        for number, crop in enumerate([0, 1, 0]):
            for row, image in enumerate([2, 0, 3, 1]):
                cluster = int((method.prototypes[number] @ memory.get((image, crop), z[crop, row].detach())).argmax())
                for view in range(4):
                    scores = method.prototypes[number] @ z[view, row] / 0.1
                    total = total + (torch.logsumexp(scores, 0) - scores[cluster]) / (3 * 4 * 4)
        for row, image in enumerate([2, 0, 3, 1]):
            memory[image, 0], memory[image, 1] = z[0, row].detach(), z[1, row].detach()
        return total

    compare(method, loss_of, larc(3.0, 1e-2), random_views(4, 16, 16, 8, 8))
