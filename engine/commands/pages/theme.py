"""Figures of pages, drawn for a light and for a dark one."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from ipfm.engine.commands.pages.picture import Picture, png
from ipfm.engine.runtime.figures import import_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130
COLOURS = 64


@dataclass(frozen=True)
class Theme:
    """Colours of a page: of paper, of text, of lines that help, and of the curves in their order."""

    paper: str
    ink: str
    faint: str
    curves: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1d242b", "#6b7680", ("#1f5fa8", "#b8571a", "#2e7d4f"))
DARK = Theme("#14191f", "#d9e0e7", "#8d99a5", ("#6fb1f5", "#f0a061", "#7fcf9d"))


def figure_picture(alt: str, draw: Callable[[Theme], Figure], *, dark: bool, colours: int = COLOURS) -> Picture:
    """A figure as a picture; `dark`: in both themes; `colours`: that its PNG has at most."""
    return Picture(alt, drawn(draw, LIGHT, colours), drawn(draw, DARK, colours) if dark else None)


def drawn(draw: Callable[[Theme], Figure], theme: Theme, colours: int = COLOURS) -> bytes:
    """The figure that `draw` makes, as a PNG in the colours of `theme`."""
    matplotlib = import_matplotlib()
    settings = {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "axes.edgecolor": theme.faint,
        "grid.color": theme.faint,
    }
    file = io.BytesIO()
    with matplotlib.rc_context(settings):
        draw(theme).savefig(file, format="png")
    with Image.open(file) as image:
        # A curve has few colours: a third of the size, and nobody sees it.
        return png(image.convert("RGB").quantize(colours, dither=Image.Dither.NONE))
