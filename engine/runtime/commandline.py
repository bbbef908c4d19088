"""Command lines: typed options from a dataclass, errors of one line, exit codes.

Exit codes: 0 done; 2 bad input, nothing was written; 1 the run failed: a line says why and where to continue;
128 + n stopped by signal n, the state of a training saved; 141, without a word, where nobody reads what is printed
(`| head`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from ipfm.engine.runtime import peers
from ipfm.engine.runtime.errors import Failed, FolderInUse, Interrupted, ProcessLost, TrainingFailed, described
from ipfm.engine.runtime.host_memory import not_enough
from ipfm.engine.runtime.launcher import is_first_here, is_first_process, lost_process
from ipfm.engine.runtime.stdio import usable_streams

T = TypeVar("T")
BAD_INPUT, FAILED = 2, 1
# Where the code of this project is, from the package's folder.
ROOMS = ("engine", "kernels", "models", "recipes")
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
        raise BadInput(described(error) if isinstance(error, OSError) else str(error)) from error


@dataclass(frozen=True)
class Given(Generic[T]):
    """What a command line gives, to be laid over the defaults that follow from a part of it."""

    options: T
    """The options, with the defaults that the command line was read with."""
    names: frozenset[str]
    """Fields of those that were given; one of a group as "group.field"."""

    def over(self, default: T) -> T:
        """The options that were given, and for the others those of `default`.

        Args:
            default: of the same class. Of two fields that exclude each other (the class's ALTERNATIVES) the one that is
                given counts.

        Raises:
            BadInput: they do not go together.
        """
        values: dict[str, Any] = {}
        groups: dict[str, dict[str, Any]] = {}
        for name in self.names:
            group, _, field = name.rpartition(".")
            holder, held = (
                (getattr(self.options, group), groups.setdefault(group, {})) if group else (self.options, values)
            )
            held[field] = getattr(holder, field)
        try:
            values |= {group: dataclasses.replace(getattr(default, group), **held) for group, held in groups.items()}
            return dataclasses.replace(_giving_way(default, self.names), **values)  # type: ignore[type-var]
        except ValueError as error:
            from ipfm.engine.runtime.parse_errors import named

            raise BadInput(named(str(error), type(default))) from error


def nowhere(name: str) -> str | None:
    """Of an option that a program does not have: nothing is known."""
    return None


def parse(
    kind: type[T],
    argv: Sequence[str],
    *,
    default: T | None = None,
    prog: str,
    description: str,
    elsewhere: Callable[[str], str | None] = nowhere,
) -> T:
    """Read a dataclass of options from the command line.

    Args:
        kind: the dataclass, or a union of them for subcommands.
        argv: arguments without the program's name. DeepSpeed's --local_rank=N is accepted and ignored.
        default: values of options that are not given; None takes the class's own. Of two that exclude each other (the
            class's ALTERNATIVES) the one that is given counts.
        prog: the program's name in messages.
        description: what --help says first.
        elsewhere: what to say of an option, by its name, that is none of these: where it is one.

    Raises:
        BadInput: an unknown option or an impossible value; the message is one line and names the option as it is typed.
        SystemExit: --help was asked for; the first process has printed it.
    """
    arguments = without_local_rank(argv)
    if default is not None:
        default = _giving_way(default, _names(kind, arguments))
    return _read(kind, arguments, default, prog, description, elsewhere)


def parse_given(
    argv: Sequence[str],
    *,
    default: T,
    prog: str,
    description: str,
    elsewhere: Callable[[str], str | None] = nowhere,
) -> Given[T]:
    """As `parse`, where other defaults may follow from what is given.

    Args:
        argv: see `parse`.
        default: values of options that are not given, which --help shows too.
        prog: see `parse`.
        description: see `parse`.
        elsewhere: see `parse`.

    Raises:
        BadInput: see `parse`.
        SystemExit: see `parse`.
    """
    kind, arguments = type(default), without_local_rank(argv)
    names = _names(kind, arguments)
    return Given(_read(kind, arguments, _giving_way(default, names), prog, description, elsewhere), names)


def _read(
    kind: type[T],
    arguments: Sequence[str],
    default: T | None,
    prog: str,
    description: str,
    elsewhere: Callable[[str], str | None],
) -> T:
    import tyro

    from ipfm.engine.runtime.option_help import Shown, registry
    from ipfm.engine.runtime.parse_errors import ParseError, check_command, parse_errors

    shown = Shown(sys.stdout)
    # Options of a subcommand are off unless they are given; a recipe may have some of its own on.
    single = () if dataclasses.is_dataclass(kind) else (tyro.conf.FlagCreatePairsOff,)
    keywords = {} if default is None else {"default": default}
    with _environment(COLUMNS=str(HELP_WIDTH)):
        try:
            if not dataclasses.is_dataclass(kind):
                check_command(kind, arguments, prog)
            with contextlib.redirect_stdout(shown), parse_errors(kind, arguments, elsewhere):
                options = tyro.cli(  # type: ignore[call-overload]
                    kind,
                    args=arguments,
                    prog=prog,
                    description=description,
                    config=single,
                    registry=registry(),
                    **keywords,
                )
        except ParseError as error:
            raise BadInput(str(error)) from None
        except SystemExit as stop:
            if not stop.code and is_first_process():
                sys.stdout.write(shown.tidied(HELP_WIDTH))
            raise
    _check_lists(options, _names(type(options), arguments))
    return options


def _check_lists(options: Any, given: Collection[str]) -> None:
    """BadInput where an option that takes any number of values was given none."""
    for f in dataclasses.fields(options):
        if f.name in given and getattr(options, f.name) == ():
            raise BadInput(f"--{f.name.replace('_', '-')} needs a value")


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
    peers.call(name)
    before, warnings.formatwarning = warnings.formatwarning, partial(_warning_of, name, warnings.formatwarning)
    try:
        os.getcwd()
    except OSError:
        # Libraries look for it when they are loaded, and end the process without a word that helps.
        _complain(f"{name}: error: the current folder is gone: go to another one")
        sys.exit(BAD_INPUT)
    try:
        try:
            main(sys.argv[1:] if argv is None else argv)
        except BaseException as error:
            peers.claim(
                error, _exit_code(error), known=_is_known(error), lost=_lost(error), said=_said_by_the_first(error)
            )
            raise
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
        _complain(f"{name}: failed: {error}", everyone=peers.speaks())
        sys.exit(FAILED)
    except Failed as error:
        _complain(f"{name}: failed: {error}", everyone=error.alone)
        sys.exit(FAILED)
    except (MemoryError, ImportError) as error:
        # A library that cannot be loaded for want of memory is an ImportError; another one is a defect.
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):
            raise
        # Of the host; what asks for much of it says the way on itself.
        _complain(f"{name}: failed: {not_enough(error)}", everyone=True)
        sys.exit(FAILED)
    except (RuntimeError, OSError) as error:
        if isinstance(error, OSError) and (_no_room(error) or error.errno == errno.EROFS):
            where = f" {error.filename}" if error.filename else ""
            _complain(f"{name}: failed: cannot write{where}: {error.strerror}", everyone=True)
        elif reason := lost_process(error):
            message = f"another process of this run has ended or does not answer ({reason})"
            _complain(f"{name}: failed: {message}", everyone=peers.speaks())
        elif isinstance(error, OSError) and error.filename and error.strerror:
            _complain(f"{name}: failed: {error.filename}: {error.strerror}", everyone=True)
        else:
            raise
        sys.exit(FAILED)
    except Interrupted as stop:
        _complain(f"{name}: {stop}; the same command continues")
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt as stop:
        _complain(f"{name}: interrupted{f'; {stop}' if str(stop) else ''}")
        sys.exit(130)
    finally:
        # Only where a run has started: a process group that is left open warns at exit.
        if "torch.distributed" in sys.modules:
            from ipfm.engine.runtime.launcher import stop_world

            stop_world()
        warnings.formatwarning = before


def _exit_code(error: BaseException) -> int:
    """What `run_command` makes of it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED if error.code else 0
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return 128 + getattr(error, "signum", signal.SIGINT)
    return BAD_INPUT if isinstance(error, (BadInput, FolderInUse)) else FAILED


def _is_known(error: BaseException) -> bool:
    """Whether every process of the run ends by this error, of which they have told each other."""
    if isinstance(error, TrainingFailed):
        return not (error.alone or isinstance(error, ProcessLost))
    return isinstance(error, Interrupted) or (isinstance(error, SystemExit) and not error.code)


def _lost(error: BaseException) -> str:
    """What is wrong with another process, if the error tells of one."""
    cause = error.__cause__ if isinstance(error, ProcessLost) else error
    return "" if cause is None else lost_process(cause)


def _said_by_the_first(error: BaseException) -> str:
    """The line of an error that the first process alone says, and another one may have alone."""
    of_one = isinstance(error, (BadInput, FolderInUse)) or (isinstance(error, Failed) and not error.alone)
    return " ".join(str(error).split()) if of_one and not isinstance(error, ProcessLost) else ""


def _warning_of(
    prog: str, usual: Callable[..., str], message: Warning | str, kind: type[Warning], file: str, *where: Any
) -> str:
    """A warning of this project as the line that it is; others as they come, with their place in the code."""
    with contextlib.suppress(ValueError):
        if Path(file).resolve().relative_to(Path(__file__).resolve().parents[2]).parts[0] in ROOMS:
            return f"{prog}: note: {message}\n"
    return usual(message, kind, file, *where)


def _complain(line: str, details: str = "", *, everyone: bool = False) -> None:
    """One process of a machine speaks for all, unless it is said that `everyone` does."""
    if everyone or is_first_here():
        # The exit code says it too, where stderr takes nothing.
        with contextlib.suppress(OSError):
            print(" ".join(part.strip() for part in line.splitlines()), file=sys.stderr, flush=True)
            peers.told()
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


def _names(kind: Any, arguments: Sequence[str]) -> frozenset[str]:
    """The fields of a dataclass that are given: no value of an option begins as an option does."""
    known = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    options = (argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--"))
    return frozenset(name if name in known or "." in name else name.removeprefix("no_") for name in options)


def _giving_way(default: T, given: Collection[str]) -> T:
    """`default` without what excludes an option that is given."""
    for pair in getattr(default, "ALTERNATIVES", ()):
        for name, other in (pair, pair[::-1]):
            if other in given and name not in given:
                default = dataclasses.replace(default, **{name: None})  # type: ignore[type-var]
    return default


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
