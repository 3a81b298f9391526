"""Labels as users have them, and as the probes need them: whole numbers from 0 on."""

from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor

from ssl_lightning.errors import UserError, listed

Labels = NDArray[np.int64]
"""``(N,)`` class of each image; -1 is unknown."""


def as_labels(labels: Any, remedy: str = "give whole numbers or words, or no labels") -> NDArray[Any]:
    """Labels of any kind as an array of whole numbers, where -1 is unknown, or of words, where "" is unknown.

    Several labels per image give an array of two dimensions; its content does not matter, because nothing uses it.

    Args:
        labels: A sequence, an array or a tensor. None and NaN are unknown.
        remedy: What to do about labels that are no classes, for the message.

    Raises:
        UserError: The labels are no classes, e.g. 0.2.
    """
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu()
        labels = labels.float().numpy() if labels.is_floating_point() else labels.numpy()
    try:
        array = np.asarray(labels)
    except ValueError:  # rows of different lengths
        return _several(len(labels))
    if array.ndim == 0:
        raise UserError(f"labels must be a sequence with the class of each image, not {labels!r}.")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim > 1:
        return _several(len(array))
    if array.dtype.kind in "bi":
        array = array.astype(np.int64, copy=False)
        return array if array.min(initial=0) >= -1 else np.maximum(array, -1)
    if array.dtype.kind == "U":
        return array
    values = [_plain(value) for value in array]
    kinds = {type(value) for value in values} - {type(None)}
    if kinds & {list, tuple, set, frozenset, dict, np.ndarray}:
        return _several(len(array))
    fractions = [value for value in values if isinstance(value, float) and not value.is_integer()]
    if fractions or not kinds <= {bool, int, float, str}:
        example = fractions[0] if fractions else next(value for value in values if not isinstance(value, _CLASSES))
        raise UserError(f"labels such as {example!r} are no classes; {remedy}.")
    if str in kinds or any(abs(value) >= 2**63 for value in values if value is not None):
        return np.array(["" if value is None else str(value) for value in values], dtype=np.str_)
    return np.array([-1 if value is None else max(int(value), -1) for value in values], dtype=np.int64)


_CLASSES = (bool, int, float, str, type(None))


def _several(count: int) -> NDArray[Any]:
    return np.full((count, 2), -1)


def _plain(value: Any) -> Any:
    """A scalar of any library as Python's; None if it is missing."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    missing = type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    return None if missing else value


def known(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """``(N,)``: whether the class of each image is known.

    Args:
        labels: What ``as_labels`` returns.
    """
    if labels.ndim > 1:
        return np.zeros(len(labels), dtype=bool)
    return labels != "" if labels.dtype.kind == "U" else labels >= 0


def numbered(
    train: NDArray[Any] | None, val: NDArray[Any] | None, classes: list[str] | None
) -> tuple[Labels | None, Labels | None, list[str]]:
    """Number the classes of training and validation images from 0 on, and say which labels cannot be used.

    Whole numbers stay as they are unless most numbers up to the largest belong to no image.

    Args:
        train: What ``as_labels`` returned for the training images. None if there are no labels.
        val: The same for the validation images. Their classes without training images become unknown.
        classes: Names of classes that are numbered already. None if there are none.

    Returns:
        The numbers of both, and the names of the classes.
    """
    if any(labels is not None and labels.ndim > 1 for labels in (train, val)):
        rank_zero_info("The labels are several per image (multi-label); probes need one class per image: no labels.")
        return None, None, []
    if train is None or not known(train).any():
        return None if train is None else _nothing(train), None if val is None else _nothing(val), []
    if val is not None and "U" in (train.dtype.kind, val.dtype.kind):
        train, val = _words(train), _words(val)
    used = np.unique(np.concatenate([labels[known(labels)] for labels in (train, val) if labels is not None]))
    if used.dtype.kind != "U" and used[-1] < max(len(classes or []), 2 * len(used)):
        names = classes if classes and used[-1] < len(classes) else [str(number) for number in range(used[-1] + 1)]
    else:
        names = [str(name) for name in used]
        train, val = _positions(train, used), None if val is None else _positions(val, used)
    return train, None if val is None else _trained(train, val, names), names


def _trained(train: NDArray[Any], val: NDArray[Any], names: list[str]) -> Labels:
    """The validation labels, without the classes that have no training images."""
    unknown = (val >= 0) & ~np.isin(val, np.unique(train))
    if not unknown.any():
        return val
    missing = [names[label] for label in np.unique(val[unknown])]
    rank_zero_info(
        f"Classes with validation images but without training images: {listed(missing)}. The probes leave out "
        f"{unknown.sum():,} images of them."
    )
    return np.where(unknown, -1, val)


def _nothing(labels: NDArray[Any]) -> Labels:
    return np.full(len(labels), -1)


def _words(labels: NDArray[Any]) -> NDArray[Any]:
    return labels if labels.dtype.kind == "U" else np.where(labels < 0, "", labels.astype(np.str_))


def _positions(labels: NDArray[Any], used: NDArray[Any]) -> Labels:
    return np.where(known(labels), np.searchsorted(used, labels), -1).astype(np.int64)
