"""Export of backbones to other programs: timm, torchvision, safetensors and ONNX files, with a model card."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch
from torch import Tensor

from ssl_lightning.backbones.own import example_images, is_own, without_wrapper
from ssl_lightning.backbones.tokens import ViT, only_size
from ssl_lightning.checkpoints.card import card_of
from ssl_lightning.checkpoints.files import replacing
from ssl_lightning.checkpoints.hub import timm_config, upload
from ssl_lightning.checkpoints.layouts.vit import PARTS_OF_TORCHVISION
from ssl_lightning.checkpoints.load import mismatch, open_backbone
from ssl_lightning.checkpoints.pretrained import Pretrained
from ssl_lightning.checkpoints.sources import TEXT
from ssl_lightning.errors import UserError

Format = Literal["timm", "torchvision", "safetensors", "onnx", "transformers"]

Weights = dict[str, Tensor]

Write = Callable[[IO[bytes]], Any]
"""Writes the content of an exported file."""


def export(
    checkpoint: str | Path,
    format: Format = "safetensors",  # noqa: A002 # the word of the command line
    output: str | Path | None = None,
    backbone: str | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    branch: str | None = None,
    push: str | None = None,
) -> Path | str:
    """Write the backbone of a checkpoint for other programs, with a model card.

    Each file appears only when it is complete.

    Args:
        checkpoint: A checkpoint file, a folder of weights or ``hf-hub:NAME``; or the name of a timm or torchvision
            model, to export its pretrained weights.
        format: ``timm`` and ``torchvision`` write weights under the names of that library; ``safetensors`` writes
            weights and the name of their backbone, for ``load_backbone``; ``onnx`` writes a graph for batches of any
            length and images of any size that the backbone takes, or the model card says which; ``transformers``
            writes a folder for that library.
        output: File or, for transformers, folder to write; the model card gets the same name with the suffix ``.md``,
            or README.md in the folder. Not needed with ``push``.
        backbone: Name of the timm or torchvision model; only for checkpoints that do not name it.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 96}``.
        branch: Which network of the checkpoint to read, by a part of its name, e.g. student; None follows the paper.
        push: Repository of the Hugging Face hub, e.g. ``me/simclr``, which is created if needed. It gets the weights
            with a configuration that timm and ``load_backbone`` read, or that transformers reads, and the model card.

    Returns:
        The file or folder, or the address of the repository.

    Raises:
        UserError: The backbone cannot have that format, or the file cannot be written.
    """
    if format not in get_args(Format):
        raise UserError(f"there is no format {format!r}; choose from {', '.join(get_args(Format))}.")
    if (output is None) == (push is None):
        raise UserError("give either --output, where to write, or --push, the name of a repository of the hub.")
    if push is not None and format not in ("safetensors", "transformers"):
        raise UserError(f"--push {push}: the hub gets the format safetensors, which timm reads, or transformers.")
    target = None if output is None else Path(output)
    if target is not None:
        _check_suffix(format, target)
    pretrained = open_backbone(str(checkpoint), backbone, backbone_kwargs, branch)
    if not pretrained.backbone.state_dict():
        raise UserError(f"{pretrained.name} has no weights to export.")
    prepared = bool(pretrained.facts) or not Path(checkpoint).exists()  # else the image transform is a guess
    if target is None:
        assert push is not None
        return _pushed(pretrained, format, push, prepared)
    try:
        if format == "transformers":
            _write_folder(pretrained, target, prepared)
            return target
        exporters = {"timm": _timm, "torchvision": _torchvision, "safetensors": _safetensors, "onnx": _onnx}
        write, loading = exporters[format](pretrained, target)
        with replacing(target) as file:
            write(file)
        with replacing(target.with_suffix(".md")) as file:
            file.write(card_of(pretrained, loading, prepared).encode())
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write {target} ({cause}); choose another --output, or free space.") from error
    return target


def _write_folder(pretrained: Pretrained, folder: Path, prepared: bool, front: str = "") -> None:
    """A folder of transformers, complete or not at all."""
    from ssl_lightning.checkpoints.to_transformers import write_folder

    part = folder.with_name(f"{folder.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        loading = write_folder(pretrained, part, folder.name, _metadata(pretrained))
        (part / "README.md").write_text(front + card_of(pretrained, loading, prepared))
        folder.mkdir(exist_ok=True)
        for file in part.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _pushed(pretrained: Pretrained, format: str, repository: str, prepared: bool) -> str:  # noqa: A002
    """The address of the repository that got the backbone."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / repository.rpartition("/")[2]
        if format == "transformers":
            _write_folder(pretrained, folder, prepared, "---\nlibrary_name: transformers\n---\n\n")
        else:
            name, kwargs, weights = _named_as_in("timm", pretrained)
            twin = replace(pretrained, name=name, backbone_kwargs=kwargs)
            folder.mkdir()
            write, _ = _safetensors(twin, folder / "model.safetensors", weights)
            with replacing(folder / "model.safetensors") as file:
                write(file)
            (folder / "config.json").write_text(json.dumps(timm_config(twin), indent=2))
            loading = f'import timm\n\nbackbone = timm.create_model("hf-hub:{repository}", pretrained=True).eval()\n'
            card = card_of(twin, f"{loading}features = backbone(images)", prepared)
            front = "---\nlibrary_name: timm\ntags:\n- image-feature-extraction\n- timm\n---\n\n"
            (folder / "README.md").write_text(front + card)
        return upload(folder, repository)


def _check_suffix(format: str, output: Path) -> None:  # noqa: A002
    """Check the suffix, by which readers recognize the format."""
    wanted = {"safetensors": ".safetensors", "onnx": ".onnx"}.get(format)
    if format == "transformers":
        if output.is_file() or output.suffix in (".pth", ".safetensors", ".onnx"):
            raise UserError(f"--output {output}: the format transformers is a folder.")
        return
    if wanted is not None and output.suffix != wanted:
        raise UserError(f"--output {output}: a file of the format {format} ends in {wanted}.")
    if wanted is None and output.suffix in (".md", ".npz", ".npy", ".onnx"):
        raise UserError(f"--output {output}: weights for {format} end in .pth or .safetensors.")


# Formats: what to write, and the lines that load it


def _timm(pretrained: Pretrained, output: Path) -> tuple[Write, str]:
    import timm

    name, kwargs, weights = _named_as_in("timm", pretrained)
    module = timm.models.model_entrypoint(name).__module__
    first = f"import {module}  # registers the name\n" if module.startswith("ssl_lightning.") else ""
    given = f", **{kwargs}" if kwargs else ""
    return _weights(weights, output), (
        f"{first}import timm\n\n"
        f'backbone = timm.create_model("{name}", num_classes=0, checkpoint_path="{output.name}"{given}).eval()\n'
        "features = backbone(images)"
    )


def _torchvision(pretrained: Pretrained, output: Path) -> tuple[Write, str]:
    import torchvision

    name, kwargs, weights = _named_as_in("torchvision", pretrained)
    heads = ("fc", "classifier", "heads", "head")
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **kwargs)
    head = next(head for head in heads if hasattr(model, head))
    given = f"**{kwargs}" if kwargs else ""
    first, load = "", "torch.load"
    if output.suffix == ".safetensors":
        first, load = "import safetensors.torch\n", "safetensors.torch.load_file"
    return _weights(weights, output), (
        f"{first}import torchvision\n\n"
        f"backbone = torchvision.models.{name}({given})\n"
        f'backbone.load_state_dict({load}("{output.name}"), strict=False)  # only the classifier is missing\n'
        f"backbone.{head} = torch.nn.Flatten(1)\n"
        "features = backbone.eval()(images)"
    )


def _safetensors(pretrained: Pretrained, output: Path, weights: Weights | None = None) -> tuple[Write, str]:
    return _weights(weights or without_wrapper(pretrained.backbone).state_dict(), output, _metadata(pretrained)), (
        f'from ssl_lightning.checkpoints import load_backbone\n\nfeatures = load_backbone("{output.name}")(images)'
    )


def _metadata(pretrained: Pretrained) -> dict[str, str]:
    """All that is known of a backbone, for ``load_backbone``."""
    facts = {
        **pretrained.facts,
        "backbone": pretrained.name,
        "backbone_kwargs": pretrained.backbone_kwargs,
        "image_transform": pretrained.image_transform,
    }
    if getattr(pretrained.backbone, "rows_first", None) is not None:
        facts["fixed_positions"] = True
    if getattr(pretrained.backbone, "antialiased", False):
        facts["antialiased"] = True
    return {
        key: value if key in TEXT else json.dumps(value, default=str)
        for key, value in facts.items()
        if value is not None
    }


def _onnx(pretrained: Pretrained, output: Path) -> tuple[Write, str]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 # torch's exporter needs it
    except ImportError as error:
        raise UserError("the format onnx needs more packages: pip install 'ssl_lightning[onnx]'.") from error
    if sum(value.nbytes for value in pretrained.backbone.state_dict().values()) > 2**31 - 2**20:
        raise UserError(
            f"an ONNX file holds at most 2 GB, and the weights of {pretrained.name} are larger; choose another format."
        )
    failures = []
    for any_size in (True, False) if only_size(pretrained.backbone) is None else (False,):
        try:
            content = _graph(pretrained, any_size)
            _compare(pretrained, onnxruntime.InferenceSession(content), any_size)
        except (torch.onnx.OnnxExporterError, _DifferentError) as error:  # e.g. a network that takes only one size
            failures.append(error)
            continue
        side, patch = pretrained.image_transform["size"], getattr(pretrained.backbone, "patch_side", 1)
        sides = f"sides that {patch} divides" if patch > 1 else "any sides"
        takes = f"images of {sides}" if any_size else f"images of {side} x {side} px only"
        return lambda file, content=content: file.write(content), (
            "import onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{output.name}")  # takes {takes}\n'
            'features = session.run(None, {"images": images.numpy()})[0]'
        )
    reason = str(failures[-1]).rpartition("## Exception summary")[2].strip().partition("\n")[0]
    raise UserError(f"torch cannot write {pretrained.name} as ONNX; choose another format. {reason}")


class _DifferentError(Exception):
    """An ONNX graph that does not give the features of its network."""


def _graph(pretrained: Pretrained, any_size: bool) -> bytes:
    """The backbone as an ONNX graph for batches of any length, and for images of any size if that is wanted."""
    model, patch = pretrained.backbone, getattr(pretrained.backbone, "patch_side", 1)
    (images,) = _examples(pretrained, [(5, 0, 0)])  # not as many as channels, which torch would take for the same
    any_length = torch.export.Dim.DYNAMIC
    dynamic: dict[int, Any] = {0: any_length}
    if any_size and patch > 1:
        batch, rows, columns = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))
        dynamic = {0: batch, 2: patch * rows, 3: patch * columns}
    elif any_size:
        dynamic |= {2: any_length, 3: any_length}
    if isinstance(model, ViT):
        model.any_grid = any_size
    logging.disable(logging.ERROR)  # of torch, about sizes that are not possible
    try:
        # Torch's older exporter fixes the batch of timm's ViTs.
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=[dynamic],
            input_names=["images"],
            output_names=["features"],
            external_data=False,
            verbose=False,
        )
    finally:
        logging.disable(logging.NOTSET)
        if isinstance(model, ViT):
            model.any_grid = False
    assert program is not None
    return program.model_proto.SerializeToString()


def _examples(pretrained: Pretrained, shapes: Iterable[tuple[int, int, int]]) -> list[Tensor]:
    """Random images: their number, and the further rows and columns of patches (or 32 px) than their usual size."""
    size, step = pretrained.image_transform["size"], getattr(pretrained.backbone, "patch_side", 32)
    channels = example_images(pretrained.backbone, 1).shape[1]
    return [torch.rand(count, channels, size + rows * step, size + columns * step) for count, rows, columns in shapes]


def _compare(pretrained: Pretrained, session: Any, any_size: bool) -> None:
    """Compare the features of a graph with its network's, for batches of several lengths and images of several sizes.

    Raises:
        _DifferentError: They differ.
    """
    for images in _examples(pretrained, [(1, 0, 0), (3, 0, 0), *([(2, 1, 1), (2, 0, 2)] if any_size else [])]):
        try:
            with torch.no_grad():
                expected = pretrained.backbone(images)
            (features,) = session.run(None, {"images": images.numpy()})
        except Exception as error:  # of a network for another size, or of onnxruntime
            raise _DifferentError(str(error)) from error
        difference = float((torch.from_numpy(features) - expected).abs().max())
        if not difference <= 1e-4 * max(1.0, float(expected.abs().max())):
            raise _DifferentError(f"Its features differ by {difference:.1e}.")


def _weights(weights: Weights, output: Path, metadata: dict[str, str] | None = None) -> Write:
    weights = {name: value.contiguous() for name, value in weights.items()}  # ours lie channels last
    if output.suffix != ".safetensors":
        return lambda file: torch.save(weights, file)
    from safetensors.torch import save

    return lambda file: file.write(save(weights, metadata))


# The same network in timm and in torchvision

_VITS = {
    "vit_base_patch16_224": "vit_b_16",
    "vit_base_patch32_224": "vit_b_32",
    "vit_large_patch16_224": "vit_l_16",
    "vit_large_patch32_224": "vit_l_32",
    "vit_huge_patch14_224": "vit_h_14",
}
"""Names in timm and in torchvision; for ResNets the names and weight names are the same."""


def _named_as_in(library: str, pretrained: Pretrained) -> tuple[str, dict[str, Any], Weights]:
    """Name, arguments and weights of the same network in a library.

    Raises:
        UserError: The library has no such network; the message says which formats to choose.
    """
    import timm
    import torchvision

    if is_own(pretrained.name):
        raise UserError(f"{pretrained.name} is a network of your own; choose the format safetensors or onnx.")
    weights = dict(pretrained.backbone.state_dict())
    home = "torchvision" if type(pretrained.backbone).__module__.startswith("torchvision.") else "timm"
    name = pretrained.name.removeprefix("torchvision/")
    if library == home:
        return name, pretrained.backbone_kwargs, weights
    name = name.partition(".")[0]  # timm names the weights after the dot
    sizes, names, parts = {"img_size": "image_size"}, _VITS, list(PARTS_OF_TORCHVISION.items())
    if home == "torchvision":
        sizes, names = ({new: old for old, new in words.items()} for words in (sizes, names))
        parts = [(new, old) for old, new in parts]
    if name in names:
        name = names[name]
        for old, new in parts:
            weights = {key.replace(old, new): value for key, value in weights.items()}
    kwargs = {sizes[key]: value for key, value in pretrained.backbone_kwargs.items() if key in sizes and value != 224}
    known = timm.is_model(name) if library == "timm" else name in torchvision.models.list_models(torchvision.models)
    there = f"torchvision/{name}" if library == "torchvision" else name
    reason = mismatch(pretrained, weights, there, kwargs) if known else "it has no network of that name"
    if reason:
        raise UserError(
            f"{library} has no network that is {pretrained.name} as it was trained: {reason}; "
            f"choose the format {home}, safetensors or onnx."
        )
    return name, kwargs, weights
