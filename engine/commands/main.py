"""The `ipfm` command: its subcommands are the dataclasses of `engine/commands/`."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import subcommand

from ipfm.engine.commands.bench.command import Bench
from ipfm.engine.commands.compare.command import Compare
from ipfm.engine.commands.convert import Convert
from ipfm.engine.commands.dataset import Dataset
from ipfm.engine.commands.doctor.command import Doctor
from ipfm.engine.commands.ema.command import Ema
from ipfm.engine.commands.evaluate import Evaluate
from ipfm.engine.commands.export.command import Export
from ipfm.engine.commands.info import Info
from ipfm.engine.commands.new import New
from ipfm.engine.commands.plan.command import TROUBLE, Plan
from ipfm.engine.commands.report.command import Report
from ipfm.engine.commands.sample.command import Sample
from ipfm.engine.commands.usage import Shell, overview, versions
from ipfm.engine.objectives.own_files import VARIABLE
from ipfm.engine.runtime.commandline import BadInput, parse, run_command, user_input, without_local_rank
from ipfm.engine.runtime.launcher import forget_launch, join_slurm


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print the script by which bash, zsh or fish completes commands, options and files.

    Example: ipfm completion bash > ~/.ipfm-completion.bash

    Once that is done, a line in the file that the shell reads at its start:

        bash  ~/.bashrc: source ~/.ipfm-completion.bash
        zsh   ~/.zshrc: fpath=(~/.zfunc $fpath); autoload -Uz compinit; compinit
              where the script is ~/.zfunc/_ipfm
        fish  none, where the script is ~/.config/fish/completions/ipfm.fish
    """

    shell: Annotated[tyro.conf.Positional[Shell], tyro.conf.arg(metavar="SHELL")]
    """bash, zsh or fish."""

    def run(self) -> None:
        """Print the script."""
        from ipfm.engine.commands.usage import completion_script

        print(completion_script(Command, self.shell))


Command = (
    Annotated[Sample, subcommand("sample")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Ema, subcommand("ema")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Dataset, subcommand("dataset")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[New, subcommand("new")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Completion, subcommand("completion")]
)


# Commands whose work a launcher's processes share. The others are one process, whatever a launcher has left behind.
SHARED = ("evaluate", "sample")
# That speaks of what was left behind.
LOOKING = ("doctor",)


# Words that are no commands, and what is given instead.
OTHERWISE = {
    "help": "ipfm --help lists the commands, ipfm COMMAND --help its options",
    **dict.fromkeys(("version", "-v", "-V"), "ipfm --version says the versions"),
    **dict.fromkeys(
        ("train", "distil", "distill", "teach", "ablation", "run"),
        "training is done by the recipes: deepspeed recipes/digits_ipfm.py --help",
    ),
    "generate": "images are drawn by ipfm sample",
    "fid": "it is measured by ipfm evaluate",
    "memory": "it is predicted by ipfm plan",
    **dict.fromkeys(("check", "env", "verify", "verify-gpu", "selftest"), "this machine is looked at by ipfm doctor"),
    **dict.fromkeys(("rent", "cost", "costs", "price"), "what to rent is said by ipfm plan --model RECIPE"),
}


def _of_recipes(name: str) -> str | None:
    """Says of an option of the recipes that it is one."""
    # What they are made of is imported with torch.
    from dataclasses import fields

    from ipfm.engine.config import TeacherConfig
    from ipfm.engine.experiments.options import DistillationOptions
    from ipfm.engine.objectives import OBJECTIVES

    settings = (DistillationOptions, TeacherConfig, *OBJECTIVES.values())
    known = {f.name.replace("_", "-") for kind in settings for f in fields(kind)}
    return "recipes have it, such as recipes/digits_ipfm.py" if name in known else None


def _check_own_objectives(given: Sequence[str]) -> None:
    """BadInput where a file of one's own that the environment names cannot be used, or is named in another way."""
    if TROUBLE:
        raise BadInput(TROUBLE[0])
    named = [after for word, after in itertools.pairwise(given) if word == "--objective"]
    named += [word.partition("=")[2] for word in given if word.startswith("--objective=")]
    if given[0] == "plan" and named and named[0].endswith(".py"):
        file = named[0]
        kind = Path(file).stem
        raise BadInput(
            f"a file with an objective of your own is named in {VARIABLE}, and --objective takes its kind: "
            f"{VARIABLE}={file} ipfm plan --objective {kind}; --recipe {file} plans it by its recipe"
        )
    if os.environ.get(VARIABLE):
        from ipfm.engine.objectives import OBJECTIVES

        with user_input():
            len(OBJECTIVES)


def _main(argv: Sequence[str]) -> None:
    given = without_local_rank(argv) or ["--help"]
    if given[0] not in (*SHARED, *LOOKING):
        forget_launch()
    with user_input():
        join_slurm()
    if given[0] in ("-h", "--help", "--version"):
        print(versions() if given[0] == "--version" else overview(Command))
        sys.exit()
    if given[0] in OTHERWISE:
        kind = "option" if given[0].startswith("-") else "command"
        raise BadInput(f"unknown {kind} {given[0]}; {OTHERWISE[given[0]]}")
    _check_own_objectives(given)
    parse(Command, given, prog="ipfm", description="", elsewhere=_of_recipes).run()  # type: ignore[arg-type]


def main() -> None:
    """Entry point of the `ipfm` command."""
    run_command("ipfm", _main, sys.argv[1:])
