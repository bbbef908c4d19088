"""Figures that are written to files: by matplotlib's own drawing, whatever backend the surroundings ask for."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLE = "MPLBACKEND"


def file_figure(**settings: Any) -> Figure:
    """A new figure that is drawn into files.

    Figure and canvas are made by hand: pyplot keeps global state and looks for a display.

    Args:
        **settings: as `matplotlib.figure.Figure` takes them, such as figsize and dpi.
    """
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**settings)
    FigureCanvasAgg(figure)
    return figure


def import_matplotlib() -> Any:
    """Matplotlib. Its import fails where MPLBACKEND names a backend that is not installed, as a notebook's may."""
    # Where its own folder in HOME cannot be written it takes a temporary one, which concerns nobody.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    given = os.environ.pop(VARIABLE, None)
    try:
        import matplotlib
    finally:
        if given is not None:
            os.environ[VARIABLE] = given
    return matplotlib
