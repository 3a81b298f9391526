"""BEiT and its tokenizer: masks, words of the same crop, and whole steps against a plain restatement."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import BEiT, FakeData, ImageTokenizer, Optim, UserError, losses
from ssl_lightning.backbones.tokens import masked_tokens
from ssl_lightning.data.views import IMAGENET_MEAN, IMAGENET_STD, preset
from tests.oracle import Weights, adamw, compare, linear, random_views, run
from tests.processes import run_processes
from tests.small import SWIN, TEACHER, TOKENIZER, VIT, small, trainer


class Brightness(torch.nn.Module):
    """The words are the brightness of squares of 4 px."""

    num_tokens, stride = 32, 4

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return (F.avg_pool2d(images.mean(1, keepdim=True), 4).clamp(0, 1) * 31).long().flatten(1)


def beit(**kwargs: Any) -> Any:
    return small(BEiT, tokenizer=Brightness(), **kwargs)


def test_defaults_are_the_papers() -> None:
    method = BEiT(backbone_kwargs={"depth": 2})
    assert method.chance_loss == pytest.approx(9.0109, abs=1e-4)
    assert method.optim.peak_lr(2048) == 1.5e-3
    assert method.head.weight.shape == (8192, 768)
    blocks: Any = method.backbone.blocks
    assert [block.drop_path1.drop_prob for block in blocks[1:]] == [pytest.approx(0.1)]
    assert float(blocks[0].gamma_1[0]) == pytest.approx(0.1)
    encoder: Any = method.backbone
    assert encoder.pos_embed is None  # positions are relative, the same in all blocks
    assert encoder.rel_pos_bias is not None
    rates = [method.optim.lr_factor(step, 800, 1) for step in (0, 9, 10, 800)]
    assert rates == pytest.approx([0, 1, 1, 1 / 150])
    (spec,) = preset("beit")
    assert (spec.mean, spec.std) == (IMAGENET_MEAN, IMAGENET_STD)
    mask = method.draw_masks(torch.empty(32, 3, 224, 224))
    assert int(mask.sum(1).max()) == 75
    assert int(mask.sum(1).min()) > 60


@pytest.mark.slow
def test_it_starts_as_in_the_released_code() -> None:
    torch.manual_seed(0)
    method = BEiT(backbone="vit_base_patch16_224", backbone_kwargs={"depth": 3})
    blocks: Any = method.backbone.blocks
    std = 0.02 * 0.53956  # cut at one deviation
    for depth, block in enumerate(blocks, start=1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(std, rel=0.01)
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(std / math.sqrt(2 * depth), rel=0.01)
    projection: Any = method.backbone.patch_embed.proj  # type: ignore[union-attr]
    assert projection.weight.std().item() == pytest.approx(std, rel=0.01)
    assert not projection.bias.any()
    assert method.head.weight.abs().max() <= 0.02
    assert method.backbone.pos_embed.std().item() == pytest.approx(std, rel=0.02)  # type: ignore[operator,union-attr]
    assert not blocks[0].attn.qkv.bias.any()


def test_the_papers_encoder_shares_its_relative_positions() -> None:
    torch.manual_seed(0)
    method = beit(backbone="beit_base_patch16_224", backbone_kwargs=VIT["backbone_kwargs"]).eval()
    vit: Any = method.backbone
    assert vit.pos_embed is None
    assert vit.blocks[0].attn.relative_position_bias_table is None
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(method(images), vit.forward_features(images)[:, 1:].mean(1))
    loss = method.training_loss([images])
    assert torch.autograd.grad(loss, vit.rel_pos_bias.relative_position_bias_table)[0].any()


def test_words_follow_the_marker_to_its_patch() -> None:
    method = beit()
    words = []
    for row, column in ((0, 0), (1, 3), (2, 1)):
        image = torch.zeros(1, 3, 32, 32)
        image[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
        words = method.words(image)[0]
        assert int(words.argmax()) == 4 * row + column  # as the patches are counted
        assert words[4 * row + column] >= 25
        assert method.tokenizer.seen.shape == (1, 3, 16, 16)  # the same crop, four pixels a patch


def test_only_masked_patches_are_predicted_and_they_are_not_seen() -> None:
    torch.manual_seed(0)
    method = beit().eval()
    images = torch.rand(2, 3, 32, 32)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5], mask[1, 2], mask[1, 11] = True, True, True
    method.draw_masks = lambda _: mask
    logits, words = method._logits_and_words(images)
    assert torch.equal(words, method.words(images)[mask])  # of the same patches, in the same order
    hidden = images.clone()
    hidden[0, :, 8:16, 8:16] = torch.rand(3, 8, 8)  # patch 5
    torch.testing.assert_close(method._logits_and_words(hidden)[0][:1], logits[:1])
    assert not torch.equal(method._logits_and_words(hidden.flip(0))[0], logits)


def test_loss_is_the_mean_over_all_masked_patches() -> None:
    logits, words = torch.randn(5, 32), torch.randint(32, (5,))
    by_hand = -torch.stack([row.log_softmax(0)[word] for row, word in zip(logits, words, strict=True)]).mean()
    torch.testing.assert_close(losses.beit(logits, words), by_hand)
    assert losses.beit(torch.zeros(5, 32), words).item() == pytest.approx(math.log(32))


def _two_processes(rank: int, processes: int) -> tuple[Tensor, float]:
    torch.manual_seed(0)
    method = beit(mask_ratio=0.6, smallest_block=8).double()  # of which some are not filled
    images = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    own = images.chunk(processes)[rank]
    torch.manual_seed(1)
    mask = method.draw_masks(own)
    torch.manual_seed(1)
    return mask, float(method.training_loss([own]).detach())


def test_two_processes_have_masks_and_loss_of_one() -> None:
    (first, loss), (second, loss1) = run_processes(_two_processes, 2, 2)
    mask, whole = _two_processes(0, 1)
    assert torch.equal(torch.cat([first, second]), mask)
    assert first.sum() != second.sum(), "else the means need no weights"
    assert (loss + loss1) / 2 == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet18", "backbone_kwargs": {}}, "set --model.backbone to a ViT"),
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 must lie between 0 and 1"),
        ({"smallest_block": 8}, "smallest_block=8 is more than 6, the patches to mask of 16; set it lower"),
        ({"tokenizer": ""}, "train one, e.g. python -m ssl_lightning fit --model ImageTokenizer"),
        ({"tokenizer": "nowhere.ckpt"}, "model.tokenizer=nowhere.ckpt is not the checkpoint of an ImageTokenizer"),
        ({"tokenizer": __file__}, "test_beit.py is not the checkpoint of an ImageTokenizer"),
        ({"tokenizer": TEACHER}, "teacher.ckpt is not the checkpoint of an ImageTokenizer"),
        ({"num_tokens": 64}, "the tokenizer knows 32 words; set --model.num_tokens"),
    ],
)
def test_wrong_arguments_say_what_to_change(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(small(BEiT, **arguments), FakeData(batch_size=8))


def test_the_tokenizer_stays_as_it_is_and_out_of_the_checkpoint(tmp_path: Path) -> None:
    method = small(BEiT)
    before = {name: value.clone() for name, value in method.tokenizer.state_dict().items()}
    trainer(tmp_path).fit(method, FakeData(batch_size=8))
    assert all(torch.equal(value, before[name]) for name, value in method.tokenizer.state_dict().items())
    assert not method.tokenizer.training
    assert not any("tokenizer" in name for name in method.state_dict())


def test_any_module_can_be_the_tokenizer(tmp_path: Path) -> None:
    class Plain(torch.nn.Module):
        """Words of the patches of 8 px of the crop as it is."""

        def forward(self, images: Tensor) -> Tensor:
            return (F.avg_pool2d(images.mean(1, keepdim=True), 8).clamp(0, 1) * 31).long().flatten(1)

    method = small(BEiT, tokenizer=Plain())
    running = trainer(tmp_path, limit_train_batches=2)
    running.fit(method, FakeData(batch_size=8))
    running.save_checkpoint(tmp_path / "x.ckpt")
    again = BEiT.load_from_checkpoint(tmp_path / "x.ckpt")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again.eval()(images), method.eval()(images))  # without its tokenizer
    with pytest.raises(UserError, match="train one"):
        trainer(tmp_path).fit(again, FakeData(batch_size=8))
    trainer(tmp_path).fit(BEiT.load_from_checkpoint(tmp_path / "x.ckpt", tokenizer=Plain()), FakeData(batch_size=8))
    with pytest.raises(UserError, match=r"words of shape \(2, 64\) for a batch of 2 crops of 4 x 4 patches"):
        small(BEiT, tokenizer=Fine()).words(images)


class Fine(torch.nn.Module):
    """Four words where one is asked for."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 64, dtype=torch.long)


def test_tokens_are_the_nearest_vectors_row_by_row() -> None:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer.load_from_checkpoint(TOKENIZER).eval()
    images = torch.rand(2, 3, 64, 32)
    tokens = tokenizer.tokens(images)
    assert tokens.shape == (2, 4 * 2)  # a stride of 16 px
    codes = tokenizer.projector(tokenizer.backbone.forward_features(images))  # type: ignore[operator]
    for place in range(8):
        code = codes[0, :, place // 2, place % 2]
        distances = (F.normalize(code, dim=0) - F.normalize(tokenizer.prototypes, dim=1)).norm(dim=1)
        assert int(tokens[0, place]) == int(distances.argmin())


def test_the_tokenizer_learns_to_reconstruct_through_its_vectors() -> None:
    torch.manual_seed(0)
    tokenizer = small(ImageTokenizer, num_tokens=16)
    images = torch.zeros(16, 3, 32, 32)
    for index in range(16):  # halves, black and white
        images[index, :, 16 * (index % 2) :, 16 * (index // 2 % 2) :] = 1
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 5e-3)
    first = None
    for _ in range(60):
        loss = tokenizer.training_loss([images])
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    health = tokenizer.health([images])
    assert loss.item() < first / 2
    assert health["prototypes_in_use"] > 1 / 16
    with pytest.raises(UserError, match="stride of 16 px does not divide views of 40 px"):
        tokenizer.check([40], 8)


def test_a_swin_can_be_the_encoder_of_the_tokenizer() -> None:
    tokenizer = small(ImageTokenizer, SWIN).eval()
    images = torch.rand(2, 3, 32, 32)
    assert tokenizer.stride == 8
    assert tokenizer.tokens(images).shape == (2, 16)
    changed = images.clone()
    changed[:, :, :8, 24:] = 0  # the fourth place of the first row
    moved = (tokenizer._map(changed) - tokenizer._map(images)).abs().sum(1)  # (B, 4, 4)
    assert (moved.flatten(1).argmax(1) == 3).all()


def test_vectors_that_are_hardly_chosen_begin_anew_as_codes_of_the_batch() -> None:
    torch.manual_seed(0)
    tokenizer = small(ImageTokenizer, num_tokens=16).eval()
    images = torch.rand(4, 3, 32, 32)
    codes = tokenizer._encoded(images)[0].detach().permute(0, 2, 3, 1).flatten(0, 2)  # (16, token_dim)
    with torch.no_grad():
        tokenizer.prototypes[0] = codes.mean(0)
        tokenizer.prototypes[1:] = -codes.mean(0)
    before = tokenizer.prototypes.detach().clone()
    used = tokenizer.tokens(images).unique()
    for step in range(45):
        assert torch.equal(tokenizer.prototypes, before), step
        tokenizer.training_loss([images])
        tokenizer.update_teacher()
    unused = torch.ones(16, dtype=torch.bool).index_fill(0, used, False)
    assert unused.any()
    assert torch.equal(tokenizer.prototypes[~unused], before[~unused])
    assert torch.cdist(tokenizer.prototypes[unused], codes).min(1).values.max() < 1e-6
    torch.testing.assert_close(tokenizer.usage[unused], torch.full((int(unused.sum()),), 1 / 16))
    assert len(tokenizer.tokens(images).unique()) > len(used)


def _restarted(rank: int, processes: int) -> Tensor:
    torch.manual_seed(0)
    tokenizer = small(ImageTokenizer, num_tokens=16, restart_below=1.0).eval()
    tokenizer.randomness.generator = torch.Generator().manual_seed(3)  # as in a step
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).chunk(processes)[rank]
    tokenizer.training_loss([images])
    tokenizer.update_teacher()
    return tokenizer.prototypes.detach()


def test_two_processes_restart_the_vectors_of_one() -> None:
    alone = _restarted(0, 1)
    for prototypes in run_processes(_restarted, 2, 2):
        torch.testing.assert_close(prototypes, alone)


def test_loss_of_the_tokenizer_reaches_encoder_vectors_and_decoder() -> None:
    codes = torch.tensor([[1.0, 0.0]], requires_grad=True)
    vectors = torch.tensor([[0.6, 0.8]], requires_grad=True)
    images = torch.zeros(1, 2)
    loss = losses.vector_quantization(images + 2, images, codes, vectors, 0.25)
    assert loss.item() == pytest.approx(4 + 1.25 * 0.8)  # the squared distance is 0.8
    loss.backward()
    torch.testing.assert_close(codes.grad, 0.25 * 2 * torch.tensor([[0.4, -0.8]]))
    torch.testing.assert_close(vectors.grad, 2 * torch.tensor([[-0.4, 0.8]]))


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    method = beit(optim=Optim("adamw", base_lr=1e-3, lr_scaling="none", weight_decay=0.5)).double()
    vit: Any = method.backbone
    drawn: list[Tensor] = []
    draw = method.draw_masks
    method.draw_masks = lambda images: drawn.append(draw(images)) or drawn[-1]

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        terms = []
        for image, mask in zip(views[0], drawn[-1].tolist(), strict=True):
            patches = run(vit.patch_embed, weights, "backbone.patch_embed.", image[None])[0].flatten(0, 1)
            tokens = [weights["backbone.cls_token"][0, 0]]
            tokens += [weights["mask_token"][0, 0] if mask[index] else patches[index] for index in range(16)]
            h = torch.stack(tokens)[None] + weights["backbone.pos_embed"]
            h = run(vit.norm, weights, "backbone.norm.", run(vit.blocks, weights, "backbone.blocks.", h))
            logits = linear(h[0, 1:], weights, "head")
            words = method.words(image[None])[0]
            terms += [-logits[index].log_softmax(0)[words[index]] for index in range(16) if mask[index]]
        return torch.stack(terms).mean()

    update = adamw(1e-3, 0.5, undecayed=("backbone.cls_token", "backbone.pos_embed"))
    compare(method, loss_of, update, random_views(3, 32, batch=2))


def test_features_are_the_mean_of_the_patches_of_whole_views() -> None:
    method = small(BEiT, VIT).eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = masked_tokens(method.backbone, images, torch.zeros(2, 16, dtype=torch.bool), method.mask_token)
    torch.testing.assert_close(method(images), tokens[:, 1:].mean(1))
