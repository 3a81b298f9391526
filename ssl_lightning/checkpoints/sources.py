"""Where weights come from: a file, a folder of timm or transformers, or a repository of the Hugging Face hub."""

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ssl_lightning.checkpoints.files import reading
from ssl_lightning.checkpoints.pickles import full_name, read_inertly
from ssl_lightning.errors import UserError

TEXT = ("backbone", "method", "data", "ssl_lightning_version")
"""Keys whose metadata in an exported file is plain text; all other metadata is JSON."""

HUB, FOLDER = ("hf-hub:", "hf_hub:"), "local-dir:"
"""How timm writes a repository of the hub, and a folder."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pth", "pytorch_model.pth")
"""Names of files of weights in such folders, the first choice first; ``.index.json`` after them lists several files."""


def is_source(source: str) -> bool:
    """Whether weights are read from a file, a folder or the hub. Otherwise the source names a pretrained model.

    Args:
        source: As for ``open_backbone``.
    """
    is_name = source.startswith((*HUB, FOLDER))
    suffixes = (".ckpt", ".pth", ".pt", ".bin", ".safetensors", ".tar", ".torch")
    return is_name or os.path.exists(source) or Path(source).suffix in suffixes


def weights_in(source: str | Path) -> dict[str, Any]:
    """What a checkpoint or a file of weights holds, on the CPU.

    Objects of other packages are passed over: nothing in a file is run.

    Args:
        source: A file; a folder, also with ``local-dir:`` before it; or ``hf-hub:NAME``. What the folder's
            ``config.json`` and ``preprocessor_config.json`` say is under those names.

    Raises:
        UserError: There is no such file or repository, or it cannot be read.
    """
    name = str(source)
    if name.startswith(HUB):
        return _read_folder(_fetched(name[len(HUB[0]) :]), name)
    path = Path(name.removeprefix(FOLDER)).expanduser()
    if path.is_dir():
        return _read_folder(path, name)
    if not path.is_file():
        raise UserError(f"{source} does not exist.")
    return {**_read_file(path), **_described(path.parent if path.name in _WEIGHTS else None)}


def _read_folder(folder: Path, name: str) -> dict[str, Any]:
    """The weights in a folder, with what describes them."""
    file = next((folder / weights for weights in _WEIGHTS if (folder / weights).is_file()), None)
    lists = [folder / f"{weights}.index.json" for weights in _WEIGHTS if (folder / f"{weights}.index.json").is_file()]
    if file is not None:
        content = _read_file(file)
    elif lists:
        parts = [_read_file(folder / part) for part in sorted(set(_json(lists[0])["weight_map"].values()))]
        content = {"state_dict": {key: value for part in parts for key, value in part.get("state_dict", part).items()}}
    else:
        raise UserError(f"{name} holds no weights: there is no {_WEIGHTS[0]} and no {_WEIGHTS[1]} in that folder.")
    return {**content, **_described(folder)}


def _described(folder: Path | None) -> dict[str, Any]:
    """What the files next to weights say about them."""
    files = ("config.json", "preprocessor_config.json")
    paths = () if folder is None else [folder / file for file in files if (folder / file).is_file()]
    return {path.name: _json(path) for path in paths}


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path} is no JSON file: {error}") from error


def _read_file(path: Path) -> dict[str, Any]:
    with reading(path):
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                return {
                    "state_dict": {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
                    **_saved_facts(file.metadata()),
                }
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # in MAE's and DINO's files, besides weights
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            content = read_inertly(path)
        except RuntimeError as error:
            if "TorchScript" not in str(error):
                raise
            raise UserError(
                f"{path} is a TorchScript program, and reading it would run it. Save its weights instead: "
                f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth')."
            ) from error
    if full_name(content) is not None:  # a whole module
        return {"model": content}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights by name, but a {type(content).__name__}.")
    return content


def _saved_facts(metadata: dict[str, str] | None) -> dict[str, Any]:
    """The metadata of a file that this package exported, in the form of a checkpoint; empty for other files."""
    if metadata is None or "backbone_kwargs" not in metadata:
        return {}
    ours = {key: value for key, value in metadata.items() if key != "format"}  # which transformers asks for
    facts: dict[str, Any] = {key: value if key in TEXT else json.loads(value) for key, value in ours.items()}
    transform: dict[str, Any] = facts.pop("image_transform")
    return {
        "hyper_parameters": {key: facts.pop(key) for key in ("backbone", "backbone_kwargs")},
        "image_transform": {
            key: tuple(value) if isinstance(value, list) else value for key, value in transform.items()
        },
        **{key: facts.pop(key) for key in ("fixed_positions", "antialiased") if key in facts},
        "saved_facts": facts,
    }


def _fetched(name: str) -> Path:
    """The folder with the files of a repository of the hub, downloaded unless they are in its cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except LocalEntryNotFoundError as error:
            raise UserError(f"hf-hub:{name} is not in the cache, and the hub cannot be reached: {error}") from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise UserError(f"hf-hub:{name} cannot be read: {str(error).strip()}") from error

    fetched = [fetch("config.json"), fetch("preprocessor_config.json")]
    for weights in _WEIGHTS:
        fetched.append(fetch(weights))
        if fetched[-1] is None and (index := fetch(f"{weights}.index.json")) is not None:
            fetched += [fetch(part) for part in set(_json(index)["weight_map"].values())]
        if fetched[-1] is not None:
            return fetched[-1].parent
    raise UserError(f"hf-hub:{name} holds no weights: there is no {_WEIGHTS[0]} and no {_WEIGHTS[1]}.")
