"""Draws images/claims-*.png and prints the distances and the verdicts of what is kept in examples/claims.

    python docs/draw_claims.py [FOLDER ...]

A FOLDER is one that ablation_D_alpha.py, ablation_steps.py, ablation_divergence.py or ablation_out_of_law.py left: what
it measured is kept first. That is every evaluation of every run (NAME.csv), the distances beside them
(NAME-distances.csv), how it was measured and the settings of its first run (NAME.json); of the last one the errors at
every noise level (out-of-law.csv).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ipfm.engine.evaluation.results import distance_axis
from ipfm.engine.experiments import Ablation, out_of_law
from ipfm.engine.experiments.ablation_numbers import DISTANCES_FILE, read_found
from ipfm.engine.experiments.ablation_report import ended
from ipfm.engine.experiments.claims import Found, Judged, judged, verdicts_table
from ipfm.engine.runtime.figures import file_figure
from ipfm.engine.runtime.wording import significant
from ipfm.recipes import ablation_D_alpha, ablation_divergence, ablation_steps

FOLDER = Path(__file__).parent
KEPT, IMAGES = FOLDER / "examples" / "claims", FOLDER / "images"
OUT_OF_LAW = "out-of-law.csv"


@dataclass(frozen=True)
class Judge:
    """An ablation that judges claims. `panels`: title -> what a line is called -> its variant."""

    ablation: Ablation
    panels: Mapping[str, Mapping[str, str]]


_DS = {"D = 128": "D128", "D = 2048": "D2048", "D = ∞": "Dinf"}
_ALPHAS = {"α = ½": "0.5", "α = 1": "1", "α = 1.2": "1.2", "α = 1.5": "1.5"}
JUDGES = {
    judge.ablation.name: judge
    for judge in (
        Judge(
            ablation_D_alpha.ABLATION,
            {
                title: {name: f"{D}-alpha{alpha}" for name, D in _DS.items() if D != "D2048"}
                for title, alpha in _ALPHAS.items()
                if alpha in ("0.5", "1")
            }
            | {"D = 128": {line: f"D128-alpha{alpha}" for line, alpha in _ALPHAS.items()}},
        ),
        Judge(ablation_steps.ABLATION, {"": {"K = 2": "K2", "K = 4": "K4"}}),
        Judge(
            ablation_divergence.ABLATION,
            {
                f"{shown}, α = 1.2": {name: f"{arch}-{D}" for name, D in _DS.items()}
                for shown, arch in (("ncsn++", "ncsnpp"), ("ddpm++", "ddpmpp"))
            },
        ),
    )
}
BLUE, GREEN, RED, ORANGE = "#1f77b4", "#2ca02c", "#d62728", "#ff7f0e"
COLOURS = {"D = 128": BLUE, "D = 2048": GREEN, "D = ∞": RED, "K = 2": BLUE, "K = 4": RED}
COLOURS |= dict(zip(_ALPHAS, (GREEN, BLUE, ORANGE, RED), strict=True))


def keep(folder: Path) -> None:
    """Keep what an ablation measured.

    Raises:
        ValueError: the folder holds none, none that judges claims, or none of the variants that are drawn.
        OSError: something of it is missing, or cannot be written.
    """
    KEPT.mkdir(parents=True, exist_ok=True)
    if (folder / OUT_OF_LAW).is_file():
        out_of_law.read_csv(folder / OUT_OF_LAW)
        (KEPT / OUT_OF_LAW).write_bytes((folder / OUT_OF_LAW).read_bytes())
        return
    if not (folder / "ablation.json").is_file():
        raise ValueError(f"{folder} holds no ablation")
    about = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    name = about["ablation"]
    if name not in JUDGES:
        raise ValueError(f"{folder} is of ablation_{name.replace('-', '_')}.py; possible: {', '.join(JUDGES)}")
    if not (folder / DISTANCES_FILE).is_file():
        raise ValueError(f"{folder} has no {DISTANCES_FILE}: give its command again, which then only reads")
    found = read_found(folder / "ablation.csv", folder / DISTANCES_FILE)
    drawn = list(dict.fromkeys(variant for lines in JUDGES[name].panels.values() for variant in lines.values()))
    if found.keys().isdisjoint(drawn):
        raise ValueError(f"{folder} has none of the variants that are drawn: {', '.join(drawn)}")
    (KEPT / f"{name}.json").write_text(
        json.dumps({**about, **_first(folder, found)}, indent=1) + "\n", encoding="utf-8"
    )
    (KEPT / f"{name}.csv").write_bytes((folder / "ablation.csv").read_bytes())
    (KEPT / f"{name}-distances.csv").write_bytes((folder / DISTANCES_FILE).read_bytes())


def _first(folder: Path, found: Mapping[str, Found]) -> dict[str, Any]:
    """The settings of the first run, and where it was made."""
    curve = next(iter(found.values())).curves[0]
    run = folder / curve.variant / f"seed{curve.seed}"
    start = (run / "environment.jsonl").read_text(encoding="utf-8").splitlines()[0]
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
    return {"run": f"{curve.variant}, seed {curve.seed}", "settings": settings, "environment": json.loads(start)}


def kept() -> dict[str, dict[str, Found]]:
    """What is kept of each ablation."""
    paths = {name: (KEPT / f"{name}.csv", KEPT / f"{name}-distances.csv") for name in JUDGES}
    return {name: read_found(*both) for name, both in paths.items() if both[0].is_file()}


def verdicts() -> list[Judged]:
    """On every claim of which there are all variants."""
    found = [one for name, its in kept().items() for one in judged(JUDGES[name].ablation.claims, its)]
    if (KEPT / OUT_OF_LAW).is_file():
        found += out_of_law.verdicts(out_of_law.read_csv(KEPT / OUT_OF_LAW))
    return found


def table() -> list[str]:
    """Markdown: a row for each claim, see docs/recipes.md for what decides it."""
    return verdicts_table(verdicts()).partition("\n\n")[0].splitlines()


def distances(found: Mapping[str, Found]) -> list[str]:
    """Markdown: a row for each variant, of its seeds the mean (smallest to largest) at the best and at the end."""
    lines = ["| variant | teacher | Fréchet distance: best | last | diverged |", "|---|---|---|---|---|"]
    rows = [f"| {variant} | {significant(its.teacher)} | {ended(its.curves)} |" for variant, its in found.items()]
    return lines + rows


def draw(name: str, found: Mapping[str, Found]) -> None:
    """Distance over images: the median of the seeds, each of them thin, teachers dashed; a panel each."""
    panels = {
        title: its
        for title, lines in JUDGES[name].panels.items()
        if (its := {line: found[variant] for line, variant in lines.items() if variant in found})
    }
    figure = file_figure(figsize=(4.6 * len(panels) + 0.4, 3.6), dpi=100, layout="constrained")
    shown = [value for its in panels.values() for one in its.values() for value in _values(one)]
    for number, (axes, (title, its)) in enumerate(
        zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True)
    ):
        for line, one in its.items():
            for curve in one.curves:
                axes.plot(*_drawn(curve.batch, curve.points), color=COLOURS[line], linewidth=0.7, alpha=0.5)
            axes.plot(*_drawn(one.curves[0].batch, middle(one)), color=COLOURS[line], linewidth=2, label=line)
            if math.isfinite(one.teacher):
                axes.axhline(one.teacher, color=COLOURS[line], linestyle="--", linewidth=1)
        distance_axis(axes, shown, span=5, metric="Fréchet distance" if number == 0 else "")
        axes.set_xlabel("thousands of images")
        axes.set_title(title, fontsize=10)
        axes.plot([], [], color="#555555", linestyle="--", linewidth=1, label="teachers")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(IMAGES / f"claims-{name}.png")


def middle(found: Found) -> list[tuple[int, float]]:
    """(step, median over the seeds), as long as it is finite: what is not counts as larger than anything."""
    steps = sorted({step for curve in found.curves for step, _ in curve.points})
    at = {step: [value for curve in found.curves for s, value in curve.points if s == step] for step in steps}
    middles = [(step, median(math.inf if math.isnan(v) else v for v in values)) for step, values in at.items()]
    return [point for point in middles if math.isfinite(point[1])]


def _values(found: Found) -> list[float]:
    values = [found.teacher, *(value for curve in found.curves for _, value in curve.points)]
    return [value for value in values if math.isfinite(value)]


def _drawn(batch: int, points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    return [step * batch / 1000 for step, _ in points], [value for _, value in points]


def main() -> None:
    """Keep what is new, draw, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    try:
        for folder in parser.parse_args().folders:
            keep(folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name, found in kept().items():
        draw(name, found)
        print(*distances(found), "", sep="\n")
    print(*table(), sep="\n")


if __name__ == "__main__":
    main()
