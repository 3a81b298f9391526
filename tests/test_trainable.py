"""Training parts of a backbone: what learns, what stays, and what is saved and exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssl_lightning import DINO, MAE, DINOv2, MoCoV3, SimCLR, SimMIM, SSLModule, UserError
from ssl_lightning.backbones.low_rank import merge, merged
from ssl_lightning.checkpoints import export, load_backbone, open_backbone
from tests.small import DINOV3, VIT, data, slow_unless, small, trainer
from tests.test_init_from import saved

BEIT: dict[str, Any] = {**VIT, "backbone": "beit_base_patch16_224"}
BIASED: dict[str, Any] = {**DINOV3, "backbone": "vit_small_patch16_dinov3_qkvb"}  # timm bypasses its qkv
WHITENED: dict[str, Any] = {"backbone": "whitened_vit", "backbone_kwargs": {"channels": (8, 8, 12), "depth": 2}}
CONVNEXT: dict[str, Any] = {
    "backbone": "convnext_atto",
    "backbone_kwargs": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
}


def trained(folder: Path, method: type[SSLModule], net: dict[str, Any], trainable: Any) -> tuple[Any, set[str]]:
    """A method after three steps from the weights of another, and the parameters of its backbone that moved."""
    source = saved(folder, method, net)
    weights = open_backbone(source).backbone.state_dict()
    module = small(method, net, init_from=source, trainable=trainable)
    images = torch.rand(3, 3, 32, 32)
    running = trainer(folder, limit_train_batches=3)
    running.validate(module, data(method), verbose=False)  # reads the source
    before = {name: p.clone() for name, p in module.backbone.named_parameters()}
    of_source = open_backbone(source).backbone(images)
    parts = [getattr(module, name) for name in ("backbone", "teacher_backbone") if hasattr(module, name)]
    for part in parts:
        torch.testing.assert_close(part.eval()(images), of_source, atol=1e-5, rtol=0)
    running.fit(module, data(method))
    running.save_checkpoint(folder / "x.ckpt")
    assert weights.keys() <= module.backbone.state_dict().keys()
    return module, {name for name, p in module.backbone.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize(
    ("method", "net"),
    slow_unless(
        lambda method, net: method is DINOv2 and net is VIT,
        [(DINOv2, VIT), (DINO, DINOV3), (MAE, BIASED), (SimMIM, BEIT), (MoCoV3, VIT), (SimCLR, VIT)],
    ),
)
def test_low_rank_updates_learn_and_are_merged_in_exports(
    method: type[SSLModule], net: dict[str, Any], tmp_path: Path
) -> None:
    lora = {"rank": 2, "alpha": 6.0, "projections": ["q", "v", "proj"]}
    module, moved = trained(tmp_path, method, net, {"lora": lora})
    assert all("lora" in name or name.startswith(("blocks.1.", "norm.", "fc_norm.")) for name in moved)
    layers = ("qkv.lora_q", "qkv.lora_v", "proj.lora_all")
    updates = {f"blocks.0.attn.{layer}_{half}" for layer in layers for half in "ab"}
    assert updates == {name for name in moved if "lora" in name}
    assert "blocks.1.mlp.fc1.weight" in moved
    name, state = "blocks.0.attn.qkv.weight", module.backbone.state_dict()
    change = merged(state)[name] - state[name]
    assert [bool(rows.any()) for rows in change.chunk(3)] == [True, False, True]  # not the keys

    images = torch.rand(3, 3, 32, 32)
    features = module.eval()(images)
    exported = export(tmp_path / "x.ckpt", output=tmp_path / "x.safetensors")
    plain = small(method, net).backbone.state_dict()
    for path in (tmp_path / "x.ckpt", exported):
        backbone = load_backbone(path)
        assert backbone.state_dict().keys() == plain.keys()
        torch.testing.assert_close(backbone(images), features, atol=1e-5, rtol=0)
    again = method.load_from_checkpoint(tmp_path / "x.ckpt")
    torch.testing.assert_close(again.eval()(images), features, atol=0, rtol=0)
    merge(again)
    assert again.backbone.state_dict().keys() == plain.keys()
    torch.testing.assert_close(again(images), features, atol=1e-5, rtol=0)
    further = small(method, net, init_from=str(tmp_path / "x.ckpt"), trainable="lora")  # goes on with merged weights
    trainer(tmp_path).validate(further, data(method), verbose=False)
    torch.testing.assert_close(further.eval()(images), features, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("net", "trainable", "learns"),
    slow_unless(
        lambda net, trainable, _: net is VIT and trainable != "norms",
        [
            (VIT, {"last_blocks": 1}, lambda name, _: name.startswith(("blocks.1.", "norm."))),
            (VIT, "norms", lambda _, part: isinstance(part, nn.LayerNorm)),
            ({}, "norms", lambda _, part: isinstance(part, nn.BatchNorm2d)),
            (CONVNEXT, {"last_blocks": 1}, lambda name, _: name.startswith("stages.3.blocks.")),
        ],
    ),
)
def test_only_what_is_chosen_learns(net: dict[str, Any], trainable: Any, learns: Any, tmp_path: Path) -> None:
    module, moved = trained(tmp_path, SimCLR, net, trainable)
    parts = dict(module.backbone.named_modules())
    names = {name for name, _ in module.backbone.named_parameters()}
    assert moved == {name for name in names if learns(name, parts[name.rpartition(".")[0]])}
    assert moved < names


@pytest.mark.parametrize(
    ("net", "trainable", "message"),
    [
        ({}, "lora", "--model.trainable.lora: the backbone has no blocks"),
        (CONVNEXT, "lora", "adapts the attention of timm's ViTs"),
        ({}, {"last_blocks": 1}, "--model.trainable.last_blocks: the backbone has no blocks"),
        (WHITENED, {"last_blocks": 3}, "--model.trainable.last_blocks 3: the backbone has 2 blocks"),
        (VIT, {"last_blocks": 3}, "--model.trainable.last_blocks 3: the backbone has 2 blocks"),
        (VIT, {"last_blocks": -1}, "--model.trainable.last_blocks -1"),
        (VIT, {"lora": {"whole_blocks": 3}}, "--model.trainable.lora.whole_blocks 3: the backbone has 2 blocks"),
        (VIT, {"lora": {"rank": 0}}, "rank of 1 or more"),
        (VIT, {"lora": {"projections": ["q", "mlp"]}}, "projections of q, k, v, proj"),
        (VIT, {"lora": {}, "last_blocks": 1}, "whole_blocks instead of --model.trainable.last_blocks"),
        (VIT, {"last_blocks": 0}, "leaves nothing of the backbone to train"),
        (VIT, {"last_block": 1}, "'last_block'; it takes last_blocks, norms and lora"),
        (VIT, "most", "--model.trainable=most must be all, norms, lora"),
    ],
)
def test_what_cannot_be_trained_is_refused(net: dict[str, Any], trainable: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(SimCLR, net, trainable=trainable)


def test_the_maps_of_a_whitened_vit_are_no_blocks_to_adapt() -> None:
    module = small(SimCLR, WHITENED, trainable="lora")
    learning = {name.split(".lora")[0] for name, p in module.backbone.named_parameters() if p.requires_grad}
    assert "blocks.0.attn.qkv" in learning
    assert not any(name.startswith("patch_embed") for name in learning)
