"""Counts the operations that the host dispatches, and those that would make it wait for a device."""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim"}
_READS |= {"unique_consecutive", "unique_dim_consecutive", "bincount"}  # their shapes or results depend on the values
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


class OperationCounter(TorchDispatchMode):
    """Counts the operations inside ``with``, those that synchronize, and the bytes of the tensors they make.

    Every operation that reaches a kernel counts, also in the backward pass and in the optimizer. An operation
    synchronizes if it makes the host wait for a device: reading a value, an output whose shape depends on values (a
    boolean mask among indices), a blocking copy between devices. On the CPU, every operation counts that would
    synchronize on a device, even if its tensor is meant for the host. ``Tensor.numpy`` is not an operation.

    Args:
        held: Tensors that count among those bytes until they are freed.

    Attributes:
        counts: Number of times that each operation was dispatched.
        synchronisations: Number of times that each operation synchronized.
        peak_bytes: Largest total size of ``held`` and of the tensors made inside ``with``.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.synchronisations: Counter[str] = Counter()
        self.peak_bytes = self._bytes = 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._hold(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation and run it."""
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._storages.add(tensor.untyped_storage())  # counted before, or made outside
        result = func(*args, **kwargs)
        self.counts[str(func)] += 1
        if _synchronizes(func.overloadpacket.__name__, args, kwargs, result):
            self.synchronisations[str(func)] += 1
        self._hold(_tensors(result))
        return result

    def _hold(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._storages:
                self._storages.add(storage)
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def _free(self, size: int) -> None:
        self._bytes -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def _synchronizes(name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> bool:
    if name in _READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return True
    if name in _INDEXES:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name in ("copy_", "_to_copy"):
        source = args[1] if name == "copy_" else args[0]
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        return waits and source.device != result.device
    return False
