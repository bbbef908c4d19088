"""Files of a run folder: replaced whole or not at all, and logs of JSON lines that can be cut back to a step."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """Opens a temporary binary file beside `path` that replaces it when the block ends without an exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_line(values: Mapping[str, object]) -> str:
    """One line of valid JSON in the order of `values`. Floats that are NaN or infinite, for which JSON has no name,
    become null; how many did is added as "non_finite"."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    bad = sum(clean[k] is None and v is not None for k, v in values.items())
    return json.dumps(clean | {"non_finite": bad} if bad else clean, allow_nan=False)


class StepLog:
    """Append-only file of JSON lines, each an object with an integer "step".

    `keep_below`: on opening, drop the lines with step ≥ keep_below, in one atomic rewrite; None leaves the file as it
    is. A last line that was cut short (the process was killed while writing) is always ignored, and removed by the
    rewrite; other unreadable lines as well, with one warning. Lines wait in memory until `flush`.
    """

    def __init__(self, path: Path | str, keep_below: int | None) -> None:
        self.path = Path(path)
        self._pending: list[str] = []
        if keep_below is None or not self.path.exists():
            return
        kept = [line for line in self.read() if line["step"] < keep_below]
        with atomic_write(self.path) as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in kept)

    def append(self, step: int, values: Mapping[str, object]) -> None:
        """Adds {"step": step, **values} to the lines to write. ValueError: `values` has a "step" of its own."""
        if "step" in values:
            raise ValueError("'step' is the name of the line's own step, values cannot have one")
        self._pending.append(json_line({"step": int(step), **values}))

    def flush(self) -> None:
        """Writes the waiting lines; they survive a kill of the process from here on."""
        if not self._pending:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in self._pending)
        with open(self.path, "a+b") as file:
            # A log that was opened without a rewrite may end in a cut line, to which nothing must be glued.
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else f"\n{text}"
            file.write(text.encode())
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
