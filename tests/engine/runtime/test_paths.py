"""Paths as they are typed: a home folder, an unset variable, a URL; alike in every command and recipe."""

import dataclasses
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import tyro

from ipfm.engine.commands.main import Command
from ipfm.engine.commands.sample.command import Sample
from ipfm.engine.experiments.teacher import TeacherOptions
from ipfm.engine.objectives.pid import PidConfig
from ipfm.engine.runtime.commandline import BadInput, parse, parse_given
from ipfm.recipes.digits_ipfm import RECIPE as DIGITS


def paths_of(kind: type) -> dict[str, bool]:
    """Options that take a path, and whether each is a positional argument."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        markers = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        inner = get_args(hint)[0] if markers else hint
        if inner is Path or Path in get_args(inner):
            found[name] = tyro.conf.Positional in markers
    return {f.name: found[f.name] for f in dataclasses.fields(kind) if f.name in found}


COMMANDS = {about.name: kind for kind, about in map(get_args, get_args(Command))}
OF_COMMANDS = [
    (command, name, positional) for command, kind in COMMANDS.items() for name, positional in paths_of(kind).items()
]
OF_RECIPES = [
    (kind, name) for kind in (type(DIGITS.base), TeacherOptions, PidConfig) for name in paths_of(kind)
]  # fmt: skip


def test_every_kind_of_path_is_looked_at():
    assert {
        ("sample", "out"),
        ("sample", "model"),
        ("evaluate", "reference"),
        ("dataset", "out"),
        ("bench", "out"),
    } <= {(command, name) for command, name, _ in OF_COMMANDS}
    assert {"out", "teacher", "reference", "inception", "data", "continue_from", "lpips"} <= {n for _, n in OF_RECIPES}


# What a command needs besides paths.
NEEDED = {"new": ["objective", "mine"]}


def given(command: str, name: str, positional: bool, path: str):
    """The option, where the command is given `path` for it, and some other path for what else it needs."""
    others = [n for n, is_positional in paths_of(COMMANDS[command]).items() if is_positional]
    arguments = [*NEEDED.get(command, []), *(path if n == name else "x" for n in others)]
    arguments += [] if positional else [f"--{name.replace('_', '-')}={path}"]
    found = getattr(parse(Command, [command, *arguments], prog="ipfm", description=""), name)
    if isinstance(found, tuple):  # several paths, of which one is given
        (found,) = found
    return found


@pytest.mark.parametrize(("command", "name", "positional"), OF_COMMANDS, ids=lambda part: str(part))
def test_a_command_expands_the_home_folder_and_refuses_an_empty_path(monkeypatch, command, name, positional):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert given(command, name, positional, "~/runs/a.b") == Path("/home/somebody/runs/a.b")
    with pytest.raises(BadInput, match=r"must name a path, got an empty text: is a variable not set?"):
        given(command, name, positional, "")


@pytest.mark.parametrize(("kind", "name"), OF_RECIPES, ids=lambda part: getattr(part, "__name__", part))
def test_a_recipe_expands_the_home_folder_and_refuses_an_empty_path(monkeypatch, kind, name):
    monkeypatch.setenv("HOME", "/home/somebody")
    default = DIGITS.base if kind is type(DIGITS.base) else kind()
    option = f"--{name.replace('_', '-')}"

    def read(path: str):
        # What else the option needs is none of its business.
        more = ["--reference=x", "--features=inception"] if name == "inception" else []
        needed = {
            "reference": ["--features=pixels"],
            "lpips": ["--distance=lpips"],
            "dinov2": ["--reference=x", "--features=dinov2"],
            "guide": ["--guidance=1.4"],
        }
        more = needed.get(name, more)
        return parse_given([f"{option}={path}", *more], default=default, prog="x", description="").options

    assert getattr(read("~/a"), name) == Path("/home/somebody/a")
    with pytest.raises(BadInput, match=f"{option} must name a path, got an empty text: is a variable not set?"):
        read("")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://nvlabs-fi-cdn.nvidia.com/edm/a.pkl", "MODEL must be a path on this machine, got https://nvlabs"),
        ("s3://bucket/a.pkl", "MODEL must be a path on this machine, got s3://bucket/a.pkl: download it first"),
        ("   ", "MODEL must name a path, got an empty text"),
        ("~nobody-of-this-name/a", "MODEL begins with the home folder of a user who is not known here: ~nobody-of"),
    ],
)
def test_what_is_no_path_here(text, said):
    with pytest.raises(BadInput) as error:
        parse(Command, ["sample", text], prog="ipfm", description="")
    assert str(error.value).startswith(said)


def test_a_tilde_inside_a_name_is_a_name():
    assert parse(Sample, ["a~b", "--out=./~"], prog="ipfm", description="").out == Path("~")


def test_lists_of_paths():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Several:
        """Several."""

        files: tuple[Path, ...] = ()
        """Files."""

    assert parse(Several, ["--files", "~", "b"], prog="x", description="").files == (Path.home(), Path("b"))
    with pytest.raises(BadInput, match=r"--files must name a path, got an empty text: is a variable not set\?"):
        parse(Several, ["--files", "a", ""], prog="x", description="")
