"""Checkpoints of other projects, made here: which network is read, under which names, and at which size."""

import copy
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_lightning import UserError
from ssl_lightning.backbones import create_backbone
from ssl_lightning.checkpoints import load_backbone, open_backbone
from ssl_lightning.checkpoints.load import weights_for

Weights = dict[str, Tensor]
RESNET: dict[str, Any] = {"layers": [1, 2, 1, 1], "channels": [2, 4, 8, 8]}
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {"img_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
DINOV3: dict[str, Any] = {**VIT, "patch_size": 16, "global_pool": "token"}
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
HEAD = {"weight": torch.ones(3, 8), "bias": torch.ones(3)}


def source(name: str, kwargs: dict[str, Any], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = create_backbone(name, **kwargs).eval()
    for key, value in model.state_dict().items():
        if "running_var" in key:
            nn.init.uniform_(value, 0.5, 1.5)
        elif value.is_floating_point():
            nn.init.normal_(value, 1.0 if value.ndim == 1 and key.endswith("weight") else 0.0, 0.2)
    return model


def named(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def renamed(weights: Weights, **parts: Any) -> Weights:
    """Weights whose names are changed by regular expressions."""
    for old, new in parts.items():
        weights = {re.sub(old, new, name): value for name, value in weights.items()}
    return weights


def replaced(weights: Weights, table: dict[str, Any]) -> Weights:
    return renamed(weights, **table)


def _stage(by: int, name: str) -> Callable[[re.Match[str]], str]:
    return lambda match: name.format(int(match[1]) + by)


def numbered(w: Weights) -> Weights:
    return replaced(w, {r"^conv1\.": "0.", r"^bn1\.": "1.", r"^layer(\d)": _stage(3, "{}")})


def officially_swin(w: Weights) -> Weights:
    index = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16).long()}
    index |= {"layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1, 7, 7, 2)}  # of version 2
    return {**replaced(w, {r"layers\.(\d)\.downsample": _stage(-1, "layers.{}.downsample")}), **index}


def mmpretrains_swin(w: Weights) -> Weights:
    weights = replaced(
        officially_swin(w),
        {
            r"^norm\.": "norm1.",
            r"^layers\.": "stages.",
            r"patch_embed\.proj": "patch_embed.projection",
            r"\.attn\.": ".attn.w_msa.",
            r"mlp\.fc1": "ffn.layers.0.0",
            r"mlp\.fc2": "ffn.layers.1",
        },
    )
    for name, value in weights.items():
        if ".downsample." in name:  # what nn.Unfold gives: channel, row, column
            width = value.shape[-1] // 4
            places = [(column * 2 + row) * width + c for c in range(width) for row in (0, 1) for column in (0, 1)]
            weights[name] = value[..., places]
    return weights


def mmpretrains_vit(w: Weights) -> Weights:
    table = {r"^norm": "ln1", r"norm([12])": r"ln\1", r"^blocks": "layers", r"mlp\.fc1": "ffn.layers.0.0"}
    return replaced(w, {**table, r"mlp\.fc2": "ffn.layers.1", r"patch_embed\.proj": "patch_embed.projection"})


def with_registers(w: Weights) -> Weights:
    first = torch.ones(1, 1, 16)
    tokens = {"cls_token": w["cls_token"] - first, "pos_embed": torch.cat([first, w["pos_embed"]], 1)}
    return {**replaced(w, {"reg_token": "register_tokens"}), **tokens, "mask_token": torch.zeros(1, 16)}


def officially_dinov3(w: Weights) -> Weights:
    weights = replaced(w, {"reg_token": "storage_tokens", r"gamma_([12])": r"ls\1.gamma"})
    for name in [name for name in weights if name.endswith("q_bias")]:
        query, value = weights.pop(name), weights.pop(name.replace("q_bias", "v_bias"))
        weights[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.ones_like(query), value])
        weights[name.replace("q_bias", "qkv.bias_mask")] = torch.ones(48)
    return {**weights, "rope_embed.periods": torch.ones(2)}


def of_transformers(w: Weights) -> Weights:
    weights = replaced(
        w,
        {
            r"^(cls_token)": r"embeddings.\1",
            r"^pos_embed": "embeddings.position_embeddings",
            r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
            r"^blocks\.": "layers.",
            r"norm1": "layernorm_before",
            r"norm2": "layernorm_after",
            r"attn\.proj": "attention.o_proj",
            r"^norm": "layernorm",
        },
    )
    for name in [name for name in weights if "attn.qkv" in name]:
        for part, value in zip("qkv", weights.pop(name).chunk(3), strict=True):
            weights[name.replace("attn.qkv", f"attention.{part}_proj")] = value
    return weights


LAYOUTS: dict[str, tuple[str, dict[str, Any], Callable[[Weights], Weights]]] = {
    "ResNet by number": ("resnet18", RESNET, numbered),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, officially_swin),
    "Swin v2": ("swinv2_tiny_window8_256", SWIN, officially_swin),
    "mmpretrain's Swin": ("swin_tiny_patch4_window7_224", SWIN, mmpretrains_swin),
    "mmpretrain's ViT": ("vit_small_patch16_224", VIT, mmpretrains_vit),
    "registers": ("vit_small_patch14_reg4_dinov2", VIT, with_registers),
    "DINOv3": ("vit_small_patch16_dinov3_qkvb", DINOV3, officially_dinov3),
    "transformers": ("vit_small_patch16_224", VIT, of_transformers),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_other_projects_are_read_behind_any_prefix(layout: str, tmp_path: Path) -> None:
    name, kwargs, rename = LAYOUTS[layout]
    model = source(name, kwargs)
    weights = rename(dict(model.state_dict()))
    torch.save({"net": named("module.my_part._orig_mod.", weights), "epoch": 3}, tmp_path / "x.pth")
    torch.testing.assert_close(load_backbone(tmp_path / "x.pth", name, kwargs)(IMAGES), model(IMAGES))


FIRST, SECOND = (dict(source("resnet18", RESNET, seed).state_dict()) for seed in (0, 1))
VITS = [dict(source("vit_small_patch16_224", VIT, seed).state_dict()) for seed in (0, 1)]
BRANCHES: dict[str, Any] = {
    "average": {"model": SECOND, "model_ema": {**named("module.", FIRST), "n_averaged": torch.tensor(3)}},
    "Lightning's average": {"state_dict": named("net.", FIRST), "current_model_state": named("net.", SECOND)},
    "teacher": {"state_dict": {**named("a.student_net.", SECOND), **named("a.teacher_net.", FIRST)}},
    "backbone is the teacher": {"state_dict": {**named("backbone.", FIRST), **named("student_backbone.", SECOND)}},
    "mixed case": {"state_dict": {**named("studentNet.", SECOND), **named("teacherNet.", FIRST)}},
    "running average": {"opt_state": SECOND, "avg_model": FIRST, "model": SECOND},
    "query": {"state_dict": {**named("module.encoder_k.", SECOND), **named("module.encoder_q.", FIRST)}},
    "momentum": {"state_dict": {**named("momentum_backbone.", SECOND), **named("backbone.", FIRST)}},
    "online": {**named("target_encoder.net.", SECOND), **named("online_encoder.net.", FIRST), **named("net.", FIRST)},
    "module in a dict": {"module": named("encoder.", FIRST), "optimizer": {"encoder.": {"conv1.weight": 3}}},
    "I-JEPA": {"encoder": named("module.", VITS[1]), "target_encoder": named("module.", VITS[0])},
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_the_network_that_the_project_evaluates_is_read(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(BRANCHES[kind], tmp_path / "x.pth")
    name, kwargs = ("vit_small_patch16_224", VIT) if kind == "I-JEPA" else ("resnet18", RESNET)
    with caplog.at_level(logging.INFO):
        loaded = load_backbone(tmp_path / "x.pth", name, kwargs)
    torch.testing.assert_close(loaded(IMAGES), source(name, kwargs)(IMAGES))
    assert (": read " in caplog.text) == (kind != "module in a dict")


def test_names_that_say_nothing_need_a_branch(tmp_path: Path) -> None:
    torch.save({"state_dict": {**named("left.", FIRST), **named("right.", SECOND)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="do not say which is evaluated: left, right"):
        load_backbone(tmp_path / "x.pth", "resnet18", RESNET)
    with pytest.raises(UserError, match="has no branch 'middle'; choose from left, right"):
        load_backbone(tmp_path / "x.pth", "resnet18", RESNET, branch="middle")
    loaded = open_backbone(str(tmp_path / "x.pth"), "resnet18", RESNET, "state_dict.module.right").backbone
    torch.testing.assert_close(loaded(IMAGES), source("resnet18", RESNET, 1)(IMAGES))


class Config(dict):  # type: ignore[type-arg]
    """What a pickle of another package may hold, or run."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_objects_of_other_packages_are_passed_over_and_modules_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = source("resnet18", RESNET)
    for content in ({"net": FIRST, "cfg": Config()}, model, {"model": copy.deepcopy(model), "cfg": {1: Config()}}):
        torch.save(content, "x.pth")
        torch.testing.assert_close(load_backbone("x.pth", "resnet18", RESNET)(IMAGES), model(IMAGES))
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_small_patch16_224", {**VIT, "img_size": 48}, "the positions from (1, 17, 16) to (1, 37, 16)"),
        ("vit_small_patch16_224", {**VIT, "img_size": 16, "patch_size": 4}, "the first layer"),
        ("resnet18", {**RESNET, "in_chans": 1}, "the first layer from (64, 3, 7, 7) to (64, 1, 7, 7)"),
    ],
)
def test_other_sizes_are_resampled_as_timm_does_it(
    name: str, kwargs: dict[str, Any], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import timm

    weights = FIRST if name == "resnet18" else VITS[0]
    torch.save(weights, tmp_path / "x.pth")
    theirs = timm.create_model(
        name,
        num_classes=0,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "x.pth"), "num_classes": 0},
        **kwargs,
    )
    images = torch.rand(2, kwargs.get("in_chans", 3), kwargs.get("img_size", 32), kwargs.get("img_size", 32))
    with caplog.at_level(logging.INFO):
        loaded = load_backbone(tmp_path / "x.pth", name, kwargs)
    assert message in caplog.text
    torch.testing.assert_close(loaded(images), theirs.eval()(images))
    begun = weights_for(str(tmp_path / "x.pth"), name, kwargs)
    assert all(torch.equal(value, begun[key]) for key, value in loaded.state_dict().items())


def test_a_folder_says_what_it_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = source("vit_small_patch16_224", VIT)
    weights = {key: value.contiguous() for key, value in of_transformers(dict(model.state_dict())).items()}
    parts = {"model-1.safetensors": list(weights)[::2], "model-2.safetensors": list(weights)[1::2]}
    for file, keys in parts.items():
        save_file({key: weights[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    with caplog.at_level(logging.INFO):
        pretrained = open_backbone(f"local-dir:{tmp_path}")
    assert "is taken for a vit_base_patch16_224" in caplog.text
    assert pretrained.image_transform["mean"] == (0.5, 0.5, 0.5)
    torch.testing.assert_close(pretrained.backbone(IMAGES), model(IMAGES))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vit_msn", "hidden_act": "gelu"}))
    torch.testing.assert_close(load_backbone(tmp_path)(IMAGES), model(IMAGES))
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(UserError, match="the activation relu; timm's has gelu"):
        load_backbone(tmp_path)


def test_positions_that_only_moco_v3_has_say_the_number_of_heads(tmp_path: Path) -> None:
    kwargs = {**VIT, "embed_dim": 48, "num_heads": 12}
    model: Any = source("vit_small_patch16_224", kwargs)
    model.fix_positions(rows_first=True)
    torch.save({"state_dict": named("module.", dict(model.state_dict()))}, tmp_path / "x.pth")
    del kwargs["num_heads"]
    loaded = load_backbone(tmp_path / "x.pth", "vit_small_patch16_224", kwargs)
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES))


def test_shapes_that_leave_no_doubt_name_the_backbone(tmp_path: Path) -> None:
    torch.save({"model": named("enc.", dict(create_backbone("resnet18").state_dict()))}, tmp_path / "x.pth")
    assert open_backbone(str(tmp_path / "x.pth")).name == "resnet18"
    torch.save(VITS[0], tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not name its backbone; give --backbone"):
        load_backbone(tmp_path / "x.pth")


def test_what_no_weight_says_is_refused(tmp_path: Path) -> None:
    cifar = dict(source("resnet18_cifar", {"channels": [2, 4, 8, 8]}).state_dict())
    solos = {**named("backbone.", cifar), **named("classifier.", HEAD), **named("momentum_backbone.", cifar)}
    caffe = {"meta": {"cfg": "backbone=dict(type='ResNet', style='caffe')"}, "state_dict": named("backbone.", FIRST)}
    refused = [
        (solos, "resnet18_cifar", {"channels": [2, 4, 8, 8]}, "a padding of 2"),
        (caffe, "resnet18", RESNET, "caffe"),
    ]
    for content, name, kwargs, message in refused:
        torch.save(content if "meta" in content else {"state_dict": content}, tmp_path / "x.ckpt")
        with pytest.raises(UserError, match=message):
            load_backbone(tmp_path / "x.ckpt", name, kwargs)
