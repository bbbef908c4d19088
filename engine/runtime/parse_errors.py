"""What is wrong with a command line, in one line, from the events with which the parser says so.

These events, and the arguments that they name, are no part of tyro's public interface. This file alone knows them;
setup.py pins the version, and a test holds every event that is read here against the parser.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import tyro
from tyro import _errors
from tyro._arguments import ArgumentDefinition

# How alike an option must be to be proposed, and how many are that are not more than that.
ALIKE, MOST = 0.8, 3
# Names that other programs of this field have for an option, and what it may be called here.
SYNONYMS = {
    "outdir": ("out",),
    "output": ("out",),
    "output-dir": ("out",),
    "network": ("teacher", "model"),
    "checkpoint": ("teacher", "model"),
    "batch-size": ("batch",),
    "batch-gpu": ("micro-batch",),
    "learning-rate": ("lr",),
    "duration": ("kimg",),
    "epochs": ("kimg", "max-steps"),
    "num-steps": ("max-steps", "heun-steps"),
    "iterations": ("max-steps",),
    "fp16": ("precision",),
    "bf16": ("precision",),
    "mixed-precision": ("precision",),
    "cond": ("conditional",),
    "class": ("classes",),
    "num-samples": ("n", "images"),
    "num-images": ("n", "images", "eval-images"),
    "num": ("images", "max-images"),
    "dest": ("save-reference",),
    "ref": ("reference",),
    "cbase": ("model-channels",),
    "cres": ("channel-mult",),
    "snap": ("snapshot-every",),
    "dump": ("checkpoint-every",),
    "init-sigma": ("sigma-init",),
    "nblock": ("num-blocks",),
    "tick": ("log-every",),
    **dict.fromkeys(("desc", "name", "nosubdir", "save-images"), ("out",)),
    **dict.fromkeys(("aug-dim", "pfgmpp"), ("D",)),
    "lsun": ("noise.p-mean",),
    "tmax": ("noise.t-max",),
    "edm-model": ("teacher",),
    "data-stat": ("reference",),
    "g-beta1": ("generator-beta1",),
}
# Such names for what is no option here, and why.
UNNEEDED = {
    "ls": "there is none such: the loss scale of fp16 finds itself",
    "lsg": "there is none such: Adam does not see a factor of the loss",
    "bench": "there is none such: cuDNN chooses as PyTorch has it",
    "cache": "there is none such: images of up to 4 GB are held in memory",
    "workers": "there is none such: images are decoded by a thread for each core",
    "use-pickle": "there is none such: what a file is says its content",
}
# Options whose numbers are one word, with commas.
LISTS = ("--seeds", "--classes")
# The same for commands, which are short words.
ALIKE_COMMAND = 0.7
# The likeness of an option that begins or ends with what was given, or contains it.
PART = 0.9


# (an option's name without the hyphens) -> where it is an option, or what is done instead; None: nowhere.
Elsewhere = Callable[[str], str | None]


class ParseError(Exception):
    """A command line that cannot be read; the message is one line."""


def parse_errors(kind: Any, arguments: Sequence[str], elsewhere: Elsewhere) -> AbstractContextManager[None]:
    """A block in which `tyro.cli` raises `ParseError` in place of printing what is wrong and leaving.

    Args:
        kind: the dataclass of options that is read, or a union of them for subcommands.
        arguments: that it is read from.
        elsewhere: what to say of an option that this program does not have. A class of options may know better: its
            ELSEWHERE has such texts by the option's name.
    """

    def report(event: _errors.ParseErrorEvent) -> NoReturn:
        raise ParseError(_line(event, kind, arguments, elsewhere))

    return _errors.on_parse_error(report)


def check_command(commands: Any, arguments: Sequence[str], prog: str) -> None:
    """Check that a command line begins with a command.

    Args:
        commands: a union of dataclasses, each annotated with its name.
        arguments: the command line; one that is empty, or asks for help, is for the parser.
        prog: the program's name.

    Raises:
        ParseError: it does not; what is wrong, and which command was meant.
    """
    names = [about.name for _, about in map(get_args, get_args(commands))]
    if not arguments or arguments[0] in (*names, "-h", "--help"):
        return
    first, *rest = arguments
    if first.startswith("-"):
        command = next((word for word in rest if word in names), "COMMAND")
        raise ParseError(f"{first} is given before the command: options follow it, as in {prog} {command} ... {first}")
    near = difflib.get_close_matches(first.lower(), names, n=MOST, cutoff=ALIKE_COMMAND)
    hint = f"perhaps you meant {' or '.join(near)}" if near else f"possible: {', '.join(names)}"
    raise ParseError(f"unknown command {first}; {hint}")


def _line(event: _errors.ParseErrorEvent, kind: Any, arguments: Sequence[str], elsewhere: Elsewhere) -> str:
    match event:
        case _errors.UnrecognizedArgs():
            return _unrecognised(event.tokens, kind, arguments, elsewhere)
        case _errors.MissingArgs() | _errors.BadValue() if unknown := _unknown(kind, arguments):
            # What was typed in place of what is missing says more.
            return _unrecognised(unknown, kind, arguments, elsewhere)
        case _errors.MissingArgs():
            command = f"{event.prog} {event.missing_arguments[0].source_parser.prog_suffix}".strip()
            missing = [missing.arg for missing in event.missing_arguments]
            return f"{command} needs {' and '.join(map(_typed, missing))}{_as_in(missing[0], kind, arguments)}"
        case _errors.MissingSubcommand():
            return f"Expected one of {{{', '.join(event.subcommand_spec.parser_from_name)}}}"
        case _errors.BadValue():
            count = event.argument.lowered.nargs
            several = isinstance(count, int) and count > 1
            return f"{_shown(event.argument)} needs {f'{count} values' if several else 'a value'}"
        case _errors.InvalidChoice():
            # "None" is how an option is given that may be left out.
            possible = ", ".join(choice for choice in sorted(event.choices) if choice != "None")
            return f"{_shown(event.argument)} must be one of {possible}, got '{event.value}'{_apart(event)}"
        case _errors.InstantiationFailure(argument=None):
            return named(event.message, kind)
        case _errors.InstantiationFailure(argument=ArgumentDefinition() as argument):
            return f"{_shown(argument)} {event.message}"
    return "the arguments cannot be read"


def _apart(event: _errors.InvalidChoice) -> str:
    """How several are given that were typed as one, with commas between them."""
    parts = event.value.split(",")
    several = event.argument.lowered.nargs in ("*", "+") and len(parts) > 1
    return f"; give them apart: {' '.join(parts)}" if several and set(parts) <= set(event.choices) else ""


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


def _unrecognised(tokens: Sequence[str], kind: Any, arguments: Sequence[str], elsewhere: Elsewhere) -> str:
    unknown = [token for token in tokens if token.startswith("-")]
    if not unknown:
        return f"unexpected argument {tokens[0]}; {_hint_for_word(tokens[0], kind, arguments)}"
    options = _spellings(kind, arguments)
    hints: list[str] = []
    proposed: list[str] = []

    def add(hint: str, token: str) -> None:
        # Of several options, which one is meant.
        hints.append(hint if len(unknown) == 1 else f"{token.partition('=')[0]}: {hint}")

    for token in unknown:
        name = _name(token)
        if said := getattr(_options(kind, arguments), "ELSEWHERE", {}).get(name):
            add(said, token)
        elif same := [f"--{known}" for known in SYNONYMS.get(name, ()) if any(f"--{known}" in one for one in options)]:
            proposed += same
        elif name in UNNEEDED:
            add(UNNEEDED[name], token)
        else:
            known_here = any(f"--{name}" in option for option in options)
            if found := None if known_here else _found_elsewhere(name, kind, elsewhere):
                add(found, token)
            proposed += [spelling for option in _alike(token, options) for spelling in option]
    if proposed:
        hints.append(f"perhaps you meant {' or '.join(dict.fromkeys(proposed))}")
    return f"unknown option {', '.join(unknown)}; {'; '.join(dict.fromkeys(hints)) or '--help lists all'}"


def _hint_for_word(word: str, kind: Any, arguments: Sequence[str]) -> str:
    before = dict(zip(arguments[1:], arguments, strict=False)).get(word, "")
    switches = next((names for names in _spellings(kind, arguments) if before in names and len(names) > 1), None)
    if switches is not None:
        # EDM's programs have a file there.
        more = "; --continue-from takes a file" if before == "--resume" and hasattr(kind, "continue_from") else ""
        return f"{before} takes no value: {' or '.join(switches)}{more}"
    if (numbers := _numbers_before(word, arguments)) and numbers[0] in LISTS:
        return f"{numbers[0]} takes one word: {','.join(numbers[1:])}"
    if re.match("[\u2010-\u2015\u2212]", word):  # as web pages and word processors have them
        return "an option begins with two plain hyphens, --"
    return "--help lists all"


def _numbers_before(word: str, arguments: Sequence[str]) -> list[str]:
    """The option before `word` and what was given to it, where these are numbers and ranges alone; else nothing."""
    place = list(arguments).index(word) if word in arguments else 0
    starts = [i for i, argument in enumerate(arguments[:place]) if argument.startswith("--")]
    rest = list(arguments[starts[-1] :]) if starts else []
    end = next((i for i, argument in enumerate(rest) if i and not re.fullmatch(r"\d[\d,-]*", argument)), len(rest))
    return rest[:end] if starts and starts[-1] + end > place else []


def _found_elsewhere(name: str, kind: Any, elsewhere: Elsewhere) -> str | None:
    """Where an option of exactly this name is, that the command at hand does not have."""
    having = [
        about.name
        for command, about in ([] if dataclasses.is_dataclass(kind) else map(get_args, get_args(kind)))
        if name in _paths(command)
    ]
    return f"{', '.join(having)} {'has' if len(having) == 1 else 'have'} it" if having else elsewhere(name)


def _name(token: str) -> str:
    """An option's name as --help has it: --micro_batch=4 is micro-batch."""
    return token.partition("=")[0].lstrip("-").replace("_", "-")


def _unknown(kind: Any, arguments: Sequence[str]) -> list[str]:
    """The options that were given and are none: no value of an option begins like one, but for numbers."""
    known = {_name(spelling) for names in _spellings(kind, arguments) for spelling in names} | {"help", "h"}
    given = [argument for argument in arguments if re.match(r"--?[A-Za-z]", argument)]
    return [
        token
        for token in given
        if (_name(token) not in known if token.startswith("--") else token not in ("-h", "-inf", "-nan"))
    ]


def _as_in(missing: ArgumentDefinition, kind: Any, arguments: Sequence[str]) -> str:
    """How what was typed without the name of a missing option is typed with it."""
    if missing.is_positional() or dataclasses.is_dataclass(kind) or len(arguments) < 2 or arguments[1].startswith("-"):
        return ""
    return f", as in {missing.lowered.name_or_flags[0]} {arguments[1]}"


def _alike(token: str, options: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The options that look like `token`, the likest first."""
    given = token.partition("=")[0].replace("_", "-").lower()
    if not given.startswith("--"):
        given = f"-{given}"  # -n, of other programs
    word = given.removeprefix("--")

    def likeness(option: tuple[str, ...]) -> float:
        if len(word) > 1 and any(word in name for name in option):
            return PART
        return max(difflib.SequenceMatcher(a=given, b=name.lower()).ratio() for name in option)

    values = {option: likeness(option) for option in options} if word else {}
    if exact := [option for option in options if given in (name.lower() for name in option)]:
        return exact
    likely = sorted((o for o in values if values[o] >= ALIKE), key=lambda option: (-values[option], option))
    return [option for place, option in enumerate(likely) if place < MOST or values[option] >= PART]


def _options(kind: Any, arguments: Sequence[str]) -> Any:
    """The class of the options that a command line is read by; None where it names no command."""
    if dataclasses.is_dataclass(kind):
        return kind
    commands = {about.name: command for command, about in map(get_args, get_args(kind))}
    return commands.get(arguments[0]) if arguments else None


def _spellings(kind: Any, arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """How each option of the command is typed: --name, or --name and --no-name."""
    if not dataclasses.is_dataclass(kind):
        named = _options(kind, arguments)
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


def _shown(argument: ArgumentDefinition) -> str:
    """An argument's name in a sentence: "--model", "MODEL"."""
    return str(argument.lowered.metavar) if argument.is_positional() else argument.display_name()


def _typed(argument: ArgumentDefinition) -> str:
    """An argument as --help shows it: "--model STR", "MODEL"."""
    if argument.is_positional():
        return str(argument.lowered.metavar)
    return f"{', '.join(argument.lowered.name_or_flags)} {argument.lowered.metavar or ''}".strip()
