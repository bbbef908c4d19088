"""The `ipfm` command: its subcommands are the dataclasses of `engine/commands/`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

from tyro.conf import subcommand

from ipfm.engine.commandline import is_first_process, parse, run_command, without_local_rank
from ipfm.engine.commands.bench import Bench
from ipfm.engine.commands.completion import Completion
from ipfm.engine.commands.convert import Convert
from ipfm.engine.commands.dataset import Dataset
from ipfm.engine.commands.evaluate import Evaluate
from ipfm.engine.commands.export import Export
from ipfm.engine.commands.info import Info
from ipfm.engine.commands.plan import Plan
from ipfm.engine.commands.report import Report
from ipfm.engine.commands.sample import Sample
from ipfm.engine.overview import overview, versions

Command = (
    Annotated[Sample, subcommand("sample")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Dataset, subcommand("dataset")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Completion, subcommand("completion")]
)


def _main(argv: Sequence[str]) -> None:
    given = without_local_rank(argv) or ["--help"]
    if given[0] in ("-h", "--help", "--version"):
        if is_first_process():
            print(versions() if given[0] == "--version" else overview(Command))
        sys.exit()
    parse(Command, given, prog="ipfm", description="").run()  # type: ignore[arg-type]


def main() -> None:
    """Entry point of the `ipfm` command."""
    run_command("ipfm", _main, sys.argv[1:])
