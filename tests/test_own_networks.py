"""Networks of one's own, and DINOv3's ViT: what a method takes besides the names of timm and torchvision."""

import contextlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_lightning import BYOL, DINO, IBOT, IJEPA, MAE, ImageTokenizer, SimCLR, SSLModule, UserError
from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.backbones.own import Pooled
from ssl_lightning.backbones.tokens import grid_of, patch_tokens
from ssl_lightning.batch_norm import SyncBatchNorm, SyncedBatchNorm
from ssl_lightning.checkpoints import export, load_backbone
from ssl_lightning.cli import main
from ssl_lightning.ema import teacher_of
from tests.small import DINOV3, METHODS, VIT_ONLY, Viewed, data, met, slow_unless, small, trainer


class Map(nn.Module):
    """A map ``(B, 2 * width, h, w)``, with BatchNorm and dropout."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Conv2d(3, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Dropout(0.5)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Wide(Map):
    """Needs its argument."""

    def __init__(self, width: int) -> None:
        super().__init__(width)


class Gives(nn.Module):
    """Gives something made of a map ``(B, 4, h, w)``."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.layer, self.make = nn.Conv2d(3, 4, 8, stride=8), make

    def forward(self, images: Tensor) -> Any:
        return self.make(self.layer(images))


class Power(nn.Module):
    """Generalized mean, whose exponent is no rate of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.p = 3.0
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).abs().pow(self.p).mean((2, 3))


def builder(width: int = 4) -> nn.Module:
    return Map(width)


@pytest.mark.parametrize(
    ("network", "width"),
    [
        (Map, 8),
        (f"{__name__}.Map", 8),
        (f"{__name__}.builder", 8),
        (lambda: Map(3), 6),
        (Viewed, 6),
        (lambda: Gives(lambda x: x.flatten(2).mT), 4),
        (lambda: Gives(lambda x: {"last_hidden_state": x.flatten(2).mT, "pooler_output": None}), 4),
        (lambda: Gives(lambda x: OrderedDict(pooler_output=x.amax((2, 3), keepdim=True))), 4),
        (lambda: nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]), 512),
        pytest.param(torchvision.models.resnet18, 512, marks=pytest.mark.slow),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48), 48),
        pytest.param(lambda: torch.compile(Power()), 4, marks=pytest.mark.slow),
        (lambda: Power().double(), 4),
    ],
)
def test_any_module_becomes_a_backbone_and_nothing_else_changes(network: Any, width: int) -> None:
    if callable(network) and getattr(network, "__name__", "") == "<lambda>":
        network = network()
    torch.manual_seed(0)
    given = isinstance(network, nn.Module)
    before = {name: value.clone() for name, value in network.state_dict().items()} if given else {}
    random = torch.get_rng_state()
    backbone: Any = create_backbone(network)
    assert not given or torch.equal(torch.get_rng_state(), random)
    assert backbone.num_features == width
    assert backbone.training
    weight = next(backbone.parameters())
    images = torch.rand(3, 1 if network is Viewed else 3, 32, 32, dtype=weight.dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        backbone.to(memory_format=torch.channels_last)
        assert backbone.eval()(images.to(memory_format=layout)).shape == (3, width)
    kept = network.state_dict() if given else {}
    assert all(torch.equal(value, before[name]) for name, value in kept.items())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("nowhere.Net", r"cannot be imported \(ModuleNotFoundError.*in Python, give the network itself"),
        ("tests.small.Net", "small has no Net"),
        ("tests.small.TOKENS", "is a dict; give a torch.nn.Module or its class"),
        ("math.sqrt", "does not accept backbone_kwargs {}"),
        (f"{__name__}.Wide", r"missing 1 required positional argument: 'width'\); set those that it needs"),
        (lambda: Gives(lambda x: (x, x)), r"gives a tuple for 2 images; it must give features \(B, D\)"),
        (lambda: Gives(lambda x: x.mean()), r"gives a tensor of shape \(\) for 2 images"),
        (lambda: Gives(lambda x: {"logits": x}), "gives a dict for 2 images"),
        (lambda: Gives(lambda x: x.flatten(1)), "3,136 numbers for images of 224 px and 4,096 .* attribute img_size"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "has lazy layers; call it once"),
        (lambda: nn.Sequential(nn.Linear(7, 3)), "takes no images of 224, 256"),
    ],
)
def test_what_is_no_backbone_is_refused_in_one_line(network: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        create_backbone(network if isinstance(network, str) else network())
    assert "\n" not in str(error.value)


def test_a_network_that_does_not_take_the_views_is_refused_before_training(tmp_path: Path) -> None:
    network = Gives(lambda x: x.flatten(1))
    network.img_size = 64  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"gives 64 numbers for images of 32 px, not 256; set --data.image_size"):
        trainer(tmp_path).fit(small(SimCLR, backbone=network, backbone_kwargs={}), data(SimCLR))


@pytest.mark.parametrize(
    "method", slow_unless(lambda method: method in (BYOL, DINO), [one for one in METHODS if one not in VIT_ONLY])
)
def test_every_method_trains_and_reads_again_a_network_of_ones_own(method: type[SSLModule], tmp_path: Path) -> None:
    network = Map(4)
    running = trainer(tmp_path, limit_train_batches=2)
    module = small(method, backbone=network, backbone_kwargs={})
    running.fit(module, data(method))
    running.save_checkpoint(tmp_path / "x.ckpt")
    images = torch.rand(2, 3, 32, 32)
    expected = module.eval()(images)
    torch.testing.assert_close(load_backbone(tmp_path / "x.ckpt")(images), expected)  # class and arguments are saved
    output = export(tmp_path / "x.ckpt", "safetensors", tmp_path / "x.safetensors")
    torch.testing.assert_close(load_backbone(output)(images), expected)
    network.load_state_dict(load_file(output))  # under the names of its class
    again = small(method, backbone=f"{__name__}.Map", backbone_kwargs={}, init_from=str(output))
    trainer(tmp_path).validate(again, data(method), verbose=False)
    torch.testing.assert_close(again.eval()(images), expected)


def test_arguments_that_a_checkpoint_does_not_hold_are_asked_for(tmp_path: Path) -> None:
    running = trainer(tmp_path, limit_train_batches=1)
    running.fit(small(SimCLR, backbone=Wide(5), backbone_kwargs={}), data(SimCLR))
    running.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"missing 1 required .* in Python, give the network itself as backbone"):
        load_backbone(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"layers.0.bias is \(10,\), not \(6,\). Give the arguments of its class"):
        load_backbone(tmp_path / "x.ckpt", Wide(3))
    images = torch.rand(2, 3, 32, 32)
    with_arguments = load_backbone(tmp_path / "x.ckpt", backbone_kwargs={"width": 5})(images)
    torch.testing.assert_close(load_backbone(tmp_path / "x.ckpt", Wide(5))(images), with_arguments)
    with pytest.raises(UserError, match="is a network of your own; choose the format safetensors or onnx"):
        export(tmp_path / "x.ckpt", "timm", tmp_path / "x.pth", Wide, {"width": 5})


def test_teachers_and_batch_norm_are_those_of_the_network() -> None:
    assert teacher_of(Power()).p == 3.0
    teacher = teacher_of(Map())
    assert teacher.layers[3].p == 0.0

    class Named(nn.BatchNorm2d):
        """Computes the same under another name."""

    class Other(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Named(4), Other(4), nn.SyncBatchNorm(4))
    SyncedBatchNorm().apply(network)
    assert [isinstance(layer, SyncBatchNorm) for layer in network] == [False, True, True, False, True]


def test_the_command_line_trains_a_class_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["--model.backbone", f"{__name__}.Wide", "--model.backbone_kwargs.width", "6"]
    words = ["fit", "--model", "SimCLR", *own, "--data", "FakeData", "--data.batch_size", "8", "--trainer.max_epochs=1"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.limit_train_batches=1", "--trainer.logger=false"]
    with contextlib.suppress(SystemExit):
        main([*words, *quiet])
    (file,) = tmp_path.rglob("last.ckpt")
    assert load_backbone(file).num_features == 12


def test_an_image_tokenizer_reads_the_map_of_a_network_of_ones_own() -> None:
    module = small(ImageTokenizer, backbone=Map(4), backbone_kwargs={})
    assert module.stride == 2
    with pytest.raises(UserError, match=r"gives no feature map; .* one of your own that gives a map \(B, D, h, w\)"):
        small(ImageTokenizer, backbone=Power(), backbone_kwargs={})


class OwnViT(nn.Module):
    """The least that methods on tokens need: no position, a mean of patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_side, self.num_prefix_tokens, self.num_features = 8, 1, 12
        self.patch_embed = nn.Sequential(nn.Unfold(8, stride=8), nn.Flatten(2), _Turned(), nn.Linear(192, 12))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 12, batch_first=True) for _ in range(2))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 12))

    def forward_features(self, images: Tensor) -> Tensor:
        return self._tokens(self.patch_embed(images))

    def encode(self, images: Tensor, kept: Tensor) -> Tensor:
        return self._tokens(self.patch_embed(images).gather(1, kept[:, :, None].expand(-1, -1, 12)))

    def _tokens(self, patches: Tensor) -> Tensor:
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def forward_head(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class _Turned(nn.Module):
    def forward(self, patches: Tensor) -> Tensor:
        return patches.mT


@pytest.mark.parametrize("method", [one for one in METHODS if one in VIT_ONLY])
def test_methods_on_tokens_say_what_a_vit_of_ones_own_needs(method: type[SSLModule]) -> None:
    with pytest.raises(UserError, match=r"set --model.backbone to .*one of your own .* patch_embed, .* forward_head"):
        small(method, backbone=Map(), backbone_kwargs={})
    module = small(method, backbone=OwnViT(), backbone_kwargs={})
    loss = module.training_loss([torch.rand(2, 3, 32, 32)] * (module.global_views or 1))
    loss.backward()
    assert all(value.grad is not None for value in module.backbone.parameters())


# DINOv3's ViT


@pytest.mark.parametrize("sides", [(32, 32), (16, 48)])
def test_dinov3s_vit_is_timms_and_kept_patches_keep_their_rotations(sides: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours: Any = create_backbone(**{"name": DINOV3["backbone"], **DINOV3["backbone_kwargs"]}).eval()
    for block in ours.blocks:
        nn.init.ones_(block.gamma_1), nn.init.ones_(block.gamma_2)
    theirs = timm.create_model(DINOV3["backbone"], num_classes=0, global_pool="token", **DINOV3["backbone_kwargs"])
    theirs.load_state_dict(ours.state_dict())
    images, prefix = torch.rand(2, 3, *sides), ours.num_prefix_tokens
    rows, columns = grid_of(ours, images)
    kept = torch.stack([torch.randperm(rows * columns)[:5] for _ in range(2)])
    seen = torch.zeros(2, 1, 1, prefix + rows * columns, dtype=torch.bool)
    seen[..., :prefix] = True
    seen[:, 0, 0, prefix:].scatter_(1, kept, torch.tensor(True).expand_as(kept))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.eval()(images))
        expected = patch_tokens(theirs, theirs.forward_features(images, attn_mask=seen))
        tokens = patch_tokens(ours, ours.encode(images, kept))
    torch.testing.assert_close(tokens, expected.gather(1, kept[:, :, None].expand_as(tokens)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [MAE, IJEPA, IBOT])
def test_methods_on_tokens_keep_the_tokens_of_dinov3s_vit(method: type[SSLModule]) -> None:
    module = met(small(method, DINOV3), 2)
    views = [torch.rand(2, 3, 32, 32)] * (module.global_views or 1) + [torch.rand(2, 3, 16, 16)] * module.local_views
    module.training_loss(views).backward()
    assert all(value.grad is not None for value in module.backbone.parameters())
    assert (module.backbone.global_pool, module.backbone.num_prefix_tokens) == ("token", 5)
    assert not isinstance(module.backbone, Pooled)
