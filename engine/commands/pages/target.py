"""Where a page goes, and whether a file there may be replaced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ipfm.engine.runtime.files import unwritable_ancestor

# How a page of ours is known when it is to be replaced: its mark is within so many bytes of its start.
MARKED_WITHIN = 400
SUFFIXES = (".html", ".md")


@dataclass(frozen=True)
class Target:
    """Where a page goes.

    Attributes:
        page: the file.
        images: the folder of a Markdown page's pictures, None for HTML, which has them in itself.
    """

    page: Path
    images: Path | None = None

    def picture(self, name: str) -> Path:
        """The file of a Markdown page's picture."""
        assert self.images is not None
        return self.images / f"{self.page.stem}-{name}.png"


def page_target(out: Path, images: Path | None, *, mark: str, what: str) -> Target:
    """Where a page goes that is asked for as `out`; nothing is written.

    Args:
        out: the page, .html or .md.
        images: folder of a Markdown page's pictures; default: NAME_files beside it.
        mark: what a page of this kind has at its start.
        what: what such a page is called, such as "report".

    Raises:
        ValueError: another suffix, another file there, a folder that is none, or `images` without Markdown.
    """
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"out must end in {' or '.join(SUFFIXES)}, got {out}")
    if images is not None and suffix != ".md":
        raise ValueError(f"images is for a Markdown page, the HTML page {out} has them in itself")
    if suffix == ".md":
        images = out.with_name(f"{out.stem}_files") if images is None else images
    for place in (images, *images.parents) if images else ():
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file, the {what} {out} cannot be there")
    check_place(out, what)
    if out.exists() and not has_mark(out, mark):
        raise ValueError(f"{out} is there and is no {what} of this command: choose another --out")
    return Target(out, images)


def check_place(out: Path, what: str, option: str = "out") -> None:
    """ValueError where no file can be written at `out`, which `option` named for `what` is to be there."""
    for place in out.parents:
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file, the {what} {out} cannot be there")
    if unwritable_ancestor(out.parent) is not None:
        raise ValueError(f"{out} cannot be written: choose another --{option}")


def has_mark(path: Path, mark: str) -> bool:
    """Whether the file begins as those of ours do that have this mark."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return mark.encode() in file.read(MARKED_WITHIN)
