"""The one way from a command line to a run: read once, planned, said or begun; what was given over other defaults."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
import tyro

from ipfm.engine import DistillConfig
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments import distil, local, recipe_options
from ipfm.engine.experiments import recipe as choreography
from ipfm.engine.experiments.local import check_own_teacher
from ipfm.engine.experiments.recipe import Plan, Recipe
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.runtime.commandline import BadInput, Given, parse, parse_given
from ipfm.models import EDMPrecond, NetworkConfig, save_model
from ipfm.recipes import ablation_alpha, ablation_pid, cifar_ipfm, cifar_pid, cifar_teacher, digits_ipfm, shapes_ipfm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder."""
    monkeypatch.chdir(tmp_path)


# -- what is given, over defaults that follow from it ------------------------------------------------------------------

BASE = recipe_options(DistillConfig(max_steps=10, sigma_init=3.0), teacher_steps=5)


def given(line: str, default: Any = BASE) -> Given[Any]:
    return parse_given(line.split(), default=default, prog="recipe.py", description="")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--seed 0",  # as it is by default, and given
        "--kimg 3",
        "--kimg=3 --max_steps None",
        "--max-steps 4 --local_rank=1",
        "--no-resume --no-tf32 --compile",
        "--resume --augment 0.0 --dropout 0",
        "--noise.p-mean -1 --noise.sigma_max 90",
        "--noise.sigma-min 85 --noise.sigma-max 100 --sigmas 2 1 --steps 2",
        "--out=--kimg --D inf --zero None",
    ],
)
@pytest.mark.parametrize(
    "default",
    [
        BASE,
        replace(BASE, seed=4, max_steps=None, kimg=7.0, augment=0.5, dropout=0.1, resume=False, tf32=False),
        replace(BASE, noise=NoiseLevels(p_std=2.0, sigma_max=50.0), student_updates=2),
    ],
)
def test_as_if_the_command_line_were_read_again(line: str, default: Any) -> None:
    again = parse(type(BASE), line.split(), default=default, prog="recipe.py", description="")
    assert given(line).over(default) == again


def test_what_does_not_go_together_is_one_line_there_too() -> None:
    with pytest.raises(BadInput, match=r"^--teacher-storage half needs precision bf16 or fp16"):
        given("--teacher-storage half").over(replace(BASE, precision="fp32"))
    with pytest.raises(BadInput, match=r"^--noise.sigma-min must be below sigma_max, got 70.0 and 50.0$"):
        given("--noise.sigma-min 70").over(replace(BASE, noise=NoiseLevels(sigma_max=50.0)))


# -- a command line is read once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (cifar_ipfm, ["--D", "2048", "--kimg", "3", "--dry-run"]),
        (cifar_pid, ["--distance", "l2", "--dry-run"]),
        (cifar_teacher, ["--arch", "ddpmpp", "--dry-run"]),
        (digits_ipfm, ["--alpha", "0.5", "--dry-run"]),
        (shapes_ipfm, ["--arch", "adm", "--dry-run"]),
        (ablation_alpha, ["--data", "cifar", "--quick", "--dry-run"]),
        (ablation_pid, ["--quick", "--max-steps", "3", "--dry-run"]),
    ],
)
def test_a_command_line_is_read_once(
    module: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("distil", "local", "teacher", "ablation"):
        for said in ("describe", "describe_training", "teacher_duration"):
            monkeypatch.setattr(f"ipfm.engine.experiments.{name}.{said}", lambda *_, **__: "said", raising=False)
    read, calls = tyro.cli, []

    def counted(*positional: Any, **keywords: Any) -> Any:
        calls.append(keywords["args"])
        return read(*positional, **keywords)

    monkeypatch.setattr(tyro, "cli", counted)
    module.main(arguments)
    assert calls == [arguments]
    assert "said" in capsys.readouterr().out and not list(Path().iterdir())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # One student update in the paper, two in its script's run without regularisation.
        ("--D 2048", {"student_updates": 1, "augment": 0.12, "kimg": 30_000}),
        ("--D 2048 --alpha 0.5", {"student_updates": 2}),
        ("--D 128 --alpha 0.5", {"student_updates": 1, "augment": 0.12}),
        (
            "--D 2048 --alpha 0.5 --student-updates 1 --max-steps 9",
            {"student_updates": 1, "max_steps": 9, "kimg": None},
        ),
    ],
)
def test_what_is_given_stands_beside_the_settings_for_a_teacher(line: str, expected: dict[str, Any]) -> None:
    plan = cifar_ipfm.RECIPE.plan(given(f"{line} --dry-run", cifar_ipfm.RECIPE.defaults))
    assert {name: getattr(plan.config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {"batch": 64, "max_steps": 150, "eval_images": 2000, "arch": "ncsnpp", "teacher_steps": 600}),
        ("--data cifar", {"batch": 256, "max_steps": None, "kimg": 10_000, "arch": "ddpmpp", "teacher_steps": None}),
        ("--quick --kimg 1", {"batch": 16, "max_steps": None, "kimg": 1.0, "seeds": (0,), "teacher_steps": 4}),
        ("--data cifar --quick --batch 8", {"batch": 8, "max_steps": 4, "kimg": None, "teacher_steps": None}),
    ],
)
def test_an_ablations_defaults_follow_from_its_data(line: str, expected: dict[str, Any]) -> None:
    ablation = ablation_alpha.ABLATION
    options = ablation.options(given(line, ablation.defaults))
    assert {name: getattr(options, name) for name in expected} == expected


# -- the order ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of a recipe that does nothing."""

    fail: Literal["", "plan", "begin", "train"] = ""
    """Where it fails."""
    dry_run: bool = False
    """Say what it would do."""


@dataclass
class Steps(Plan):
    """A plan that notes what is called."""

    options: Options
    done: list[str] = field(default_factory=list)

    def describe(self) -> str:
        return "nothing"

    def begin(self, world: World) -> Callable[[], None]:
        self.done.append("begin")
        _fail_at("begin", self.options)
        return self.train

    def train(self) -> None:
        self.done.append("train")
        _fail_at("train", self.options)


def _fail_at(place: str, options: Options) -> None:
    if options.fail == place:
        raise ValueError(f"failed at {place}")


@dataclass(frozen=True, kw_only=True)
class Nothing(Recipe[Options]):
    """A recipe that does nothing."""

    done: list[str]

    @property
    def defaults(self) -> Options:
        return Options()

    def plan(self, given: Given[Options]) -> Plan:
        self.done.append("plan")
        _fail_at("plan", given.options)
        return Steps(given.options, self.done)


def run(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], *, rank: int = 0) -> list[str]:
    done: list[str] = []

    class Process(World):
        def barrier(self) -> None:
            done.append("barrier")

    def start() -> World:
        done.append("world")
        return Process(rank, 2, CPU)

    monkeypatch.setattr(choreography, "start_world", start)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    try:
        Nothing(file="nothing.py", about="", done=done).main(arguments)
    except (BadInput, ValueError) as error:
        done.append(f"{type(error).__name__}: {error}")
    return done


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["plan", "world", "barrier", "begin", "train"]),
        (["--dry-run"], ["plan"]),
        (["--fial", "plan"], ["BadInput: unknown option --fial; perhaps you meant --fail"]),
        (["--fail", "plan"], ["plan", "BadInput: failed at plan"]),
        (["--fail", "begin"], ["plan", "world", "barrier", "begin", "BadInput: failed at begin"]),
        # An error of the training is no mistake of the user's.
        (["--fail", "train"], ["plan", "world", "barrier", "begin", "train", "ValueError: failed at train"]),
    ],
)
def test_the_order_of_things(arguments: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, arguments) == expected


@pytest.mark.parametrize(("rank", "printed"), [(0, "nothing\n"), (1, "")])
def test_one_process_says_the_plan(
    rank: int, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, ["--dry-run"], rank=rank)
    assert capsys.readouterr().out == printed


def test_a_teacher_that_was_read_is_not_held_beside_the_runs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NetworkConfig(
        img_resolution=32, img_channels=3, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
        dropout=0.0, D=128.0,
    )  # fmt: skip
    save_model(EDMPrecond(network), Path("teacher"))
    held: list[Any] = []

    class Training:
        rows = ()

        def __init__(self, config: object, teacher: object, **others: object) -> None:
            held.append(weakref.ref(teacher))

        def run(self, path: Path) -> None:
            gc.collect()
            held.append(held[0]())

    monkeypatch.setattr(distil, "Distiller", Training)
    monkeypatch.setattr(choreography, "start_world", lambda: World(0, 1, CPU))
    cifar_ipfm.main(["--teacher", "teacher", "--out", "run", "--batch", "4"])
    assert held[1] is None


# What recipes share, and what stands in for the package where Python finds none.
NO_RECIPES = ("__init__", "ablation_data", "ipfm")


def test_a_recipe_file_is_data_and_ends_in_main() -> None:
    """Two imports of the engine's recipes at the most, `main`, and the two lines that start it."""
    files = [p for p in Path(cifar_ipfm.__file__).parent.glob("*.py") if p.stem not in NO_RECIPES]
    assert len(files) == 46
    for file in files:
        text = file.read_text(encoding="utf-8")
        name = "ABLATION" if file.stem.startswith("ablation") else "RECIPE"
        end = f'\nmain = {name}.main\n\nif __name__ == "__main__":\n    run_command(__file__, main)\n'
        assert text.endswith(end), file.name
        assert text.count("from ipfm.engine.experiments") == 1 and "def main" not in text, file.name
    assert math.isinf(cifar_pid.RECIPE.D)


def test_whose_result_is_shown_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the same folder is named again for another length or sampler, by its name or by default."""
    config = DistillConfig(D=64.0, max_steps=300, heun_steps=40)
    choreography.say_if_settled(tmp_path, "distill", config)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(choreography, "is_settled", lambda *_, **__: True)
    monkeypatch.setattr(choreography, "settings_said", lambda *_: "heun-steps is 18 there, 40 here")
    choreography.say_if_settled(tmp_path, "distill", config)
    assert capsys.readouterr().err == (
        f"{tmp_path} is finished: this is its result after 300 steps, nothing is trained or measured again; it was "
        "made with other settings (heun-steps is 18 there, 40 here)\n"
    )


# -- the teacher in a run's own folder ---------------------------------------------------------------------------------


def own_teacher(run: Path, *steps: int, exported: int | None) -> None:
    """What a teacher's training in `run` leaves: checkpoints after these steps, and the teacher."""
    for step in steps:
        (run / "teacher" / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)
    if exported is not None:
        (run / "teacher" / "model").mkdir(parents=True)
        record = {"extra": {"optimizer_steps": exported}}
        (run / "teacher" / "model" / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("asked", "distilled", "steps", "exported", "said"),
    [
        (900, True, (800, 900), 900, ""),
        (900, False, (400,), None, ""),  # stopped
        (1200, False, (800, 900), 900, ""),  # not distilled yet
        (900, True, (800,), 900, ""),  # the last checkpoint was lost: it is made again
        (1200, True, (800, 900), 900, "has 900 steps and was distilled, --teacher-steps asks for 1200: give"),
        (600, True, (800, 900), 900, "has 900 steps and was distilled, --teacher-steps asks for 600: give"),
        (600, False, (700,), None, "has 700 steps, --teacher-steps asks for 600: give --teacher-steps 700"),
        (900, True, (), 900, "no checkpoint of its training: give --teacher run/teacher/model"),
    ],
)  # fmt: skip
def test_the_teacher_in_a_runs_folder_is_not_trained_on_once_it_is_distilled(asked, distilled, steps, exported, said):
    own_teacher(Path("run"), *steps, exported=exported)
    teaching = replace(digits_ipfm.RECIPE.training, max_steps=asked)
    with pytest.raises(ValueError) if said else nullcontext() as error:
        check_own_teacher(Path("run/teacher"), teaching, distilled=distilled)
    assert not said or (said in str(error.value) and str(error.value).endswith("or choose another --out"))


@pytest.mark.parametrize(("module", "recipe"), [(local, digits_ipfm), (distil, cifar_ipfm)], ids=["local", "distil"])
def test_a_dry_run_of_a_lengthened_run_has_its_warm_ups(
    module: ModuleType, recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the run in the folder began with; without one, shares of the length."""
    words = ["--discriminator", "encoder", "--max-steps", "400", "--dry-run"]
    plan = recipe.RECIPE.plan(parse_given(words, default=recipe.RECIPE.defaults, prog="recipe.py", description=""))
    described: list[Any] = []
    monkeypatch.setattr(module, "describe", lambda config, *_, **__: described.append(config) or "")
    plan.describe()
    replace(plan, record={"decided": {"discriminator_kimg": [0.0008, 0.0016]}}).describe()
    assert [config.starts == (0.0008, 0.0016) for config in described] == [False, True]
