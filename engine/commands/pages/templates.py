"""Pages from templates: HTML with its pictures in itself, or Markdown with links to them."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from ipfm.engine.commands.pages.picture import Picture, is_ours
from ipfm.engine.commands.pages.target import Target
from ipfm.engine.runtime.wording import significant, size
from ipfm.models.atomic_files import atomic_write

# Style and macros that all pages share.
SHARED = Path(__file__).parent


def write_page(where: Target, folder: Path, content: Mapping[str, Any], pictures: Mapping[str, Picture]) -> None:
    """Write the page, and a Markdown page's pictures before it; each file is replaced whole or not at all.

    Args:
        where: the page's place.
        folder: that of the templates page.html.j2 and page.md.j2.
        content: what they speak of.
        pictures: the pictures in `content`, by the names that their files get.

    Raises:
        ValueError: a file that is no picture of ours is where one would go.
        OSError: the disk refuses.
    """
    if where.images is None:
        text = _html(folder, content)
    else:
        places = {name: where.picture(name) for name in pictures}
        for place in places.values():
            if place.exists() and not is_ours(place):
                raise ValueError(f"{place} is there and is no picture of a report: choose another --images")
        for name, found in pictures.items():
            with atomic_write(places[name]) as file:
                file.write(found.png)
        text = _markdown(folder, content, {id(pictures[n]): _link(places[n], where.page) for n in pictures})
    with atomic_write(where.page) as file:
        file.write(text.encode())


def _link(picture: Path, page: Path) -> str:
    """The picture's place as seen from the page, with "/" between its parts."""
    return quote(Path(os.path.relpath(picture.resolve(), page.resolve().parent)).as_posix())


def _html(folder: Path, content: Mapping[str, Any]) -> str:
    environment = _environment(folder, autoescape=True)
    environment.filters |= {"data_uri": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"}
    return environment.get_template("page.html.j2").render(content)


def _markdown(folder: Path, content: Mapping[str, Any], links: Mapping[int, str]) -> str:
    environment = _environment(folder, autoescape=False)
    # What is printed is escaped here, as autoescape does it for HTML; the filters below are exempt.
    environment.finalize = lambda value: value if isinstance(value, _Verbatim) else _escaped(str(value))
    environment.filters |= {
        "file": lambda found: _Verbatim(links[id(found)]),
        # What a macro made is escaped already.
        "verbatim": _Verbatim,
        "code": lambda text: _Verbatim(f"<code>{html.escape(text)}</code>"),
        "block": lambda text: _Verbatim("\n".join(f"    {line}" for line in text.splitlines())),
    }
    text = environment.get_template("page.md.j2").render(content)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


class _Verbatim(str):
    """Text that is Markdown already."""


def _escaped(text: str) -> str:
    """Text with what Markdown or HTML would read as more than letters made plain."""

    def plain(found: re.Match[str]) -> str:
        return f"&#{ord(found[0])};" if found[0] in "<>&|" else f"\\{found[0]}"

    # Within a word an underscore is one.
    return re.sub(r"[<>&|\\`*\[\]#]|(?<!\w)_|_(?!\w)", plain, text)


def _environment(folder: Path, *, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, SHARED]),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "significant": significant,
        "bytes": lambda count: "" if count is None else size(count),
        "percent": lambda share: "" if share is None else f"{share:+.1f} %",
    }
    return environment
