"""A section of `ipfm doctor --full` in a process of its own.

python -m ipfm.engine.commands.doctor.section NAME PLACE ROWS PARENT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from ipfm.engine.commands.doctor.place import LEFT_OUT, OutOfTime, Place
from ipfm.engine.commands.doctor.sections import SECTIONS, Section
from ipfm.engine.runtime.json_output import plain
from ipfm.engine.runtime.parent import end_with


def fill(section: Section, place: Place, rows: Path) -> None:
    """Add a section's rows to a file of JSON lines, each as it comes."""
    with rows.open("a") as file:
        try:
            for row in section.rows(place):
                _add(file, {"row": plain(row)})
        except OutOfTime as over:
            _add(file, {LEFT_OUT: str(over)})


def _add(file: IO[str], line: dict[str, Any]) -> None:
    file.write(f"{json.dumps(line, default=str)}\n")
    file.flush()


def main(name: str, place: str, rows: str, parent: str) -> None:
    """Run the section `name` at a place, a `Place` as JSON; it ends with the process `parent` that asks for it."""
    end_with(int(parent))
    given = json.loads(place)
    # The same kernels are compiled for no other section, but all together are some minutes' work.
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    section = next(section for section in SECTIONS if section.name == name)
    fill(section, Place(**{**given, "folder": Path(given["folder"])}), Path(rows))
    sys.stdout.flush()
    sys.stderr.flush()
    # What libraries do at the end of a process is no part of what was measured.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
