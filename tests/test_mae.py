"""MAE: architecture, masking, probes, and whole steps against a plain restatement."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_lightning import MAE, FakeData, LinearProbe, Optim, UserError
from ssl_lightning.masks import random_masking
from tests.oracle import Weights, adamw, compare, linear, parameters, random_views, run
from tests.processes import run_processes
from tests.small import VIT, small, trainer


def test_the_model_has_the_published_size() -> None:
    with torch.device("meta"):
        method = MAE()
        cifar = MAE(backbone="vit_small_patch16_224", backbone_kwargs={"img_size": 32, "patch_size": 4})
    assert parameters(method) == 111_907_840
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == 111_655_680
    assert parameters(cifar) == 46_814_128


def test_it_starts_as_in_the_released_code() -> None:
    torch.manual_seed(0)
    vit: Any = MAE(backbone_kwargs={"depth": 1}, decoder_depth=1).backbone
    for weight, bound in (
        (vit.patch_embed.proj.weight, 0.0625),
        (vit.patch_embed.proj.bias, 0.0360844),
        (vit.blocks[0].attn.qkv.weight, 0.0441942),
        (vit.blocks[0].attn.proj.weight, 0.0625),
    ):
        assert 0.98 * bound < weight.abs().max() <= bound
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert MAE(backbone_kwargs={"depth": 1}, decoder_depth=1).optim.peak_lr(4096) == pytest.approx(2.4e-3)


def test_masking_of_the_worked_example() -> None:
    visible, restore, mask = random_masking(torch.tensor([[0.3, 0.1, 0.9, 0.5, 0.7, 0.2, 0.8, 0.4]]), 0.75)
    assert visible.tolist() == [[1, 5]]
    assert restore.tolist() == [[2, 0, 7, 4, 5, 1, 6, 3]]
    assert mask.tolist() == [[1, 0, 1, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(196, 0.75, 49), (64, 0.75, 16), (100, 0.9, 9), (10, 0.9, 1)])
def test_every_image_has_its_own_mask_of_the_papers_size(patches: int, ratio: float, kept: int) -> None:
    visible, _, mask = random_masking(torch.rand(8, patches), ratio)
    assert (mask == 0).sum(1).tolist() == [kept] * 8
    assert visible.shape == (8, kept)
    assert len({tuple(row) for row in mask.tolist()}) > 1


def test_only_visible_patches_reach_the_encoder_with_their_own_positions() -> None:
    torch.manual_seed(0)
    method = small(MAE)
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    lengths: list[int] = []
    method.backbone.blocks.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))  # type: ignore[union-attr,operator]
    predictions, mask = method.reconstruct(images, noise)
    assert lengths == [1 + 4]
    assert predictions.shape == (2, 16, 8 * 8 * 3)
    changed = images.clone()
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(hidden.bool(), torch.rand_like(changed), changed)
    torch.testing.assert_close(method.reconstruct(changed, noise)[0], predictions)  # what is masked is not seen
    shuffle = noise.argsort(1)
    order = torch.cat([shuffle[:, :4].flip(1), shuffle[:, 4:]], 1)  # the same patches kept, in another order
    tokens = method.encode(images, shuffle[:, :4])
    torch.testing.assert_close(method.encode(images, order[:, :4])[:, 1:].flip(1), tokens[:, 1:])


def test_features_are_the_class_token_of_the_whole_image_or_the_mean_of_its_patches() -> None:
    method = small(MAE).eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = method.encode(images, torch.arange(16).expand(2, -1))
    torch.testing.assert_close(method(images), tokens[:, 0])
    kwargs = {**method.hparams["backbone_kwargs"], "global_pool": "avg"}
    pooled = small(MAE, {"backbone_kwargs": kwargs}).eval()
    pooled.load_state_dict(method.state_dict())
    torch.testing.assert_close(pooled(images), tokens[:, 1:].mean(1))


def test_probes_learn_from_whole_views_in_eval_mode_every_few_steps(tmp_path: Any) -> None:
    calls: list[int] = []

    class Recorder(LinearProbe):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if outputs["features"] is not None:
                calls.append(batch_idx)
                assert pl_module.backbone.training
                pl_module.eval()
                torch.testing.assert_close(outputs["features"], pl_module(batch[0][0]).detach())
                pl_module.train()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    kwargs = {**VIT["backbone_kwargs"], "drop_path_rate": 0.5}  # differs in train mode
    method = small(MAE, {"backbone_kwargs": kwargs}, probe_every=3, optim=Optim("sgd", base_lr=0.0))
    trainer(tmp_path, callbacks=[Recorder()]).fit(method, FakeData(batch_size=8))
    assert calls == [0, 3, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet18"}, "set --model.backbone to a ViT"),
        ({"backbone": "vit_base_patch16_siglip_224"}, "set --model.backbone to a ViT"),
        ({"backbone": "vit_base_patch16_clip_224"}, "set --model.backbone to a ViT"),
        ({"mask_ratio": 1.5}, "mask_ratio"),
    ],
)
def test_wrong_arguments_say_what_to_change(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message), torch.device("meta"):
        MAE(**arguments)


def test_views_of_another_size_than_the_backbones_have_their_own_fixed_positions(tmp_path: Any) -> None:
    torch.manual_seed(0)
    method, other = small(MAE), small(MAE, {"backbone_kwargs": {**VIT["backbone_kwargs"], "img_size": 16}})
    fixed = ("backbone.pos_embed", "decoder.positions")
    other.load_state_dict({k: v for k, v in method.state_dict().items() if k not in fixed}, strict=False)
    images, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 4)
    torch.testing.assert_close(method.reconstruct(images, noise)[0], other.reconstruct(images, noise)[0])
    trainer(tmp_path).fit(method, FakeData(batch_size=8, image_size=16))


def _two_processes(rank: int) -> tuple[Tensor, float]:
    torch.manual_seed(0)
    method = small(MAE).double()
    images = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    noise = method.noise(images[:4])
    torch.manual_seed(1)
    return noise, float(method.training_loss([images[rank * 4 : rank * 4 + 4]]))


def test_two_processes_draw_the_masks_of_one() -> None:
    results = run_processes(_two_processes, 2)
    torch.manual_seed(0)
    method = small(MAE).double()
    images = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    assert torch.equal(torch.cat([noise for noise, _ in results]), method.noise(images))
    torch.manual_seed(1)
    loss = float(method.training_loss([images]))
    assert sum(loss for _, loss in results) / 2 == pytest.approx(loss, abs=1e-10)


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    optim = Optim("adamw", base_lr=1e-3, weight_decay=0.05, extra={"betas": (0.9, 0.95)})
    method = small(MAE, optim=optim).double()
    vit: Any = method.backbone
    noises: list[Tensor] = []
    method.noise = lambda images: noises.append(torch.rand(len(images), 16)) or noises[-1]  # type: ignore[method-assign,func-returns-value]

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        (images,), total, count = views, torch.zeros((), dtype=torch.float64), 0
        for image, noise in zip(images, noises[-1], strict=True):
            kept = noise.argsort()[:4].tolist()
            patches = run(vit.patch_embed, weights, "backbone.patch_embed.", image[None])[0].flatten(0, 1)
            positions = weights["backbone.pos_embed"][0]
            tokens = [weights["backbone.cls_token"][0, 0] + positions[0]]
            tokens += [patches[index] + positions[1 + index] for index in kept]
            h = run(vit.blocks, weights, "backbone.blocks.", torch.stack(tokens)[None])
            h = linear(run(vit.norm, weights, "backbone.norm.", h), weights, "decoder.embed")[0]
            full = [h[0]] + [
                h[1 + kept.index(index)] if index in kept else weights["mask_token"][0, 0] for index in range(16)
            ]
            x = torch.stack(full)[None] + weights["decoder.positions"]
            x = run(method.decoder.blocks, weights, "decoder.blocks.", x)
            x = linear(run(method.decoder.norm, weights, "decoder.norm.", x), weights, "decoder.projection")[0, 1:]
            for index in range(16):
                row, column = index // 4 * 8, index % 4 * 8
                patch = image[:, row : row + 8, column : column + 8].permute(1, 2, 0).reshape(-1)
                target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                if index not in kept:
                    total, count = total + (x[index] - target).square().mean(), count + 1
        return total / count

    compare(method, loss_of, adamw(1e-3, 0.05, 0.9, 0.95), random_views(3, 32, batch=2))
