"""Images in the tables that Hugging Face's `datasets` keeps them in: parquet or arrow files in a folder.

A row is an image; the column of the images holds the file's bytes (or a struct with bytes and path, as `datasets`
writes it), that of the labels the class. Arrow files are mapped into memory, and any row is read at its place; of
parquet a row group is decoded at a time, and the last few are kept. The package is pyarrow, on which `datasets` itself
is built: `datasets` would first copy every parquet file into a cache of its own.
"""

from __future__ import annotations

import io
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

from ipfm.engine.data.image_files import LeftOut, printable
from ipfm.engine.data.shards import choose
from ipfm.models.checkpoints.recognise import what_place

SUFFIXES = (".parquet", ".arrow")
_IMAGES = ("image", "img", "images", "jpg", "jpeg", "png", "picture", "pixel_values")
_LABELS = ("label", "labels", "cls", "class", "target", "fine_label", "label_id")
_KEPT_BYTES = 1 << 30


class _Chunk(NamedTuple):
    """Rows that are read together."""

    file: str
    number: int
    rows: int


class TableFiles:
    """The images of tables; see `ipfm.engine.data.image_files.ImageFiles`.

    Args:
        path: a file, or the folder that they lie in.
        names: of the files, relative to the folder.
        split: which of them, as in `open_dataset`.

    Raises:
        ValueError: pyarrow is not installed; a file is damaged or has other columns; one line that names it.
    """

    def __init__(self, path: Path, names: Iterable[str] = (), split: str | None = None) -> None:
        _pyarrow(path)
        self.path, self.left_out = path, LeftOut()
        self._folder = path if path.is_dir() else path.parent
        names = list(names) if path.is_dir() else [path.name]
        caches = [name for name in names if name.rpartition("/")[2].startswith(("cache-", "tmp", "indices-"))]
        self.left_out.add("caches of datasets", caches)
        found = choose(str(path), [name for name in names if name not in caches], split)
        found.leave_out_others(self.left_out, "files")
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._tables: dict[str, Any] = {name: self._open(name) for name in found.names}
        self._image, self._label = self._columns(found.names[0])
        self._chunks = [chunk for name in found.names for chunk in self._chunks_of(name)]
        self._starts = [0, *accumulate(chunk.rows for chunk in self._chunks)]
        # The row within its file, as a viewer of it counts.
        self.names: list[str] = []
        for name in found.names:
            rows = sum(chunk.rows for chunk in self._chunks if chunk.file == name)
            self.names += [f"{name}/{row:09d}" for row in range(rows)]
        self._row = {name: row for row, name in enumerate(self.names)}
        self.label_files: list[str] = []

    def _open(self, name: str) -> Any:
        import pyarrow
        import pyarrow.parquet

        place = self._folder / name
        try:
            if place.suffix.lower() == ".parquet":
                return pyarrow.parquet.ParquetFile(place)
            source = pyarrow.memory_map(str(place))
            try:
                return pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                return pyarrow.ipc.open_file(source).read_all()
        except (pyarrow.ArrowException, OSError) as error:
            why = what_place(place) or _line(error)
            raise ValueError(f"{place} is damaged, or no {place.suffix} file: {why}; fetch it again") from None

    def _schema(self, name: str) -> Any:
        table = self._tables[name]
        return table.schema_arrow if hasattr(table, "schema_arrow") else table.schema

    def _columns(self, first: str) -> tuple[str, str | None]:
        schema = self._schema(first)
        features = _features(schema)
        pictures = [field.name for field in schema if _holds_bytes(field.type)]
        told = [name for name in pictures if features.get(name) == "Image"]
        image = _one(told, _IMAGES) or _one(pictures, _IMAGES, only=True)
        if image is None:
            raise ValueError(
                f"{self._folder / first} has the columns {', '.join(map(printable, schema.names[:8]))}, of which none "
                f"is known to hold images: name it {_IMAGES[0]} (the bytes of an image file, or a struct with bytes)"
            )
        numbers = [field.name for field in schema if _is_number(field.type)]
        classes = [name for name in numbers if features.get(name) == "ClassLabel"]
        label = _one(classes, _LABELS) or next((name for name in _LABELS if name in numbers), None)
        for name in self._tables:
            if missing := [one for one in (image, label) if one is not None and one not in self._schema(name).names]:
                raise ValueError(f"{self._folder / name} has no column {missing[0]}, {self._folder / first} has")
        return image, label

    def _chunks_of(self, name: str) -> list[_Chunk]:
        table = self._tables[name]
        if not hasattr(table, "schema_arrow"):
            return [_Chunk(name, i, len(part)) for i, part in enumerate(table.column(self._image).chunks) if len(part)]
        about = table.metadata
        return [_Chunk(name, i, about.row_group(i).num_rows) for i in range(about.num_row_groups)]

    def open(self, name: str) -> IO[bytes]:
        """See `ImageFiles.open`."""
        import pyarrow

        row = self._row[name]
        number = bisect_right(self._starts, row) - 1
        try:
            value = self._column(number)[row - self._starts[number]].as_py()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.where(name)}: {_line(error)}") from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            path = value.get("path") if isinstance(value, dict) else None
            what = f"the path {printable(str(path))} in the place of an image" if path else "no image"
            raise ValueError(f"{self.where(name)} holds {what}: images must lie in the files themselves")
        return io.BytesIO(data)

    def _column(self, number: int) -> Any:
        """The images of a chunk."""
        chunk = self._chunks[number]
        table = self._tables[chunk.file]
        if not hasattr(table, "schema_arrow"):
            return table.column(self._image).chunk(chunk.number)
        with self._lock:
            if number not in self._kept:
                group = table.read_row_group(chunk.number, columns=[self._image])
                self._kept[number] = group.column(self._image).combine_chunks()
                while len(self._kept) > 2 and sum(column.nbytes for column in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(number)
            return self._kept[number]

    def has(self, name: str) -> bool:
        """See `ImageFiles.has`."""
        return name in self._row

    def where(self, name: str) -> str:
        """See `ImageFiles.where`."""
        file, _, row = name.rpartition("/")
        return f"{printable(str(self._folder / file))}: row {int(row)}"

    @property
    def label_source(self) -> str:
        """See `HoldsLabels.label_source`."""
        return f"the column {self._label}"

    def stored_labels(self) -> list[object] | None:
        """See `HoldsLabels.stored_labels`."""
        if self._label is None:
            return None
        found: list[object] = []
        for name, table in self._tables.items():
            whole = table.read(columns=[self._label]) if hasattr(table, "schema_arrow") else table
            labels = whole.column(self._label).to_pylist()
            if None in labels:
                raise ValueError(f"{self._folder / name}: row {labels.index(None)} has no label, others have")
            found += labels
        return found


def _pyarrow(path: Path) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError(f"{path} is read by pyarrow, which is not installed: pip install 'ipfm[datasets]'") from None


def _features(schema: Any) -> dict[str, str]:
    """What `datasets` says that each column is, from the file's metadata, such as "Image" or "ClassLabel"."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: str(about.get("_type")) for name, about in said.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _holds_bytes(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _is_number(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_integer(kind))


def _one(names: list[str], known: tuple[str, ...], *, only: bool = False) -> str | None:
    """The column with a known name; else the first, or with `only` the one that there is."""
    found = next((name for name in known if name in names), None)
    return found or (names[0] if len(names) == 1 or (names and not only) else None)


def _line(error: BaseException) -> str:
    return printable(" ".join(str(error).split())[:160])
