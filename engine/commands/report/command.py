"""`ipfm report`: a page about a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ipfm.engine.commands.compare.command import Compare
from ipfm.engine.runtime.commandline import user_input


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make a page about a run: result, samples, curves, settings, how to make it again.

    The HTML page is one file that needs nothing else; a Markdown page has its pictures in a folder beside it. Of a run
    that is going on, was stopped, or has damaged files, it says what there is and what is missing.

    Several runs are compared, as by ipfm compare.

    Example: ipfm report runs/digits-D128-alpha1-K1
    """

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder of a distillation or of a teacher's training."""
    further: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")] = ()
    """Other runs, to compare it with."""
    out: Path | None = None
    """The page, .html or .md; an older report there is replaced. Default: report.html in RUN; of several runs
    compare.html."""
    images: Path | None = None
    """Folder of a Markdown page's pictures. Default: NAME_files beside the page."""
    json: bool = False
    """Print the same facts as JSON instead; nothing is written."""

    def run(self) -> None:
        """Write the page, or print the facts."""
        if self.further:
            Compare(runs=(self.run_folder, *self.further), out=self.out, images=self.images, json=self.json).run()
            return
        with user_input():
            if self.json and not self.out is self.images is None:
                raise ValueError("json prints the facts and writes no page: leave out and images away")
            from ipfm.engine.commands.report.facts import facts_of
            from ipfm.engine.commands.report.page import target, write_page
            from ipfm.engine.commands.report.pictures import samples
            from ipfm.engine.training.run_state import read_run

            where = target(self.run_folder / "report.html" if self.out is None else self.out, self.images)
            record = read_run(self.run_folder)
        facts = facts_of(record)
        if self.json:
            grids = samples(record)
            shown = {"pictures": grids.to_json(record), "missing": [*facts.missing, *grids.problems]}
            print(json.dumps(facts.to_json() | shown, indent=1, allow_nan=False))
            return
        with user_input():
            write_page(record, facts, where)
        print(f"report: {where.page}")
