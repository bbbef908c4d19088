"""Command lines: typed options from a dataclass, errors of one line, exit codes.

Exit codes: 0 done; 2 bad input, nothing was written; 1 the run failed: a line says why and where to continue;
128 + n stopped by signal n, the state of a training saved; 141, without a word, where nobody reads what is printed
(`| head`).
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from ipfm.engine.runtime.errors import Failed, FolderInUse, Interrupted, ProcessLost
from ipfm.engine.runtime.launcher import is_first_process, lost_process
from ipfm.engine.runtime.stdio import usable_streams

T = TypeVar("T")
BAD_INPUT, FAILED = 2, 1
# Columns of --help.
HELP_WIDTH = 100


class BadInput(Exception):
    """What the user gave cannot be used; the message is one line. `details`: further lines on what is possible."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Errors in this block are the user's to mend: one line, exit code 2. Wrap the checks, not the work."""
    try:
        yield
    except (ValueError, OSError) as error:
        # A full disk, and a reader of --help that has gone, are not what the user gave.
        if isinstance(error, BrokenPipeError) or _no_room(error):
            raise
        raise BadInput(str(error)) from error


def parse(kind: type[T], argv: Sequence[str], *, default: T | None = None, prog: str, description: str) -> T:
    """Read a dataclass of options from the command line.

    Args:
        kind: the dataclass, or a union of them for subcommands.
        argv: arguments without the program's name. DeepSpeed's --local_rank=N is accepted and ignored.
        default: values of options that are not given; None takes the class's own. Of two that exclude each other (the
            class's ALTERNATIVES) the one that is given counts.
        prog: the program's name in messages.
        description: what --help says first.

    Raises:
        BadInput: an unknown option or an impossible value; the message is one line and names the option as it is typed.
        SystemExit: --help was asked for; the first process has printed it.
    """
    import tyro

    from ipfm.engine.runtime.option_help import Shown, registry

    arguments = without_local_rank(argv)
    captured, shown = io.StringIO(), Shown(sys.stdout)
    # Options of a subcommand are off unless they are given; a recipe may have some of its own on.
    single = () if dataclasses.is_dataclass(kind) else (tyro.conf.FlagCreatePairsOff,)
    keywords = {} if default is None else {"default": _giving_way(default, arguments)}
    # Wide, so that no message is broken into lines.
    with _environment(COLUMNS=str(HELP_WIDTH) if {"-h", "--help"} & set(arguments) else "1000"):
        try:
            with contextlib.redirect_stderr(captured), contextlib.redirect_stdout(shown):
                return tyro.cli(  # type: ignore[call-overload]
                    kind,
                    args=arguments,
                    prog=prog,
                    description=description,
                    config=single,
                    registry=registry(),
                    **keywords,
                )
        except SystemExit as stop:
            if not stop.code:
                if is_first_process():
                    sys.stdout.write(shown.tidied(HELP_WIDTH))
                raise
            raise BadInput(_as_typed(_one_line(captured.getvalue()), kind)) from None
        except ValueError as error:
            raise BadInput(_as_typed(str(error), kind)) from error


@usable_streams()
def run_command(prog: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call `main` with the command line and turn what it raises into a line on stderr and an exit code.

    Args:
        prog: the program, or its file, for the messages.
        main: the program.
        argv: its arguments; those of this process when None.

    Raises:
        SystemExit: with one of the exit codes above. Any other exception passes through: it is a defect, and its
            traceback is wanted.
    """
    name = Path(prog).name
    try:
        try:
            main(sys.argv[1:] if argv is None else argv)
        finally:
            # What is printed has come out, or this is where it fails.
            sys.stdout.flush()
    except BadInput as error:
        _complain(f"{name}: error: {error}", error.details)
        sys.exit(BAD_INPUT)
    except FolderInUse as error:
        # That of a teacher, which is taken in the course of a run, is the user's to mend too.
        _complain(f"{name}: error: {error}")
        sys.exit(BAD_INPUT)
    except ProcessLost as error:
        # The one that speaks for all may be the one that is gone.
        _complain(f"{name}: failed: {error}", everyone=True)
        sys.exit(FAILED)
    except Failed as error:
        _complain(f"{name}: failed: {error}")
        sys.exit(FAILED)
    except (RuntimeError, OSError) as error:
        if isinstance(error, OSError) and (_no_room(error) or error.errno == errno.EROFS):
            where = f" {error.filename}" if error.filename else ""
            _complain(f"{name}: failed: cannot write{where}: {error.strerror}", everyone=True)
        elif reason := lost_process(error):
            message = f"another process of this run has ended or does not answer ({reason})"
            _complain(f"{name}: failed: {message}", everyone=True)
        else:
            raise
        sys.exit(FAILED)
    except Interrupted as stop:
        _complain(f"{name}: {stop}; the same command continues")
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        _complain(f"{name}: interrupted")
        sys.exit(130)
    finally:
        # Only where a run has started: a process group that is left open warns at exit.
        if "torch.distributed" in sys.modules:
            from ipfm.engine.runtime.launcher import stop_world

            stop_world()


def _complain(line: str, details: str = "", *, everyone: bool = False) -> None:
    """One process speaks for all, unless it is said that `everyone` does."""
    if everyone or is_first_process():
        # The exit code says it too, where stderr takes nothing.
        with contextlib.suppress(OSError):
            print(" ".join(part.strip() for part in line.splitlines()), file=sys.stderr, flush=True)
            if details:
                print(details, file=sys.stderr, flush=True)


def _no_room(error: Exception) -> bool:
    """Whether a disk has no room."""
    if not isinstance(error, OSError):
        return False
    from ipfm.models.atomic_files import NO_ROOM

    return error.errno in NO_ROOM


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """The arguments without DeepSpeed's --local_rank=N."""
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


def _giving_way(default: T, arguments: Sequence[str]) -> T:
    """`default` without what excludes an option that is given."""
    given = {argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in arguments}
    for pair in getattr(default, "ALTERNATIVES", ()):
        for name, other in (pair, pair[::-1]):
            if other in given and name not in given:
                default = dataclasses.replace(default, **{name: None})  # type: ignore[type-var]
    return default


def _one_line(box: str) -> str:
    """The message in a box drawn by the parser, and the options that it proposes instead."""
    # The first row is the box's title. Its frame, and the lines between its parts, are plain ASCII on some terminals.
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", row).strip("│").rstrip() for row in box.splitlines()[1:]]
    rows = [row for row in rows if row.strip(" -─╰╯")] or ["the arguments cannot be read"]
    message = rows[0].strip().rstrip(".")
    # Names of options stand four columns deeper, their texts eight.
    depth = len(rows[0]) - len(rows[0].lstrip()) + 4
    options = [row.strip() for row in rows[1:] if len(row) - len(row.lstrip()) == depth]
    if message.startswith("Missing from"):
        needed = [option for option in options if re.match(r"--\S+ |[A-Z]", option)]
        return f"{message.removeprefix('Missing from ').rstrip(':')} needs {' and '.join(needed)}"
    if message.startswith("Unrecognized"):
        given = message.partition(": ")[2].split(", ")
        unknown = [argument for argument in given if argument.startswith("-")]
        proposed = [name.rstrip(",") for option in options for name in option.split() if name.startswith("--")]
        hint = f"perhaps you meant {' or '.join(proposed)}" if proposed else "--help lists all"
        return f"unknown option {', '.join(unknown)}; {hint}" if unknown else f"unexpected argument {given[0]}; {hint}"
    message = re.sub(r"^Error parsing (\w+(Config|Options): )?", "", message)
    if found := re.match(r"Missing value for argument '(.*)'", message):
        return f"{found[1]} needs a value"
    if found := re.match(r"invalid choice (.*) for argument '(.*)'\. Expected one of (\(.*\))", message):
        return f"{found[2]} must be one of {', '.join(sorted(ast.literal_eval(found[3])))}, got {found[1]}"
    if found := re.match(r"(\S+): no type matching \{None\}\|(\w+) could be .* from \[(.*)\]", message):
        return f"{found[1]} takes {_NOUNS.get(found[2], found[2])}, got {found[3]}"
    if found := re.match(r"(\S+): (invalid literal for int|could not convert string to float).*: (.*)", message):
        return f"{found[1]} takes {_NOUNS['INT' if 'int' in found[2] else 'FLOAT']}, got {found[3]}"
    if found := re.match(r"(\S+): Could not find valid parse for arguments: \[(.*)\]", message):
        return f"{found[1]} cannot be read from {found[2]}"
    return message


_NOUNS = {"INT": "a whole number", "FLOAT": "a number"}


def _as_typed(message: str, kind: object) -> str:
    """A setting's own message with the option in front: "micro_batch must …" becomes "--micro-batch must …"."""
    if not dataclasses.is_dataclass(kind):
        return message
    names = {f.name.replace("_", "-") for f in dataclasses.fields(kind)}
    group, _, rest = message.partition(": ")
    prefix, message = (f"{group}.", rest) if group in names else ("", message)
    first, space, rest = message.partition(" ")
    name = first.replace("_", "-")
    return f"--{prefix}{name}{space}{rest}" if prefix or name in names else message


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
