"""Export of backbones to other programs: timm, torchvision, safetensors and ONNX files, with a model card."""

import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch
from torch import Tensor

from ssl_lightning.checkpoints.files import replacing
from ssl_lightning.checkpoints.load import TEXT, Pretrained, mismatch, open_backbone
from ssl_lightning.errors import UserError

Format = Literal["timm", "torchvision", "safetensors", "onnx"]

Weights = dict[str, Tensor]

Write = Callable[[IO[bytes]], Any]
"""Writes the content of an exported file."""


def export(
    checkpoint: str | Path,
    format: Format,  # noqa: A002 # the word of the command line
    output: str | Path,
    backbone: str | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
) -> Path:
    """Write the backbone of a checkpoint for other programs, with a model card.

    Each file appears only when it is complete.

    Args:
        checkpoint: A checkpoint file, of this package or a paper's official one; or the name of a timm or torchvision
            model, to export its pretrained weights.
        format: ``timm`` and ``torchvision`` write weights under the names of that library; ``safetensors`` writes
            weights and the name of their backbone, for ``load_backbone``; ``onnx`` writes a graph for batches of any
            size.
        output: File to write; the model card gets the same name with the suffix ``.md``.
        backbone: Name of the timm or torchvision model; only for checkpoints that do not name it.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 96}``.

    Returns:
        The file.

    Raises:
        UserError: The backbone cannot have that format, or the file cannot be written.
    """
    if format not in get_args(Format):
        raise UserError(f"there is no format {format!r}; choose from {', '.join(get_args(Format))}.")
    output = Path(output)
    _check_suffix(format, output)
    pretrained = open_backbone(str(checkpoint), backbone, backbone_kwargs)
    if not pretrained.backbone.state_dict():
        raise UserError(f"{pretrained.name} has no weights to export.")
    exporters = {"timm": _timm, "torchvision": _torchvision, "safetensors": _safetensors, "onnx": _onnx}
    write, loading = exporters[format](pretrained, output)
    prepared = bool(pretrained.facts) or not Path(checkpoint).exists()  # else the image transform is a guess
    try:
        with replacing(output) as file:
            write(file)
        with replacing(output.with_suffix(".md")) as file:
            file.write(_card(pretrained, loading, prepared).encode())
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write {output} ({cause}); choose another --output, or free space.") from error
    return output


def _check_suffix(format: str, output: Path) -> None:  # noqa: A002
    """Check the suffix, by which readers recognize the format."""
    wanted = {"safetensors": ".safetensors", "onnx": ".onnx"}.get(format)
    if wanted is not None and output.suffix != wanted:
        raise UserError(f"--output {output}: a file of the format {format} ends in {wanted}.")
    if wanted is None and output.suffix in (".md", ".npz", ".npy", ".onnx"):
        raise UserError(f"--output {output}: weights for {format} end in .pth or .safetensors.")


# Formats: what to write, and the lines that load it


def _timm(pretrained: Pretrained, output: Path) -> tuple[Write, str]:
    import timm

    name, kwargs, weights = _named_as_in("timm", pretrained)
    own = timm.models.model_entrypoint(name).__module__ == "ssl_lightning.backbones"
    first = "import ssl_lightning.backbones.resnet  # registers the name\n" if own else ""
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


def _safetensors(pretrained: Pretrained, output: Path) -> tuple[Write, str]:
    facts = {
        **pretrained.facts,
        "backbone": pretrained.name,
        "backbone_kwargs": pretrained.backbone_kwargs,
        "image_transform": pretrained.image_transform,
    }
    if getattr(pretrained.backbone, "rows_first", None) is not None:
        facts["fixed_positions"] = True
    metadata = {
        key: value if key in TEXT else json.dumps(value, default=str)
        for key, value in facts.items()
        if value is not None
    }
    return _weights(pretrained.backbone.state_dict(), output, metadata), (
        f'from ssl_lightning.checkpoints import load_backbone\n\nfeatures = load_backbone("{output.name}")(images)'
    )


def _onnx(pretrained: Pretrained, output: Path) -> tuple[Write, str]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 # torch's exporter needs it
    except ImportError as error:
        raise UserError("the format onnx needs more packages: pip install 'ssl_lightning[onnx]'.") from error
    size, channels = pretrained.image_transform["size"], pretrained.backbone_kwargs.get("in_chans", 3)
    model, images = pretrained.backbone, torch.rand(3, channels, size, size)
    with torch.no_grad():
        expected = model(images)
    if sum(value.nbytes for value in model.state_dict().values()) > 2**31 - 2**20:
        raise UserError(
            f"an ONNX file holds at most 2 GB, and the weights of {pretrained.name} are larger; choose another format."
        )
    try:
        # Torch's older exporter fixes the batch of timm's ViTs.
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}],
            input_names=["images"],
            output_names=["features"],
            external_data=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"torch cannot write {pretrained.name} as ONNX; choose another format. {error}") from error
    assert program is not None
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content)
    if isinstance(session.get_inputs()[0].shape[0], int):
        raise UserError(f"torch can write {pretrained.name} as ONNX for one batch size only; choose another format.")
    for count in (1, 3):
        (features,) = session.run(None, {"images": images[:count].numpy()})
        difference = float((torch.from_numpy(features) - expected[:count]).abs().max())
        if not difference <= 1e-4 * max(1.0, float(expected.abs().max())):
            raise UserError(
                f"the features of {pretrained.name} as ONNX differ by {difference:.1e}; choose another format."
            )
    return lambda file: file.write(content), (
        "import onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{output.name}")\n'
        'features = session.run(None, {"images": images.numpy()})[0]'
    )


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

_PARTS_OF_VITS = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.": "conv_proj.",
    "blocks.": "encoder.layers.encoder_layer_",
    ".norm1.": ".ln_1.",
    ".attn.qkv.": ".self_attention.in_proj_",
    ".attn.proj.": ".self_attention.out_proj.",
    ".norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.0.",
    ".mlp.fc2.": ".mlp.3.",
    "norm.": "encoder.ln.",
}


def _named_as_in(library: str, pretrained: Pretrained) -> tuple[str, dict[str, Any], Weights]:
    """Name, arguments and weights of the same network in a library.

    Raises:
        UserError: The library has no such network; the message says which formats to choose.
    """
    import timm
    import torchvision

    weights = dict(pretrained.backbone.state_dict())
    home = "torchvision" if type(pretrained.backbone).__module__.startswith("torchvision.") else "timm"
    name = pretrained.name.removeprefix("torchvision/")
    if library == home:
        return name, pretrained.backbone_kwargs, weights
    name = name.partition(".")[0]  # timm names the weights after the dot
    sizes, names, parts = {"img_size": "image_size"}, _VITS, list(_PARTS_OF_VITS.items())
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


# The model card


def _card(pretrained: Pretrained, loading: str, prepared: bool) -> str:
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
