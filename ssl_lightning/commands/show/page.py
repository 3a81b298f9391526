"""What a backbone sees, as a page or as a picture."""

import base64
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from ssl_lightning.commands.show.see import Seen
from ssl_lightning.drawing import data_uri, fitted, heat, sheet, squares
from ssl_lightning.evaluation.components import patch_colors

_LONGER_SIDE = 480
"""Of the images in the page, in pixels."""
_BYTES = 8_000_000
"""Most bytes of features in the page."""
_DIRECTIONS = 256


def sheet_of(seen: Sequence[Seen]) -> Image.Image:
    """A row for each image: itself, the components of its patches, also of the foreground only, and attention.

    Args:
        seen: The images.
    """
    colors = patch_colors([image.features for image in seen])
    heads = max((len(image.attention) for image in seen if image.attention is not None), default=0)
    rows = []
    for image, whole, inner in zip(seen, colors.all, colors.foreground, strict=True):
        attention = [] if image.attention is None else [*map(heat, image.attention.double().numpy())]
        blank = [Image.new("RGB", (1, 1), "white")] * (heads - len(attention))
        rows.append([fitted(image.picture), squares(whole), squares(inner), *attention, *blank])
    return sheet(rows, ["image", "components", "of the foreground", *(f"head {number + 1}" for number in range(heads))])


def page_of(seen: Sequence[Seen], checkpoint: str, backbone: str) -> str:
    """The page as HTML.

    Args:
        seen: The images.
        checkpoint: What gave the features, for the title.
        backbone: Its name.
    """
    import jinja2

    colors = patch_colors([image.features for image in seen])
    codes = _coded([image.features for image in seen])
    images = [
        {
            "name": image.name,
            "short": os.path.basename(image.name),
            "size": f"{image.picture.width} x {image.picture.height} px",
            "rows": image.features.shape[1],
            "columns": image.features.shape[2],
            "picture": data_uri(fitted(image.picture, min(_LONGER_SIDE, max(image.picture.size))), "JPEG"),
            "components": data_uri(Image.fromarray(whole)),
            "foreground": data_uri(Image.fromarray(inner)),
            "heads": [] if image.attention is None else [_small_heat(head) for head in image.attention],
            "features": base64.b64encode(code.tobytes()).decode(),
        }
        for image, whole, inner, code in zip(seen, colors.all, colors.foreground, codes, strict=True)
    ]
    text = Path(__file__).with_name("show.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    numbers: dict[str, Any] = {"images": [{key: image[key] for key in _IN_SCRIPT} for image in images]}
    numbers["palette"] = (np.array(colormaps["viridis"](np.arange(256)))[:, :3] * 255).round().astype(int).tolist()
    names = {"title": os.path.basename(os.path.normpath(checkpoint)), "checkpoint": checkpoint, "backbone": backbone}
    return template.render(**names, images=images, numbers=numbers, nonce=secrets.token_urlsafe(12))


_IN_SCRIPT = ("rows", "columns", "features", "short")


def _small_heat(values: Tensor) -> str:
    return data_uri(heat(values.double().numpy(), max(values.shape)))


def _coded(maps: Sequence[Tensor]) -> list[np.ndarray[Any, np.dtype[np.int8]]]:
    """Features ``(rows * columns, K)`` of length 1 as whole numbers, in the directions that hold the most of them.

    The product of two of them, divided by 127 ** 2, is their cosine similarity to about 0.02.
    """
    unit = F.normalize(torch.cat([features.flatten(1).T for features in maps]), dim=1)
    count = max(1, min(_DIRECTIONS, unit.shape[1], _BYTES // len(unit)))
    if count < unit.shape[1]:
        some = unit[torch.linspace(0, len(unit) - 1, min(len(unit), 20_000)).long()].double()
        unit = unit @ torch.linalg.eigh(some.T @ some).eigenvectors[:, -count:].float()
    codes = (unit * 127).round().to(torch.int8)
    return [part.numpy() for part in codes.split([features.shape[1] * features.shape[2] for features in maps])]
