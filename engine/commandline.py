"""Command lines: typed options from a dataclass, errors of one line, exit codes.

Exit codes: 0 done; 2 bad input, nothing was written; 1 the run failed; 128 + n stopped by signal n, state saved.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from ipfm.engine.loop import Interrupted, TrainingFailed

T = TypeVar("T")
BAD_INPUT = 2


class BadInput(Exception):
    """What the user gave cannot be used; the message is one line."""


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Errors in this block are the user's to mend: one line, exit code 2. Wrap the checks, not the work."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error


def parse(kind: type[T], argv: Sequence[str], *, default: T | None = None, prog: str, description: str) -> T:
    """Read a dataclass of options from the command line.

    Args:
        kind: the dataclass, or a union of them for subcommands.
        argv: arguments without the program's name. DeepSpeed's --local_rank=N is accepted and ignored.
        default: values of options that are not given; None takes the class's own.
        prog: the program's name in messages.
        description: what --help says first.

    Raises:
        BadInput: an unknown option or an impossible value.
        SystemExit: --help was asked for.
    """
    import tyro

    arguments = _without_local_rank(argv)
    captured = io.StringIO()
    keywords = {} if default is None else {"default": default}
    # Wide, so that no message is broken into lines.
    with _environment(COLUMNS="100" if {"-h", "--help"} & set(arguments) else "1000"):
        try:
            with contextlib.redirect_stderr(captured):
                return tyro.cli(kind, args=arguments, prog=prog, description=description, **keywords)  # type: ignore[call-overload]
        except SystemExit as stop:
            if not stop.code:
                raise
            raise BadInput(_one_line(captured.getvalue())) from None
        except ValueError as error:
            raise BadInput(str(error)) from error


def run_command(prog: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call `main` with the command line and turn what it raises into a line on stderr and an exit code."""
    name = Path(prog).name
    try:
        main(sys.argv[1:] if argv is None else argv)
    except BadInput as error:
        _complain(f"{name}: error: {error}")
        sys.exit(BAD_INPUT)
    except TrainingFailed as error:
        _complain(f"{name}: failed: {error}")
        sys.exit(1)
    except Interrupted as stop:
        _complain(f"{name}: {stop}; the same command continues")
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        _complain(f"{name}: interrupted")
        sys.exit(130)
    finally:
        # Only where a run has started: a process group that is left open warns at exit.
        if "torch.distributed" in sys.modules:
            from ipfm.engine.zero import stop_world

            stop_world()


def _complain(line: str) -> None:
    """One process speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(" ".join(line.split("\n")), file=sys.stderr, flush=True)


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    arguments: list[str] = []
    skip = False
    for argument in argv:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not re.fullmatch(r"--local[_-]rank=-?\d+", argument):
            arguments.append(argument)
    return arguments


def _one_line(box: str) -> str:
    """The message in a box drawn by the parser, and the options that it proposes instead."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", row).strip("│╭╮╰╯─ ") for row in box.splitlines()]
    # The first row is the box's title; below the message stand the help of the option in question and a hint.
    message, *others = [row for row in rows if row][1:] or ["the arguments cannot be read"]
    message = re.sub(r"^(Error parsing )?(\w+(Config|Options): )?", "", message).rstrip(".")
    message = re.sub(r": no type matching \{None\}\|(\w+) could be .* from \['(.*)'\]", r" takes \1, got '\2'", message)
    proposed = [row.split()[0] for row in others if row.startswith("--")]
    if message.startswith("Unrecognized"):
        return message + (f"; perhaps you meant {' or '.join(proposed)}" if proposed else "; --help lists all")
    return message


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
