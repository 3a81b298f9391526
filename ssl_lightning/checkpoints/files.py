"""Checkpoint files, written so that an interruption never damages the last good file."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from packaging.version import Version
from safetensors import SafetensorError

from ssl_lightning.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin that writes checkpoints, for files that are complete at every moment.

    Lightning's own plugin collects a checkpoint in memory and moves it from the temporary folder. If that is on another
    disk, the move is a copy, which an interruption leaves incomplete.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write to a file next to it, then rename that file.

        Args:
            checkpoint: What to save.
            path: File; or a URL, which Lightning's own plugin writes.
            storage_options: As for Lightning's.

        Raises:
            UserError: The disk is full or cannot be written; an earlier file of that name is kept.
        """
        if not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = "the earlier file is kept" if path.exists() else "there is no earlier file"
            raise UserError(
                f"cannot write the checkpoint {path} ({cause}); {kept}. Free space or set --trainer.default_root_dir, "
                f"then resume with --ckpt_path last."
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
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces another once it is complete; a failure leaves the other file as it was.

    Args:
        path: The file to replace; its folder is created.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn the exceptions of an unreadable checkpoint into a UserError.

    Args:
        path: The checkpoint file.

    Raises:
        UserError: It is damaged or no checkpoint.
    """
    try:
        yield
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or no checkpoint: {str(error).partition('. ')[0]}") from error


def rename(state: dict[str, Any], renamed: dict[str, str]) -> None:
    """Rename parts of a state that an earlier version saved, in place; the order stays.

    Args:
        state: Weights by name.
        renamed: New prefixes by old prefix.
    """
    for key in list(state):
        old = next((old for old in renamed if f"{key}.".startswith(f"{old}.")), None)
        state[key if old is None else renamed[old] + key.removeprefix(old)] = state.pop(key)


def describe(method: Any, checkpoint: dict[str, Any]) -> None:
    """Add what a reader of a checkpoint needs to know about its weights: method, branch, data, metrics.

    Args:
        method: The method to save.
        checkpoint: What is about to be written.
    """
    bases = [base.__name__ for base in type(method).__mro__ if issubclass(base, L.LightningModule)]
    checkpoint["method"], checkpoint["method_bases"] = bases[0], bases[: bases.index("SSLModule") + 1]
    checkpoint["ssl_lightning_version"] = version("ssl_lightning")
    evaluated = method.evaluated_backbone
    checkpoint["evaluated_backbone"] = next(name for name, part in method.named_modules() if part is evaluated)
    if method._trainer is None:
        return
    checkpoint["metrics"] = {name: float(value) for name, value in method.trainer.callback_metrics.items()}
    data: Any = getattr(method.trainer, "datamodule", None)
    if hasattr(data, "image_transform"):
        checkpoint["image_transform"], checkpoint["facts"] = data.image_transform, data.facts


def settle_progress(saved: dict[str, Any], fit_loop: Any) -> None:
    """Count the current batch as done, and restart a validation that is due or running from its first batch.

    Callbacks save before Lightning counts the batch. Lightning can resume such a checkpoint. But saved at the last
    batch of an epoch, it miscounts epochs (seen in 2.6), and saved during a validation, it skips batches.

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
        if not begins:  # otherwise the batch is counted after the validation
            saved["epoch_loop.state_dict"]["_batches_that_stepped"] += not loop._should_accumulate()
            if loop._num_ready_batches_reached():
                _count(saved["epoch_progress"], "processed")
    if begins:
        for count in (validation["total"], validation["current"]):
            count |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def _count(progress: dict[str, dict[str, int]], what: str) -> None:
    for part in ("total", "current"):
        progress[part][what] += 1


def check_fit(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Check that the weights in a checkpoint fit a method; warn if a training resumes with other hyper-parameters.

    Args:
        module: The method, with a trainer.
        checkpoint: What is about to be loaded.

    Raises:
        UserError: They do not fit; the message says what differs.
    """
    own, saved = _flat(module.hparams), _flat(checkpoint.get("hyper_parameters", {}))
    fitting, begun = module.trainer.state.fn == TrainerFn.FITTING, own.pop("init_from", "None")  # already applied
    if fitting and begun not in ("None", saved.get("init_from", "None")):
        raise UserError(
            f"--model.init_from {begun} is not read where --ckpt_path resumes a training; give either of them."
        )
    for what, default in (("trainable", "all"), ("continued", None)) if fitting else ():
        before = checkpoint.get("hyper_parameters", {}).get(what, default)
        if before != module.hparams.get(what, default):
            raise UserError(
                f"--model.{what} differs from the training that --ckpt_path resumes, which had {before}; give the "
                "same, or begin a new training with --model.init_from instead of --ckpt_path."
            )
    changed = [f"{key} {own[key]} (was {saved[key]})" for key in own if key in saved and own[key] != saved[key]]
    weights, saved_weights = module.state_dict(), checkpoint.get("state_dict", {})
    unlike = {
        name for name in weights.keys() & saved_weights.keys() if _shape(weights[name]) != _shape(saved_weights[name])
    }
    if module.strict_loading:
        unlike |= weights.keys() ^ saved_weights.keys()
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
    if changed and fitting:
        rank_zero_warn(f"resuming with other hyper-parameters than the checkpoint's: {'; '.join(changed)}")


def _flat(hyper_parameters: Any, prefix: str = "") -> dict[str, str]:
    """Hyper-parameters as text, nested ones as ``outer.inner``; tuples as the lists that YAML makes of them."""
    flat: dict[str, str] = {}
    for key, value in hyper_parameters.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(list(value) if isinstance(value, tuple) else value)
    return flat


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)
