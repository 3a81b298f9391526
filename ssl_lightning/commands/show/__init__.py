"""The command ``show``: what the features of a backbone hold at each place of some images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_lightning.arguments import SSLArgumentParser, title_of
from ssl_lightning.checkpoints import open_backbone
from ssl_lightning.checkpoints.files import replacing
from ssl_lightning.commands.show.page import page_of, sheet_of
from ssl_lightning.commands.show.see import find, see
from ssl_lightning.errors import UserError

__all__ = ["run", "show"]


def run(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The command line after ``show``.
    """
    parser = SSLArgumentParser(prog="ssl-lightning show", description=title_of(show))
    parser.add_argument(
        "images", type=str, nargs="+", help="Image files, folders of images, or patterns such as '*.jpg'."
    )
    parser.add_function_arguments(show, as_positional=False, skip={"images"})
    print(show(**parser.parse_args([*words])))


def show(
    images: Sequence[str],
    checkpoint: str,
    output: str = "show.html",
    image_size: int | None = None,
    num_images: int = 8,
    backbone: str | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    branch: str | None = None,
) -> Path:
    """Show patch components, attention and similar patches of images, as a page or a picture.

    Components: the first three principal components of the features of all patches (of a CNN, of all places of its last
    map) as red, green and blue, also of the foreground only. Attention: of each head of the last block of a ViT, from
    its class token. In the page, a click on a patch shows how similar all others are.

    Args:
        images: Image files, folders of images, or patterns such as ``*.jpg``.
        checkpoint: A checkpoint file, a folder of weights or ``hf-hub:NAME``; or the name of a timm or torchvision
            model, to use its pretrained weights; or ``untrained``.
        output: What to write: a page ``.html``, which needs no other file and no network, or a picture ``.png``.
        image_size: Shorter side of the images in pixels: larger images have more patches. None means the size that the
            checkpoint was evaluated with.
        num_images: Largest number of images to show. Of more they are evenly spread.
        backbone: Name of the timm or torchvision model; only for checkpoints that do not name it.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 96}``.
        branch: Which network of the checkpoint to read, by a part of its name, e.g. student; None follows the paper.

    Returns:
        The path of the page or picture.

    Raises:
        UserError: There is no image or no such checkpoint, or the backbone has no map or takes no images of this size.
    """
    target = Path(output)
    if target.suffix.lower() not in (".html", ".htm", ".png") or not target.absolute().parent.is_dir():
        raise UserError(f"--output {output}: name a file such as show.html or show.png in a folder that exists.")
    if num_images < 1 or (image_size is not None and image_size < 1):
        raise UserError(f"--num_images {num_images} and --image_size {image_size} must be at least 1.")
    files = find(images)
    pretrained = open_backbone(checkpoint, backbone, backbone_kwargs, branch)
    seen = see(pretrained, files, image_size, num_images)
    try:
        with replacing(target) as file:
            if target.suffix.lower() == ".png":
                sheet_of(seen).save(file, "PNG")
            else:
                file.write(page_of(seen, checkpoint, pretrained.name).encode())
    except OSError as error:
        raise UserError(f"cannot write {target} ({error}); choose another --output.") from error
    return target
