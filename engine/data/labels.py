"""dataset.json of an image data set: {"labels": [["00000/img00000000.png", 6], ...]}, or {"labels": null}."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ipfm.engine.data.image_files import LABEL_FILE, MAX_FILE_BYTES, ImageFiles, printable

MAX_CLASSES = 1_000_000
"""A class number is below this: labels are one-hot vectors, as wide as there are classes."""


def read_labels(files: ImageFiles) -> Tensor | None:
    """The labels of `files.names` in their order; None where there is no dataset.json, or it says null.

    Whole numbers, the classes, are (N,) int64; lists of numbers are (N, K) float32.

    Raises:
        ValueError: one line that names the file: no JSON of this form, labels of several kinds or out of range, an
            image without a label, a label without its image or two labels for one.
    """
    if not files.has(LABEL_FILE):
        return None
    where = files.where(LABEL_FILE)
    found = _entries(files, where)
    if found is None:
        return None
    present = set(files.names)
    for name in found:
        if name not in present:
            raise ValueError(f"{where} has a label for {printable(name)}, which is not there")
    for name in files.names:
        if name not in found:
            raise ValueError(f"{where} has no label for {printable(name)}")
    return as_labels([found[name] for name in files.names], files.names, where)


def as_labels(values: Sequence[object], names: Sequence[str], where: str) -> Tensor:
    """`values` of the images `names` as a tensor, as in `read_labels`.

    Raises:
        ValueError: labels of several kinds or out of range; `where` begins the message.
    """
    first = values[0]
    if isinstance(first, list):
        width = len(first)
        for name, value in zip(names, values, strict=True):
            if not (isinstance(value, list) and len(value) == width > 0 and all(map(is_number, value))):
                raise ValueError(f"{where}: the label of {printable(name)} is no list of {max(width, 1)} numbers")
        return torch.tensor(values, dtype=torch.float32)
    for name, value in zip(names, values, strict=True):
        if type(value) is not int or not 0 <= value < MAX_CLASSES:
            raise ValueError(
                f"{where}: the label of {printable(name)} must be a whole number from 0 to {MAX_CLASSES - 1}, "
                f"got {printable(str(value))[:60]}"
            )
    return torch.tensor(values, dtype=torch.int64)


def _entries(files: ImageFiles, where: str) -> dict[str, object] | None:
    """Label by name."""
    with files.open(LABEL_FILE) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{where} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {printable(str(error))}") from None
    if not isinstance(content, dict) or "labels" not in content:
        raise ValueError(f'{where} has no "labels"')
    labels = content["labels"]
    if labels is None:
        return None
    if not isinstance(labels, list):
        raise ValueError(f'{where}: "labels" must be a list of pairs [name, label], or null')
    found: dict[str, object] = {}
    for number, entry in enumerate(labels):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"{where}: entry {number} of the labels is no pair [name, label]")
        name = entry[0].replace("\\", "/")
        if name in found:
            raise ValueError(f"{where} has two labels for {printable(name)}")
        found[name] = entry[1]
    return found


def is_number(value: object) -> bool:
    """Whether it is a number that float32 holds: JSON as Python reads it may say NaN, Infinity or a thousand digits."""
    if type(value) is int:
        return abs(value) < 1 << 100
    return type(value) is float and math.isfinite(value) and abs(value) < 3.4e38
