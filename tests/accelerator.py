"""A device that stands for a Mac's GPU: it computes on the CPU, and refuses what MPS refuses.

It refuses float64, tensors of another device, a generator of another device, and operations without a kernel for MPS
in the table that torch ships. ``on_device`` is only for processes of their own: torch allows one such device in a
process, and afterwards counts it as an accelerator. Trainers need ``inference_mode=False``: the tensors of the device
do not know it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchgen
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

NAME = "standin"
_WIDE = (torch.float64, torch.complex128)
_TRANSFERS = ("_to_copy", "copy_", "set_", "_copy_from")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # indices may be on the CPU


def missing_on_mps() -> set[str]:
    """Names of the operations that have kernels for other devices, but none for MPS, in the table that torch ships."""
    table = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    entries = {entry.split("(", 1)[0]: entry for entry in re.split(r"^- func: ", table, flags=re.M)[1:]}
    missing = set()
    for name, entry in entries.items():
        delegate = re.search(r"^  structured_delegate: (\S+)", entry, flags=re.M)
        parts = [entry, entries[delegate[1]] if delegate is not None else ""]
        kernels = "".join(
            found[1] for part in parts for found in re.finditer(r"^  dispatch:\n((?:    .*\n)+)", part, re.M)
        )
        if kernels and not re.search(r"\bMPS\b|Composite", kernels):
            missing.add(name)
    return missing


NOT_DETERMINISTIC = {
    *("_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "grid_sampler_2d_backward", "histc", "kthvalue"),
    *("max_unpool2d", "nll_loss2d_forward", "put_", "reflection_pad2d_backward", "replication_pad2d_backward"),
    "upsample_bicubic2d_backward",
}
"""Operations on images that torch documents to fail on a GPU if algorithms must be deterministic."""


class OnDevice(Tensor):
    """A tensor of the device; ``held`` on the CPU is what it holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        if held.dtype in _WIDE:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        wrapper.held = held
        return wrapper

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    def tolist(self) -> Any:
        """Torch's own refuses subclasses."""
        return self.detach().held.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved like the tensor of any device."""
        return self.detach().held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Makes the tensors that are asked for with the name of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_missing: set[str] = set()


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = tree_flatten((args, kwargs))[0]
    tensors = [value for value in flat if isinstance(value, Tensor)]
    inside = any(isinstance(tensor, OnDevice) for tensor in tensors)
    device = kwargs.get("device")
    goes = inside if device is None else torch.device(device).type == NAME
    if not inside and not goes:
        return func(*args, **kwargs)
    schema = func._schema
    name, overload = schema.name.removeprefix("aten::"), schema.overload_name
    if goes:
        if (f"{name}.{overload}" if overload else name) in _missing:
            raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the MPS device.")
        if torch.are_deterministic_algorithms_enabled() and name in NOT_DETERMINISTIC:
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        if any(isinstance(value, torch.Generator) and value.device.type != NAME for value in flat):
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu': {schema}")
    if inside and name not in _TRANSFERS:
        others = tensors[:1] if name in _INDEXING else tensors
        if any(not isinstance(tensor, OnDevice) and tensor.ndim for tensor in others):
            raise RuntimeError(f"Expected all tensors to be on the same device: {schema}")
    if name == "copy_" and not isinstance(args[0], OnDevice):
        goes = False
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    held = tree_map(lambda value: value.held if isinstance(value, OnDevice) else value, (args, kwargs))
    result = func(*held[0], **held[1])
    if name == "_to_copy" and not goes:
        return result
    if name == "_local_scalar_dense":
        return result
    if goes:
        result = tree_map(lambda value: OnDevice(value) if isinstance(value, Tensor) else value, result)
    return return_and_correct_aliasing(func, args, kwargs, result)


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Nothing to set up; the CPU's accepts the CPU only."""


class _Module:
    """What torch asks the module of a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


@contextmanager
def on_device() -> Iterator[torch.device]:
    """The device, for as long as its tensors may be made."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # since torch 2.9

    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        _missing.update(missing_on_mps())
        AcceleratorRegistry.register(NAME, _Accelerator)
        StrategyRegistry.register(NAME, SingleDeviceStrategy, device=torch.device(NAME, 0))
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=...) passes by the mode
    with _Mode():
        yield torch.device(NAME, 0)
    torch._C._set_only_lift_cpu_tensors(False)
