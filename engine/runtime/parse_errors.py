"""What is wrong with a command line, in one line, from the events with which the parser says so.

These events, and the arguments that they name, are no part of tyro's public interface. This file alone knows them;
setup.py pins the version, and a test holds every event that is read here against the parser.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import tyro
from tyro import _errors
from tyro._arguments import ArgumentDefinition

# How alike an option must be to be proposed, and how many are that are not more than that.
ALIKE, MOST = 0.8, 3
# The likeness of an option that begins or ends with what was given, or contains it.
PART = 0.9


class ParseError(Exception):
    """A command line that cannot be read; the message is one line."""


def parse_errors(kind: Any, arguments: Sequence[str]) -> AbstractContextManager[None]:
    """A block in which `tyro.cli` raises `ParseError` in place of printing what is wrong and leaving.

    Args:
        kind: the dataclass of options that is read, or a union of them for subcommands.
        arguments: that it is read from.
    """

    def report(event: _errors.ParseErrorEvent) -> NoReturn:
        raise ParseError(_line(event, kind, arguments))

    return _errors.on_parse_error(report)


def _line(event: _errors.ParseErrorEvent, kind: Any, arguments: Sequence[str]) -> str:
    match event:
        case _errors.UnrecognizedArgs():
            return _unrecognised(event.tokens, kind, arguments)
        case _errors.MissingArgs():
            command = f"{event.prog} {event.missing_arguments[0].source_parser.prog_suffix}".strip()
            return f"{command} needs {' and '.join(_typed(missing.arg) for missing in event.missing_arguments)}"
        case _errors.MissingSubcommand():
            return f"Expected one of {{{', '.join(event.subcommand_spec.parser_from_name)}}}"
        case _errors.BadValue():
            return f"{event.argument.display_name()} needs a value"
        case _errors.InvalidChoice():
            possible = ", ".join(sorted(event.choices))
            return f"{event.argument.display_name()} must be one of {possible}, got '{event.value}'"
        case _errors.InstantiationFailure(argument=None):
            return named(event.message, kind)
        case _errors.InstantiationFailure(argument=ArgumentDefinition() as argument):
            name = argument.lowered.metavar if argument.is_positional() else argument.display_name()
            return f"{name} {event.message}"
    return "the arguments cannot be read"


def named(message: str, kind: Any) -> str:
    """A setting's own message with the option in front: "micro_batch must …" becomes "--micro-batch must …".

    Args:
        message: begins with the name of a field of `kind`, or of one of its groups; any other is returned as it is.
        kind: the dataclass of options; for a union nothing is changed.
    """
    first, space, rest = message.partition(" ")
    name = first.replace("_", "-")
    # Where a group has a name too that the options themselves have, theirs counts.
    paths = sorted(_paths(kind), key=lambda path: -path.count(".")) if dataclasses.is_dataclass(kind) else []
    options = {path.rpartition(".")[2]: path for path in paths}
    return f"--{options[name]}{space}{rest}" if name in options else message


def _unrecognised(tokens: Sequence[str], kind: Any, arguments: Sequence[str]) -> str:
    unknown = [token for token in tokens if token.startswith("-")]
    options = _spellings(kind, arguments)
    proposed = [name for token in unknown for option in _alike(token, options) for name in option]
    hint = f"perhaps you meant {' or '.join(dict.fromkeys(proposed))}" if proposed else "--help lists all"
    return f"unknown option {', '.join(unknown)}; {hint}" if unknown else f"unexpected argument {tokens[0]}; {hint}"


def _alike(token: str, options: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The options that look like `token`, the likest first."""
    given = token.partition("=")[0]
    word = given.removeprefix("--")

    def likeness(option: tuple[str, ...]) -> float:
        if any(name.endswith(word) or (len(word) > 1 and word in name) for name in option):
            return PART
        return max(difflib.SequenceMatcher(a=given, b=name).ratio() for name in option)

    values = {option: likeness(option) for option in options} if word and given.startswith("--") else {}
    likely = sorted((o for o in values if values[o] >= ALIKE), key=lambda option: (-values[option], option))
    return [option for place, option in enumerate(likely) if place < MOST or values[option] >= PART]


def _spellings(kind: Any, arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """How each option of the command is typed: --name, or --name and --no-name."""
    if not dataclasses.is_dataclass(kind):
        commands = {about.name: command for command, about in map(get_args, get_args(kind))}
        named = commands.get(arguments[0]) if arguments else None
        return [] if named is None else [(f"--{path}",) for path in _paths(named)]
    switches = {name.replace("_", "-") for name, (hint, _) in _hints(kind).items() if hint is bool}
    return [(f"--{path}", f"--no-{path}") if path in switches else (f"--{path}",) for path in _paths(kind)]


def _paths(kind: Any) -> Iterator[str]:
    """Names of the options of a dataclass, as they are typed after "--": micro-batch, noise.p-mean."""
    for name, (kind_of, markers) in _hints(kind).items():
        option = name.replace("_", "-")
        if dataclasses.is_dataclass(kind_of):
            yield from (f"{option}.{path}" for path in _paths(kind_of))
        elif tyro.conf.Positional not in markers:
            yield option


def _hints(kind: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Field -> (its type, what it is annotated with)."""
    hints = get_type_hints(kind, include_extras=True)
    hints = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    return {
        name: (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
        for name, hint in hints.items()
    }


def _typed(argument: ArgumentDefinition) -> str:
    """An argument as --help shows it: "--model STR", "MODEL"."""
    if argument.is_positional():
        return str(argument.lowered.metavar)
    return f"{', '.join(argument.lowered.name_or_flags)} {argument.lowered.metavar or ''}".strip()
