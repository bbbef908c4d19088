"""The `ipfm` command: its subcommands are the dataclasses of `engine/commands/`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

from tyro.conf import subcommand

from ipfm.engine.commandline import parse, run_command
from ipfm.engine.commands.bench import Bench
from ipfm.engine.commands.convert import Convert
from ipfm.engine.commands.dataset import Dataset
from ipfm.engine.commands.evaluate import Evaluate
from ipfm.engine.commands.info import Info
from ipfm.engine.commands.plan import Plan
from ipfm.engine.commands.report import Report
from ipfm.engine.commands.sample import Sample

DESCRIPTION = """Inverse Poisson flow matching: distils PFGM++ and diffusion models into one- to four-step generators.

Training is done by the recipes: `deepspeed recipes/digits_ipfm.py --help`."""

Command = (
    Annotated[Sample, subcommand("sample")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Dataset, subcommand("dataset")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Bench, subcommand("bench")]
)


def _main(argv: Sequence[str]) -> None:
    parse(Command, list(argv) or ["--help"], prog="ipfm", description=DESCRIPTION).run()  # type: ignore[arg-type]


def main() -> None:
    """Entry point of the `ipfm` command."""
    run_command("ipfm", _main, sys.argv[1:])
