"""Class labels as users give them in Python: numbers of classes, or rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ClassLabels = int | Sequence[int] | Tensor
"""One class for all images; classes, which are taken in turn; or a row for each image, (n, classes)."""


def read_labels(given: ClassLabels | None, n: int, label_dim: int) -> tuple[Sequence[int] | None, Tensor | None]:
    """Classes to be taken in turn, or a row for each image; neither where none are given.

    Args:
        given: see `ClassLabels`; arrays and lists of rows too.
        n: number of images.
        label_dim: number of classes that the network knows; 0: it is unconditional.

    Returns:
        (classes, None) or (None, rows (n, label_dim) float32); (None, None) where `given` is None.

    Raises:
        ValueError: what the network does not know, or labels of another number of images; one line.
    """
    if given is None:
        return None, None
    values = _tensor(given, n, label_dim)
    if values.ndim == 2:
        return None, _rows(values, n, label_dim)
    if values.ndim > 2 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise _wrong(given, n, label_dim)
    classes = values.reshape(-1).tolist()
    check_classes(classes, label_dim, name="class_labels")
    if len(classes) > max(n, 1):
        raise ValueError(f"class_labels must be at most one for each of {n} images, got {len(classes)}")
    return classes, None


def check_classes(classes: Sequence[int], label_dim: int, *, name: str = "classes") -> None:
    """Check that a network knows all of the classes.

    Args:
        classes: their numbers.
        label_dim: number of classes that it knows.
        name: begins the messages.

    Raises:
        ValueError: it does not, it knows none, or there are none; one line.
    """
    if not label_dim:
        raise ValueError(f"{name} were given, but the network is unconditional: leave them out")
    for number in classes:
        if not 0 <= number < label_dim:
            raise ValueError(f"{name} must be from 0 to {label_dim - 1} for this network, got {number}")
    if not classes:
        raise ValueError(f"{name} must be at least one, got none")


def _tensor(given: ClassLabels, n: int, label_dim: int) -> Tensor:
    try:
        return torch.as_tensor(list(given) if isinstance(given, range) else given)
    except (TypeError, ValueError, RuntimeError):
        raise _wrong(given, n, label_dim) from None


def _rows(rows: Tensor, n: int, label_dim: int) -> Tensor:
    if not label_dim:
        check_classes((), label_dim, name="class_labels")
    if tuple(rows.shape) not in ((n, label_dim), (1, label_dim)):
        raise ValueError(f"rows of class_labels must have shape ({n}, {label_dim}), got {tuple(rows.shape)}")
    if not rows.isfinite().all():
        raise ValueError("rows of class_labels must be finite")
    return rows.float().expand(n, -1)


def _wrong(given: object, n: int, label_dim: int) -> ValueError:
    text = f"a tensor {tuple(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else f"{given!r:.60}"
    return ValueError(f"class_labels must be whole numbers of classes, or rows ({n}, {label_dim}), got {text}")
