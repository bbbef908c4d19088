"""The files of an image folder or of a zip of images: found, named and read; nothing is unpacked to disk."""

from __future__ import annotations

import io
import os
import threading
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Protocol

EXTENSIONS = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
"""What the name of an image ends in, in small or capital letters."""
LABEL_FILE = "dataset.json"
MAX_FILE_BYTES = 1 << 28
"""Largest file that is read from a zip, unpacked."""


class ImageFiles(Protocol):
    """Images and the label file of one data set.

    Names are relative, with "/" between folders; `open` may be called by several threads at a time.
    """

    @property
    def path(self) -> Path:
        """The folder or zip."""

    @property
    def names(self) -> list[str]:
        """Names of the images, sorted; hidden files and other kinds of files are left out."""

    def open(self, name: str) -> IO[bytes]:
        """The content of a file.

        Raises:
            ValueError: it cannot be read; one line that names it.
        """

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def where(self, name: str) -> str:
        """The file, for messages."""


class FolderFiles:
    """Files of a folder and of its sub-folders. Links to folders are not followed.

    Raises:
        ValueError: the folder cannot be listed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found: list[str] = []
        try:
            for folder, _, files in os.walk(path, onerror=_raise):
                inside = Path(folder).relative_to(path)
                found += ((inside / file).as_posix() for file in files)
        except OSError as error:
            raise ValueError(f"{error.filename}: {error.strerror}") from None
        self.names = _images(found)

    def open(self, name: str) -> IO[bytes]:
        try:
            return open(self.path / name, "rb")
        except OSError as error:
            raise ValueError(f"{self.where(name)}: {error.strerror}") from None

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def where(self, name: str) -> str:
        return printable(str(self.path / name))


class ZipFiles:
    """Files of a zip, stored or deflated.

    Raises:
        ValueError: the zip is damaged, or holds a name twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise ValueError(f"{path}: {printable(str(error))}") from None
        # A zip has one position in its file, and counts its open members without a lock of its own.
        self._lock = threading.Lock()
        members = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        self._members = frozenset(members)
        if len(members) != len(self._members):
            twice = next(name for i, name in enumerate(sorted(members)[1:]) if sorted(members)[i] == name)
            raise ValueError(f"{path} holds {printable(twice)} twice")
        self.names = _images(members)

    def open(self, name: str) -> IO[bytes]:
        try:
            with self._lock:
                if self._zip.getinfo(name).file_size > MAX_FILE_BYTES:
                    raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
                return io.BytesIO(self._zip.read(name))
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
            # RuntimeError: encrypted; NotImplementedError, one of them: a compression that is not supported.
            raise ValueError(f"{self.where(name)}: {printable(str(error))}") from None

    def has(self, name: str) -> bool:
        return name in self._members

    def where(self, name: str) -> str:
        return f"{self.path}: {printable(name)}"


def printable(text: str) -> str:
    """`text` on one line, whatever a file name or a library's message holds."""
    return text if text.isprintable() else ascii(text)


def _images(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS and not _hidden(name))


def _hidden(name: str) -> bool:
    # Mac OS puts a second file beside each image, under the image's name, into its zips.
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _raise(error: OSError) -> None:
    raise error
