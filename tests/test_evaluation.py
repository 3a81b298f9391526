"""Evaluation by the papers' protocols: features, classifiers, fine-tuning, retrieval, and the commands."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from ssl_lightning import (
    ArrayData,
    DigitsData,
    Evaluation,
    FakeData,
    FineTune,
    KNNProbe,
    LinearClassifier,
    LinearProbe,
    SimCLR,
    UserError,
)
from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.checkpoints import open_backbone
from ssl_lightning.cli import main
from ssl_lightning.commands.compare import compare
from ssl_lightning.data.crops import ViewMaker, rand_augmented
from ssl_lightning.data.decoding import opened_already
from ssl_lightning.data.views import ViewSpec
from ssl_lightning.evaluation.features import LabelledFeatures, Tokens, extract
from ssl_lightning.evaluation.finetune import FINETUNE_PROTOCOLS, layer_groups
from ssl_lightning.evaluation.knn import knn_grid, knn_predict
from ssl_lightning.evaluation.linear import LINEAR_PROTOCOLS, accuracies, fit_heads
from ssl_lightning.evaluation.lowshot import choose, low_shot
from ssl_lightning.evaluation.results import Results, interval
from ssl_lightning.evaluation.retrieval import retrieval
from tests.small import BACKBONE, VIT, digits, simclr, slow_unless, trainer

CPU = {"accelerator": "cpu"}
VIT_KWARGS = {**VIT["backbone_kwargs"], "depth": 5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The checkpoint of a short training on the digits with both probes, and what they said at its end."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    running = trainer(folder, max_epochs=8, callbacks=[KNNProbe(), LinearProbe()])
    running.fit(simclr(), digits())
    path = folder / "checkpoints" / "last.ckpt"
    running.save_checkpoint(path)
    return path, {name: float(value) for name, value in running.callback_metrics.items()}


@pytest.fixture
def evaluation(run: tuple[Path, Any], tmp_path: Path) -> Evaluation:
    return Evaluation(str(run[0]), DigitsData(), output=str(tmp_path / "out"), trainer=CPU)


# Online and offline


def test_the_knn_command_and_the_online_probe_say_the_same(run: tuple[Path, Any], evaluation: Evaluation) -> None:
    found = evaluation.knn(k=20, temperature=0.07)
    assert found is not None
    assert found.accuracy["top1"] == pytest.approx(run[1]["val/knn_top1"], abs=1e-7)
    assert found.accuracy["top1"] > 0.25


def test_validate_says_what_the_linear_probe_said_online(run: tuple[Path, Any], tmp_path: Path) -> None:
    again = trainer(tmp_path, callbacks=[LinearProbe()])
    found = again.validate(SimCLR(**BACKBONE), digits(), ckpt_path=run[0], verbose=False)[0]
    assert found["val/linear_top1"] == pytest.approx(run[1]["val/linear_top1"], abs=1e-7)


def test_a_probe_goes_on_after_validate(tmp_path: Path) -> None:
    probe, module = LinearProbe(), simclr()
    for _ in range(2):
        running = trainer(tmp_path, callbacks=[probe], limit_train_batches=2)
        running.fit(module, digits())
        running.validate(module, digits(), verbose=False)
    assert "val/linear_top1" in running.callback_metrics


def test_images_are_prepared_as_in_training_unless_said_otherwise(run: tuple[Path, Any], tmp_path: Path) -> None:
    transform = open_backbone(str(run[0])).image_transform
    assert transform["size"] == 16
    assert transform["mean"] == ViewSpec().mean
    for data, size in ((FakeData(), 16), (FakeData(image_size=24), 24)):
        found = Evaluation(str(run[0]), data, output=str(tmp_path), trainer=CPU).knn(k=1)
        assert found is not None
        assert found.data["image_transform"] == {**transform, "size": size}


# Features


def test_features_are_extracted_once(run: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_LIGHTNING_CACHE", str(tmp_path))
    passes = []

    def features(source: str = str(run[0]), **kwargs: Any) -> Any:
        pretrained = open_backbone(source, **kwargs)
        count = len(passes)
        pretrained.backbone.register_forward_hook(lambda *_: passes.append(1))
        found = extract(pretrained, DigitsData(image_size=16), trainer(tmp_path))
        return found, len(passes) > count

    first, computed = features()
    assert computed
    again, computed = features()
    assert not computed
    torch.testing.assert_close(again.test.features, first.test.features, atol=0, rtol=0)
    _, computed = features("untrained", backbone=BACKBONE["backbone"], backbone_kwargs=BACKBONE["backbone_kwargs"])
    assert computed, "other weights"
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    again, computed = features()
    assert computed, "damaged files"
    torch.testing.assert_close(again.test.features, first.test.features, atol=0, rtol=0)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(run: tuple[Path, Any], tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        more = {} if count == 1 else {"devices": 2, "strategy": "ddp"}
        words = ["evaluate", "linear", "--checkpoint", str(run[0]), "--data", "DigitsData", "--epochs", "2"]
        words += ["--trainer", json.dumps({**CPU, **more}), "--output", str(tmp_path / str(count))]
        environment = {"SSL_LIGHTNING_CACHE": str(tmp_path / f"cache{count}")}
        assert command(words, tmp_path, environment).returncode == 0
        found.append(Results.read(tmp_path / str(count) / "linear" / "results.json"))
    assert found[0].rows == found[1].rows
    assert found[0].accuracy == found[1].accuracy
    printed = command(["evaluate", "robustness", *words[2:6], *words[8:]], tmp_path, environment)
    assert printed.returncode == 0, printed.stderr


def test_pieces_are_the_normed_class_tokens_of_the_last_blocks_and_the_mean_of_the_patches() -> None:
    vit = create_backbone("vit_tiny_patch16_224", **VIT_KWARGS).eval()
    images, outputs = torch.rand(2, 3, 32, 32), []
    for block in vit.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        whole = vit(images)
        tokens = [vit.norm(output) for output in outputs]
        wanted = torch.stack([*(token[:, 0] for token in tokens[-4:]), tokens[-1][:, 1:].mean(1)], dim=1)
        torch.testing.assert_close(Tokens(vit, 4, True)(images), wanted)
        torch.testing.assert_close(Tokens(vit)(images)[:, 0], whole)
        torch.testing.assert_close(Tokens(vit, 1, True)(images)[:, 0], whole)


def test_a_cnn_has_no_class_tokens() -> None:
    with pytest.raises(UserError, match=r"last 4 blocks are needed, but the backbone is no ViT"):
        Tokens(create_backbone("resnet10_cifar"), 4)


# kNN


def test_a_grid_of_neighbours_is_each_of_its_predictions() -> None:
    torch.manual_seed(0)
    bank, labels, queries = torch.randn(50, 8), torch.randint(3, (50,)), torch.randn(20, 8)
    for (k, temperature), found in knn_grid(bank, labels, queries, 3, [1, 5, 50], [0.07, 1.0]).items():
        assert torch.equal(found, knn_predict(bank, labels, queries, 3, k, temperature))


# Linear classifiers


def test_protocols_are_the_papers() -> None:
    def told(name: str) -> tuple[Any, ...]:
        protocol = LINEAR_PROTOCOLS[name]
        optim = protocol.optim
        return optim.name, optim.peak_lr(protocol.batch_size), optim.weight_decay, protocol.epochs, protocol.batch_size

    assert told("moco_v2") == ("sgd", 30.0, 0.0, 100, 256)
    assert told("simclr") == ("sgd", pytest.approx(1.6), 1e-6, 90, 4096)
    assert told("mae") == ("lars", pytest.approx(6.4), 0.0, 90, 16384)
    assert told("moco_v3_vit") == ("sgd", pytest.approx(12.0), 0.0, 90, 1024)
    assert told("dino_vit_small") == ("sgd", pytest.approx(0.004), 0.0, 100, 1024)
    assert LINEAR_PROTOCOLS["dino_vit_base"].inputs == ((1, True),)
    assert len(LINEAR_PROTOCOLS["dinov2"].choices) == 52
    factors = [LINEAR_PROTOCOLS["moco_v2"].optim.lr_factor(10 * epoch, 1000, 10) for epoch in (0, 59, 60, 79, 80, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.fixture(scope="module")
def clusters() -> tuple[LabelledFeatures, LabelledFeatures]:
    """Two parts of three clusters that a line separates, mostly."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    centres = torch.randn(3, 8, generator=random)
    features = (centres[labels] + torch.randn(600, 8, generator=random))[:, None]
    return LabelledFeatures(features[:300], labels[:300]), LabelledFeatures(features[300:], labels[300:])


def test_classifiers_trained_at_once_are_those_trained_alone(clusters: tuple[LabelledFeatures, Any]) -> None:
    protocol = replace(LINEAR_PROTOCOLS["simclr"], batch_size=64, epochs=5, lrs=(0.1, 1.0))
    together = fit_heads(clusters[0], 3, protocol, seed=0)
    for number, lr in enumerate(protocol.lrs):
        alone = fit_heads(clusters[0], 3, replace(protocol, lrs=(lr,)), seed=0)
        torch.testing.assert_close(together.heads[number][1].weight, alone.heads[0][1].weight)


@pytest.mark.parametrize(
    "name",
    slow_unless(
        lambda name: name in ("simclr", "mae"),
        [name for name, one in LINEAR_PROTOCOLS.items() if one.inputs == ((1, False),)],
    ),
)
def test_every_protocol_learns_what_logistic_regression_learns(
    name: str, clusters: tuple[LabelledFeatures, LabelledFeatures]
) -> None:
    train, test = clusters
    exact = low_shot(train.features[:, 0], train.labels, test.features[:, 0], 100, seed=0)
    protocol = replace(LINEAR_PROTOCOLS[name], batch_size=64, epochs=60)
    if protocol.optim.name.startswith("lar"):  # whose steps are shares of the weights: too many for a test
        protocol = replace(protocol, lrs=(100.0,))
    best = max(accuracies(fit_heads(train, 3, protocol, seed=0), test))
    assert best > float((exact == test.labels).double().mean()) - 0.04


def test_a_sweep_is_chosen_on_held_out_images_and_reported_on_the_test_set(evaluation: Evaluation) -> None:
    found = evaluation.linear(epochs=10, lrs=[1e-6, 0.3])
    assert found is not None
    assert found.rows[1]["held out, %"] > found.rows[0]["held out, %"]
    assert found.rows[1]["top-1, %"] == pytest.approx(100 * found.accuracy["top1"])
    assert "top-1, %" not in found.rows[0]
    assert found.accuracy["top1"] > 0.2  # chance is 0.1


def test_the_frozen_backbone_stays_bit_for_bit(run: tuple[Path, Any], tmp_path: Path) -> None:
    module = LinearClassifier(str(run[0]), protocol="mae")
    before = {name: value.clone() for name, value in module.tokens.state_dict().items()}
    running = trainer(tmp_path, max_epochs=2)
    running.fit(module, digits(views=None))
    for name, value in module.tokens.state_dict().items():
        assert torch.equal(value, before[name]), name
    norm, linear = module.heads.heads[0]
    assert norm.weight is None
    assert norm.running_mean.abs().sum() > 0
    assert module.heads.heads[0][1] is linear


def test_a_classifier_is_resumed_from_its_checkpoint(run: tuple[Path, Any], tmp_path: Path) -> None:
    module = LinearClassifier(str(run[0]), protocol="lightly")
    running = trainer(tmp_path, max_epochs=1)
    running.fit(module, digits(views=None))
    running.save_checkpoint(tmp_path / "linear.ckpt")
    again = LinearClassifier(str(run[0]), protocol="lightly")
    found = trainer(tmp_path).validate(again, digits(), ckpt_path=tmp_path / "linear.ckpt", verbose=False)[0]
    assert found["val/top1"] == pytest.approx(float(running.callback_metrics["val/top1"]))


def test_augmented_training_makes_no_choice_on_the_test_set(evaluation: Evaluation) -> None:
    with pytest.raises(UserError, match="augment trains one classifier, and sweep tries 5; give --lrs one number"):
        evaluation.linear(augment=True)
    found = evaluation.linear(augment=True, lrs=0.1, epochs=2, batch_size=128)
    assert found is not None
    assert found.parameters["batch_size"] == 128
    assert evaluation.data.batch_size == 64, "the data stays as it is"
    assert len(found.rows) == 1


def test_images_without_a_label_are_not_trained_on(run: tuple[Path, Any], tmp_path: Path) -> None:
    (images, labels), val = classes(0, 1, count=20), classes(0, 1)
    labels[::2] = np.where(np.arange(20) % 2, -1, labels[::2])
    data = ArrayData(images, labels, *val, batch_size=8)
    found = Evaluation(str(run[0]), data, output=str(tmp_path), trainer=CPU).finetune(epochs=1)
    assert found is not None
    assert found.data["train_images"] == (labels >= 0).sum() == 30


@pytest.mark.slow
def test_every_protocol_runs_from_the_command(tmp_path: Path) -> None:
    for name, protocol in LINEAR_PROTOCOLS.items():
        found = Evaluation(
            "untrained", DigitsData(image_size=32), VIT["backbone"], VIT_KWARGS, output=str(tmp_path), trainer=CPU
        ).linear(name, epochs=1)
        assert found is not None
        assert len(found.rows) == len(protocol.choices)
        assert 0 <= found.accuracy["top1"] <= 1


# Few labels


def test_choices_are_equal_for_each_class_and_follow_the_seed() -> None:
    labels = np.array([0] * 50 + [1] * 20 + [-1] * 30)
    for per_class, counts in ((3, [3, 3]), (0.1, [5, 2]), (0.001, [1, 1])):
        chosen = choose(labels, per_class, seed=0)
        assert np.bincount(labels[chosen]).tolist() == counts
        assert len(set(chosen.tolist())) == len(chosen)
    assert (
        choose(labels, 3, seed=0).tolist() == choose(labels, 3, seed=0).tolist() != choose(labels, 3, seed=1).tolist()
    )
    with pytest.raises(UserError, match=r"class 1 has 20 training images, not 25"):
        choose(labels, 25, seed=0)


def test_more_labels_help(evaluation: Evaluation) -> None:
    found = evaluation.lowshot(shots=[1, 50], draws=3)
    assert found is not None
    one, fifty = found.rows
    assert fifty["top-1, %"] > one["top-1, %"] + 10
    low, high = found.accuracy["interval"]
    assert low < found.accuracy["top1"] < high
    assert found.seeds == [0, 1, 2]


# Fine-tuning


def test_layers_have_the_shares_of_the_learning_rate_of_mae() -> None:
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, global_pool="avg")
    share = {}
    names = {id(param): name for name, param in vit.named_parameters()}
    for group in layer_groups(vit, 0.05, 0.65):
        for param in group["params"]:
            share[names[id(param)]] = group["lr_scale"]
            undecayed = param.ndim <= 1 or names[id(param)] in ("pos_embed", "cls_token")
            assert group["weight_decay"] == (0 if undecayed else 0.05), names[id(param)]
    assert share["cls_token"] == share["pos_embed"] == pytest.approx(0.003697, abs=1e-6)
    assert share["patch_embed.proj.weight"] == pytest.approx(0.003697, abs=1e-6)
    assert share["blocks.0.attn.qkv.weight"] == pytest.approx(0.005688, abs=1e-6)
    assert share["blocks.11.mlp.fc1.weight"] == pytest.approx(0.65)
    assert share["fc_norm.weight"] == 1.0


def finetuned(tmp_path: Path, protocol: Any, **kwargs: Any) -> tuple[FineTune, list[list[float]], float]:
    torch.manual_seed(0)
    module = FineTune("untrained", VIT["backbone"], VIT_KWARGS, protocol)
    rates = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    running = trainer(tmp_path, callbacks=[Watch()], **kwargs)
    running.fit(module, digits(views=None, image_size=32))
    return module, rates, float(running.callback_metrics["val/top1"])


@pytest.mark.slow
def test_fine_tuning_like_mae(tmp_path: Path) -> None:
    protocol = FINETUNE_PROTOCOLS["mae_vit_base"]
    module, rates, _ = finetuned(tmp_path, protocol, max_epochs=1)
    first = np.array(rates[0]) / rates[0][-1]
    for later in rates[1:]:
        np.testing.assert_allclose(np.array(later) / later[-1], first, err_msg="the layers keep their shares")
    again, _, _ = finetuned(tmp_path, protocol, max_epochs=1)
    torch.testing.assert_close(again.head.weight, module.head.weight, atol=0, rtol=0)  # Mixup and the like are seeded

    images = torch.rand(2, 3, 32, 32)
    module.eval()
    before = module(images)
    hook = module.backbone.blocks[-1].register_forward_hook(
        lambda _module, _inputs, tokens: torch.cat([tokens[:, :1] + 5, tokens[:, 1:]], dim=1)
    )
    torch.testing.assert_close(module(images), before)  # the class token is not read
    hook.remove()


def test_the_norm_after_pooling_is_new_and_the_rest_is_the_checkpoints(tmp_path: Path) -> None:
    vit = create_backbone(VIT["backbone"], **VIT_KWARGS)
    nn.init.constant_(vit.norm.weight, 3.0)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    module = FineTune(str(tmp_path / "vit.pth"), VIT["backbone"], VIT_KWARGS, "mae_vit_base")
    assert torch.equal(module.backbone.fc_norm.weight, torch.ones_like(vit.norm.weight))
    for name, value in module.backbone.state_dict().items():
        if not name.startswith("fc_norm"):
            assert torch.equal(value, vit.state_dict()[name]), name
    rates = [block.drop_path1.drop_prob for block in module.backbone.blocks[1:]]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1])


@pytest.mark.slow
def test_fine_tuning_trains_the_batch_norms_and_learns(run: tuple[Path, Any], tmp_path: Path) -> None:
    data = DigitsData(batch_size=32)
    found = Evaluation(str(run[0]), data, output=str(tmp_path / "out"), trainer=CPU).finetune(
        "vicreg_10percent", fraction=0.5, epochs=10, lr=0.4, head_lr=0.8
    )
    assert found is not None
    assert found.accuracy["top1"] > 0.25
    assert found.data["train_images"] == pytest.approx(1437 / 2, abs=10)
    assert found.parameters["fraction"] == 0.5
    assert (tmp_path / "out" / "finetune" / "metrics.csv").exists()
    module = FineTune(str(run[0]), protocol="vicreg_10percent")
    before = module.backbone.bn1.running_mean.clone()
    trainer(tmp_path, limit_train_batches=1).fit(module, digits(views=None))
    assert not torch.equal(module.backbone.bn1.running_mean, before)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "mae_vit_base", FINETUNE_PROTOCOLS))
def test_every_fine_tuning_protocol_runs(name: str, tmp_path: Path) -> None:
    module = FineTune("untrained", VIT["backbone"], VIT_KWARGS, name)
    weights = module.backbone.patch_embed.proj.weight.detach().clone()
    running = trainer(tmp_path, limit_train_batches=2, limit_val_batches=1, num_sanity_val_steps=0)
    running.fit(module, digits(views=None, image_size=32))
    assert math.isfinite(float(running.callback_metrics["train/loss"]))
    assert not torch.equal(module.backbone.patch_embed.proj.weight, weights)


def test_rand_augment_is_timms_and_follows_the_image_alone() -> None:
    spec = ViewSpec(size=32, scale=(1, 1), ratio=(1, 1), flip=0, rand_augment="rand-m9-mstd0.5-inc1")
    torch.manual_seed(0)
    images = [opened_already(torch.randint(256, (3, 32, 32), dtype=torch.uint8)) for _ in range(8)]
    maker, indices = ViewMaker([spec], seed=3), np.arange(8)
    turned = maker.crop(5, indices[::-1].copy(), images[::-1])[0][0].flip(0)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    whole = maker.crop(5, indices, images)[0][0]
    assert torch.equal(turned, whole), "wherever the image is in the batch"
    assert np.array_equal(np.random.get_state()[1], state), "the global generator is put back"  # noqa: NPY002
    plain = ViewMaker([replace(spec, rand_augment="")], seed=3).crop(5, indices, images)[0][0]
    assert sum(not torch.equal(one, other) for one, other in zip(whole, plain, strict=True)) >= 4
    for number in (2, 7):
        alone = rand_augmented(plain[number], spec, 3, 5, number, 0)
        assert torch.equal(alone, whole[number])
    with pytest.raises(UserError, match="rand_augment='random'"):
        rand_augmented(plain[0], replace(spec, rand_augment="random"), 0)


# Retrieval, robustness


def test_retrieval_agrees_with_scikit_learn() -> None:
    torch.manual_seed(0)
    gallery, queries = torch.randn(60, 4), torch.randn(25, 4)
    gallery_labels, labels = torch.randint(4, (60,)), torch.randint(4, (25,))
    found = retrieval(gallery, gallery_labels, queries, labels, (1, 3))
    similarity = torch.nn.functional.cosine_similarity(queries[:, None], gallery[None], dim=2)
    relevant = labels[:, None] == gallery_labels[None]
    oracle = [average_precision_score(*query) for query in zip(relevant.numpy(), similarity.numpy(), strict=True)]
    assert found["mAP"] == pytest.approx(np.mean(oracle), abs=1e-9)
    nearest = similarity.topk(3).indices
    assert found["recall@3"] == pytest.approx(float(relevant.gather(1, nearest).any(1).double().mean()))
    assert found["recall@1"] == pytest.approx(float(relevant.gather(1, nearest[:, :1]).any(1).double().mean()))


def test_changed_images_have_changed_features_the_more_the_further(evaluation: Evaluation) -> None:
    found = evaluation.robustness()
    assert found is not None
    similar = {row["change"]: row["similarity to clean"] for row in found.rows}
    assert similar["none"] == pytest.approx(1)
    assert 1 > similar["noise 0.05"] > similar["noise 0.1"] > similar["noise 0.2"]
    assert 1 > similar["blur 0.02"] > similar["blur 0.04"] > similar["blur 0.08"]
    assert max(value for name, value in similar.items() if name != "none") < 1
    assert found.rows[0]["top-1, %"] > 100 * found.accuracy["top1"]


# Results, the command line


def test_intervals_are_wilsons() -> None:
    assert interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert interval(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)


def command(words: list[str], folder: Path, environment: dict[str, str] | None = None) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "ssl_lightning", *words],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_results_say_everything(run: tuple[Path, Any], evaluation: Evaluation, tmp_path: Path) -> None:
    evaluation.knn()
    evaluation.knn(k=1)
    again = json.loads((tmp_path / "out" / "knn_1" / "results.json").read_text())
    assert again["parameters"]["k"] == [1], "earlier results stay"
    found = json.loads((tmp_path / "out" / "knn" / "results.json").read_text())
    assert found["protocol"] == "knn"
    assert found["backbone"]["weights"] == open_backbone(str(run[0])).hash
    assert found["backbone"]["method"] == "SimCLR"
    assert found["data"]["data"] == "DigitsData"
    assert (found["data"]["train_images"], found["data"]["test_images"], found["data"]["classes"]) == (1437, 360, 10)
    assert found["parameters"]["reported"] == {"k": 20, "temperature": 0.07}
    assert found["versions"].keys() >= {"ssl_lightning", "torch"}
    assert found["seconds"] > 0
    low, high = found["accuracy"]["interval"]
    assert low < found["accuracy"]["top1"] < high


@pytest.mark.slow
def test_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ssl-lightning"])
    where = ["--trainer.default_root_dir", ".", "--trainer.accelerator", "cpu", "--without", "[view_grid, pictures]"]
    for name, epochs in (("short", "1"), ("long", "2")):
        main(["fit", "--config", "configs/quickstart.yaml", "--name", name, "--trainer.max_epochs", epochs, *where])
    checkpoint = "long/version_0/checkpoints/last.ckpt"
    main(["evaluate", "knn", "--checkpoint", checkpoint, "--trainer", json.dumps(CPU)])  # on the run's data
    results = Results.read(tmp_path / "long/version_0/evaluations/knn/results.json")
    assert results.headline in capsys.readouterr().out
    main(["compare", "short", "long", "--csv", "all.csv", "--plot", "all.png"])
    short, long = compare([str(tmp_path / "short"), str(tmp_path / "long")]).rows
    assert (short["run"], short["epochs"], long["run"], long["epochs"]) == ("short", 1, "long", 2)
    assert "knn, %" in long
    assert "knn, %" not in short
    assert long["kNN top-1, %"] == pytest.approx(100 * results.accuracy["top1"], abs=0.01)
    assert (tmp_path / "all.csv").read_text().count("\n") == 3
    assert (tmp_path / "all.png").stat().st_size > 10_000


# Bad input


def classes(*labels: int, count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    chosen = np.array(labels * count)
    return random.integers(256, size=(len(chosen), 3, 16, 16), dtype=np.uint8), chosen


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one class in both sets": ({"data": (classes(0, 1), classes(1, 2))}, "training images have 2 classes and test"),
    "no labels": ({"data": ((classes(0)[0], None), (classes(0)[0], None))}, "needs labeled images"),
    "no labels in the test set": (
        {"data": (classes(0, 1), (classes(0, 1)[0], None))},
        "needs validation images with labels",
    ),
    "no test set": ({"data": (classes(0, 1), None)}, "needs validation images with labels"),
    "k": ({"data": (classes(0, 1), classes(0, 1)), "k": 13}, r"--k \[13\] must lie between 1 and 12"),
    "patches": (
        {
            "data": (classes(0, 1), classes(0, 1)),
            "backbone": VIT["backbone"],
            "backbone_kwargs": VIT_KWARGS,
            "size": 20,
        },
        "patches of 8 px do not divide images of 20 px",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    arguments, message = BAD[case]
    (images, labels), val = arguments["data"]
    val_images, val_labels = val or (None, None)
    data = ArrayData(
        images, labels, val_images, val_labels, val_fraction=0, image_size=arguments.get("size"), batch_size=4
    )
    name = arguments.get("backbone", BACKBONE["backbone"])
    kwargs = arguments.get("backbone_kwargs", BACKBONE["backbone_kwargs"])
    evaluation = Evaluation("untrained", data, name, kwargs, output=str(tmp_path / "out"), trainer=CPU)
    with pytest.raises(UserError, match=message):
        evaluation.knn(k=arguments.get("k", 1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("knn", {"temperature": [0.07, 0.0]}),
        ("robustness", {"temperature": -1.0}),
        ("lowshot", {"shots": 0}),
        ("linear", {"epochs": 0}),
        ("linear", {"batch_size": -1}),
        ("finetune", {"epochs": -1}),
    ],
)
def test_numbers_that_mean_nothing_are_refused(protocol: str, options: dict[str, Any], evaluation: Evaluation) -> None:
    with pytest.raises(UserError, match=rf"--{next(iter(options))} .*: give numbers above 0"):
        getattr(evaluation, protocol)(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "2 training images leave 0 to train on"), ({"lrs": 0.1, "batch_size": 1}, "BatchNorm needs 2 images")],
)
def test_too_few_images_for_a_linear_classifier_are_refused(options: dict[str, Any], message: str) -> None:
    images, labels = classes(0, 1)
    data = ArrayData(images[[0, -1]], labels[[0, -1]], images, labels, val_fraction=0, batch_size=2)
    evaluation = Evaluation("untrained", data, BACKBONE["backbone"], BACKBONE["backbone_kwargs"], trainer=CPU)
    with pytest.raises(UserError, match=message):
        evaluation.linear(**options)


def test_commands_answer_mistakes_in_a_line(
    run: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": torch.rand(3)}, tmp_path / "other.pth")
    data = ["--data", "DigitsData"]
    for words, message in (
        (["linear", "--checkpoint", str(run[0]), *data, "--protocol", "moco"], "unknown protocol 'moco'"),
        (
            ["knn", "--checkpoint", "other.pth", "--backbone", "resnet18", *data],
            "resnet18. 120 weights are missing",
        ),
        (["knn", "--checkpoint", "gone.ckpt", *data], "gone.ckpt does not exist"),
        (["knn", "--checkpoint", "resnet81", *data], "unknown backbone 'resnet81'"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["evaluate", *words])
        said = (capsys.readouterr().err + str(end.value.code)).splitlines()[-1]
        assert said.startswith("error: ")
        assert message in said
    assert not (tmp_path / "evaluations").exists()


@pytest.mark.slow
def test_a_mistake_in_the_shell_is_answered_in_a_line(tmp_path: Path) -> None:
    printed = command(["compare", "gone"], tmp_path)
    assert printed.returncode != 0
    assert (
        printed.stderr.splitlines()[-1]
        == "error: gone does not exist; give the folder of a run, e.g. runs/SimCLR or runs/SimCLR/version_0."
    )


def test_raw_pixels_and_untrained_backbones_are_baselines(tmp_path: Path) -> None:
    pixels = Evaluation("pixels", DigitsData(), None, {"img_size": 16}, output=str(tmp_path), trainer=CPU).knn()
    untrained = Evaluation("untrained", DigitsData(image_size=16), **BACKBONE, output=str(tmp_path), trainer=CPU).knn()
    assert pixels is not None
    assert untrained is not None
    assert pixels.accuracy["top1"] > 0.95  # digits are easy
    assert pixels.backbone["name"] == "pixels"
    assert untrained.accuracy["top1"] < pixels.accuracy["top1"]
