"""The ways in which PyTorch checkpoints are stored, told apart by content: plain pickle, zip, older torch.save."""

import io
import mmap
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ipfm.models.checkpoints.pickle_values import Limits, Table, shown
from ipfm.models.checkpoints.recognise import missing, what_file, what_of_ours, what_zip
from ipfm.models.checkpoints.stored_tensors import LEGACY_START, STORAGES, Storage, read_legacy, storage_of
from ipfm.models.checkpoints.unpickler import read_pickle

ContainerKind = Literal["pickle", "torch.save zip", "older torch.save"]
_MAX_DIRECTORY = 4 << 20  # bytes of a zip's table of contents; a published training state has a tenth of this
# The record at the end of every zip, which a comment of at most 64 KiB may follow.
_END_OF_ZIP, _MAX_END = b"PK\x05\x06", 22 + (1 << 16)
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class Container:
    """What a file holds: the object, and how it was stored."""

    kind: ContainerKind
    root: object


def map_file(path: Path) -> memoryview:
    """The bytes of a file, read as they are used.

    Raises:
        ValueError: it cannot be read; one line that names it.
    """
    try:
        if not path.is_file():
            if path.is_dir():
                raise ValueError(f"{shown_path(path)} is a folder{_of(path)}; a checkpoint is a file")
            raise ValueError(f"{shown_path(path)} is no ordinary file" if path.exists() else missing(path))
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise ValueError(f"{shown_path(path)} is empty, as a download is that has failed")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ValueError(f"{shown_path(path)} cannot be read: {shown(error.strerror, 200)}") from None


def _of(folder: Path) -> str:
    what = what_of_ours(folder)
    return "" if what is None else f" ({what})"


def shown_path(path: Path) -> str:
    """A path for a message, on one line."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def read_container(
    data: memoryview, table: Table, *, where: str, limits: Limits, path: Path | None = None
) -> Container:
    """The object in `data`, its storages left where they are.

    Args:
        data: the whole file.
        table: the globals that are admitted, besides torch's storage classes.
        where: the file, for messages.
        limits: what its pickle may cost.
        path: the file, for what lies beside it.

    Raises:
        ValueError: one line that names the file, for anything but a checkpoint whose every global is admitted.
    """
    start = bytes(data[: len(LEGACY_START)])
    table = {**table, **STORAGES}
    if start.startswith(b"PK\x03\x04"):
        return Container("torch.save zip", _read_zip(data, table, where, limits))
    if start == LEGACY_START:
        return Container("older torch.save", read_legacy(data, table, where=where, limits=limits))
    if start.startswith(b"\x80"):
        return Container("pickle", read_pickle(data, table, where=where, limits=limits))
    what = what_file(data, path) or f"it begins with {shown(start[:8])}"
    raise ValueError(f"{where}: neither a pickle nor a torch.save file: {what}")


def _read_zip(data: memoryview, table: Table, where: str, limits: Limits) -> object:
    members = _members(data, where)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        what = f": {what_zip(list(members))}" if not pickles else ""
        raise ValueError(f"{where}: no torch.save file: a zip with {len(pickles) or 'no'} members */data.pkl{what}")
    root = pickles[0].removesuffix("data.pkl")

    def content(name: str) -> memoryview:
        if name not in members:
            raise ValueError(f"{where}: the zip has no member {shown(name)}")
        return _content(data, members[name], where)

    def storage(described: object) -> Storage:
        dtype, key, count = storage_of(described, fields=5)
        name = f"{root}data/{key}"
        if name not in members:
            raise ValueError(f"the zip has no member {shown(name)}")
        if members[name].file_size != count * dtype.itemsize:
            raise ValueError(f"member {shown(name)} has not the size of its {count} elements")
        return Storage(dtype, count, lambda: content(name))

    order = f"{root}byteorder"
    if order in members and bytes(content(order)) != b"little":
        raise ValueError(f"{where}: its numbers are {shown(bytes(content(order)))}-endian; possible: little")
    return read_pickle(content(pickles[0]), table, where=where, persistent=storage, limits=limits)


def _members(data: memoryview, where: str) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(_View(data)) as archive:
            infos = archive.infolist()
    # The directory is not ours to trust, and zipfile answers damage with more kinds of exceptions than it names.
    except Exception as error:
        why = shown(str(error), 100)
        if isinstance(error, zipfile.BadZipFile) and _END_OF_ZIP not in bytes(data[-_MAX_END:]):
            why = "its end is missing, as after a download or a copy that was interrupted: fetch it again"
        raise ValueError(f"{where}: a damaged or truncated zip: {why}") from None
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename
        if name in members:
            raise ValueError(f"{where}: the zip has two members {shown(name)}")
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{where}: no torch.save file: a zip with a member {shown(name)}")
        members[name] = info
    return members


def _content(data: memoryview, info: zipfile.ZipInfo, where: str) -> memoryview:
    """The bytes of a member that is stored as it is."""
    name = shown(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise ValueError(
            f"{where}: member {name} is compressed or encrypted, which torch.save never does: was it packed again? "
            "Unpack it, and pack it without compression: zip -0 -r NEW.pt FOLDER"
        )
    header = bytes(data[info.header_offset : info.header_offset + _LOCAL_HEADER.size])
    if info.header_offset < 0 or len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"{where}: member {name} is not where the zip says")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    content = data[start : start + info.file_size]
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise ValueError(f"{where}: member {name} is truncated or damaged")
    return content


class _View(io.RawIOBase):
    """Bytes as a file, of which no more is read at once than a sane table of contents has."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data = data
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(len(self._data) - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_DIRECTORY:
            raise ValueError(f"a table of contents of more than {_MAX_DIRECTORY} bytes")
        part = bytes(self._data[self._at : self._at + size])
        self._at += size
        return part
