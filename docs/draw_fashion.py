"""Draws images/fashion-images.png and writes examples/fashion.csv: Fashion-MNIST's teachers beside their generators.

    python docs/draw_fashion.py FOLDER

FOLDER holds NAME.json and NAME.npz of every network that was measured; NAME is teacher-D128, K4-D128, K2-D128, K1-D128,
or one of these with Dinf:

    ipfm evaluate MODEL --json --repeats 3 --features classifier --classifier F --reference DATA > FOLDER/NAME.json
    ipfm sample MODEL --n 12 --out FOLDER/NAME.npz

The images in a column are of the same latent. The table is printed; networks that are missing are named and left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ipfm.engine.experiments.repeats import spread
from ipfm.engine.runtime.wording import significant

FOLDER = Path(__file__).parent
PICTURE, NUMBERS = FOLDER / "images" / "fashion-images.png", FOLDER / "examples" / "fashion.csv"
DS, NETWORKS = ("128", "inf"), ("teacher", "K4", "K2", "K1")
COLUMNS = ("network", "D", "nfe", "set", "images", "distance", "seconds", "features")
# The same for all networks, or their distances cannot be compared.
COMMON = ("features_name", "reference", "images", "seed")

# An opaque light ground, so that a page may be light or dark.
GROUND, INK, QUIET = "#f4f5f7", "#1d2430", "#5b6472"
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SIDE, SCALE, GAP, SHOWN = 28, 2, 4, 12  # of an image; whole-number enlargement; between images; images in a row
CELL, LEFT, MARGIN, HEAD = SIDE * SCALE + GAP, 236, 20, 44


class Wrong(Exception):
    """What the folder holds does not belong together."""


@dataclass(frozen=True)
class Set:
    """A set of samples of a network: a line of the numbers, see `COLUMNS`."""

    network: str
    D: str
    nfe: int
    number: int
    images: int
    distance: float
    seconds: float
    features: str

    @property
    def name(self) -> str:
        """Of its network's files."""
        return f"{self.network}-D{self.D}"


def measured(folder: Path) -> list[Set]:
    """The sets of all networks that are there; those that are not are named.

    Raises:
        Wrong: there are none, or they were measured differently.
    """
    found: list[Set] = []
    facts: dict[str, Any] = {}
    for D in DS:
        for network in NETWORKS:
            path = folder / f"{network}-D{D}.json"
            if not path.is_file():
                print(f"{path} is missing: left out", file=sys.stderr)
                continue
            about = json.loads(path.read_text(encoding="utf-8"))
            its = {name: about.get(name) for name in COMMON}
            facts = facts or its
            if its != facts:
                raise Wrong(f"{path}: {its}, but the networks before it have {facts}")
            if float(about["D"]) != float(D):
                raise Wrong(f"{path} is of D = {about['D']}")
            found += [
                Set(network, D, about["nfe"], i, one["images"], _number(one), one["seconds"], its["features_name"])
                for i, one in enumerate(about["runs"], 1)
            ]
    if not found:
        raise Wrong(f"{folder} holds none of {', '.join(f'{n}-D{D}.json' for D in DS for n in NETWORKS)}")
    return found


def _number(run: dict[str, Any]) -> float:
    """The distance of a set; NaN where it could not be measured."""
    value = run.get("distance")
    return math.nan if value is None else float(value)


def write(sets: Sequence[Set], path: Path) -> None:
    """Write a line for each set."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(
            [s.network, s.D, s.nfe, s.number, s.images, repr(s.distance), s.seconds, s.features] for s in sets
        )


def read(path: Path) -> list[Set]:
    """What `write` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Set(
                row["network"], row["D"], int(row["nfe"]), int(row["set"]), int(row["images"]), float(row["distance"]),
                float(row["seconds"]), row["features"],
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def by_name(sets: Sequence[Set]) -> dict[str, list[Set]]:
    """The sets of each network."""
    return {name: [s for s in sets if s.name == name] for name in dict.fromkeys(s.name for s in sets)}


def called(one: Set) -> str:
    """A network for people."""
    return "teacher" if one.network == "teacher" else f"generator, K = {one.network.removeprefix('K')}"


def table(sets: Sequence[Set]) -> list[str]:
    """Markdown, a row for each kind of network: its evaluations and, for each D, distances of its sets and images/s."""
    groups = by_name(sets)
    Ds = [D for D in DS if any(s.D == D for s in sets)]
    shown = {D: f"D = {D.replace('inf', '∞')}" for D in Ds}
    head = [cell for D in Ds for cell in (f"Fréchet distance, {shown[D]}", f"images/s, {shown[D]}")]
    lines = [f"| network | NFE | {' | '.join(head)} |", "|---|---|" + "---|" * len(head)]
    for network in NETWORKS:
        its = {D: groups.get(f"{network}-D{D}", []) for D in Ds}
        first = next((group[0] for group in its.values() if group), None)
        if first is None:
            continue
        cells = [called(first), str(first.nfe)]
        for group in its.values():
            rate = sum(s.images for s in group) / max(sum(s.seconds for s in group), 1e-9)
            cells += [str(spread([s.distance for s in group])), significant(rate)] if group else ["–", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def images(folder: Path, name: str) -> list[Image.Image]:
    """The first images of a network, a pixel a pixel.

    Raises:
        Wrong: they are not there, or no grey images of this size.
    """
    path = folder / f"{name}.npz"
    if not path.is_file():
        raise Wrong(f"{path} is missing, whose distances are there")
    with np.load(path) as archive:
        found = archive["images"]
    if found.dtype != np.uint8 or found.shape[1:] != (SIDE, SIDE, 1) or len(found) < SHOWN:
        raise Wrong(f"{path} holds {found.dtype} {found.shape}, not at least {SHOWN} uint8 images of {SIDE}x{SIDE}")
    return [Image.fromarray(image[..., 0]) for image in found[:SHOWN]]


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT / f"DejaVuSans{'-Bold' * bold}.ttf", size)


def picture(folder: Path, sets: Sequence[Set]) -> Image.Image:
    """The whole picture: below a line for each D, a row of images for each of its networks."""
    groups = by_name(sets)
    Ds = [D for D in DS if any(s.D == D for s in sets)]
    width = LEFT + SHOWN * CELL - GAP + MARGIN
    whole = Image.new("RGB", (width, MARGIN + len(Ds) * HEAD + len(groups) * CELL), GROUND)
    draw, y = ImageDraw.Draw(whole), MARGIN // 2
    for D in Ds:
        title = {"inf": "D = ∞, diffusion", "128": "D = 128, PFGM++"}[D]
        draw.text((MARGIN, y + HEAD // 2), title, INK, font(20, bold=True), anchor="lm")
        y += HEAD
        for group in (group for group in groups.values() if group[0].D == D):
            evaluations = f"{group[0].nfe} evaluation{'s' * (group[0].nfe > 1)}"
            words = f"teacher, {evaluations}" if group[0].network == "teacher" else evaluations
            draw.text((MARGIN, y + 18), words, INK, font(17), anchor="lm")
            distance = significant(spread([s.distance for s in group]).mean)
            draw.text((MARGIN, y + 40), f"distance {distance}", QUIET, font(15), anchor="lm")
            for i, image in enumerate(images(folder, group[0].name)):
                large = image.resize((SIDE * SCALE, SIDE * SCALE), Image.Resampling.NEAREST)
                whole.paste(large, (LEFT + i * CELL, y))
            y += CELL
    return whole


def main() -> None:
    """Draw, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    try:
        sets = measured(folder)
        drawn = picture(folder, sets)
    except (Wrong, OSError, ValueError) as error:
        parser.error(str(error))
    drawn.save(PICTURE, optimize=True)
    write(sets, NUMBERS)
    print(*table(sets), sep="\n")


if __name__ == "__main__":
    main()
