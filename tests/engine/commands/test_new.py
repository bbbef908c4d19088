"""`ipfm new`: files of one's own that run as they are; what commands say of their runs, with the files and without."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path

import launch
import prepared
import pytest
import soak
import torch

from ipfm.engine.commands.main import _main as ipfm
from ipfm.engine.commands.new import called
from ipfm.engine.objectives.own_files import VARIABLE
from ipfm.engine.runtime.commandline import BadInput
from ipfm.engine.runtime.launcher import free_port, launch_variables
from ipfm.models import EDMPrecond, load_model, presets, save_model

LAYOUT = [word for name, value in soak.LAYOUT.items() for word in (f"--{name}", value)]
WORKER = launch.WORKERS / "own_objective.py"
# Enough to be killed on the way.
STEPS = 24
# Laid out, which takes seconds to choose.
SMALL = ("--teacher", "teacher", "--batch", 8, "--heun-steps", 2, "--log-every", 1, "--zero", 0, *LAYOUT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder outside of the project: a teacher, a file of each kind as `ipfm new` writes it, a run of each."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    small = replace(presets.get("digits", D=128.0), model_channels=8, channel_mult=(1,))
    save_model(EDMPrecond(small), folder / "teacher", extra={"task": "teacher", "D": 128.0})
    with contextlib.chdir(folder):
        for what, name in (("objective", "mine"), ("weighting", "late")):
            ipfm(["new", what, name])
        recipe("mine.py", *SMALL, "--max-steps", STEPS, "--checkpoint-every", 5, "--out", "run")
        recipe("late.py", *SMALL, "--max-steps", 3, "--power", 1, "--steps", 2)
        yield folder


def recipe(*words: object, file: Path | None = None) -> str:
    """Run a recipe to its end in one process; what it said."""
    done = prepared.run(*words, env=launch.environment())
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def weights(folder: Path) -> list[torch.Tensor]:
    return [p.detach() for p in load_model(folder / "generator").parameters()]


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("what", ["objective", "weighting"])
def test_the_template_is_called_as_one_likes(what: str) -> None:
    template = (resources.files("ipfm.recipes") / "templates" / f"{what}.py").read_text(encoding="utf-8")
    text = called(template, "two_words")
    assert "xample" not in text and 'kind: ClassVar[str] = "two_words"' in text and "class TwoWordsConfig(" in text
    assert len(text.splitlines()) == len(template.splitlines())
    numbers = [int(number) for number in re.findall(r"^    [A-Z]+ = (\d+)$", text, re.M)]
    assert numbers == sorted(set(numbers)) and all(1000 <= number < 65536 for number in numbers)
    assert called(template, "two_words") == text and (what == "weighting" or called(template, "other")[:800] != text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective", "9lives"], "NAME must be a word of letters, digits and underscores that begins with a letter"),
        (["objective", "a-b"], "NAME must be a word"),
        (["weighting", "lambda"], "is none of Python's own, got 'lambda'"),
        (["weighting", "pid"], "there is an objective pid: choose another name"),
        (["objective", "random"], "random.py would hide the module random from Python"),
        (["objective", "torch", "--out", "mine.txt"], "--out is the file, whose name ends in .py, got mine.txt"),
        (["objective", "objective"], "objective would make a class ObjectiveStream, a name that the file imports"),
        (["objective", "mine", "--out", "nowhere/mine.py"], "the folder nowhere does not exist: make it first"),
        (["objective", "there"], "there.py exists: give another name, or --out"),
    ],
)
def test_names_and_files_that_cannot_be(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").write_text("kept")
    with pytest.raises(BadInput, match=re.escape(said)):
        ipfm(["new", *words])
    assert [path.name for path in tmp_path.iterdir()] == ["there.py"]
    assert (tmp_path / "there.py").read_text() == "kept"


def test_what_is_written_is_said_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ipfm(["new", "weighting", "late", "--out", "idea.py", "--json"])
    assert json.loads(capsys.readouterr().out) == {"out": "idea.py", "what": "weighting", "kind": "late"}
    assert (tmp_path / "idea.py").is_file()


# -- their runs --------------------------------------------------------------------------------------------------------


def test_settings_of_the_file_stand_over_those_of_the_rule(place: Path) -> None:
    config = json.loads((place / "run" / "config.json").read_text())
    assert config["objective"] == "mine" and config["config"]["lr"] == 2e-4 and config["config"]["points"] == 8
    # Of a weighting the rule says them, the file its own.
    (run,) = (place / "runs").iterdir()
    assert re.fullmatch(r"late-own\d*-small-D128-alpha1-K2-power1", run.name)
    config = json.loads((run / "config.json").read_text())
    assert config["objective"] == "late" and config["config"]["lr"] == 3e-4 and config["config"]["power"] == 1
    assert config["about"]["info"].endswith("2 steps, weighting: lambda sigma^1.0")


def test_a_killed_run_goes_on_as_if_it_had_not_been(place: Path) -> None:
    words = ("mine.py", *SMALL, "--max-steps", STEPS, "--checkpoint-every", 5, "--out", "killed")
    with tempfile.TemporaryFile() as nothing:
        program = prepared.start(*words, env=launch.environment(), stdout=nothing, stderr=nothing)
        while not (place / "killed" / "checkpoints" / "step-0000005").exists() and program.poll() is None:
            time.sleep(0.005)
        program.kill()
        program.wait()
    assert not (place / "killed" / "generator").exists()
    recipe(*words)
    assert all(map(torch.equal, weights(place / "killed"), weights(place / "run")))


@pytest.mark.distributed
def test_two_processes_under_zero_make_the_same(place: Path) -> None:
    port = free_port()
    words = ("mine.py", *SMALL, "--max-steps", STEPS, "--zero", 2, "--micro-batch", 2, "--out", "two")
    with contextlib.ExitStack() as stack:
        started = []
        for rank in range(2):
            out = stack.enter_context(tempfile.TemporaryFile())
            env = launch.environment(**launch_variables(rank, 2, port))
            started.append(prepared.start(*words, env=env, stdout=out, stderr=out))
            stack.callback(started[-1].kill)
        assert [program.wait(120) for program in started] == [0, 0]
    for one, two in zip(weights(place / "run"), weights(place / "two"), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


# -- what the commands say of them -------------------------------------------------------------------------------------


def commands(place: Path, export: str) -> dict[str, list[str]]:
    (late,) = (place / "runs").iterdir()
    late = late.relative_to(place)
    return {
        "info": ["info", "run"],
        "generator": ["info", "run/generator"],
        "late": ["info", f"{late}/generator"],
        "report": ["report", "run", "--json"],
        "report of late": ["report", str(late), "--json"],
        "page": ["report", str(late)],
        "export": ["export", f"{late}/generator", export, "--samples", "4", "--json"],
        "sample": ["sample", "run/generator", "--n", "4", "--out", f"{export}.npz"],
        "plan": ["plan", "--model", "teacher", "--objective", "mine", "--points", "3", "--batch", "8"],
        "plan lora": ["plan", "--model", "teacher", "--objective", "mine", "--generator", "lora"],
        "plan of late": ["plan", "--model", "teacher", "--objective", "late", "--steps", "2", "--batch", "8", "--json"],
        "plan by recipe": ["plan", "--model", "teacher", "--recipe", "mine.py", "--gpus", "1", "--json"],
        "plan --help": ["plan", "--help"],
        "new": ["new", "objective", "mine", "--out", f"{export}.py"],
        "by path": ["plan", "--model", "teacher", "--objective", "mine.py"],
    }


def ask(place: Path, asked: Mapping[str, list[str]], files: str = "") -> dict[str, str]:
    """What each command prints in a process of its own that has these files named."""
    given = {VARIABLE: files} if files else {}
    done = prepared.run(WORKER, json.dumps(asked), env=launch.environment(**given), cwd=place)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def without(place: Path) -> dict[str, str]:
    return ask(place, commands(place, "plain"))


@pytest.fixture(scope="module")
def named(place: Path) -> dict[str, str]:
    asked = {name: words for name, words in commands(place, "named").items() if name != "export"}
    return ask(place, asked, f"mine.py{os.pathsep}{place / 'late.py'}")


@pytest.mark.parametrize("export", ["plain", "named"])
def test_with_the_file_and_without_the_folder_says_what_it_is(
    export: str, place: Path, without: Mapping[str, str], named: Mapping[str, str]
) -> None:
    said = without if export == "plain" else named
    assert re.search(r"^objective +regression on the teacher's ODE$", said["info"], re.M)
    assert re.search(r"^distilled by +regression on the teacher's ODE$", said["generator"], re.M)
    assert "weighting: lambda sigma^1.0" in said["late"]
    facts, late = (json.loads(said[name]) for name in ("report", "report of late"))
    assert facts["objective"] == "regression on the teacher's ODE in 8 steps"
    assert facts["loss_reading"] == "generator_loss is a squared error: it falls."
    assert late["objective"] == "inverse Poisson flow matching (α = 1), weighting: lambda sigma^1.0"
    assert "in 2 network evaluations at D = 128" in late["summary"]
    if export == "named":
        return  # the card of an objective that is known: test_registry.py
    card = (place / export / "README.md").read_text(encoding="utf-8")
    assert "| weighting | lambda sigma^1.0 |" in card and "| distilled by | inverse Poisson flow matching" in card
    assert "4 images, 1 network evaluation each" in said["sample"] and said["page"].startswith("report: ")


def test_with_the_file_the_commands_know_more(without: Mapping[str, str], named: Mapping[str, str]) -> None:
    one, more = (json.loads(said["report of late"])["command"] for said in (without, named))
    assert one["line"] is None and one["notes"] == [
        "It was made by late.py, a file outside of this project: `deepspeed late.py` with the settings below."
    ]
    assert more["line"].startswith("deepspeed late.py --teacher teacher ") and more["line"].endswith(
        " --steps 2 --power 1"
    )
    assert without["plan"].startswith("error: ") and "objective" in without["plan"]
    assert named["plan"].startswith("objective mine: regression on the teacher's ODE\n")
    assert named["plan lora"] == (
        "error: generator lora was given, and MineObjective trains no such network by factors: leave it out, or give "
        "the role lora=config.lora_of('generator')\n"
    )
    plan = json.loads(named["plan of late"])
    assert plan["objective"] == "late" and plan["about"]["info"].endswith("weighting: lambda sigma^0.5")
    text = " ".join(re.sub("[│|]", " ", named["plan --help"]).split())
    assert (
        "By what: cmt, dmd, ect, ipfm, pid, mine, late." in text
        and "--points INT Of mine: steps of the teacher's ODE. Default: 8." in text
    )
    assert text.count("K: evaluations of the generator") == 1
    # A file that the user names in the command is one that is named.
    assert json.loads(without["plan by recipe"]) == json.loads(named["plan by recipe"])
    assert named["new"] == "error: there is an objective mine: choose another name\n"
    assert without["by path"] == (
        "error: a file with an objective of your own is named in IPFM_OBJECTIVES, and --objective takes its kind: "
        "IPFM_OBJECTIVES=mine.py ipfm plan --objective mine; --recipe mine.py plans it by its recipe\n"
    )


# -- files that cannot be used -----------------------------------------------------------------------------------------

WEIGHTING = (
    "from dataclasses import dataclass\nfrom ipfm.engine import DistillConfig\n"
    "from ipfm.recipes import distill_ipfm\n\n\n"
    "@dataclass(frozen=True, kw_only=True)\nclass A(DistillConfig):\n    power: float = 1.0\n\n\n"
    "RECIPE = distill_ipfm.RECIPE.by(A, __file__, __doc__)\n"
)
BROKEN = {
    "missing.py": (None, r"IPFM_OBJECTIVES names missing\.py, which does not exist \(looked for in .*\)"),
    "folder": ("", r"IPFM_OBJECTIVES names folder, which is a folder: name the file in it"),
    "notes.txt": ("x", r"IPFM_OBJECTIVES names notes\.txt, which is no file of Python: its name must end in \.py"),
    "syntax.py": ("x = 1\ndef f(:\n", r"syntax\.py, line 2: invalid syntax"),
    "empty.py": ("x = 1\n", r"empty\.py has no objective: no class in it has a line such as kind: .*"),
    "torch.py": ('class A:\n    kind = "a"\n', r"torch\.py is called like the module torch of Python, .*: rename it"),
    "raises.py": (
        'class A:\n    kind = "a"\n\n\nraise RuntimeError("no\\nluck")\n', r"raises\.py, line 5: RuntimeError: no luck"
    ),
    "exits.py": (
        'class A:\n    kind = "a"\n\n\nraise SystemExit(3)\n',
        r"exits\.py, line 5: the file runs, or ends, the program: that belongs under if __name__ == \"__main__\"",
    ),
    "runs.py": (
        'from ipfm.recipes import distill_ipfm\n\n\nclass A:\n    kind = "a"\n\n\ndistill_ipfm.main(["--dry-run"])\n',
        r"runs\.py, line 8: the file runs, or ends, the program: that belongs under if __name__ == \"__main__\"",
    ),
    "computed.py": (
        'class A:\n    kind = "a" + "b"\n',
        r"computed\.py, line 1: A: kind must be written as a constant, as ipfm plan reads it without running it",
    ),
    "planned.py": (
        'class A:\n    kind = "a"\n    planned = {"b": "help"}\n',
        r"planned\.py, line 1: A: planned names b, which is no setting of this class",
    ),
    "annotated.py": (
        'class A:\n    kind = "a"\n    planned = {"b": "help"}\n    b: Path = 3\n',
        r"annotated\.py, line 1: A: planned names b, whose annotation must be made of int, .*, got Path",
    ),
    "batch.py": (
        'class A:\n    kind = "a"\n    planned = {"batch": "help"}\n    batch: int = 3\n',
        r"the objective a offers batch to ipfm plan, which has another such option",
    ),
    "second.py": (
        'class A:\n    kind = "pid"\n', r"two objectives have the kind 'pid', the second one in second\.py"
    ),
    "streams.py": (
        "from ipfm.engine.objectives import ObjectiveStream\n\n\n"
        'class A:\n    kind = "a"\n\n\nclass S(ObjectiveStream):\n    LATENT = 22\n',
        r"streams\.py, line 8: the random streams \[22\] of streams\.S belong to .*\.PidStream: take numbers .*",
    ),
    "undecorated.py": (
        WEIGHTING.replace("@dataclass(frozen=True, kw_only=True)\n", "").replace("power", 'kind = "a"\n    power'),
        r"undecorated\.py, line 11: A needs @dataclass\(frozen=True, kw_only=True\) above it",
    ),
    "kindless.py": (
        WEIGHTING + '\n\nclass B:\n    kind = "b"\n',
        r'kindless\.py, line 11: A has no kind of its own: a line kind: ClassVar\[str\] = "mine"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_used_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    text, said = BROKEN[name]
    if text:
        (tmp_path / name).write_text(text)
    elif text is not None:
        (tmp_path / name).mkdir()
    asked = {"info": ["info", "run"], "--help": ["--help"]}
    answers = ask(tmp_path, asked, name)
    assert re.fullmatch(f"error: {said}\n", answers["info"])
    assert answers["--help"].startswith("usage: ipfm COMMAND")


def test_a_run_goes_on_from_one_of_ones_own_where_its_file_is_named(place: Path) -> None:
    words = (launch.ROOT / "recipes" / "distill_ipfm.py", *SMALL, "--continue-from", "run", "--max-steps", STEPS + 1)
    done = prepared.run(*words, env=launch.environment())
    assert done.returncode == 2 and done.stderr.endswith(
        "run is a run of the objective mine, which is not known here: set IPFM_OBJECTIVES=mine.py to continue it\n"
    )
    recipe("mine.py", *SMALL, "--continue-from", "run", "--max-steps", STEPS + 1, "--out", "further")
    assert json.loads((place / "further" / "config.json").read_text())["objective"] == "mine"


def test_nothing_that_a_folder_names_is_run(place: Path, tmp_path: Path) -> None:
    """The name of the file in a folder is text: the file beside it is not looked at."""
    (place / "spy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((place / "run" / "config.json").read_text())
    (place / "spied").mkdir()
    (place / "spied" / "config.json").write_text(
        json.dumps({**config, "objective": "spy", "about": {"file": "spy.py"}})
    )
    said = ask(place, {"info": ["info", "spied"], "report": ["report", "spied", "--json"]})
    assert "It was made by spy.py" in said["report"] and "objective" in said["info"]
    assert not (tmp_path / "ran").exists()
