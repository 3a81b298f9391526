"""The model card of an exported backbone."""

import json
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from ssl_lightning.checkpoints.pretrained import Pretrained


def card_of(pretrained: Pretrained, loading: str, prepared: bool) -> str:
    """What is known of a backbone, in Markdown.

    Args:
        pretrained: The backbone.
        loading: Lines that load it, and give ``features`` of ``images``.
        prepared: Whether it is known how its images are prepared.
    """
    facts, kwargs = pretrained.facts, pretrained.backbone_kwargs
    parameters = sum(parameter.numel() for parameter in pretrained.backbone.parameters())
    metrics = {
        name: value for name, value in facts.get("metrics", {}).items() if name.startswith(("val/", "train/loss"))
    }
    versions = [f"{name} {version(name)}" for name in ("ssl_lightning", "torch", "timm", "torchvision")]
    if trained := facts.get("ssl_lightning_version"):
        versions.append(f"trained with ssl_lightning {trained}")
    rows = {
        "backbone": f"`{pretrained.name}`" + (f" with `{kwargs}`" if kwargs else ""),
        "features": f"{pretrained.embed_dim:,} numbers per image, of {parameters:,} parameters",
        "method": facts.get("method"),
        "data": _listed(facts.get("data"), _counted(facts, "images"), _counted(facts, "classes")),
        "training": _listed(_counted(facts, "epochs"), _counted(facts, "steps")),
        "metrics": _listed(*(f"{name} {value:.4g}" for name, value in metrics.items())),
        "weights": f"`{pretrained.hash}`",
        "versions": _listed(*versions),
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value)]
    sections = [f"# {_listed(pretrained.name, facts.get('method'))}", "\n".join(table)]
    lines = f"{_images(pretrained, prepared)}\n{loading}".splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    code = "\n".join([*imports, "", *(line for line in lines if line and line not in imports)])
    if prepared:
        transform = pretrained.image_transform
        sections.append(
            f"## Images\n\nThe shorter side resized to {_short_side(transform)} px ({transform['interpolation']}, "
            f"antialiased), the central {transform['size']} x {transform['size']} px of it, {_scaling(transform)}, "
            f"minus the mean {_rounded(transform['mean'])}, divided by {_rounded(transform['std'])}."
        )
    sections.append(f"## Use\n\n```python\n{code}\n```")
    if recipe := facts.get("recipe"):
        sections.append(f"## Recipe\n\n```json\n{json.dumps(recipe, indent=2, default=str)}\n```")
    return "\n\n".join(sections) + "\n"


def _images(pretrained: Pretrained, prepared: bool) -> str:
    """Lines that give ``images``: from a photo if the transform is known, otherwise random ones of the right shape."""
    transform, channels = pretrained.image_transform, pretrained.backbone_kwargs.get("in_chans", 3)
    if not prepared or channels != 3 or "value_range" in transform:
        return f"import torch\n\nimages = torch.rand(1, {channels}, {transform['size']}, {transform['size']})"
    return f"""import torch
from PIL import Image
from torchvision.transforms import v2

prepare = v2.Compose(
    [
        v2.ToImage(),
        v2.Resize({_short_side(transform)}, v2.InterpolationMode.{transform["interpolation"].upper()}, antialias=True),
        v2.CenterCrop({transform["size"]}),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize({_rounded(transform["mean"])}, {_rounded(transform["std"])}),
    ]
)
images = prepare(Image.open("photo.jpg").convert("RGB"))[None]"""


def _scaling(transform: dict[str, Any]) -> str:
    """How pixels come to lie between 0 and 1, in words."""
    kind = f"as {transform['channels']} channels, " if "channels" in transform else ""
    if "value_range" not in transform:
        return f"{kind}divided by 255"
    low, high = transform["value_range"]
    return f"{kind}minus {low:g}, divided by {high - low:g}, clipped to [0, 1] (8-bit images: divided by 255)"


def _short_side(transform: dict[str, Any]) -> int:
    return round(transform["size"] / transform["crop_fraction"])


def _rounded(numbers: Iterable[float]) -> list[float]:
    return [round(float(number), 6) for number in numbers]


def _listed(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _counted(facts: dict[str, Any], what: str) -> str | None:
    return f"{facts[what]:,} {what}" if facts.get(what) else None
