"""Command lines: one line for every mistake, exit codes, the launcher's argument, --help."""

import ast
import contextlib
import errno
import inspect
import io
import itertools
import os
import re
import signal
import sys
import warnings
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import tyro

from ipfm.engine.config import RunConfig, TeacherConfig
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.objectives.student_settings import StudentConfig
from ipfm.engine.runtime import commandline, launcher, parse_errors
from ipfm.engine.runtime.commandline import BadInput, parse, run_command, user_input
from ipfm.engine.runtime.errors import FolderInUse, Interrupted, TrainingFailed
from ipfm.engine.runtime.host_memory import not_enough

BASE = DistillConfig(D=128.0, max_steps=10, sigma_init=3.0)


def read(line: str, kind: type = DistillConfig, default: object = BASE):
    return parse(kind, line.split(), default=default, prog="recipe.py", description="What it does.")


# -- reading options ---------------------------------------------------------------------------------------------------


def test_options_replace_the_defaults():
    config = read("--alpha -0.5 --sigmas 2.5 1.25 --seed 7 --no-resume --noise.p-mean -1 --D inf --out runs/a --zero 1")
    assert config == replace(
        BASE, alpha=-0.5, sigmas=(2.5, 1.25), seed=7, resume=False, D=float("inf"), out=Path("runs/a"), zero=1,
        noise=replace(BASE.noise, p_mean=-1.0),
    )  # fmt: skip
    assert read("") == BASE
    assert parse(TeacherConfig, [], prog="x", description="") == TeacherConfig()


@pytest.mark.parametrize("line", ["--micro-batch 4", "--micro_batch 4", "--micro-batch=4", "--micro_batch=4"])
def test_spellings(line):
    assert read(line).micro_batch == 4


@pytest.mark.parametrize("argument", ["--local_rank=0", "--local_rank 3", "--local-rank=3", "--local-rank 0"])
@pytest.mark.parametrize(
    "line", ["{} --seed 3", "--seed 3 {}", "--seed 3 --local_rank=-1 {}", "{} --seed 3 --local_rank"]
)
def test_the_launchers_argument_is_ignored(argument, line):
    assert read(line.format(argument)) == replace(BASE, seed=3)


@pytest.mark.parametrize("line", ["--kimg 2", "--kimg=2", "--kimg 2 --max-steps None"])
def test_a_length_given_replaces_the_other_kind_of_default(line):
    config = read(line)
    assert (config.kimg, config.max_steps) == (2.0, None)
    back = read("--max_steps 5", default=config)
    assert (back.kimg, back.max_steps) == (None, 5)


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    # an unknown option, with the near one
    "--sedd 3": "unknown option --sedd; perhaps you meant --seed",
    "--no-resum": "unknown option --no-resum; perhaps you meant --resume or --no-resume",
    "--zzzz": "unknown option --zzzz; --help lists all",
    "--seed 3 --zzzz=4 --qqqq 5": "unknown option --zzzz=4, --qqqq; --help lists all",
    "stray": "unexpected argument stray; --help lists all",
    "--tf32 false": "unexpected argument false; --tf32 takes no value: --tf32 or --no-tf32",
    "-seed 3": "unknown option -seed; perhaps you meant --seed",
    "--SEED 3": "unknown option --SEED; perhaps you meant --seed",
    "—seed 3": "unexpected argument —seed; an option begins with two plain hyphens, --",
    # a value of the wrong type, or none
    "--batch x": "--batch takes a whole number, got 'x'",
    "--batch 1.5": "--batch takes a whole number, got '1.5'",
    "--batch=": "--batch takes a whole number, got ''",
    "--lr fast": "--lr takes a number, got 'fast'",
    "--micro_batch x": "--micro-batch takes a whole number, got 'x'",
    "--D abc": "--D takes a number, got 'abc'",
    "--sigmas 1 x": "--sigmas takes numbers, got '1', 'x'",
    "--sigmas 2,1": "--sigmas takes numbers, separated by spaces, got '2,1'",
    # numbers that Python takes for others, or is alone to know
    "--D 1e400": "--D is too large a number, got 1e400; inf is infinity",
    "--lr 1e-400": "--lr is too small a number, got 1e-400",
    "--sigmas 1e999 1": "--sigmas is too large a number, got 1e999; inf is infinity",
    "--alpha 1_0.5": "--alpha takes a number, got '1_0.5': write 10.5",
    "--alpha 1,5": "--alpha takes a number, got '1,5': write 1.5",
    "--alpha \uff11": "--alpha takes a number, got '\uff11': write 1",
    "--seed 1_000": "--seed takes a whole number, got '1_000': write 1000",
    "--batch 4,096": "--batch takes a whole number, got '4,096': write 4096",
    "--max-steps 1e6": "--max-steps takes a whole number, got '1e6': write 1000000",
    "--batch \u0664\u0668": "--batch takes a whole number, got '\u0664\u0668'",
    "--noise.rho x": "--noise.rho takes a number, got 'x'",
    "--batch": "--batch needs a value",
    "--D --seed 3": "--D needs a value",
    "--sigmas": "--sigmas needs a value",
    "--seed 3 --sigmas --no-resume": "--sigmas needs a value",
    "--precision fp8": "--precision must be one of auto, bf16, fp16, fp32, got 'fp8'",
    "--zero 5": "--zero must be one of 0, 1, 2, 3, got '5'",
    # values that the configuration refuses
    "--batch 0": "--batch must be an integer >= 1, got 0",
    "--batch -3": "--batch must be an integer >= 1, got -3",
    "--micro-batch 0": "--micro-batch must be an integer >= 1, got 0",
    "--D -1": "--D must lie in (0, inf], got -1.0",
    "--D nan": "--D must lie in (0, inf], got nan",
    "--alpha nan": "--alpha must be a number in [-1e+06, 1e+06], got nan",
    "--lr 0": "--lr must be a finite number > 0, got 0.0",
    "--student_lr inf": "--student-lr must be a finite number > 0, got inf",
    "--ema-kimg -1": "--ema-kimg must be a finite number > 0, got -1.0",
    "--sigmas 1 2": "--sigmas must fall strictly, got 1, 2",
    "--steps 3 --sigmas 2 1": "--steps and sigmas disagree: 3 steps, 2 noise levels",
    "--max-steps 3 --kimg 2": "--max-steps and kimg exclude each other, got 3 and 2.0",
    "--kimg 1e308": "--kimg must be at most 100,000,000 optimiser steps, got 1e+308",
    "--seed 99999999999999999999": "--seed must be below 2^64, got 99999999999999999999",
    "--offload optimizer --zero 0": "--offload optimizer needs zero 1, 2 or 3, got 0",
    "--noise.sigma-min -1": "--noise.sigma-min must be a finite number > 0, got -1.0",
    "--noise.sigma_min 90": "--noise.sigma-min must be below sigma_max, got 90.0 and 80.0",
    "--noise.t-max 0": "--noise.t-max must lie in (0, 1000], got 0.0",
}


@pytest.mark.quick
@pytest.mark.parametrize(("line", "message"), MISTAKES.items())
def test_a_mistake_is_one_line(line, message, capfd):
    with pytest.raises(SystemExit) as stop:
        run_command("recipes/recipe.py", lambda argv: read(" ".join(argv)), line.split())
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"recipe.py: error: {message}\n")


@pytest.mark.parametrize("line", ["--max-step 5 --lrr 3"])
def test_every_unknown_option_gets_its_proposals(line):
    with pytest.raises(BadInput) as error:
        read(line)
    unknown, _, proposals = str(error.value).partition("; perhaps you meant ")
    assert unknown == "unknown option --max-step, --lrr"
    assert {"--max-steps", "--lr"} <= set(proposals.split(" or "))


@pytest.mark.parametrize(("line", "message"), MISTAKES.items())
def test_messages_do_not_depend_on_the_locale(line, message):
    """On a terminal that is not UTF-8 the parser draws its boxes in ASCII."""
    ascii_out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(ascii_out), pytest.raises(BadInput) as error:
        read(line)
    assert str(error.value) == message


EVENTS = {
    "UnrecognizedArgs": {"prog", "tokens"},
    "MissingArgs": {"prog", "missing_arguments"},
    "MissingSubcommand": {"prog", "subcommand_spec"},
    "BadValue": {"prog", "argument"},
    "InvalidChoice": {"prog", "argument", "value", "choices"},
    "InstantiationFailure": {"prog", "message", "argument"},
}


@pytest.mark.parametrize("name", EVENTS)
def test_the_parser_still_says_what_is_read_of_it(name):
    """tyro's error events are private: another version than the pinned one may have others."""
    event = getattr(tyro._errors, name, None)
    assert event is not None and issubclass(event, tyro._errors.ParseErrorEvent), f"tyro has no event {name} any more"
    assert EVENTS[name] <= {f.name for f in fields(event)}, f"{name} of tyro says other things than it did"


@pytest.mark.parametrize("surroundings", [{"COLUMNS": "20"}, {"COLUMNS": "500"}, {"FORCE_COLOR": "1", "TERM": "xterm"}])
@pytest.mark.parametrize(("line", "message"), MISTAKES.items())
def test_messages_do_not_depend_on_the_terminal(line, message, surroundings, monkeypatch, capfd):
    """They are not read out of what the parser would print, which is nothing."""
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput) as error:
        read(line)
    assert str(error.value) == message
    assert capfd.readouterr() == ("", "")


def test_no_regular_expression_reads_a_message():
    """Of printed text, --help alone is touched up."""
    for module in (commandline, parse_errors):
        text = Path(module.__file__).read_text(encoding="utf-8")
        assert not re.search("[\u2500-\u257f]|\\\\x1b", text), module.__name__
        assert "redirect_stderr" not in text, module.__name__


def test_a_narrow_terminal_does_not_break_messages(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(BadInput) as error:
        read("--kimg 1e308")
    assert str(error.value) == MISTAKES["--kimg 1e308"]
    assert os.environ["COLUMNS"] == "40"


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Draw images."""

    ELSEWHERE: ClassVar[dict[str, str]] = {"steps": "the number of steps is the model's own"}

    model: tyro.conf.Positional[Path]
    """Where the model lies."""
    n: int = 4
    """How many."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan memory."""

    model: str
    """Which model."""
    zero: Literal[0, 1] = 0
    """Stage."""


COMMANDS = Annotated[Draw, tyro.conf.subcommand("draw")] | Annotated[Plan, tyro.conf.subcommand("plan")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("drow", "unknown command drow; perhaps you meant draw"),
        ("DRAW a", "unknown command DRAW; perhaps you meant draw"),
        ("paint a --n 3", "unknown command paint; possible: draw, plan"),
        ("--n 4 draw a", "--n is given before the command: options follow it, as in ipfm draw ... --n"),
        ("--n=4", "--n=4 is given before the command: options follow it, as in ipfm COMMAND ... --n=4"),
        ("draw", "ipfm draw needs PATH"),
        ("plan", "ipfm plan needs --model STR"),
        ("plan --modle x", "unknown option --modle; perhaps you meant --model"),
        ("plan x --zero 1", "ipfm plan needs --model STR, as in --model x"),
        ("draw -n 4 a", "unknown option -n; perhaps you meant --n"),
        ("draw a --nn 3", "unknown option --nn; perhaps you meant --n"),
        ("draw a b", "unexpected argument b; --help lists all"),
        # an option of another subcommand, which is said, and one like it, which is not proposed
        ("draw a --zero 1", "unknown option --zero; plan has it"),
        ("draw a --steps 1", "unknown option --steps; the number of steps is the model's own"),
        ("draw a --alpha 1", "unknown option --alpha; recipes have it"),
        ("draw a --zeroo 1", "unknown option --zeroo; --help lists all"),
        ("", "Expected one of {draw, plan}"),
        ("draw a --n x", "--n takes a whole number, got 'x'"),
        ("plan --model a --zero 9", "--zero must be one of 0, 1, got '9'"),
    ],
)
def test_subcommands(line, message):
    with pytest.raises(BadInput) as error:
        parse(COMMANDS, line.split(), prog="ipfm", description="", elsewhere={"alpha": "recipes have it"}.get)
    assert str(error.value) == message
    assert parse(COMMANDS, ["draw", "a", "--n", "3"], prog="ipfm", description="") == Draw(model=Path("a"), n=3)


@dataclass(frozen=True)
class Odd:
    """A check that fails in other words than this module knows."""

    size: int = field(default=1)
    """Size."""

    def __post_init__(self) -> None:
        if self.size == 7:
            raise ValueError("sevens are\nunlucky, got 7")


def test_any_other_refusal_is_one_line_too(capfd):
    with pytest.raises(SystemExit) as stop:
        run_command("x", lambda argv: parse(Odd, argv, prog="x", description=""), ["--size", "7"])
    assert stop.value.code == 2
    err = capfd.readouterr().err
    assert err == "x: error: sevens are unlucky, got 7\n"


# -- --help ------------------------------------------------------------------------------------------------------------


def documented(*kinds: type) -> dict[str, str]:
    """Option -> the text under it in the source."""
    texts = {}
    for kind in kinds:
        body = ast.parse(inspect.getsource(kind)).body[0].body
        for statement, text in itertools.pairwise(body):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr)):
                continue
            # What a class says of itself is no option.
            if not ast.unparse(statement.annotation).startswith("ClassVar"):
                texts[statement.target.id] = text.value.value
    return texts


@pytest.mark.parametrize("spelling", ["--help", "-h", "--seed 3 --help"])
def test_help_lists_every_option_with_its_text(spelling, capfd):
    with pytest.raises(SystemExit) as stop:
        run_command("recipe.py", lambda argv: read(" ".join(argv)), spelling.split())
    assert stop.value.code == 0
    out, err = capfd.readouterr()
    assert err == ""
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", re.sub(r"\x1b\[[0-9;]*m", "", out)).split())
    assert shown.startswith("usage: recipe.py") and "What it does." in shown
    texts = documented(RunConfig, Distillation, StudentConfig, DistillConfig)
    # Every setting has its text, and the group of noise levels those of its own.
    assert set(texts) == set(DistillConfig().to_json())
    for name, text in texts.items():
        option = "--noise.sigma-min" if name == "noise" else f"--{name.replace('_', '-')}"
        assert re.search(rf"{option}[ ,]", shown), name
        assert " ".join(text.split()).rstrip(".") in shown, name
    for level in ("sigma-min", "sigma-max", "rho", "sigma-data", "p-mean", "p-std", "t-max"):
        assert f"--noise.{level} FLOAT" in shown


SECOND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_one_process_shows_the_help(monkeypatch, capfd):
    for name, value in SECOND.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    assert capfd.readouterr() == ("", "")


# -- exit codes --------------------------------------------------------------------------------------------------------


def ends(error: BaseException | None, capfd, argv: list[str] | None = None) -> tuple[int, str]:
    def main(_: object) -> None:
        if error is not None:
            raise error

    code = 0
    try:
        run_command("/some/where/recipe.py", main, [] if argv is None else argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert out == ""
    return code, err


def test_a_warning_of_this_project_is_one_line_without_its_place_in_the_code():
    before, said = warnings.formatwarning, []

    def main(_: object) -> None:
        for file in (commandline.__file__, "/else/where.py"):
            said.append(warnings.formatwarning("1 line was left out", UserWarning, file, 7))

    run_command("/some/where/recipe.py", main, [])
    assert said == [
        "recipe.py: note: 1 line was left out\n",
        "/else/where.py:7: UserWarning: 1 line was left out\n",
    ]
    assert warnings.formatwarning is before


@pytest.mark.quick
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (BadInput("no such file"), 2, "recipe.py: error: no such file\n"),
        (BadInput("two\n  lines"), 2, "recipe.py: error: two lines\n"),
        (FolderInUse("runs/a is in use"), 2, "recipe.py: error: runs/a is in use\n"),
        (TrainingFailed("too many"), 1, "recipe.py: failed: too many\n"),
        (Interrupted(signal.SIGINT), 130, "recipe.py: stopped by SIGINT, state saved; the same command continues\n"),
        (
            Interrupted(signal.SIGINT, Path("runs/a")),
            130,
            "recipe.py: stopped by SIGINT, state saved in runs/a; the same command continues\n",
        ),
        (Interrupted(signal.SIGTERM), 143, "recipe.py: stopped by SIGTERM, state saved; the same command continues\n"),
        (KeyboardInterrupt(), 130, "recipe.py: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_exit_codes(error, code, line, capfd, monkeypatch):
    for name in launcher.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert ends(error, capfd) == (code, line)
    for name, value in SECOND.items():
        monkeypatch.setenv(name, value)
    assert ends(error, capfd) == (code, "")  # the first process speaks for all


def test_memory_that_the_host_has_not_is_a_failure_of_whichever_process_asked(capfd, monkeypatch):
    error = MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000000000,)\nand data type float64")
    said = "recipe.py: failed: there is not enough memory (Unable to allocate 7.28 TiB for an array with shape "
    monkeypatch.setenv("RANK", "1")
    assert ends(error, capfd) == (1, f"{said}(1000000000000,) and data type float64)\n")
    assert ends(MemoryError(), capfd) == (1, "recipe.py: failed: there is not enough memory\n")
    unloaded = "libtorch_cpu.so: failed to map segment from shared object"
    said = f"recipe.py: failed: there is not enough memory ({unloaded})\n"
    assert ends(ImportError(unloaded), capfd) == (1, said)
    with pytest.raises(ImportError, match="libcudart"):
        ends(ImportError("libcudart.so.12: cannot open shared object file"), capfd)


def test_what_the_host_says_of_memory_begins_with_what_was_asked_for():
    said = (
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8 bytes. Error code 12 (Cannot allocate memory)"
    )
    text = "there is not enough memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes)"
    assert not_enough(RuntimeError(said)) == text


def test_a_file_that_cannot_be_had_is_one_line(capfd, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    error = PermissionError(errno.EACCES, "Permission denied", "/data/a.png")
    assert ends(error, capfd) == (1, "recipe.py: failed: /data/a.png: Permission denied\n")


def test_the_current_folder_is_gone(capfd, monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    place = tmp_path / "removed"
    place.mkdir()
    monkeypatch.chdir(place)
    place.rmdir()
    assert ends(None, capfd) == (2, "recipe.py: error: the current folder is gone: go to another one\n")


def test_a_defect_keeps_its_traceback(capfd):
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError(), capfd)


@pytest.mark.parametrize("error", [None, BadInput("x"), ZeroDivisionError()], ids=repr)
def test_the_process_group_is_left_in_any_case(error, monkeypatch, capfd):
    left = []
    monkeypatch.setattr("ipfm.engine.runtime.launcher.stop_world", lambda: left.append(True))
    with contextlib.suppress(ZeroDivisionError):
        ends(error, capfd)
    assert left == [True]


def test_arguments_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--seed", "4"])
    seen = []
    run_command("recipe.py", seen.extend)
    assert seen == ["--seed", "4"]


def test_user_input():
    missing = FileNotFoundError(2, "No such file or directory", "t.pt")
    for error, said in ((ValueError("D is odd"), "D is odd"), (missing, "t.pt: No such file or directory")):
        with pytest.raises(BadInput) as raised, user_input():
            raise error
        assert str(raised.value) == said and raised.value.__cause__ is error
    with pytest.raises(ZeroDivisionError), user_input():
        raise ZeroDivisionError
    with user_input():
        pass


def test_the_environment_is_put_back(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    read("--seed 3")
    assert "COLUMNS" not in os.environ
    monkeypatch.setenv("COLUMNS", "77")
    with pytest.raises(BadInput):
        read("--seed x")
    assert os.environ["COLUMNS"] == "77"
    assert commandline.BAD_INPUT == 2
