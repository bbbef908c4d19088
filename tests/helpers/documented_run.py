"""How a documented command is executed in this process: what it starts, with options that make a long run short."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType, ModuleType
from typing import Literal

import launch
import stand_ins
from documented import Command

from ipfm.engine.commands.main import Command as Subcommand
from ipfm.engine.commands.main import _main as ipfm
from ipfm.engine.experiments.local import TrainAndDistil
from ipfm.engine.runtime.commandline import parse

How = Literal["executed", "marked", "covered"]

# Commands that other tests run: what they begin with -> the test. `make` targets: what the target runs.
COVERED: Mapping[str, str] = MappingProxyType(
    {
        "make demo": "recipes/test_digits_recipe.py::test_the_default_start_is_deepspeed",
        "make fashion": "recipes/test_fashion_recipe.py::test_from_end_to_end_and_on_from_there",
        "make test": "docs/test_documented_commands.py::test_what_make_starts_is_there",
        "make thorough": "docs/test_documented_commands.py::test_what_make_starts_is_there",
        "make test-gpu": "test_gpus.py::test_which_marks_ask_for_a_gpu",
        "make quick": "docs/test_documented_commands.py::test_what_make_starts_is_there",
        "make lint": "docs/test_documented_commands.py::test_what_make_starts_is_there",
        "make types": "docs/test_documented_commands.py::test_what_make_starts_is_there",
        "make bench": "kernels/test_bench.py::test_a_run_leaves_tables_and_plots",
        "make soak": "engine/training/test_failures.py::test_a_small_soak",
        "make equivalence": "engine/objectives/test_equivalence.py::test_equals_the_plain_loop",
        "make nodes": "engine/distributed/test_two_nodes.py::test_two_machines_compute_what_one_does",
        "make rehearsal": "recipes/test_rehearsal.py::test_the_smallest_recipe_passes",
        "make counts": "engine/commands/test_counts.py::test_a_row_by_its_name",
        "make fuzz": "models/checkpoints/test_fuzz.py::test_flipped_and_missing_bytes",
        "ipfm bench --step": "engine/commands/test_bench_step.py::test_the_table_of_the_command",
        # It starts a process for each group of libraries.
        "ipfm doctor": "engine/commands/test_doctor.py::test_this_machine_in_text_and_json",
        "ipfm bench --passes": "engine/commands/test_bench_step.py::test_the_table_of_passes",
        "ipfm bench --memory": "engine/commands/test_bench_memory.py::test_a_run",
        "python recipes/ablation_D_alpha.py --data fashion": "engine/experiments/test_ablation.py::"
        "test_ablations_of_clothes_share_teachers_and_classifier",
        "python recipes/ablation_steps.py --data fashion": "engine/experiments/test_ablation.py::"
        "test_ablations_of_clothes_share_teachers_and_classifier",
        "python recipes/ablation_divergence.py --data fashion": "engine/experiments/test_ablation.py::"
        "test_clothes_are_another_ablation_with_its_own_sizes",
        "python recipes/ablation_out_of_law.py": "engine/experiments/test_out_of_law.py::"
        "test_from_teachers_to_verdicts",
        # Of a file of one's own, in a process that it is named to.
        "deepspeed mine.py": "engine/commands/test_new.py::test_settings_of_the_file_stand_over_those_of_the_rule",
        "deepspeed late.py": "engine/commands/test_new.py::test_settings_of_the_file_stand_over_those_of_the_rule",
        "ipfm plan --objective mine": "engine/commands/test_new.py::test_with_the_file_the_commands_know_more",
        # Of networks of full size, whose simulation takes seconds each.
        "ipfm plan --model imagenet512_edm2_ipfm --size": "engine/commands/test_plan.py::"
        "test_a_recipe_for_several_sizes_is_planned_for_one",
        "ipfm plan --model cifar10-ncsnpp --student lora": "engine/commands/test_plan.py::"
        "test_factors_on_the_teachers_weights_are_planned",
        # torch's exporter to ONNX takes seconds.
        "ipfm export runs/digits-D128-alpha1-K1/generator generator.onnx": "engine/commands/test_export.py::"
        "test_a_one_step_generator_in_onnx",
        # It compiles, which a process with Triton's interpreter cannot.
        "ipfm bench --offline": "kernels/test_compile_report.py::test_every_kernel_is_compiled_for_every_architecture",
    }
)


class Unknown(Exception):
    """A command that cannot be executed here, is not marked, and that no other test is named for."""

    def __init__(self, command: Command, why: str) -> None:
        super().__init__(
            f"{command.where}: `{command.text}` {why}. Correct the command; or, if it needs a GPU, end it in a "
            "comment with the word GPU; or teach tests/helpers/documented_run.py to "
            "execute it; or name in its table COVERED the test that does"
        )


SHELL = frozenset({"|", "||", "&", "&&", ";", "<", ">", ">>"})

# That installing this project works; what else is installed has to be what its setup.py names.
INSTALLED = "test_package.py::test_installed_wheel_is_importable_and_runs"


def covering(command: Command) -> list[str]:
    """The tests that run a command in the place of this module; all targets of a `make`."""
    words = command.words
    if words[0] == "pip":
        return [INSTALLED] if words[1:2] == ["install"] and all(map(_installable, words[2:])) else []
    lines = [f"make {target}" for target in words[1:]] if words[0] == "make" else [" ".join(words)]
    return [test for line in lines for start, test in COVERED.items() if f"{line} ".startswith(f"{start} ")]


def _installable(word: str) -> bool:
    """Whether `pip install` may be told it: an option, this project's folder, or one of its dependencies."""
    path, _, extras = word.partition("[")
    if word.startswith("-"):
        return True
    declared = (launch.ROOT / "setup.py").read_text(encoding="utf-8")
    if path == "." or path.endswith("/ipfm"):
        return all(f'"{extra}": [' in declared for extra in extras.rstrip("]").split(",") if extra)
    return re.search(rf'"{re.escape(re.split("[<>=!~]", path)[0])}\b', declared) is not None


def how(command: Command) -> How:
    """What is done about a command.

    Raises:
        Unknown: nothing can be.
    """
    program, *rest = _redirected(command.words)[0]
    if not SHELL.isdisjoint(rest):
        raise Unknown(command, "is more than one command, or reads by the shell")
    if program in ("make", "pip") or covering(command):
        if len(covering(command)) < (len(rest) if program == "make" else 1):
            raise Unknown(command, "is run by no test")
        return "covered"
    if program == "pytest":
        return "covered"
    return "marked" if command.marked else "executed"


def inputs(command: Command) -> str:
    """The part of a command that may name files which it reads: not what `ipfm dataset` and `convert` write."""
    words = command.words
    if words[:2] in (["ipfm", "convert"], ["ipfm", "dataset"]):
        del words[3:4]
    return shlex.join(words)


def run(command: Command) -> None:
    """Execute a command in the current folder, shortened.

    Raises:
        Unknown: there is no way to.
    """
    start(command, short=True)


def accept(command: Command) -> None:
    """See that the options of a marked command are accepted: a recipe's by its dry run, those of `ipfm` by its parser.

    Raises:
        Unknown: there is no way to.
    """
    start(command, short=False)


def start(command: Command, *, short: bool) -> None:
    """Execute what a command starts (`short`), or have its options read alone."""
    words, output = _redirected(_started(command))
    if output is not None:
        with output.open("w") as file, contextlib.redirect_stdout(file):
            _start(command, words, short=short)
        assert not short or output.stat().st_size > 0, f"{command.where}: nothing was printed"
    else:
        _start(command, words, short=short)


def _redirected(words: list[str]) -> tuple[list[str], Path | None]:
    """A command without `> FILE` at its end, and that file, in the current folder."""
    if words[-2:-1] != [">"]:
        return words, None
    return words[:-2], Path(words[-1].removeprefix("~/"))


def _start(command: Command, words: list[str], *, short: bool) -> None:
    # An absolute folder that machines share is one of the current folder.
    words = [word.removeprefix("/") if word.startswith("/shared/") else word for word in words]
    program, *arguments = words
    if PurePosixPath(program).parent.name == "recipes":
        module = recipe(program, command)
        module.main([*arguments, *(shorter(module, arguments) if short else _dry(module, arguments))])
    elif program == "ipfm":
        if short:
            ipfm([*arguments, *shorter_subcommand(arguments)])
        else:
            parse(Subcommand, arguments, prog="ipfm", description="")  # type: ignore[arg-type]
    elif program == "-c":
        code = compile(arguments[0], command.where, "exec")
        if short:
            exec(code, {"__name__": "__main__"})
    elif program == "tensorboard":
        read_curves(arguments, command)
    elif program.endswith(".py") and short and Path(program).exists():
        script(program, arguments)
    else:
        raise Unknown(command, f"starts {program!r}, which is no recipe, no `ipfm` and no file that the page makes")


def _started(command: Command) -> list[str]:
    """The program that a command starts in the end, and its arguments; launchers read their own options themselves."""
    program, *rest = command.words
    if program in ("python", "python3"):
        return rest
    if program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        options = parse_args(rest)
        rest = [options.user_script, *options.user_args]
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(rest)
        rest = [options.training_script, *options.training_script_args]
    else:
        return [program, *rest]
    # `deepspeed .venv/bin/ipfm evaluate …`
    return ["ipfm", *rest[1:]] if PurePosixPath(rest[0]).name == "ipfm" else rest


def recipe(file: str, command: Command) -> ModuleType:
    """The module of recipes/<name>.py."""
    if not (launch.ROOT / file).is_file():
        raise Unknown(command, f"names {file}, which does not exist")
    return importlib.import_module(f"ipfm.recipes.{PurePosixPath(file).stem}")


def options_of(module: ModuleType) -> set[str]:
    """Names of a recipe's options."""
    thing = module.ABLATION if hasattr(module, "ABLATION") else module.RECIPE
    thing = getattr(thing, "digits", thing)
    return {field.name for field in dataclasses.fields(thing.base)}


def shorter(module: ModuleType, arguments: Sequence[str]) -> list[str]:
    """Options after which a recipe ends within seconds; the last of two equal options counts."""
    if "--dry-run" in arguments or "--help" in arguments:
        return []
    given = dict(itertools.pairwise(arguments))
    ours: dict[str, object] = {"eval-images": 16, "heun-steps": 2, "batch": 4}
    ours |= layout(arguments)
    ours["micro-batch"] = 2 if "--micro-batch" in given else 4
    known = options_of(module)
    if "order" in known:  # a batch is of whole trajectories
        ours["points"] = 4
    if "seeds" in known:
        ours |= {"quick": "", "seeds": 0, "eval-every": 2}
        ours |= {"augment": 0} if given.get("--data") == "cifar" else {}
        ours |= {} if "--variants" in given else {"variants": module.ABLATION.variants[0].label}
    if state := given.get("--continue-from"):
        ours["kimg"] = stand_ins.kimg_of(state) + 0.008
    elif "--kimg" in given:
        ours["kimg"] = 0.008
    elif "--branch" in given:  # of a run of two steps, with its batch
        ours = {name: value for name, value in ours.items() if "batch" not in name} | {"max-steps": 3}
    else:
        ours["max-steps"] = 2
    if "--student-first-kimg" in given:
        ours["student-first-kimg"] = 0.004
    if trains_a_teacher(module, given):
        ours["teacher-steps"] = 2
    return words_of(ours, known)


def layout(arguments: Sequence[str]) -> dict[str, object]:
    """The options of a layout that a command leaves open; 16-bit numbers need ZeRO."""
    ours = {name: value for name, value in stand_ins.LAYOUT.items() if f"--{name}" not in arguments}
    if "zero" in ours and not {"bf16", "fp16"}.isdisjoint(arguments):
        ours["zero"] = 1
    return ours


def words_of(options: Mapping[str, object], known: Collection[str]) -> list[str]:
    """As a command line has them, those that a recipe knows."""
    chosen = {name: value for name, value in options.items() if name.replace("-", "_") in known}
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value)) if word]


def trains_a_teacher(module: ModuleType, given: Mapping[str, str]) -> bool:
    """Whether a recipe may be told how long to train the teacher that it distils."""
    if hasattr(module, "ABLATION"):
        return given.get("--data") != "cifar"
    return isinstance(module.RECIPE, TrainAndDistil)


def _dry(module: ModuleType, arguments: Sequence[str]) -> list[str]:
    if {"--dry-run", "--help"} & set(arguments):
        return []
    return ["--dry-run", *words_of(layout(arguments), options_of(module))]


def shorter_subcommand(arguments: Sequence[str]) -> list[str]:
    """The same for a subcommand of `ipfm`."""
    subcommand = arguments[0] if arguments else ""
    if "--help" in arguments:
        return []
    if subcommand == "evaluate":
        return ["--images", "16", "--heun-steps", "2"]
    if subcommand == "sample":
        few = [] if "--seeds" in arguments else ["--n", "4"]
        return [*few, *(["--heun-steps", "4"] if "--heun-steps" in arguments else [])]
    if subcommand == "bench":
        return ["--quick"]
    return []


def read_curves(arguments: Sequence[str], command: Command) -> None:
    """Read what `tensorboard --logdir` would show, with its own reader: the server would not end."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    try:
        folder = arguments[arguments.index("--logdir") + 1]
    except (ValueError, IndexError):
        raise Unknown(command, "has no --logdir") from None
    reader = EventMultiplexer().AddRunsFromDirectory(folder).Reload()
    assert any(tags["scalars"] for tags in reader.Runs().values()), f"{command.where}: {folder} holds no curves"


def script(file: str, arguments: Sequence[str]) -> None:
    """Run a Python file as `python FILE ARGUMENTS` does."""
    before, sys.argv = sys.argv, [file, *arguments]
    try:
        runpy.run_path(file, run_name="__main__")
    finally:
        sys.argv = before
