"""Networks of one's own: any module that maps images to features, to a map or to tokens."""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_lightning.backbones.tokens import input_channels
from ssl_lightning.errors import UserError

if TYPE_CHECKING:
    Backbone = str | nn.Module | Callable[..., nn.Module]
else:
    Backbone = str  # all that the command line can give; for a union its help would list every module of torch

_SIZES = 224, 256, 64, 32, 28, 96, 128, 384
"""Sides of images in pixels to try on a network that does not state its size."""

_WIDTHS = "num_features", "embed_dim", "out_features"
"""Attributes that may state the width of the features."""


def is_own(backbone: Any) -> bool:
    """Whether a backbone is a network of one's own: a module, what builds it, or the path of its class.

    Args:
        backbone: As for ``create_backbone``.
    """
    if not isinstance(backbone, str):
        return True
    from timm.models import is_model

    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", backbone) is not None and not is_model(backbone)


def name_of(backbone: Any) -> str:
    """The name that checkpoints and messages give to a backbone: the path of its class if it is one's own.

    Args:
        backbone: As for ``create_backbone``.
    """
    if isinstance(backbone, str):
        return backbone
    named = _unwrapped(backbone) if isinstance(backbone, nn.Module) else backbone
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}.{named.__qualname__}"


def own_backbone(backbone: Any, **kwargs: Any) -> nn.Module:
    """A network of one's own as a backbone, which maps images ``(B, C, S, S)`` to features ``(B, num_features)``.

    Its weights stay as they are. One that gives a map or tokens is wrapped, see ``Pooled``.

    Args:
        backbone: A module; the path of its class or of a function that builds it; or these themselves.
        kwargs: Arguments of the class or the function.

    Raises:
        UserError: It cannot be built, or does not give features; the message says what to change.
    """
    name = name_of(backbone)
    network = _imported(backbone) if isinstance(backbone, str) else backbone
    if not isinstance(network, nn.Module):
        try:
            network = network(**kwargs)
        except Exception as error:  # of the user's code
            raise UserError(
                f"backbone {name!r} does not accept backbone_kwargs {kwargs} ({_said(error)}); set those that it "
                "needs, or, in Python, give the network itself as backbone."
            ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"backbone {name!r} gives a {type(network).__name__}, not a torch.nn.Module.")
    network = _unwrapped(network)
    if any(isinstance(weight, nn.parameter.UninitializedParameter) for weight in network.parameters()):
        raise UserError(
            f"backbone {name!r} has lazy layers; call it once, on images of the size of your views, before training."
        )
    if isinstance(network, Pooled):
        return network
    _leave_out_classifier(network, name)
    size = next((kwargs[key] for key in ("img_size", "image_size") if isinstance(kwargs.get(key), int)), None)
    return _with_features(network, name, size or _stated_size(network))


class Pooled(nn.Module):
    """A network of one's own whose map or tokens are averaged to features.

    Of a dictionary, as transformers' models give it, it takes ``pooler_output``, else ``last_hidden_state``.

    Args:
        network: Maps images to features ``(B, D)``, a map ``(B, D, h, w)`` or tokens ``(B, N, D)``. Of tokens the
            first ``network.num_prefix_tokens`` are left out, if it has such an attribute.
        num_features: Width D.
        contiguous: Whether it needs images and weights in the usual layout of memory, because it takes a ``view`` of
            what convolutions give.
    """

    def __init__(self, network: nn.Module, num_features: int, contiguous: bool = False) -> None:
        super().__init__()
        self.network, self.num_features, self.contiguous = network, num_features, contiguous

    def forward_features(self, images: Tensor) -> Any:
        """What the network gives."""
        return self.network(_usual(images) if self.contiguous else images)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, num_features)`` of images ``(B, C, S, S)``."""
        features = pooled(self.network, self.forward_features(images), images.shape[0])
        if features.shape[1] != self.num_features:
            raise UserError(
                f"backbone {name_of(self.network)!r} gives {features.shape[1]:,} numbers for images of "
                f"{images.shape[-1]} px, not {self.num_features:,}; set --data.image_size, or its attribute img_size."
            )
        return features

    def to(self, *args: Any, memory_format: Any = None, **kwargs: Any) -> "Pooled":
        """As for any module, but weights keep their layout if the network needs it."""
        if memory_format is not None and not self.contiguous:
            super().to(memory_format=memory_format)
        return super().to(*args, **kwargs) if args or kwargs else self


def pooled(network: nn.Module, output: Any, images: int) -> Tensor:
    """Features ``(images, D)`` in what a network gives.

    Args:
        network: For messages, and for the number of tokens that are not patches.
        output: What it gives.
        images: Number of images.

    Raises:
        UserError: It is something else.
    """
    if isinstance(output, Mapping):
        named = [output.get(key) for key in ("pooler_output", "last_hidden_state")]
        output = next((value for value in named if value is not None), output)
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4) or output.shape[0] != images:
        shape = getattr(output, "shape", None)
        what = f"a {type(output).__name__}" if shape is None else f"a tensor of shape {tuple(shape)}"
        raise UserError(
            f"backbone {name_of(network)!r} gives {what} for {images} images; it must give features (B, D), a map "
            "(B, D, h, w) or tokens (B, N, D)."
        )
    if output.ndim == 4:
        return output.mean((2, 3))
    prefix: Any = getattr(network, "num_prefix_tokens", 0)
    return output if output.ndim == 2 else output[:, prefix:].mean(1)


def without_wrapper(backbone: nn.Module) -> nn.Module:
    """The network whose names the weights have in files: without ``Pooled`` around it.

    Args:
        backbone: Any.
    """
    return backbone.network if isinstance(backbone, Pooled) else backbone


def example_images(network: nn.Module, size: int) -> Tensor:
    """Two images of the channels, type and device that a network takes.

    Args:
        network: A backbone.
        size: Side in pixels.
    """
    stated = getattr(without_wrapper(network), "in_chans", None)
    weight = next((value for value in network.parameters() if value.is_floating_point()), torch.empty(0))
    shape = 2, stated if isinstance(stated, int) else input_channels(network) or 3, size, size
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)


def check_size(backbone: nn.Module, size: int) -> None:
    """Check by a forward pass that a network of one's own takes images of a size.

    Args:
        backbone: Given by ``own_backbone``.
        size: Side of the images in pixels.

    Raises:
        UserError: It does not; the message says why.
    """
    width: Any = backbone.num_features
    with undisturbed(backbone):
        try:  # not compiled: two images would be one more graph
            found = pooled(backbone, backbone._call_impl(example_images(backbone, size)), 2).shape[1]
        except Exception as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"backbone {name_of(without_wrapper(backbone))!r} does not take views of {size} px "
                f"({_said(error)}); set --data.image_size, or the sizes in --data.views."
            ) from error
    if found != width:
        raise UserError(
            f"backbone {name_of(backbone)!r} gives {found:,} numbers for images of {size} px, not {width:,}; set "
            "--data.image_size or the sizes in --data.views, or end it with a pooling."
        )


def _imported(path: str) -> Any:
    """The class or function of a path.

    Raises:
        UserError: There is none.
    """
    module, _, name = path.rpartition(".")
    remedy = "run where it can be imported, or, in Python, give the network itself as backbone"
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # of the user's code
        raise UserError(f"backbone {path!r} cannot be imported ({_said(error)}); {remedy}.") from error
    if found is None:
        raise UserError(f"backbone {path!r} cannot be imported: {module} has no {name}; {remedy}.")
    if not callable(found) and not isinstance(found, nn.Module):
        raise UserError(f"backbone {path!r} is a {type(found).__name__}; give a torch.nn.Module or its class.")
    return found


def _unwrapped(network: Any) -> Any:
    """A module without what torch wraps around it: compiled (``--model.compile`` compiles again), or parallel."""
    while [name for name, _ in network.named_children()] == ["_orig_mod"] or isinstance(
        network, nn.DataParallel | DistributedDataParallel
    ):
        (network,) = network.children()
    return network


def _leave_out_classifier(network: Any, name: str) -> None:
    """Leave out the classifier of a model of timm or torchvision."""
    home = type(network).__module__
    if home.startswith("timm.models."):
        from ssl_lightning.backbones.vit import adapted, any_size

        classes = getattr(network, "num_classes", 0)
        if classes:
            network.reset_classifier(0)
        any_size(network)
        adapted(network)
    elif home.startswith("torchvision.models."):
        head = next((head for head in ("fc", "classifier", "heads", "head") if hasattr(network, head)), "")
        classes = any(isinstance(part, nn.Linear) for part in getattr(network, head, nn.Identity()).modules())
        if classes:
            setattr(network, head, nn.Flatten(1))  # some classifiers flatten, too
    else:
        return
    if classes:
        rank_zero_info(f"backbone {name}: its classifier is left out")


def _with_features(network: nn.Module, name: str, size: int | None) -> nn.Module:
    """The network with its width as ``num_features``, wrapped if it needs to be."""
    widths: dict[int, int] = {}
    failure: Exception | None = None
    contiguous, plain = False, True
    for contiguous in (False, True):
        if contiguous:
            for weight in network.parameters():
                weight.data = _usual(weight.data)
        else:
            network.to(memory_format=torch.channels_last)
        for side in (size,) if size else _SIZES:
            if len(widths) == 2:
                break
            images = example_images(network, side)
            try:
                with undisturbed(network):
                    output = network(images if contiguous else images.to(memory_format=torch.channels_last))
            except Exception as error:  # of the user's code
                failure = failure or error
                continue
            widths[side] = pooled(network, output, len(images)).shape[1]
            plain = isinstance(output, Tensor) and output.ndim == 2
        if widths:
            break
    if len(set(widths.values())) > 1:
        both = " and ".join(f"{width:,} numbers for images of {side} px" for side, width in widths.items())
        raise UserError(
            f"backbone {name!r} gives {both}; end it with a pooling, or set its attribute img_size to the size of your "
            "views in pixels."
        )
    stated = next((getattr(network, key) for key in _WIDTHS if isinstance(getattr(network, key, None), int)), None)
    if not widths and stated is None:
        tried = size or ", ".join(map(str, _SIZES))
        raise UserError(
            f"backbone {name!r} takes no images of {tried} px ({_said(failure)}); set its attributes img_size, the "
            "side of your views in pixels, or num_features."
        ) from failure
    width: Any = next(iter(widths.values()), stated)
    backbone: Any = network
    if not (widths and plain and not contiguous and getattr(network, "num_features", width) == width):
        backbone = Pooled(network, width, contiguous)
    backbone.num_features = width
    if len(widths) == 1:
        (backbone.img_size,) = widths
    return backbone


def _usual(tensor: Tensor) -> Tensor:
    """In the usual layout, also where there is one channel, for which ``contiguous`` takes any layout."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _said(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _stated_size(network: nn.Module) -> int | None:
    """Side in pixels of the images that a network says it takes, itself or, as transformers' models, in its config."""
    for holder in (network, getattr(network, "config", None)):
        for key in ("img_size", "image_size", "input_size"):
            side = getattr(holder, key, None)
            side = side[-1] if isinstance(side, tuple | list) and side else side
            if isinstance(side, int):
                return side
    return None


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Let a forward pass in eval mode change nothing: neither modes nor statistics nor random numbers."""
    modes = [(module, module.training) for module in network.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    devices = {buffer.device for buffer in [*network.parameters(), *network.buffers()] if buffer.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices):
        network.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, value in buffers:
                buffer.copy_(value)
