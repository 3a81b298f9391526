"""SimMIM: masks, decoder, and whole steps against a plain restatement."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import Optim, SimMIM, UserError, losses
from tests.processes import run_processes
from tests.restate import Weights, adamw, compare, parameters, random_views, run
from tests.small import VIT, small, trainer


def test_decoder_and_defaults_are_the_papers() -> None:
    method = SimMIM(backbone_kwargs={"depth": 1})
    assert parameters(method.decoder) == 768 * 16 * 16 * 3 + 16 * 16 * 3
    assert method.optim.peak_lr(2048) == pytest.approx(1e-4 * 2048 / 512)
    factors = [method.optim.lr_factor(step, 800, 1) for step in (0, 10, 699, 700)]
    assert factors == pytest.approx([0.0025, 1, 1, 0.1])  # 1e-6 at the start, of 4e-4
    decayed, undecayed = ({id(p) for p in group["params"]} for group in method.optim.create(method, 256).param_groups)
    names = {id(p): name for name, p in method.named_parameters()}
    assert {"mask_token", "decoder.0.weight"} <= {names[p] for p in decayed}
    assert {"decoder.0.bias", "backbone.norm.weight"} <= {names[p] for p in undecayed}


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


def test_units_hide_their_patches_from_the_encoder_and_alone_count() -> None:
    torch.manual_seed(0)
    method = small(SimMIM, mask_unit=16)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet18"}, "set model.backbone to a ViT"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0 must lie between 0 and 1"),
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


def _masks(rank: int, processes: int) -> Tensor:
    method = small(SimMIM)
    method._generator = torch.Generator().manual_seed(3)  # as in a step
    return method._units(torch.empty(8 // processes, 3, 32, 32))


def test_two_processes_draw_the_masks_of_one() -> None:
    assert torch.equal(torch.cat(run_processes(_masks, 2, 2)), _masks(0, 1))


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    optim = Optim("adamw", base_lr=1e-3, weight_decay=0.05)
    method = small(SimMIM, optim=optim, mask_unit=16).double()
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

    compare(method, loss_of, adamw(1e-3, 0.05), random_views(3, 32, batch=2))


def test_features_are_those_of_whole_views() -> None:
    method = small(SimMIM, VIT).eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = method.backbone.masked_tokens(images, torch.zeros(2, 16, dtype=torch.bool), method.mask_token)
    torch.testing.assert_close(method(images), tokens.mean(1))
