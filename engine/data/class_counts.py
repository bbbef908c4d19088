"""How many images of each class a data set has, from its labels alone: of its dataset.json, or of the set itself."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from pathlib import Path
from typing import IO

import torch

from ipfm.engine.data.image_files import LABEL_FILE, MAX_FILE_BYTES, LeftOut
from ipfm.engine.data.labels import as_labels, entries, read_labels
from ipfm.engine.data.open_dataset import open_image_files, read_packed
from ipfm.models.checkpoints.recognise import missing, user_path


def class_counts(path: Path, classes: int) -> tuple[int, ...]:
    """The number of images of each class.

    Args:
        path: a dataset.json, a folder or zip with one, in which no image is needed, or any data set with labels.
        classes: that the teacher knows.

    Raises:
        ValueError: no labels, labels that are no classes, or one that the teacher does not know; one line.
    """
    path = user_path(path)
    if not path.exists():
        raise ValueError(f"{missing(path)}: labels are those of a dataset.json, or of a data set")
    found = _listed(path)
    if found is None and path.suffix.lower() != ".json":
        packed = read_packed(path)
        found = packed.labels if packed is not None else read_labels(open_image_files(path))
    if found is None:
        raise ValueError(f"labels was given, but {path} has none")
    if found.ndim != 1:
        raise ValueError(f"{path} has labels that are vectors, not classes, of which nothing can be counted")
    largest = int(found.max())
    if largest >= classes:
        raise ValueError(f"{path} has the class {largest}, the teacher knows 0 to {classes - 1}")
    return tuple(torch.bincount(found, minlength=classes).tolist())


class _LabelFile:
    """A dataset.json, wherever it lies, in the form of `ipfm.engine.data.image_files.ImageFiles`."""

    def __init__(self, path: Path, place: str, data: bytes) -> None:
        self.path, self._place, self._data = path, place, data
        self.names: list[str] = []
        self.label_files = [LABEL_FILE]
        self.left_out = LeftOut()

    def open(self, name: str) -> IO[bytes]:
        """See `ImageFiles.open`."""
        return io.BytesIO(self._data)

    def has(self, name: str) -> bool:
        """See `ImageFiles.has`."""
        return name == LABEL_FILE

    def where(self, name: str) -> str:
        """See `ImageFiles.where`."""
        return self._place


def _listed(path: Path) -> torch.Tensor | None:
    """The labels of the dataset.json that `path` is or has at its top; None where there is none, or it says null."""
    try:
        if path.is_dir() and (path / LABEL_FILE).is_file():
            path = path / LABEL_FILE
        if path.is_file() and path.suffix.lower() == ".json":
            file = _LabelFile(path, str(path), path.read_bytes())
        elif path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if LABEL_FILE not in archive.namelist() or archive.getinfo(LABEL_FILE).file_size > MAX_FILE_BYTES:
                    return None
                file = _LabelFile(path, f"{path}: {LABEL_FILE}", archive.read(LABEL_FILE))
        else:
            return None
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}{os.sep if path.is_dir() else ''} cannot be read: {error}") from None
    found = entries(file, LABEL_FILE)
    return as_labels(list(found.values()), list(found), file.where(LABEL_FILE)) if found else None
