"""What an ablation measured, in two CSV files, from which its curves and its verdicts can be made again elsewhere."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from ipfm.engine.experiments.ablation_report import Curve
from ipfm.engine.experiments.claims import Found
from ipfm.models.atomic_files import atomic_write

# The distances beside the curves, which are in ablation.csv.
DISTANCES_FILE = "distances.csv"
DISTANCES = ("variant", "network", "seed", "set", "distance")


def write_distances(found: Mapping[str, Found], path: Path) -> None:
    """Write a line for each distance that is on no curve, of `DISTANCES`.

    Of each variant they are its teacher's (no set), and where sets of samples were measured, those of its teacher and
    of its last generators, a seed each; sets count from 1.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(DISTANCES)
    for variant, its in found.items():
        writer.writerow([variant, "teacher", "", "", repr(its.teacher)])
        for number, value in enumerate(its.teacher_sets, 1):
            writer.writerow([variant, "teacher", "", number, repr(value)])
        for seed, values in its.sets.items():
            for number, value in enumerate(values, 1):
                writer.writerow([variant, "generator", seed, number, repr(value)])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def read_found(curves: Path, distances: Path) -> dict[str, Found]:
    """What was measured of each variant, but for network evaluations and images a second.

    Args:
        curves: an ablation.csv, see `ipfm.engine.experiments.ablation_report.write_csv`.
        distances: what `write_distances` wrote for it.

    Raises:
        ValueError: a file is none of these, or they are not of the same variants.
    """
    points: dict[tuple[str, int], list[tuple[int, float, float]]] = {}
    for row in _rows(curves, ("variant", "seed", "step", "kimg", "distance")):
        its = points.setdefault((row["variant"], int(row["seed"])), [])
        its.append((int(row["step"]), float(row["kimg"]), float(row["distance"])))
    found: dict[str, list[Curve]] = {}
    for (variant, seed), its in points.items():
        batch = next((round(1000 * kimg / step) for step, kimg, _ in its if step), 1)
        curve = Curve(variant, seed, batch, tuple((step, value) for step, _, value in its))
        found.setdefault(variant, []).append(curve)
    beside = _rows(distances, DISTANCES)
    if {row["variant"] for row in beside} != {*found}:
        raise ValueError(f"{distances} has not the variants of {curves}, which are {', '.join(found)}")
    return {variant: _found(its, beside, variant) for variant, its in found.items()}


def _found(curves: list[Curve], rows: list[dict[str, str]], variant: str) -> Found:
    """The curves with the distances beside them."""

    def of(network: str, *, sets: bool) -> Iterator[tuple[str, float]]:
        for row in rows:
            if (row["variant"], row["network"], bool(row["set"])) == (variant, network, sets):
                yield row["seed"], float(row["distance"])

    its: dict[int, list[float]] = {}
    for seed, value in of("generator", sets=True):
        its.setdefault(int(seed), []).append(value)
    teacher = next((value for _, value in of("teacher", sets=False)), math.nan)
    return Found(curves, teacher, its, [value for _, value in of("teacher", sets=True)])


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if not {*columns} <= {*(rows.fieldnames or ())}:
            raise ValueError(f"{path} has not the columns {', '.join(columns)}")
        return list(rows)
