"""The files of an image folder or of a zip of images: found, named and read; nothing is unpacked to disk."""

from __future__ import annotations

import io
import os
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Protocol

from ipfm.engine.data.formats import EXTENSIONS, why_not_read
from ipfm.models.checkpoints.recognise import image_kind, missing

LABEL_FILE = "dataset.json"
OWN_FILES = frozenset((".ipfm-samples.json",))
"""What `ipfm sample` writes beside its images: never an image, so never left out."""
ARRAY = ".npy"
"""What the names of latents end in, which stand in a set of their own in the place of images."""
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
        """Names of the images, or of latents, sorted; hidden files and other kinds of files are left out."""

    @property
    def left_out(self) -> LeftOut:
        """What is there and is no image of the set."""

    @property
    def label_files(self) -> list[str]:
        """Names of all files dataset.json, in small or capital letters, sorted."""

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
    """Files of a folder and of its sub-folders. Links to folders are followed, but for those that lead back up.

    Raises:
        ValueError: the folder cannot be listed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: list[str] = []
        self._folders: list[str] = []
        self._special: list[str] = []
        self._loops: list[str] = []
        self._broken: list[str] = []
        try:
            self._walk(path, "", tuple(_identity(folder) for folder in (path, *path.resolve().parents)))
        except OSError as error:
            raise ValueError(f"{printable(str(error.filename))}: {error.strerror}") from None
        self.names, self.left_out, self.label_files = _sorted_out(self._found, self._folders)
        _tell_images(self)
        self.left_out.add("pipes, sockets or devices", self._special)
        self.left_out.add("links to a folder above them", self._loops)
        self.left_out.add("links that lead nowhere", self._broken)

    def _walk(self, folder: Path, inside: str, above: tuple[tuple[int, int], ...]) -> None:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = inside + entry.name
                if entry.is_dir():
                    identity = _identity(Path(entry.path))
                    if entry.is_symlink() and identity in above:
                        self._loops.append(name)
                        continue
                    self._folders.append(name)
                    self._walk(Path(entry.path), f"{name}/", (*above, identity))
                elif _leads_nowhere(entry) and os.path.splitext(name)[1].lower() not in EXTENSIONS:
                    self._broken.append(name)
                elif entry.is_file() or _leads_nowhere(entry):
                    self._found.append(name)  # a broken link to an image is found when that is read
                else:
                    self._special.append(name)

    def open(self, name: str) -> IO[bytes]:
        try:
            return open(self.path / name, "rb")
        except FileNotFoundError:
            raise ValueError(missing(self.path / name)) from None
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
        members = [(_plain_name(info.filename), info) for info in self._zip.infolist() if not info.is_dir()]
        self._members = dict(members)
        if len(members) != len(self._members):
            inside = sorted(name for name, _ in members)
            twice = next(name for i, name in enumerate(inside[1:]) if inside[i] == name)
            raise ValueError(f"{path} holds {printable(twice)} twice")
        folders = [_plain_name(info.filename).rstrip("/") for info in self._zip.infolist() if info.is_dir()]
        self.names, self.left_out, self.label_files = _sorted_out(self._members, folders)
        _tell_images(self)

    def open(self, name: str) -> IO[bytes]:
        try:
            with self._lock:
                member = self._members[name]
                if member.file_size > MAX_FILE_BYTES:
                    raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
                return io.BytesIO(self._zip.read(member))
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


class LeftOut(dict[str, list[str]]):
    """What is not taken from a set: names by the reason, which counts them in words."""

    def add(self, reason: str, names: Iterable[str]) -> None:
        """Leave `names` out for `reason`; a reason without a name is none."""
        if names := list(names):
            self.setdefault(reason, []).extend(names)

    @property
    def beyond_system_files(self) -> bool:
        """Whether anything else is left out than what a system puts into every folder."""
        return any(reason != SYSTEM_FILES for reason in self)

    def said(self) -> str:
        """One line: "files .avif: 2 (a.avif, b.avif); hidden files: 1 (.x.png)"."""
        return "; ".join(f"{reason}: {len(names)} ({_shown(names)})" for reason, names in self.items())


SYSTEM_FILES = "files of the system"
NO_SUFFIX = "files without a suffix"
_SUFFIX = "files "  # what those of one suffix are left out as
_LOOKED_INTO, _TRIED = 1000, 5  # a file to open each


def _shown(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:3]) + (", …" if len(names) > 3 else "")


def _tell_images(files: ImageFiles) -> None:
    """Say which of the files without an image's suffix are images: they are not taken, and a name says why."""
    for reason in [one for one in files.left_out if one == NO_SUFFIX or one.startswith(f"{_SUFFIX}.")]:
        # Of a kind of files that are none, a few tell.
        if reason != NO_SUFFIX and not any(_is_image(files, name) for name in files.left_out[reason][:_TRIED]):
            continue
        found = files.left_out.pop(reason)
        images = {name for name in found[:_LOOKED_INTO] if _is_image(files, name)}
        said = f"images whose names end in {reason.removeprefix(_SUFFIX)}: rename them"
        images_said = "images whose names have no suffix, such as .png" if reason == NO_SUFFIX else said
        files.left_out.add(images_said, (name for name in found if name in images))
        files.left_out.add(reason, (name for name in found if name not in images))


def _is_image(files: ImageFiles, name: str) -> bool:
    try:
        with files.open(name) as file:
            return image_kind(file.read(32)) is not None
    except (OSError, ValueError):
        return False


def _sorted_out(names: Iterable[str], folders: Iterable[str]) -> tuple[list[str], LeftOut, list[str]]:
    """Images, sorted; what is left out; label files, sorted."""
    images, arrays, labels, left = [], [], [], LeftOut()
    for name in sorted(names):
        suffix = os.path.splitext(name)[1].lower()
        if name in OWN_FILES:
            continue
        if ".." in name.split("/"):
            left.add("names that lead out of it", [name])
        elif _of_the_system(name):
            left.add(SYSTEM_FILES, [name])
        elif _hidden(name):
            left.add("hidden files", [name])
        elif why := why_not_read(suffix):
            left.add(why, [name])
        elif suffix in EXTENSIONS:
            images.append(name)
        elif name.rpartition("/")[2].lower() == LABEL_FILE:
            labels.append(name)
        elif suffix == ARRAY:
            arrays.append(name)
        else:
            left.add(f"{_SUFFIX}{printable(suffix)}" if suffix else NO_SUFFIX, [name])
    # Arrays at the top of a zip without labels are an .npz, and a single one in a folder may be anything.
    if arrays and not images and (labels or any("/" in name for name in arrays)):
        images, arrays = arrays, []
    left.add(f"{_SUFFIX}{ARRAY}", arrays)
    full = {"/".join(parts[:i]) for name in images for parts in [name.split("/")] for i in range(1, len(parts))}
    left.add("folders without an image", (name for name in folders if name not in full and not _hidden(name)))
    return images, left, labels


def _plain_name(member: str) -> str:
    """A member's name as the folder's files have theirs: Windows writes backslashes, tar's users "./"."""
    name = member.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    return name


def same_name(name: str) -> str:
    """What a label's name and its file's have in common, however each was written: `name` in NFC, without "./"."""
    return unicodedata.normalize("NFC", _plain_name(name))


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Whether it is a broken link, or one of a circle: a file that should be there."""
    return entry.is_symlink() and not os.path.exists(entry.path)


# What systems and storage boxes put beside files: copies of them, thumbnails, what was deleted.
_SYSTEM_FOLDERS = frozenset(("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"))


def _of_the_system(name: str) -> bool:
    parts = name.split("/")
    last = parts[-1]
    file = last.startswith("._") or last in (".DS_Store", "Thumbs.db", "desktop.ini")
    return file or not _SYSTEM_FOLDERS.isdisjoint(parts)


def _hidden(name: str) -> bool:
    # Mac OS puts a second file beside each image, under the image's name, into its zips.
    return any(part.startswith(".") or part in _SYSTEM_FOLDERS for part in name.split("/"))
