"""Draws images/three-networks.svg, the picture of concepts.md: what flows where in the two steps of a distillation.

python docs/draw_networks.py                 # the picture
python docs/draw_networks.py --png FILE      # the same as a PNG, to look at
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PICTURE = Path(__file__).parent / "images" / "three-networks.svg"
# An opaque light ground, so that a page may be light or dark.
GROUND, PANEL, INK, QUIET = "#f4f5f7", "#ffffff", "#1d2430", "#5b6472"
TRAINED, FROZEN, GRADIENT = "#cfe3fb", "#e3e5e9", "#c0262d"

Point = tuple[float, float]


def box(axes: Axes, at: Point, text: str, *, width: float = 1.5, height: float = 0.9, kind: str = "value") -> None:
    """A network that is trained or frozen, an operation, or a bare value."""
    face = {"trained": TRAINED, "frozen": FROZEN, "operation": PANEL, "value": PANEL}[kind]
    edge = "none" if kind == "value" else "#1f5fa8" if kind == "trained" else QUIET
    style = "round,pad=0,rounding_size=0.14" if kind != "operation" else "round,pad=0,rounding_size=0.42"
    low = (at[0] - width / 2, at[1] - height / 2)
    axes.add_patch(FancyBboxPatch(low, width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.4))
    axes.text(*at, text, ha="center", va="center", fontsize=10, color=INK, linespacing=1.35)


def arrow(axes: Axes, start: Point, end: Point, *, gradient: bool = False, bend: float = 0.0) -> None:
    """Of data, or of a gradient."""
    line = ("--", GRADIENT, 1.7) if gradient else ("-", INK, 1.3)
    shape = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, connectionstyle=shape, linestyle=line[0], color=line[1],
            linewidth=line[2], shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def note(axes: Axes, at: Point, text: str, *, color: str = QUIET, size: float = 8.8, ha: str = "center") -> None:
    axes.text(*at, text, ha=ha, va="center", fontsize=size, color=color, linespacing=1.3)


def panel(axes: Axes, low: float, high: float, title: str, about: str) -> None:
    rounded = "round,pad=0,rounding_size=0.2"
    size = (15.4, high - low)
    axes.add_patch(FancyBboxPatch((0.3, low), *size, boxstyle=rounded, facecolor=PANEL, edgecolor="#d5d9e0"))
    axes.text(0.65, high - 0.38, title, fontsize=12.5, weight="bold", color=INK, va="center")
    axes.text(3.75, high - 0.38, about, fontsize=9.6, color=QUIET, va="center")


def student_step(axes: Axes) -> None:
    panel(axes, 6.1, 9.75, "Student step", "S learns to denoise what G makes now; teacher T is not used")
    row = 8.0
    box(axes, (1.25, row), "latents z\nat $\\sigma_{init}$", width=1.3)
    box(axes, (3.45, row), "generator G\nno gradient", width=1.9, kind="frozen")
    box(axes, (5.55, row), "y", width=0.6)
    box(axes, (7.5, row), "perturb\n$x\\sim p_r(x|y)$", width=1.9, kind="operation")
    box(axes, (9.4, row), "x", width=0.5)
    box(axes, (11.2, row), "student S\ntrained", width=1.9, kind="trained")
    box(axes, (14.15, row), "$w(\\sigma)\\,\\|S(x)-y\\|^2$\n= student_loss", width=2.5, kind="operation")
    for start, end in ((1.9, 2.5), (4.4, 5.25), (5.85, 6.55), (8.45, 9.15), (9.65, 10.25), (12.15, 12.9)):
        arrow(axes, (start, row + 0.12), (end, row + 0.12))
    arrow(axes, (12.9, row - 0.2), (12.15, row - 0.2), gradient=True)
    # The target, under everything.
    axes.plot([5.55, 5.55, 14.15], [row - 0.3, 6.6, 6.6], color=INK, linewidth=1.3)
    arrow(axes, (14.15, 6.6), (14.15, row - 0.45))
    note(axes, (9.4, 6.82), "y is the target")
    note(axes, (7.5, 8.75), "$\\ln\\sigma$ normal,  $r=\\sigma\\sqrt{D}$")


def generator_step(axes: Axes) -> None:
    panel(axes, 0.95, 5.85, "Generator step", "G moves y where student and teacher agree; T and S stay as they are")
    row, up, down = 3.2, 4.35, 2.05
    box(axes, (1.25, row), "latents z\nat $\\sigma_{init}$", width=1.3)
    box(axes, (3.45, row), "generator G\ntrained", width=1.9, kind="trained")
    box(axes, (5.55, row), "y", width=0.6)
    box(axes, (7.5, row), "perturb\n$x\\sim p_r(x|y)$", width=1.9, kind="operation")
    box(axes, (9.4, row), "x", width=0.5)
    box(axes, (11.2, up), "teacher T\nfrozen", width=2.1, kind="frozen")
    box(axes, (11.2, down), "student S\nfrozen in this step", width=2.1, kind="frozen")
    box(axes, (14.15, row), "$L_\\alpha(T(x),S(x),y)$\n= generator_loss", width=2.5, height=1.0, kind="operation")
    for start, end in ((1.9, 2.5), (4.4, 5.25), (5.85, 6.55), (8.45, 9.15)):
        arrow(axes, (start, row + 0.15), (end, row + 0.15))
    for end, start in ((4.4, 5.25), (5.85, 6.55), (8.45, 9.15)):
        arrow(axes, (start, row - 0.15), (end, row - 0.15), gradient=True)
    for level, sign in ((up, 1), (down, -1)):
        arrow(axes, (9.55, row + 0.3 * sign), (10.15, level + 0.16 * sign))
        arrow(axes, (10.15, level - 0.2 * sign), (9.68, row + 0.16 * sign), gradient=True)
        arrow(axes, (12.25, level + 0.16 * sign), (13.6, row + 0.5 * sign))
        arrow(axes, (13.1, row + 0.5 * sign), (12.25, level - 0.2 * sign), gradient=True)
    axes.plot([5.4, 5.4, 14.05], [row - 0.3, 1.3, 1.3], color=INK, linewidth=1.3)
    arrow(axes, (14.05, 1.3), (14.05, row - 0.5))
    axes.plot([14.4, 14.4, 5.7], [row - 0.5, 1.08, 1.08], color=GRADIENT, linewidth=1.7, linestyle="--")
    arrow(axes, (5.7, 1.08), (5.7, row - 0.3), gradient=True)
    note(axes, (9.4, 1.48), "y, and the gradient with respect to it")
    note(axes, (7.5, 3.95), "$\\sigma\\leq 24.4$,  $r=\\sigma\\sqrt{D}$")
    arrow(axes, (3.45, row - 0.45), (3.45, 2.1))
    note(axes, (3.45, 1.8), "average of the weights (EMA):\nwhat is measured and exported")


def picture() -> Figure:
    """The whole figure."""
    figure = Figure(figsize=(11.2, 7.0), facecolor=GROUND)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 16), ylim=(0, 10))
    axes.axis("off")
    student_step(axes)
    generator_step(axes)
    arrow(axes, (0.7, 0.47), (1.5, 0.47))
    note(axes, (1.65, 0.47), "data", ha="left")
    arrow(axes, (2.9, 0.47), (3.7, 0.47), gradient=True)
    note(axes, (3.85, 0.47), "gradient", ha="left")
    box(axes, (6.0, 0.47), "", width=0.6, height=0.4, kind="trained")
    note(axes, (6.45, 0.47), "weights change in this step", ha="left")
    box(axes, (10.1, 0.47), "", width=0.6, height=0.4, kind="frozen")
    note(axes, (10.55, 0.47), "weights get no gradient in this step", ha="left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, help="a PNG to write instead")
    png = parser.parse_args().png
    # Letters as shapes look the same everywhere; no date and no random names, so that a picture changes with its code.
    matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "ipfm"})
    if png is not None:
        picture().savefig(png, dpi=110)
    else:
        picture().savefig(PICTURE, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
