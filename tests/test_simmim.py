"""SimMIM: masks, decoder, and whole steps against a plain restatement."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import Optim, SimMIM, UserError, losses
from ssl_lightning.backbones.tokens import masked_tokens
from tests.oracle import Weights, adamw, compare, parameters, random_views, run
from tests.processes import run_processes
from tests.small import SWIN, VIT, small, trainer

BEIT: dict[str, Any] = {"backbone": "beit_base_patch16_224", "backbone_kwargs": VIT["backbone_kwargs"]}


def test_decoder_and_defaults_are_the_papers() -> None:
    method = SimMIM(backbone_kwargs={"depth": 1})
    assert parameters(method.decoder) == 768 * 16 * 16 * 3 + 16 * 16 * 3
    assert method.optim.peak_lr(2048) == pytest.approx(1e-4 * 2048 / 512)
    factors = [method.optim.lr_factor(step, 800, 1) for step in (0, 10, 699, 700)]
    assert factors == pytest.approx([0.005, 1, 1, 0.1])  # 5e-7 of 1e-4, both times batch / 512
    decayed, undecayed = ({id(p) for p in group["params"]} for group in method.optim.create(method, 256).param_groups)
    names = {id(p): name for name, p in method.named_parameters()}
    assert {"decoder.0.weight", "backbone.rel_pos_bias.relative_position_bias_table"} <= {names[p] for p in decayed}
    spared = {"backbone.cls_token", "decoder.0.bias", "backbone.norm.weight"}
    assert spared <= {names[p] for p in undecayed}
    assert "mask_token" in {names[p] for p in decayed}
    swin = small(SimMIM, SWIN, mask_unit=8)
    (undecayed,) = (group for group in swin.optim.create(swin, 256).param_groups if not group["decayed"])
    assert any(p is swin.mask_token for p in undecayed["params"])
    encoder: Any = method.backbone
    assert encoder.pos_embed is None  # positions are relative, the same in all blocks
    assert encoder.blocks[0].attn.relative_position_bias_table is None
    assert float(encoder.blocks[0].gamma_1[0]) == pytest.approx(0.1)


@pytest.mark.slow
def test_vits_start_as_in_the_released_code() -> None:
    torch.manual_seed(0)
    method, swin = SimMIM(backbone_kwargs={"depth": 2}), small(SimMIM, SWIN, mask_unit=8)
    encoder: Any = method.backbone
    std = 0.02 * 0.53956  # cut at one deviation
    second = encoder.blocks[1]
    for layer in (encoder.patch_embed.proj, second.attn.qkv, second.mlp.fc1):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.01)
    for layer in (second.attn.proj, second.mlp.fc2):  # divided by the square root of twice the depth
        assert layer.weight.std().item() == pytest.approx(std / 2, rel=0.01)
    assert method.mask_token.abs().max() <= 0.02
    assert swin.mask_token.abs().max() > 0.02


def test_loss_of_the_worked_example() -> None:
    mask = torch.tensor([[[True, False], [False, False]]])
    loss = losses.simmim(torch.full((1, 3, 2, 2), 2.0), torch.zeros(1, 3, 2, 2), mask)
    assert loss.item() == pytest.approx(1.99998, abs=1e-6)


@pytest.mark.parametrize(("size", "masked"), [(192, 22), (224, 30)])
def test_whole_units_of_32_px_are_masked_as_many_in_each_image_rounded_up(size: int, masked: int) -> None:
    method = small(SimMIM, mask_unit=32)
    units = method._units(torch.empty(8, 3, size, size))
    assert units.shape == (8, size // 32, size // 32)
    assert units.flatten(1).sum(1).tolist() == [masked] * 8
    assert len({tuple(row) for row in units.flatten(1).tolist()}) > 1


@pytest.mark.parametrize("encoder", [VIT, BEIT, SWIN], ids=["vit", "beit", "swin"])
def test_units_hide_their_patches_from_the_encoder_and_alone_count(encoder: dict[str, Any]) -> None:
    torch.manual_seed(0)
    method = small(SimMIM, encoder, mask_unit=16)
    images, units = torch.rand(2, 3, 32, 32), torch.tensor([[[1, 0], [0, 0]], [[0, 1], [0, 1]]]).bool()
    pixels = units.repeat_interleave(16, 1).repeat_interleave(16, 2)
    predictions = method.reconstruct(images, units)
    assert predictions.shape == images.shape
    hidden = torch.where(pixels[:, None], torch.rand_like(images), images)
    torch.testing.assert_close(method.reconstruct(hidden, units), predictions)
    garbage = torch.where(pixels[:, None], predictions, torch.rand_like(images))
    loss = losses.simmim(predictions, images, pixels)
    torch.testing.assert_close(losses.simmim(garbage, images, pixels), loss)
    assert not torch.allclose(losses.simmim(predictions, hidden, pixels), loss)


def test_the_decoder_lays_pixels_channel_first() -> None:
    method = small(SimMIM)
    method.decoder[0] = torch.nn.Identity()
    values = torch.arange(8 * 8 * 3.0).view(1, -1, 1, 1)
    assert method.decoder(values)[0, 1, 2, 3] == 64 + 2 * 8 + 3


def test_the_papers_encoders_see_the_token_in_the_place_of_masked_patches() -> None:
    torch.manual_seed(0)
    images, units = torch.rand(2, 3, 32, 32), torch.tensor([[[1, 0], [0, 0]], [[0, 1], [0, 1]]]).bool()

    method = small(SimMIM, BEIT, mask_unit=16)
    vit: Any = method.backbone
    torch.nn.init.normal_(vit.rel_pos_bias.relative_position_bias_table)
    hidden = units.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)  # 4 x 4 patches of 8 px
    tokens = torch.where(hidden[..., None], method.mask_token, vit.patch_embed(images))
    tokens = torch.cat([vit.cls_token.expand(2, 1, -1), tokens], dim=1)
    for block in vit.blocks:
        tokens = block(tokens, shared_rel_pos_bias=vit.rel_pos_bias())
    patches = vit.norm(tokens)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(method.reconstruct(images, units), method.decoder(patches))

    method = small(SimMIM, SWIN, mask_unit=16)
    swin: Any = method.backbone
    hidden = units.repeat_interleave(4, 1).repeat_interleave(4, 2)  # 8 x 8 patches of 4 px
    tokens = torch.where(hidden[..., None], method.mask_token[0], swin.patch_embed(images))
    patches = swin.norm(swin.layers(tokens)).permute(0, 3, 1, 2)  # one for each 8 px
    assert patches.shape == (2, 48, 4, 4)
    torch.testing.assert_close(method.reconstruct(images, units), method.decoder(patches))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet18"}, "set --model.backbone to a ViT, BEiT or Swin"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0 must lie between 0 and 1"),
        ({"backbone_kwargs": {"patch_size": (8, 16)}}, "SimMIM needs square patches, not 8 x 16 px"),
        ({"mask_unit": 24}, "mask_unit=24 is not a multiple of the backbone's patches of 16 px"),
    ],
)
def test_wrong_arguments_say_what_to_change(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SimMIM(**arguments)


def test_units_that_do_not_divide_the_view_are_refused(tmp_path: Any) -> None:
    from ssl_lightning import FakeData

    with pytest.raises(UserError, match="mask_unit=24 px do not divide views of 32 px"):
        trainer(tmp_path).fit(small(SimMIM, mask_unit=24), FakeData(batch_size=8))


def test_views_that_the_backbone_does_not_take_are_refused(tmp_path: Any) -> None:
    from ssl_lightning import FakeData

    with pytest.raises(UserError, match=r"takes images of 32 px only, not views of 64 px; set --model.backbone_kwargs"):
        trainer(tmp_path).fit(small(SimMIM, SWIN), FakeData(batch_size=8, image_size=64))


def _masks(rank: int, processes: int) -> Tensor:
    method = small(SimMIM)
    method.randomness.generator = torch.Generator().manual_seed(3)  # as in a step
    return method._units(torch.empty(8 // processes, 3, 32, 32))


def test_two_processes_draw_the_masks_of_one() -> None:
    assert torch.equal(torch.cat(run_processes(_masks, 2, 2)), _masks(0, 1))


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    optim = Optim("adamw", base_lr=1e-3, weight_decay=0.5)
    method = small(SimMIM, VIT, optim=optim, mask_unit=16).double()
    vit: Any = method.backbone
    drawn: list[Tensor] = []
    draw = method._units
    method._units = lambda images: drawn.append(draw(images)) or drawn[-1]

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        (images,), total, count = views, torch.zeros((), dtype=torch.float64), 0
        for image, units in zip(images, drawn[-1].tolist(), strict=True):
            patches = run(vit.patch_embed, weights, "backbone.patch_embed.", image[None])[0]
            tokens = []
            hidden = [units[row // 2][column // 2] for row in range(4) for column in range(4)]
            for index in range(16):
                own = patches[index // 4, index % 4]
                tokens.append(weights["mask_token"][0, 0] if hidden[index] else own)
            h = torch.stack(tokens)[None] + weights["backbone.pos_embed"]
            h = run(vit.norm, weights, "backbone.norm.", run(vit.blocks, weights, "backbone.blocks.", h))[0]
            pixels = F.conv2d(h[:, :, None, None], weights["decoder.0.weight"], weights["decoder.0.bias"])
            for index in range(16):
                row, column = index // 4 * 8, index % 4 * 8
                patch = image[:, row : row + 8, column : column + 8]
                if hidden[index]:
                    total, count = total + (pixels[index].view(3, 8, 8) - patch).abs().sum() / 3, count + 64
        return total / (count + 1e-5)

    update = adamw(1e-3, 0.5, undecayed=("backbone.pos_embed",))
    compare(method, loss_of, update, random_views(3, 32, batch=2))


def test_features_are_those_of_whole_views() -> None:
    method = small(SimMIM, VIT).eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = masked_tokens(method.backbone, images, torch.zeros(2, 16, dtype=torch.bool), method.mask_token)
    torch.testing.assert_close(method(images), tokens.mean(1))
