"""What `ipfm` says of itself: the list of its subcommands, the versions of what it stands on, shell completion."""

from __future__ import annotations

import functools
import inspect
import operator
import platform
import warnings
from typing import Annotated, Any, Literal, get_args

from ipfm.engine.runtime.versions import PACKAGES, installed

Shell = Literal["bash", "zsh", "fish"]

TEXT = """usage: ipfm COMMAND ...

Inverse Poisson flow matching: distils PFGM++ and diffusion models into few-step generators.
Training is done by the recipes: deepspeed recipes/digits_ipfm.py --help

commands:
{commands}

options: -h, --help (after a command: its own); --version, of ipfm, Python, torch, triton, deepspeed
example: ipfm sample runs/digits-D128-alpha1-K1/generator --n 64 --out digits.png
exit codes: 0 done; 1 failed; 2 bad input, nothing was written; 128 + n stopped by signal n"""


def overview(commands: Any) -> str:
    """What `ipfm --help` says, with a line for each subcommand.

    Args:
        commands: a union of the subcommands, each annotated with its name.
    """
    named = _named(commands)
    width = max(map(len, named))
    return TEXT.format(commands="\n".join(f"  {name:<{width}}  {summary(kind)}" for name, kind in named.items()))


def versions() -> str:
    """Lines of names and versions; nothing is imported for it."""
    lines = [f"ipfm {installed('ipfm')}", f"Python {platform.python_version()}"]
    return "\n".join([*lines, *(f"{name} {installed(name)}" for name in PACKAGES if name != "ipfm")])


def summary(kind: type) -> str:
    """The first sentence of a subcommand's help, without its full stop."""
    paragraph = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).removesuffix(".")


def completion_script(commands: Any, shell: Shell) -> str:
    """A script that makes the shell complete `ipfm`, its subcommands and their options, without starting Python.

    Args:
        commands: as in `overview`.
        shell: which one.
    """
    import shtab
    import tyro

    from ipfm.engine.runtime.option_help import registry

    named = tuple(
        Annotated[kind, tyro.conf.subcommand(name, description=summary(kind))]
        for name, kind in _named(commands).items()
    )
    with warnings.catch_warnings():
        # Its own scripts start Python at every press of the key; this is what others are made of.
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(  # type: ignore[call-overload]
            functools.reduce(operator.or_, named),
            prog="ipfm",
            config=(tyro.conf.FlagCreatePairsOff,),
            registry=registry(none=False),
        )
    parser.add_argument("--version", action="store_true", help="versions of ipfm and its libraries")
    return str(shtab.complete(parser, shell, root_prefix="ipfm"))


def _named(commands: Any) -> dict[str, type]:
    found = {}
    for command in get_args(commands):
        kind, about = get_args(command)
        found[about.name] = kind
    return found
