"""Backbones for the Hugging Face hub: timm's configuration, and the upload."""

from pathlib import Path
from typing import Any

from ssl_lightning.checkpoints.pretrained import Pretrained
from ssl_lightning.errors import UserError


def timm_config(pretrained: Pretrained) -> dict[str, Any]:
    """The ``config.json`` with which timm builds a backbone from the hub.

    Args:
        pretrained: A backbone of timm.
    """
    transform, model = pretrained.image_transform, pretrained.backbone
    known: Any = getattr(model, "pretrained_cfg", {})
    size, classes = transform["size"], pretrained.backbone_kwargs.get("num_classes", 0)
    return {
        "architecture": pretrained.name.partition(".")[0],
        "num_classes": classes,
        "num_features": pretrained.embed_dim,
        "model_args": {**pretrained.backbone_kwargs, "num_classes": classes},
        "pretrained_cfg": {
            "input_size": [pretrained.backbone_kwargs.get("in_chans", 3), size, size],
            "interpolation": transform["interpolation"],
            "crop_pct": transform["crop_fraction"],
            "crop_mode": "center",
            "mean": list(transform["mean"]),
            "std": list(transform["std"]),
            "num_classes": classes,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }


def upload(folder: Path, repository: str) -> str:
    """Upload the files of a folder to a repository of the hub, which is created if needed.

    Args:
        folder: The folder.
        repository: Its name, e.g. ``me/simclr``.

    Returns:
        The address of the repository.

    Raises:
        UserError: The hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="ssl_lightning")
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Add the backbone")
    except Exception as error:  # of the hub, of HTTP, or of its library, which changed
        raise UserError(
            f"--push {repository} failed: {str(error).strip()} Log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    return str(url)
