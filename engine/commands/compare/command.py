"""`ipfm compare`: several runs beside each other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ipfm.engine.runtime.commandline import user_input


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare runs: settings, results, curves, samples, spread over seeds.

    Runs that are the same but for the seed are a group: its mean and spread are given, and differences between groups
    by the seeds that both have. Runs whose numbers do not compare, such as of other data, are kept apart. An ablation's
    folder stands for all of its runs, a folder of runs for those in it.

    Example: ipfm compare runs/seed0 runs/seed1 --csv runs.csv
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")] = ()
    """Two or more run folders, of distillations or of teachers' trainings."""
    out: Path | None = None
    """The page, .html or .md; an older comparison there is replaced. Default: compare.html."""
    images: Path | None = None
    """Folder of a Markdown page's pictures. Default: NAME_files beside the page."""
    picture: Path | None = None
    """The curves alone, as a .png."""
    csv: Path | None = None
    """A table with a line for each run; one with a line for each evaluation is NAME-evaluations beside it."""
    json: bool = False
    """Print the same facts as JSON instead of text; a page is written only where --out asks for it."""

    def run(self) -> None:
        """Write the page and what else is asked for; print the tables, or the facts."""
        with user_input():
            if not self.runs:
                raise ValueError("give two or more run folders, or a folder of runs")
            from ipfm.engine.commands.compare.selection import selected

            paths = selected(self.runs)
            from ipfm.engine.commands.compare import tables
            from ipfm.engine.commands.compare.facts import comparison
            from ipfm.engine.commands.compare.page import check_picture, target, write_page, write_picture
            from ipfm.engine.commands.compare.plots import curves
            from ipfm.engine.commands.compare.runs import read_runs

            page = Path("compare.html") if self.out is None and not self.json else self.out
            where = None if page is None else target(page, self.images)
            if where is None and self.images is not None:
                raise ValueError("images is for a Markdown page: give --out NAME.md")
            if self.picture is not None:
                check_picture(self.picture)
            if self.csv is not None:
                tables.check_csv(self.csv)
            found = comparison(read_runs(paths))
        written: list[tuple[str, Path]] = []
        is_drawn = self.picture is not None or where is not None
        drawn = curves(found, dark=where is not None and where.images is None) if is_drawn else {}
        if where is not None:
            with user_input():
                write_page(found, where, drawn)
            written.append(("page", where.page))
        if self.picture is not None and write_picture(drawn, self.picture):
            written.append(("curves", self.picture))
        if self.csv is not None:
            tables.write_csv(found, self.csv)
            written += [("runs", self.csv), ("evaluations", tables.evaluations_path(self.csv))]
        if self.json:
            print(json.dumps(found.to_json(), indent=1, allow_nan=False))
        else:
            print(tables.text(found), "", *(f"{what}: {path}" for what, path in written), sep="\n")
