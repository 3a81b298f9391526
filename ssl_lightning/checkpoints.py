"""Checkpoint files: written so that an interruption never harms the last good one, read whoever wrote them."""

import argparse
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO
from packaging.version import Version
from torch import Tensor, nn

from ssl_lightning.errors import UserError

_CONTAINERS = ("state_dict", "teacher", "model", "student")
"""Where files keep the weights; of DINO's and DINOv2's the teacher's, which their papers evaluate."""

_PREFIXES = ("encoder_q.", "base_encoder.", "backbone.", "encoder.", "")
"""Before the names of the weights: MoCo v2; MoCo v3; DINO, DINOv2, lightly; SimSiam; bare. Ours say it themselves."""

_HEADS = (
    *("fc", "head", "heads", "classifier", "projector", "projection_head", "predictor", "prototypes"),
    *("mask_token", "decoder", "dino_head", "ibot_head"),
)
"""What may be left over beside the backbone: parts of these names, or of one that goes on with ``_``."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin that writes checkpoints, for files that are whole at every moment.

    Lightning's own collects a checkpoint in memory and moves it from the temporary folder, which is no renaming but
    copying where that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the file, then rename.

        Args:
            checkpoint: What to save.
            path: File, or the URL of one, which Lightning's own way is left to.
            storage_options: As for Lightning's.

        Raises:
            UserError: The disk is full or cannot be written; an earlier file of that name is as it was.
        """
        if not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            part.unlink(missing_ok=True)
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = "the earlier one is kept" if path.exists() else "there is no earlier one"
            raise UserError(
                f"cannot write the checkpoint {path} ({cause}); {kept}. Free space or set trainer.default_root_dir, "
                f"then go on with --ckpt_path last."
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: File or URL.
            args: As for Lightning's.
            kwargs: As for Lightning's.

        Raises:
            UserError: The file is damaged or no checkpoint.
        """
        with reading(path):
            return super().load_checkpoint(path, *args, **kwargs)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Say in words that a checkpoint cannot be read.

    Args:
        path: Its file.

    Raises:
        UserError: It is damaged or no checkpoint.
    """
    try:
        yield
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or no checkpoint: {str(error).partition('. ')[0]}") from error


def settle_progress(saved: dict[str, Any], fit_loop: Any) -> None:
    """Count the batch at hand as done, and a validation that is due or under way as one to begin anew.

    Callbacks save before Lightning counts the batch. It takes such a run up again, but one saved at the last batch of
    an epoch loses count of its epochs (seen in 2.6), and one saved during a validation leaves batches out.

    Args:
        saved: State of the trainer's fit loop in a checkpoint that is being written.
        fit_loop: The loop.
    """
    batches, validation = saved["epoch_loop.batch_progress"], saved["epoch_loop.val_loop.batch_progress"]
    begins = validation["current"]["completed"] < validation["current"]["ready"]
    if batches["current"]["completed"] < batches["current"]["processed"]:
        _count(batches, "completed")
        loop, fetcher = fit_loop.epoch_loop, fit_loop._data_fetcher
        begins = fetcher is not None and loop._should_check_val_fx(fetcher)
        if not begins:  # else all that follows is still to come
            saved["epoch_loop.state_dict"]["_batches_that_stepped"] += not loop._should_accumulate()
            if loop._num_ready_batches_reached():
                _count(saved["epoch_progress"], "processed")
    if begins:
        for count in (validation["total"], validation["current"]):
            count |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def _count(progress: dict[str, dict[str, int]], what: str) -> None:
    for part in ("total", "current"):
        progress[part][what] += 1


def check_fit(module: L.LightningModule, checkpoint: dict[str, Any]) -> list[str]:
    """See whether the weights in a checkpoint are those of such a module.

    Args:
        module: The method.
        checkpoint: What is about to be loaded.

    Returns:
        The hyper-parameters that differ nevertheless.

    Raises:
        UserError: They are not; says what differs.
    """
    own, saved = _flat(module.hparams), _flat(checkpoint.get("hyper_parameters", {}))
    changed = [f"{key} {own[key]} (was {saved[key]})" for key in own if key in saved and own[key] != saved[key]]
    weights, found = module.state_dict(), checkpoint.get("state_dict", {})
    unlike = {name for name in weights.keys() & found.keys() if _shape(weights[name]) != _shape(found[name])}
    if module.strict_loading:
        unlike |= weights.keys() ^ found.keys()
    if unlike:
        name, method = type(module).__name__, checkpoint.get("method", "another method")
        newer = str(checkpoint.get("ssl_lightning_version", "0"))
        differing = [f"the method {name} (was {method})"] if method != name else []
        if Version(newer) > Version(version("ssl_lightning")):
            differing.append(f"the version of this package {version('ssl_lightning')} (was {newer})")
        raise UserError(
            f"the checkpoint does not fit: {len(unlike)} weights are missing, of another shape or too many, e.g. "
            f"{', '.join(sorted(unlike)[:3])}. What differs: "
            f"{'; '.join(differing + changed) or 'the code of the method'}."
        )
    return changed


def _flat(hyper_parameters: Any, prefix: str = "") -> dict[str, str]:
    """Hyper-parameters as text, those in dictionaries as ``outer.inner``; a tuple is the list that YAML makes of it."""
    flat: dict[str, str] = {}
    for key, value in hyper_parameters.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(list(value) if isinstance(value, tuple) else value)
    return flat


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)


def load_backbone(
    path: str | Path, backbone: str | None = None, backbone_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """The backbone of a checkpoint, in eval mode: called with images it gives features ``(B, embed_dim)``.

    Reads checkpoints of this package, the official ones of MoCo v2 and v3, SimSiam, SwAV, DINO, DINOv2, MAE, Barlow
    Twins and VICReg, lightly's, and bare weights of timm and torchvision; ``.safetensors`` files as well. The format is
    found by the names of the weights. All weights of the backbone must be there; only heads may be left over.

    Args:
        path: The file.
        backbone: Name of the timm or torchvision model; None for a checkpoint of this package, which knows it.
        backbone_kwargs: Arguments of its builder, e.g. ``{img_size: 96}``.

    Raises:
        UserError: The file needs code to be read, or fits no format; says which weights are missing or left over.
    """
    from ssl_lightning.backbones import AnySizeViT, create_backbone

    checkpoint = _weights_in(path)
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    weights = _container(checkpoint)
    of_moco_v3 = "MoCoV3" in checkpoint.get("method_bases", []) or any(name.startswith("base_enc") for name in weights)
    if backbone is None:
        if "backbone" not in hyper_parameters:
            raise UserError(f"{path} does not say what its backbone is; give its name, e.g. resnet50.")
        backbone = str(hyper_parameters["backbone"])
    kwargs = {**(hyper_parameters.get("backbone_kwargs") or {}), **(backbone_kwargs or {})}
    kwargs.pop("pretrained", None)
    if of_moco_v3 and backbone.startswith("vit_small"):
        kwargs.setdefault("num_heads", 12)  # the paper's; no weight tells
    model = create_backbone(backbone, **kwargs)
    own = checkpoint.get("evaluated_backbone")
    candidates = _PREFIXES if own is None else [f"{own}."]
    prefixes = [prefix for prefix in candidates if any(name.startswith(prefix) for name in weights)]
    misfits = []
    for prefix in prefixes:
        found = _as_timm_names(
            {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, model
        )
        misfit = _misfit(found, model.state_dict())
        if not misfit:
            model.load_state_dict(found, strict=False)
            of_mae = any(name.startswith("decoder_") for name in weights)
            if isinstance(model, AnySizeViT) and (of_moco_v3 or of_mae):
                model.rows_first = of_moco_v3  # fixed positions, also at other sizes
            return model.eval()
        misfits.append(f"{prefix or 'no prefix'}: {misfit}")
    raise UserError(f"{path} does not hold a {backbone}. Looked for its weights after {'; '.join(misfits)}.")


def _weights_in(path: str | Path) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist.")
    with reading(path):
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # what MAE's and DINO's files hold beside weights
            return torch.load(path, map_location="cpu", weights_only=True)


def _container(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, without what DistributedDataParallel puts before their names."""
    for key in _CONTAINERS:
        if isinstance(checkpoint.get(key), dict):
            return _container(checkpoint[key])
    tensors = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _as_timm_names(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """DINOv2's names as timm's: registers, and blocks that were trained in chunks (``blocks.0.5`` is ``blocks.5``)."""
    if "reg_token" in model.state_dict() and "register_tokens" in weights:
        weights["reg_token"] = weights.pop("register_tokens")
    chunked = any(part.isdigit() for name in weights if name.startswith("blocks.") for part in name.split(".")[2:3])
    if not chunked:
        return weights
    return {
        ".".join([parts[0], *parts[2:]]) if (parts := name.split("."))[0] == "blocks" else name: value
        for name, value in weights.items()
    }


def _misfit(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """Why these weights are not those of the model; nothing if they are."""
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    others = [name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape]
    left = [name for name in found if name not in wanted and not _of_a_head(name)]
    parts = []
    if missing:
        parts.append(f"{len(missing)} are missing, e.g. {missing[0]}")
    if others:
        name = sorted(others)[0]
        parts.append(f"{name} is {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}")
    if left:
        parts.append(f"{len(left)} are left over, e.g. {left[0]}")
    return ", ".join(parts)


def _of_a_head(name: str) -> bool:
    first = name.split(".")[0]
    return any(first == head or first.startswith(f"{head}_") for head in _HEADS)
