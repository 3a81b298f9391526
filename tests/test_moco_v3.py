"""MoCo v3: architecture for ResNets and ViTs, and whole steps against a plain restatement."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import MoCoV3, Optim, UserError
from ssl_lightning.backbones.tokens import sincos_positions
from tests.oracle import Weights, adamw, compare, lars, moved, parameters, random_views, relu_mlp, run, unit
from tests.small import VIT, small


def test_resnet_heads_have_the_published_size() -> None:
    method = MoCoV3()
    assert parameters(method.projector) == 9_445_376
    assert parameters(method.predictor) == 2_105_344
    assert not list(method.projector[-1].parameters())  # a BatchNorm without affine
    assert isinstance(method.predictor[-1], nn.Linear)  # and none in the predictor
    assert all((block.bn3.weight == 0).all() for block in method.backbone.layer1)  # type: ignore[union-attr]
    assert method.optim == Optim("lars", base_lr=0.6, weight_decay=1e-6, warmup_epochs=10)
    assert (method.temperature, method.momentum, method.views) == (1.0, 0.99, "moco_v3")


def test_vit_heads_have_the_published_size() -> None:
    method = MoCoV3(backbone="vit_small_patch16_224")
    assert parameters(method.projector) == 19_415_040
    assert parameters(method.predictor) == 2_105_344
    assert not list(method.predictor[-1].parameters())
    assert isinstance(method.predictor[-1], nn.BatchNorm1d)
    assert method.backbone.blocks[0].attn.num_heads == 12  # type: ignore[index,union-attr]
    assert method.views == "moco_v3_vit"


def test_vit_starts_as_in_the_released_code() -> None:
    torch.manual_seed(0)
    vit = MoCoV3(backbone="vit_base_patch16_224", backbone_kwargs={"depth": 1}, hidden_dim=8).backbone
    block = vit.blocks[0]  # type: ignore[index]
    for weight, bound in (
        (vit.patch_embed.proj.weight, 0.0625),  # type: ignore[union-attr]
        (block.attn.qkv.weight, 0.0625),
        (block.attn.proj.weight, 0.0625),
        (block.mlp.fc1.weight, math.sqrt(6 / (768 + 3072))),
    ):
        assert weight.abs().max() <= bound  # type: ignore[operator]
        assert weight.abs().max() > 0.99 * bound  # type: ignore[operator]
    assert (vit.patch_embed.proj.bias == 0).all()  # type: ignore[union-attr]
    assert vit.pos_embed.shape == (1, 197, 768)
    assert (vit.pos_embed[0, 0] == 0).all()  # type: ignore[index]


def test_the_patch_projection_stays_as_it_is_in_student_and_teacher() -> None:
    torch.manual_seed(0)
    method = small(MoCoV3, VIT, optim=Optim("adamw", base_lr=0.1, weight_decay=0.5, decay_norm_and_bias=True))
    optimizer = method.optim.create(method, 256)
    before = [p.clone() for p in method.backbone.patch_embed.parameters()]  # type: ignore[union-attr]
    positions = method.backbone.pos_embed.clone()  # type: ignore[operator]
    for _ in range(3):
        optimizer.zero_grad()
        method.training_loss([torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)]).backward()
        optimizer.step()
        method.update_teacher()
    for backbone in (method.backbone, method.teacher_backbone):
        for p, expected in zip(backbone.patch_embed.parameters(), before, strict=True):  # type: ignore[union-attr]
            assert torch.equal(p, expected)
            assert p.grad is None
        assert torch.equal(backbone.pos_embed, positions)  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 1  # no weight is left out of the decay


def test_each_view_has_its_own_forward() -> None:
    method = small(MoCoV3)
    method.training_loss([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)])
    assert method.backbone.bn1.num_batches_tracked == 2  # type: ignore[union-attr]


def test_chance_loss_is_that_of_equal_embeddings() -> None:
    method = small(MoCoV3, temperature=0.2)
    assert method.chance_loss is None
    for head in (method.projector, method.predictor, method.teacher_projector):
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    loss = method.training_loss([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)])
    assert loss.item() == pytest.approx(4 * 0.2 * math.log(4))
    method.global_batch = 4  # as within a training
    assert method.chance_loss == pytest.approx(4 * 0.2 * math.log(4))


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    logits = unit(queries) @ unit(keys.detach()).T / temperature
    losses = [-torch.log_softmax(logits[i], 0)[i] for i in range(len(logits))]
    return 2 * temperature * torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_whole_steps_equal_a_plain_restatement(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "resnet":
        method = small(MoCoV3, temperature=0.3, momentum=0.9, optim=Optim("lars", base_lr=3.0, weight_decay=1e-2))
        update, norms, predictor_norms, size = lars(3.0, 1e-2), (1, 4), (1,), 16
    else:
        optim = Optim("adamw", base_lr=1e-2, weight_decay=0.1)
        method = small(MoCoV3, VIT, temperature=0.3, momentum=0.9, optim=optim)
        update, norms, predictor_norms, size = adamw(1e-2, 0.1), (1, 4, 7), (1, 4), 32
    method.double()

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        queries, keys = [], []
        for view in views:
            z = relu_mlp(run(method.backbone, weights, "backbone.", view), weights, "projector", norms)
            queries.append(relu_mlp(z, weights, "predictor", predictor_norms))
            features = run(method.teacher_backbone, weights, "teacher_backbone.", view)
            keys.append(relu_mlp(features, weights, "teacher_projector", norms))
        return contrast(queries[0], keys[1], 0.3) + contrast(queries[1], keys[0], 0.3)

    compare(method, loss_of, update, random_views(3, size, size), after=lambda weights: moved(weights, 0.9))


def test_momentum_is_that_of_the_step_to_come(tmp_path: object) -> None:
    method = small(MoCoV3, momentum=0.5)
    method.progress_of = lambda step: step / 4  # type: ignore[method-assign]
    with torch.no_grad():
        method.projector[0].weight += 1
    before = method.teacher_projector[0].weight.clone()
    method.update_teacher()
    share = (method.teacher_projector[0].weight - before).mean().item()
    assert share == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 4)), abs=1e-5)
    assert F.mse_loss(before, method.teacher_projector[0].weight) > 0


def test_a_vit_without_class_token_is_refused() -> None:
    with pytest.raises(UserError, match="class token"):
        MoCoV3(backbone="vit_base_patch16_siglip_224")


def test_the_fixed_positions_are_those_of_the_images_grid() -> None:
    vit = small(MoCoV3, VIT).backbone
    assert torch.equal(vit.positions(3, 5), sincos_positions(48, (3, 5), rows_first=True))
    assert vit.positions(4, 4) is vit.pos_embed
