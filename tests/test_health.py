"""Health of the features without labels, and the alarm where nothing is learnt."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from ssl_lightning import (
    BYOL,
    CAPI,
    DINO,
    IBOT,
    IJEPA,
    MAE,
    NNCLR,
    NPID,
    BarlowTwins,
    BEiT,
    DeepClusterV2,
    DINOv2,
    Distillation,
    GramAnchoring,
    HealthMonitor,
    ImageTokenizer,
    Jigsaw,
    LeJEPA,
    LossFloorAlarm,
    MoCoV2,
    MoCoV3,
    Optim,
    ReSA,
    RotNet,
    SimCLR,
    SimDINO,
    SimDINOv2,
    SimMIM,
    SimSiam,
    SSLModule,
    SwAV,
    UserError,
    VICReg,
    ViewSpec,
    VISReg,
)
from ssl_lightning.distributed import world_size
from ssl_lightning.evaluation import feature_std, rankme, uniformity
from tests.processes import run_processes
from tests.small import METHODS, VIT, VIT_ONLY, digits, simclr, slow_unless, small, trainer

OWN = {
    CAPI: {"teacher_agreement", "masked_patch_error", "clustering_error", "patch_entropy", "prototypes_in_use"},
    DeepClusterV2: {"prototypes_in_use"},
    DINO: {"teacher_agreement", "teacher_entropy", "prototypes_in_use"},
    Distillation: {
        *("image_agreement", "image_explained", "patch_agreement", "patch_explained"),
        *("neighbors_shared", "teacher_scale"),
    },
    IBOT: {"teacher_agreement", "teacher_entropy", "patch_entropy", "prototypes_in_use"},
    IJEPA: {"teacher_agreement", "masked_patch_error"},
    LeJEPA: {"prediction_error", "sigreg"},
    VISReg: {"prediction_error", "visreg"},
    DINOv2: {"teacher_agreement", "teacher_entropy", "patch_entropy", "prototypes_in_use"},
    ReSA: {"teacher_agreement", "assignment_entropy"},
    SimDINO: {"teacher_agreement", "compression", "expansion", "collapsed_expansion"},
    SimDINOv2: {"teacher_agreement", "compression", "patch_compression", "expansion", "collapsed_expansion"},
    SwAV: {"teacher_entropy", "prototypes_in_use"},
    MoCoV2: {"teacher_agreement", "queue_age"},
    MoCoV3: {"teacher_agreement"},
    BYOL: {"teacher_agreement"},
    MAE: {"masked_patch_error"},
    NNCLR: {"queue_age", "neighbours_in_use"},
    SimSiam: {"projection_std"},
    RotNet: {"pretext_accuracy"},
    Jigsaw: {"pretext_accuracy"},
    NPID: {"memory_agreement"},
    SimMIM: {"masked_patch_error"},
    BEiT: {"pretext_accuracy"},
    GramAnchoring: {"teacher_agreement", "teacher_entropy", "patch_entropy", "prototypes_in_use"},
    ImageTokenizer: {"reconstruction_error", "prototypes_in_use"},
}
DECAYED = Optim("adamw", base_lr=1e-2, weight_decay=50.0, lr_scaling="none", warmup_epochs=0)
VANISHING = Optim("adamw", base_lr=1e-5, weight_decay=5e4, lr_scaling="none", warmup_epochs=0)
NARROW: dict[str, Any] = {"stem_stride": 2, "channels": (8, 8, 16, 16)}
"""Its features at the start are farther from the teacher's than chance."""

WRONG: dict[type[SSLModule], dict[str, Any]] = {
    SimCLR: {"temperature": 100.0},
    MoCoV2: {"temperature": 100.0},
    MoCoV3: {"temperature": 100.0},
    NNCLR: {"temperature": 100.0},
    ReSA: {"temperature": 100.0},
    DeepClusterV2: {"temperature": 100.0},
    SwAV: {"epsilon": 10.0},
    DINO: {"student_temperature": 10.0, "teacher_temperature": 10.0, "warmup_teacher_temperature": 10.0},
    MAE: {"optim": DECAYED},
    BarlowTwins: {"optim": VANISHING},
    VICReg: {"optim": VANISHING},
    SimSiam: {"optim": Optim("adamw", base_lr=3e-2, lr_scaling="none", warmup_epochs=0)},
    RotNet: {"optim": Optim("sgd", base_lr=0.0, warmup_epochs=0)},
    IJEPA: {"momentum": 0.0, "optim": DECAYED},
    LeJEPA: {"optim": DECAYED},
    SimDINO: {"momentum": 0.0, "epsilon": 10.0, "optim": VANISHING},
    SimDINOv2: {"momentum": 0.0, "epsilon": 10.0, "mask_ratio": (0.4, 0.5), "optim": VANISHING},
    VISReg: {"optim": DECAYED},
    CAPI: {"temperature": 100.0},
    DINOv2: {"student_temperature": 10.0, "warmup_teacher_temperature": 10.0, "koleo_weight": 0.0},
    IBOT: {"student_temperature": 10.0, "warmup_teacher_temperature": 10.0, "masked_share": 1.0},
    SimMIM: {"optim": Optim("sgd", base_lr=0.0, warmup_epochs=0)},
    BEiT: {"optim": Optim("sgd", base_lr=0.0, warmup_epochs=0)},
    Distillation: {"backbone_kwargs": NARROW, "optim": Optim("sgd", base_lr=0.0, warmup_epochs=0)},
    Jigsaw: {"optim": DECAYED},
    NPID: {"temperature": 100.0},
    BYOL: {"momentum": 0.0, "optim": Optim("adamw", base_lr=3e-2, lr_scaling="none", warmup_epochs=0)},
}
"""A setting with which each method learns nothing; predictors and last norms of some are taken away as well.

GramAnchoring goes on from a DINOv2 that has learnt, and a tokenizer is no method to learn features by.
"""

RIGHT: dict[str, Any] = {
    "backbone_kwargs": {"stem_stride": 2, "channels": (16, 16, 32, 32)},
    "optim": Optim("adamw", base_lr=3e-3, lr_scaling="none", warmup_epochs=0),
}

RIGHT_VIT: dict[type[SSLModule], dict[str, Any]] = {
    DINOv2: {  # with the paper's LayerScale so small a network would see nothing of the image for long
        "backbone_kwargs": {**VIT["backbone_kwargs"], "init_values": None, "weight_init": "jax"},
        "optim": RIGHT["optim"],
        "centering": "sinkhorn",
        "layer_decay": 1.0,
        "patch_embed_lr": 1.0,
    },
}


def module_and_data(method: type[SSLModule], **kwargs: Any) -> tuple[Any, Any]:
    size = 32 if method in {*VIT_ONLY, Jigsaw} else 16
    view = ViewSpec(
        size=size, count=method.global_views or 2, scale=(0.5, 1), ratio=(0.9, 1.1), flip=0, jitter=0.8, brightness=0.4
    )
    torch.manual_seed(0)
    return small(method, kwargs), digits(views=[view], image_size=size, batch_size=64)


def metrics(folder: Path) -> str:
    return (folder / "metrics.csv").read_text()


@pytest.mark.parametrize("method", slow_unless(lambda method: method in (SimCLR, DINOv2), METHODS))
def test_health_is_logged_and_changes_no_weight(method: type[SSLModule], tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [HealthMonitor()]):
        module, data = module_and_data(method)
        L.seed_everything(0, verbose=False)
        running = trainer(tmp_path, callbacks=callbacks, limit_train_batches=3, max_epochs=2)
        running.fit(module, data)
        weights.append(module.state_dict())
    found = {name.removeprefix("health/") for name in running.callback_metrics if name.startswith("health/")}
    views = {"blank_views", *({"alignment", "lidar"} if method.global_views != 1 else ())}
    assert found - {"alpha_req"} == {"rankme", "feature_std", "uniformity"} | views | OWN.get(method, set())
    assert all(torch.isfinite(running.callback_metrics[f"health/{name}"]) for name in found)
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_readings_are_those_of_plain_images(tmp_path: Path) -> None:
    module, data = module_and_data(SimCLR)
    running = trainer(tmp_path, callbacks=[HealthMonitor(num_images=100)], limit_train_batches=2)
    running.fit(module, data)
    module.eval()
    with torch.no_grad():
        features = torch.cat([module(data.on_after_batch_transfer(b, 0).images) for b in data.plain_dataloader(100)])
    assert len(features) == 100
    for name, formula in (("rankme", rankme), ("feature_std", feature_std), ("uniformity", uniformity)):
        assert float(running.callback_metrics[f"health/{name}"]) == pytest.approx(formula(features), rel=1e-3)


def test_checkpoints_and_early_stopping_go_by_health(tmp_path: Path) -> None:
    for validation in (1.0, 0):  # with a validation set and without
        module, data = module_and_data(SimCLR)
        keep = ModelCheckpoint(tmp_path / str(validation), "{epoch}", monitor="health/rankme", mode="max")
        stop = EarlyStopping("health/rankme", mode="max", stopping_threshold=1.0, check_on_train_epoch_end=True)
        running = trainer(
            tmp_path,
            callbacks=[HealthMonitor(), keep, stop],
            limit_train_batches=2,
            max_epochs=3,
            limit_val_batches=validation,
            enable_checkpointing=True,
        )
        running.fit(module, data)
        assert Path(keep.best_model_path).is_file()
        assert float(keep.best_model_score) == pytest.approx(float(running.callback_metrics["health/rankme"]))
        assert running.current_epoch == 1, "RankMe is above 1 after the first epoch"


def alarmed(method: type[SSLModule], tmp_path: Path, wrong: bool, **options: Any) -> tuple[LossFloorAlarm, L.Trainer]:
    right = (
        RIGHT_VIT.get(method, {})
        if method in VIT_ONLY
        else {**RIGHT, **({"temperature": 0.2} if method is MoCoV3 else {})}
    )
    module, data = module_and_data(method, **(WRONG[method] if wrong else right))
    if wrong and method in (BYOL, SimSiam):
        module.predictor = nn.Identity()
    if wrong and method is SimSiam:
        module.projector[-1] = nn.Identity()
    if wrong and method is SimMIM:
        nn.init.zeros_(module.backbone.norm.weight)
    if wrong and method in (BEiT, RotNet):
        for parameter in module.head.parameters():
            nn.init.zeros_(parameter)
    alarm = LossFloorAlarm(patience=30, **options)
    logger = CSVLogger(tmp_path, "", "")
    epochs = 6 if wrong else 2  # of 22 steps
    running = trainer(tmp_path, callbacks=[HealthMonitor(every_n_epochs=1), alarm], max_epochs=epochs, logger=logger)
    running.fit(module, data)
    return alarm, running


@pytest.mark.parametrize("method", slow_unless(lambda method: method is SimCLR, WRONG))
def test_a_run_that_learns_nothing_is_told_once_with_the_remedies(method: type[SSLModule], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="LossFloorAlarm: ") as warned:
        alarm, running = alarmed(method, tmp_path, wrong=True, stop=True)
    told = [str(one.message) for one in warned if "LossFloorAlarm" in str(one.message)]
    assert len(told) == 1
    assert method.remedies in told[0]
    assert alarm.raised
    assert running.current_epoch < 6 or method in (SwAV, BYOL, SimSiam), "it stops if asked"
    assert "health/alarm" in metrics(tmp_path)


@pytest.mark.parametrize("method", slow_unless(lambda method: method is SimCLR, WRONG))
def test_a_run_that_learns_is_left_alone(method: type[SSLModule], tmp_path: Path) -> None:
    alarm, running = alarmed(method, tmp_path, wrong=False)
    assert alarm.raised is None
    assert running.current_epoch == 2
    assert "health/alarm" not in metrics(tmp_path)


def test_collapsed_features_are_told_where_the_loss_says_nothing(tmp_path: Path) -> None:
    class Constant(SimCLR):
        chance_loss = None

        def training_loss(self, views: Any) -> torch.Tensor:
            return torch.cat([self.backbone(view) for view in views]).square().mean()  # drives features to a point

    module, data = Constant(**simclr().hparams), digits()
    nn.init.constant_(module.backbone.layer4[-1].bn2.bias, 1.0)
    for parameter in module.backbone.parameters():
        nn.init.zeros_(parameter) if parameter.ndim > 1 else None
    alarm = LossFloorAlarm()
    with pytest.warns(UserWarning, match="features have collapsed"):
        trainer(tmp_path, callbacks=[HealthMonitor(), alarm], max_epochs=4, limit_train_batches=2).fit(module, data)
    assert alarm.raised


def test_one_look_is_not_two(tmp_path: Path) -> None:
    module, data = module_and_data(SimCLR)
    alarm = LossFloorAlarm(min_rankme=1000)  # every look is bad
    callbacks = [HealthMonitor(every_n_epochs=3), alarm]
    trainer(tmp_path, callbacks=callbacks, max_epochs=5, limit_train_batches=2).fit(module, data)
    assert alarm.raised is None
    with pytest.warns(UserWarning, match="features have collapsed"):
        trainer(tmp_path, callbacks=callbacks, max_epochs=6, limit_train_batches=2).fit(module, data)


def test_the_alarm_goes_on_counting_after_a_resume() -> None:
    alarm = LossFloorAlarm(patience=5)
    alarm._steps, alarm._smooth = 3, 5.5
    again = LossFloorAlarm(patience=5)
    again.load_state_dict(alarm.state_dict())
    assert (again._steps, again._smooth, again.raised) == (3, 5.5, None)


def test_two_processes_read_what_one_does(tmp_path: Path) -> None:
    one, two = run_processes(_readings, 1, tmp_path), run_processes(_readings, 2, tmp_path)
    assert two[0] == two[1]
    for name in ("rankme", "feature_std", "uniformity"):
        assert two[0][f"health/{name}"] == pytest.approx(one[0][f"health/{name}"], rel=1e-3)


def _readings(rank: int, tmp_path: Path) -> dict[str, float]:
    module, data = module_and_data(SimCLR, optim=Optim("sgd", base_lr=0.0, lr_scaling="none", warmup_epochs=0))
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0  # the backbone stays as it is
    data.batch_size = 64 // world_size()
    several = {"devices": 2, "strategy": "ddp", "plugins": [LightningEnvironment()]} if world_size() > 1 else {}
    running = trainer(tmp_path, callbacks=[HealthMonitor()], limit_train_batches=1, limit_val_batches=0, **several)
    running.fit(module, data)
    return {name: float(value) for name, value in running.callback_metrics.items() if name.startswith("health/")}


def test_arguments_are_checked() -> None:
    with pytest.raises(UserError, match="num_images=1 must be at least 2"):
        HealthMonitor(num_images=1)
    with pytest.raises(UserError, match="tolerance=2 must lie between 0 and 1"):
        LossFloorAlarm(tolerance=2)
