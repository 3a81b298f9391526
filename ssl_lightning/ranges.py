"""Which numbers the options of methods, optimizers and data take."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from ssl_lightning.errors import UserError

_OF_METHODS: dict[str, tuple[Callable[[float], bool], str]] = {
    "above 0": (
        lambda value: value > 0,
        "temperature student_temperature teacher_temperature teacher_patch_temperature warmup_teacher_temperature "
        "target_temperature epsilon limit",
    ),
    "from 0 to 1": (
        lambda value: 0 <= value <= 1,
        "momentum center_momentum predicted_share cosine_weight sigreg_weight regularizer_weight",
    ),
    "from 0 to below 1": (lambda value: 0 <= value < 1, "drop_path"),
    "of 1 or more": (
        lambda value: value >= 1,
        "bn_splits bottleneck_dim decoder_dim decoder_heads gram_every hidden_dim kmeans_iterations mask_unit "
        "num_permutations num_prototypes num_slices num_tokens patch_bottleneck_dim patch_size probe_every "
        "projection_dim projector_dim projector_layers prototype_sets sinkhorn_iterations smallest_block targets "
        "token_dim",
    ),
    "of 3 or more": (lambda value: value >= 3, "knots"),
    "of 0 or more": (
        lambda value: value >= 0,
        "clip_gradient decoder_depth freeze_last_layer freeze_prototypes_steps gram_weight koleo_weight min_context "
        "nce_k patch_weight predictor_depth predictor_dim queue_length queue_start_epoch standardize_steps "
        "warmup_teacher_temperature_epochs",
    ),
}


_OF_OPTIMIZERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "of 0 or more": (
        lambda value: value >= 0,
        "base_lr weight_decay warmup_epochs warmup_start_factor end_lr_factor",
    ),
}

_OF_DATA: dict[str, tuple[Callable[[float], bool], str]] = {
    "of 1 or more": (lambda value: value >= 1, "image_size"),
    "of 2 or more": (lambda value: value >= 2, "train_samples"),
    "above 0, at most 1": (lambda value: 0 < value <= 1, "crop_fraction"),
    "from 0 to 1": (lambda value: 0 <= value <= 1, "max_unreadable"),
    "from 0 to below 2 ** 63": (lambda value: 0 <= value < 2**63, "seed"),
}


_RANGES = {"model": _OF_METHODS, "model.optim": _OF_OPTIMIZERS, "data": _OF_DATA}


def check_ranges(group: Literal["model", "model.optim", "data"], options: Mapping[str, Any]) -> None:
    """Raise a UserError if an option is a number that it cannot be.

    Args:
        group: Whose options.
        options: Names and values; only the names above are checked.
    """
    for possible, (fits, names) in _RANGES[group].items():
        for name in names.split():
            value = options.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not fits(value):
                raise UserError(f"--{group}.{name} {value}: give a number {possible}.")
