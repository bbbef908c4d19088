"""Logs of a run: JSON lines that can be cut back to a step."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none to read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def unwritable_ancestor(folder: Path) -> Path | None:
    """The place that keeps files from being written to `folder`, there or still to be made; None where none does."""
    folder = folder.absolute()
    above = next(place for place in (folder, *folder.parents) if place.exists())
    return None if above.is_dir() and os.access(above, os.W_OK | os.X_OK) else above


def check_writable(out: Path, folder: Path) -> None:
    """Check that files can be written to `folder`, for what is asked for as `out`.

    Raises:
        ValueError: they cannot.
    """
    above = unwritable_ancestor(folder)
    if above is not None:
        raise ValueError(f"{out} cannot be written: {above} is no folder that takes files")


def json_line(values: Mapping[str, object]) -> str:
    """One line of valid JSON in the order of `values`.

    Floats that are NaN or infinite, for which JSON has no name, become null; how many did is added as "non_finite".
    """
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    bad = sum(clean[k] is None and v is not None for k, v in values.items())
    return json.dumps(clean | {"non_finite": bad} if bad else clean, allow_nan=False)


class StepLog:
    """Append-only file of JSON lines, each an object with an integer "step".

    A last line that was cut short (the process was killed while writing) is always ignored, and removed by the rewrite;
    other unreadable lines as well, with one warning. Lines wait in memory until `flush`.

    Args:
        path: the file.
        keep_below: on opening, drop the lines with step ≥ keep_below, in one atomic rewrite; None leaves the file as it
            is.
    """

    def __init__(self, path: Path | str, keep_below: int | None) -> None:
        self.path = Path(path)
        self._pending: list[str] = []
        if keep_below is None or not self.path.exists():
            return
        kept = [line for line in self.read() if line["step"] < keep_below]
        from ipfm.models.atomic_files import atomic_write  # with torch, which this room loads without

        with atomic_write(self.path) as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in kept)

    def append(self, step: int, values: Mapping[str, object]) -> None:
        """Add {"step": step, **values} to the lines to write.

        Raises:
            ValueError: `values` has a "step" of its own.
        """
        if "step" in values:
            raise ValueError("'step' is the name of the line's own step, values cannot have one")
        self._pending.append(json_line({"step": int(step), **values}))

    @property
    def waiting(self) -> int:
        """Number of lines that wait for `flush`."""
        return len(self._pending)

    def flush(self) -> None:
        """Write the waiting lines; they survive a kill of the process from here on.

        Raises:
            OSError: the disk refuses; the file is what it was, as far as the system lets it be, and the lines keep
                waiting.
        """
        if not self._pending:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in self._pending)
        # Without a buffer: what a full disk refused must not be written when the file is closed.
        with open(self.path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            # A log that was opened without a rewrite may end in a cut line, to which nothing must be glued.
            if size > 0:
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else f"\n{text}"
            payload = text.encode()
            try:
                while payload:
                    payload = payload[file.write(payload) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise
        self._pending.clear()

    def read(self) -> list[dict]:
        """The lines on disk, in their order."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        read, unreadable = [], 0
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if not isinstance(value["step"], int):
                    raise TypeError
                read.append(value)
            except (ValueError, TypeError, KeyError):
                unreadable += number < len(lines) - 1
        if unreadable:
            warnings.warn(f"{self.path}: {unreadable} unreadable lines were left out", stacklevel=2)
        return read
