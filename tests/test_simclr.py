"""SimCLR: architecture, order of the computation, and several whole steps against a plain restatement."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import Optim, SimCLR
from tests.oracle import Weights, compare, lars_simclr, parameters, random_views, relu_mlp, run
from tests.small import simclr


@pytest.mark.parametrize(("layers", "count"), [(2, 4_460_672), (3, 8_659_072)])
def test_projector_has_the_published_size(layers: int, count: int) -> None:
    with torch.device("meta"):
        method = SimCLR(projector_layers=layers)
    assert parameters(method.projector) == count
    assert parameters(method.backbone) == 23_508_032
    norms = [module for module in method.projector if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == layers
    assert norms[-1].bias is None
    assert norms[-1].weight is not None


def test_defaults_are_the_papers() -> None:
    method = SimCLR()
    assert (method.temperature, method.views, method.embed_dim) == (0.1, "simclr", 2048)
    assert method.optim.peak_lr(4096) == pytest.approx(4.8)
    assert (method.optim.warmup_epochs, method.optim.weight_decay) == (10, 1e-6)
    # the last BatchNorm of each residual branch starts at zero
    assert all((block.bn3.weight == 0).all() for block in method.backbone.layer1)  # type: ignore[union-attr]


def test_both_views_share_one_forward() -> None:
    method = simclr()
    method.training_loss([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)])
    assert method.backbone.bn1.num_batches_tracked == 1  # type: ignore[union-attr]
    assert method.projector[1].num_batches_tracked == 1


@pytest.mark.parametrize(("decoupled", "candidates"), [(False, 7), (True, 6)])
def test_chance_loss_is_that_of_equal_projections(decoupled: bool, candidates: int) -> None:
    method = simclr(decoupled=decoupled)
    assert method.chance_loss is None
    for parameter in method.projector.parameters():
        nn.init.zeros_(parameter)
    loss = method.training_loss([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)])
    assert loss.item() == pytest.approx(math.log(candidates))
    method.global_batch = 4  # as within a training
    assert method.chance_loss == pytest.approx(math.log(candidates))


def restated_loss(z: Tensor, temperature: float) -> Tensor:
    """Equation 1 of the paper, pair by pair."""
    n = len(z) // 2
    total = z.new_zeros(())
    for i in range(2 * n):
        similarity = [F.cosine_similarity(z[i], z[k], dim=0) / temperature for k in range(2 * n)]
        others = torch.stack([value for k, value in enumerate(similarity) if k != i])
        total = total - (similarity[(i + n) % (2 * n)] - torch.logsumexp(others, 0))
    return total / (2 * n)


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    method = simclr(temperature=0.3, optim=Optim("lars_simclr", base_lr=3.0, weight_decay=1e-2)).double()

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        z = run(method.backbone, weights, "backbone.", torch.cat(views))  # (2B, C)
        return restated_loss(relu_mlp(z, weights, "projector", (1, 4)), 0.3)

    lrs = [3.0, 2.25, 1.5, 0.75]
    compare(method, loss_of, lars_simclr(lrs, 1e-2), random_views(4, 16, 16), lrs=lrs, atol=1e-8)
