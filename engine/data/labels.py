"""dataset.json of an image data set: {"labels": [["00000/img00000000.png", 6], ...]}, or {"labels": null}."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ipfm.engine.data.formats import why_not_read
from ipfm.engine.data.image_files import LABEL_FILE, MAX_FILE_BYTES, ImageFiles, printable, same_name
from ipfm.engine.data.shards import HoldsLabels
from ipfm.models.checkpoints.recognise import what_pointer

WITHOUT = "; ipfm dataset --labels none goes on without labels"
MAX_CLASSES = 1_000_000
"""A class number is below this: labels are one-hot vectors, as wide as there are classes."""


def read_labels(files: ImageFiles) -> Tensor | None:
    """The labels of `files.names` in their order; None where there is no dataset.json, or it says null.

    Files that hold labels of their own have these.

    Whole numbers, the classes, are (N,) int64; lists of numbers are (N, K) float32.

    Raises:
        ValueError: one line that names the file: no JSON of this form, labels of several kinds or out of range, an
            image without a label, a label without its image or two labels for one.
    """
    file = label_file(files)
    if file is None and not isinstance(files, HoldsLabels):
        return None
    try:
        if isinstance(files, HoldsLabels):
            stored = files.stored_labels()
            return None if stored is None else as_labels(stored, files.names, str(files.path))
        assert file is not None
        return _labels_in(files, file)
    except ValueError as error:
        raise ValueError(f"{error}{WITHOUT}") from None


def _labels_in(files: ImageFiles, file: str) -> Tensor | None:
    where, below = files.where(file), file[: -len(LABEL_FILE)]
    found = entries(files, file)
    if found is None:
        return None
    keys = [same_name(name.removeprefix(below)) for name in files.names]
    found = _in_the_case_of(keys, found)
    known = set(keys)
    for name in found:
        if name not in known:
            raise ValueError(f"{where} has a label for {printable(name)}, which {_is_not(files, below + name)}")
    for name in keys:
        if name not in found:
            raise ValueError(f"{where} has no label for {printable(name)}")
    return as_labels([found[name] for name in keys], files.names, where)


def _is_not(files: ImageFiles, name: str) -> str:
    if not files.has(name):
        return "is not there"
    why = why_not_read(os.path.splitext(name)[1].lower())
    return f"is left out with all {why}" if why else "is left out: it is no image"


def label_file(files: ImageFiles) -> str | None:
    """Name of the label file: at the top, or in the one folder that all images lie in; None where there is none.

    Raises:
        ValueError: there are label files, but none of all images.
    """
    found = sorted(files.label_files, key=lambda name: (name.count("/"), name != LABEL_FILE))
    if not found:
        return None
    below = found[0][: -len(LABEL_FILE)]
    if stray := next((name for name in files.names if not name.startswith(below)), None):
        raise ValueError(
            f"{files.where(found[0])} has the labels of its own folder, in which {printable(stray)} is not: "
            f"give that folder alone, or take no labels{WITHOUT}"
        )
    if len(found) > 1:
        raise ValueError(
            f"{files.path} has {len(found)} label files, {printable(found[0])} and {printable(found[1])}: keep one"
            f"{WITHOUT}"
        )
    return found[0]


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
        if isinstance(value, str):
            raise ValueError(
                f"{where}: the label of {printable(name)} must be a whole number from 0 to {MAX_CLASSES - 1}, "
                f"got {printable(value)[:60]}, a text: number the classes, or make a folder of each "
                "(ipfm dataset --labels folders)"
            )
        if type(value) is not int or not 0 <= value < MAX_CLASSES:
            raise ValueError(
                f"{where}: the label of {printable(name)} must be a whole number from 0 to {MAX_CLASSES - 1}, "
                f"got {printable(str(value))[:60]}"
            )
    return torch.tensor(values, dtype=torch.int64)


def _in_the_case_of(keys: Sequence[str], found: dict[str, object]) -> dict[str, object]:
    """Labels by the names `keys`, of which they may differ in capitals where that leaves no doubt."""
    if found.keys() <= set(keys):
        return found
    by_small: dict[str, list[str]] = {}
    for key in keys:
        by_small.setdefault(key.lower(), []).append(key)
    named: dict[str, object] = {}
    for name, label in found.items():
        own = by_small.get(name.lower(), [])
        key = own[0] if len(own) == 1 and own[0] not in found else name
        if key in named:
            return found
        named[key] = label
    return named


def entries(files: ImageFiles, label_file: str) -> dict[str, object] | None:
    """Label by name in a label file; None where it says null.

    Raises:
        ValueError: it is no JSON of this form; one line that names it.
    """
    where = files.where(label_file)
    with files.open(label_file) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{where} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        what = None if data.lstrip().startswith((b"{", b"[")) else what_pointer(data[:512])
        raise ValueError(f"{where} is no JSON: {what or printable(str(error))}") from None
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
        name = same_name(entry[0])
        if name in found:
            raise ValueError(f"{where} has two labels for {printable(name)}")
        found[name] = entry[1]
    return found


def is_number(value: object) -> bool:
    """Whether it is a number that float32 holds: JSON as Python reads it may say NaN, Infinity or a thousand digits."""
    if type(value) is int:
        return abs(value) < 1 << 100
    return type(value) is float and math.isfinite(value) and abs(value) < 3.4e38
