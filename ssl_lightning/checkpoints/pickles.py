"""Reading pickles that hold objects of other packages, without running any code.

A pickle names the classes and functions that rebuild its objects. Here only tensors are rebuilt; every other class or
function is replaced by a placeholder that keeps what it is given and does nothing. Torch takes this file as its
``pickle_module``.
"""

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_REBUILT = {
    *(("torch._utils", name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")),
    *(("torch._utils", name) for name in ("_rebuild_parameter", "_rebuild_parameter_with_state")),
    *(("torch.storage", name) for name in ("TypedStorage", "UntypedStorage")),
    *(("torch", name) for name in ("Size", "float16", "bfloat16", "float32", "float64", "int64")),
    ("torch.nn.parameter", "Parameter"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")),
}
"""What is rebuilt: tensors and plain containers. None of it runs code that a file could bring along."""


class Placeholder(dict[Any, Any]):
    """Takes the place of an object whose class is not rebuilt: a dict, as configurations often are one."""

    full_name = ""
    state: Any = None
    dump_patches = False  # torch asks a module for it if its source has changed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.args = args

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "Placeholder":
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> "Placeholder":
        return Placeholder()

    def __setstate__(self, state: Any) -> None:
        self.state = state[0] if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict) else state

    def _ignore(self, *args: Any) -> None:
        """Items of what is a list or a set in its own package."""

    append = extend = add = _ignore

    __hash__ = object.__hash__  # type: ignore[assignment] # it may be a key

    def __eq__(self, other: object) -> bool:
        return self is other


class Unpickler(pickle.Unpickler):
    """Rebuilds tensors, and replaces all other objects."""

    def find_class(self, module: str, name: str) -> Any:
        """The function or class, or a placeholder for it."""
        if (module, name) in _REBUILT:
            return super().find_class(module, name)
        return type("Placeholder", (Placeholder,), {"full_name": f"{module}.{name}"})


def load(file: Any, **kwargs: Any) -> Any:
    """Read the next object of a file; torch calls it for files in its older format.

    Args:
        file: Opened for reading.
        kwargs: Of the unpickler.
    """
    return Unpickler(file, **kwargs).load()


def read_inertly(path: str | Path) -> Any:
    """What ``torch.load`` gives, with placeholders for everything but tensors and plain containers.

    Args:
        path: A file that ``torch.load(path, weights_only=True)`` refused for an object in it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses the source of modules
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=sys.modules[__name__])


def tensors_of_module(value: Any) -> dict[str, Tensor] | None:
    """The state of a module that was pickled as a whole; None for other objects.

    Args:
        value: A placeholder.
    """
    state = value.state if isinstance(value, Placeholder) else None
    if not isinstance(state, dict) or not {"_parameters", "_buffers", "_modules"} <= state.keys():
        return None
    left_out = state.get("_non_persistent_buffers_set") or ()
    tensors = {**state["_parameters"], **{name: b for name, b in state["_buffers"].items() if name not in left_out}}
    for name, part in state["_modules"].items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in (tensors_of_module(part) or {}).items()}
    return {name: tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def full_name(value: Any) -> str | None:
    """The class or function that a placeholder stands for; None for other objects.

    Args:
        value: Any.
    """
    return type(value).full_name or None if isinstance(value, Placeholder) else None
