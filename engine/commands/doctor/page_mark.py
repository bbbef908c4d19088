"""The page of `ipfm doctor --full`: its name, and how it is known as one of ours."""

from __future__ import annotations

from pathlib import Path

MARK = "what a machine is, by ipfm doctor"
PAGE = "doctor.html"
# The mark is within so many bytes of its start.
MARKED_WITHIN = 400


def check_place(out: Path) -> None:
    """ValueError where the folder has another page of this name."""
    page = out / PAGE
    if page.is_file():
        with page.open("rb") as file:
            if MARK.encode() not in file.read(MARKED_WITHIN):
                raise ValueError(f"{page} is there and is no page of this command: choose another --out")
