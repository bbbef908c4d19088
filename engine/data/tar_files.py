"""Images in tar archives that are not packed, the shards of WebDataset, read where they lie and ordered by name.

    shard-000000.tar    000000.jpg  000000.cls    an image, and its class as a number; or
                        000001.jpg  000001.json   {"label": 7}

The headers of all members are read once, at the start; after that any image is one read at a known place, so that the
order is that of every other data set, a function of (seed, step, sample) on any number of ranks. WebDataset's own
reader shuffles within a buffer, whose content depends on ranks and workers.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from ipfm.engine.data.formats import EXTENSIONS, why_not_read
from ipfm.engine.data.image_files import MAX_FILE_BYTES, LeftOut, printable
from ipfm.engine.data.shards import choose
from ipfm.engine.runtime.launcher import is_first_process
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.models.checkpoints.recognise import what_place

_LOOKED_AT = 64  # members that tell what a tar holds
_MAX_LABEL = 1 << 20
_KEYS = ("label", "cls", "class")


class _Member(NamedTuple):
    shard: str
    offset: int
    size: int


def holds_images(path: Path) -> bool:
    """Whether a file is a tar that is not packed, with an image among its first members."""
    try:
        with tarfile.open(path, "r:") as archive:
            for _, member in zip(range(_LOOKED_AT), archive, strict=False):
                if member.isfile() and os.path.splitext(member.name)[1].lower() in EXTENSIONS:
                    return True
    except (tarfile.TarError, OSError, EOFError, ValueError):
        pass
    return False


class TarFiles:
    """The images of tar archives; see `ipfm.engine.data.image_files.ImageFiles`.

    Args:
        path: a tar, or the folder that they lie in.
        names: of the tars, relative to the folder.
        split: which of them, as in `open_dataset`.

    Raises:
        ValueError: a tar is damaged, holds a name twice, or an image has several labels; one line that names it.
    """

    def __init__(self, path: Path, names: Iterable[str] = (), split: str | None = None) -> None:
        self.path, self.left_out = path, LeftOut()
        self._folder = path if path.is_dir() else path.parent
        found = choose(str(path), list(names) if path.is_dir() else [path.name], split)
        found.leave_out_others(self.left_out, "tars")
        self._images: dict[str, _Member] = {}
        self._labels: dict[str, _Member] = {}
        self._fields: list[str] = []
        with ProgressBar("headers", len(found.names), unit=" tar", enabled=is_first_process()) as bar:
            for shard in found.names:
                self._read_headers(shard)
                bar.advance()
        # 000001.seg.png beside 000001.png is a field of that sample, and no image of the set.
        samples = {os.path.splitext(name)[0] for name in self._images}
        for name in [one for one in self._images if _key(one) in samples and _key(one) != os.path.splitext(one)[0]]:
            del self._images[name]
            self._fields.append(name)
        self.names = sorted(self._images)
        self.left_out.add("further fields of samples", self._fields)
        self.label_files: list[str] = []

    def _read_headers(self, shard: str) -> None:
        inside = "" if self.path.is_file() else f"{shard}/"
        for info in self._members(shard):
            name, member = inside + info.name.removeprefix("./"), _Member(shard, info.offset_data, info.size)
            suffix = os.path.splitext(name)[1].lower()
            if os.path.basename(name).startswith("."):
                self.left_out.add("hidden files", [name])
            elif why := why_not_read(suffix):
                self.left_out.add(why, [name])
            elif suffix in EXTENSIONS or suffix in (".cls", ".json"):
                kind = self._images if suffix in EXTENSIONS else self._labels
                if name in kind:
                    raise ValueError(f"{self.where(name)} is there twice")
                kind[name] = member
            else:
                self._fields.append(name)

    def _members(self, shard: str) -> Iterator[tarfile.TarInfo]:
        place, end = self._folder / shard, 0
        try:
            with open(place, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for info in archive:
                    archive.members = []  # type: ignore[attr-defined]  # a million of them would be kept
                    end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if info.isreg() and info.sparse is None:
                        yield info
                # Python takes a header that is cut short for the end, which is a block of zeros.
                file.seek(end)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise ValueError("it is cut short")
        except FileNotFoundError:
            raise ValueError(f"{place} does not exist") from None
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            why = f"{what_place(place) or printable(str(error))}; fetch it again, and unpack what is packed"
            raise ValueError(f"{place} is no tar that can be read, or damaged: {why}") from None

    def open(self, name: str) -> IO[bytes]:
        """See `ImageFiles.open`."""
        member = self._images[name]
        if member.size > MAX_FILE_BYTES:
            raise ValueError(f"{self.where(name)}: larger than {MAX_FILE_BYTES >> 20} MiB")
        return io.BytesIO(self._read(name, member))

    def _read(self, name: str, member: _Member) -> bytes:
        try:
            with open(self._folder / member.shard, "rb") as file:
                file.seek(member.offset)
                data = file.read(member.size)
        except OSError as error:
            raise ValueError(f"{self.where(name)}: {error.strerror}") from None
        if len(data) < member.size:
            raise ValueError(f"{self.where(name)}: the tar is shorter than when its headers were read")
        return data

    def has(self, name: str) -> bool:
        """See `ImageFiles.has`."""
        return name in self._images

    def where(self, name: str) -> str:
        """See `ImageFiles.where`."""
        return printable(str(self._folder / name)) if self.path.is_dir() else f"{self.path}: {printable(name)}"

    @property
    def label_source(self) -> str:
        """See `HoldsLabels.label_source`."""
        return "the .cls or .json beside each image"

    def stored_labels(self) -> list[object] | None:
        """See `HoldsLabels.stored_labels`: what .cls says, or the "label" (or "cls", "class") of .json."""
        found: dict[str, object] = {}
        for name, member in self._labels.items():
            stem, suffix = os.path.splitext(name)
            label = self._label(name, member, suffix.lower())
            if label is not None and found.setdefault(stem, label) != label:
                raise ValueError(f"{self.where(stem)} has two labels, in .cls and in .json")
        if not found:
            return None
        labels = []
        for name in self.names:
            own = [found[stem] for stem in (os.path.splitext(name)[0], _key(name)) if stem in found]
            if not own:
                raise ValueError(f"{self.where(name)} has no label, others have")
            labels.append(own[0])
        return labels

    def _label(self, name: str, member: _Member, suffix: str) -> object | None:
        if member.size > _MAX_LABEL:
            raise ValueError(f"{self.where(name)} is too large for a label")
        text = self._read(name, member).decode("utf-8", "replace").strip()
        if suffix == ".cls":
            return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text
        try:
            said = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where(name)} is no JSON: {printable(str(error))}") from None
        if not isinstance(said, dict):
            return said
        return next((said[key] for key in _KEYS if said.get(key) is not None), None)


def _key(name: str) -> str:
    """What the members of a sample have in common: their name up to the first dot."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
