"""Every command and every block of Python in README.md, CONTRIBUTING.md and docs/ does what it is printed for.

Commands are executed in this process, on stand-ins for the files that they name, shortened by further options. One
whose comment says that it needs a GPU is only seen to have options that exist.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import documented
import documented_run
import idx_files
import launch
import pytest
import stand_ins
import torch
from documented import Block, Command
from traced_once import traced_once

from ipfm.engine.commands.export import program
from ipfm.engine.data.shapes import shapes
from ipfm.engine.experiments.local import TrainAndDistil
from ipfm.engine.experiments.step_time import StepTime
from ipfm.engine.runtime.commandline import BadInput
from ipfm.models import NetworkConfig, presets

COMMANDS = [command for page in documented.pages() for command in documented.commands(page)]
TESTS = [command for command in COMMANDS if command.words[0] == "pytest"]
# One person's way, in which each command builds on the ones before: nothing on it is left out or begun anew.
WALKS = ("docs/getting-started.md", "docs/distil-a-checkpoint.md", "docs/your-own-pictures.md")


def identity(command: Command) -> str:
    return f"{command.where} {' '.join(command.words)}"[:80]


# -- the folders in which they are executed ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stand-ins are copied from."""
    return tmp_path_factory.mktemp("stand-ins")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each page, as its commands build on each other."""
    root = tmp_path_factory.mktemp("pages")
    return {str(page.relative_to(launch.ROOT)): root / page.stem for page in documented.pages()}


@pytest.fixture(scope="module")
def seen() -> dict[tuple[str, ...], str]:
    """The commands that were executed: words -> where they stand."""
    return {}


@pytest.fixture(scope="module")
def stand_in_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for Debian's Fashion-MNIST."""
    return idx_files.write_idx(tmp_path_factory.mktemp("fashion"))


@pytest.fixture(scope="module", autouse=True)
def small(stand_in_set: Path) -> Iterator[None]:
    """Thin networks under the presets' names and in recipes that train one, few images, no process beside this one."""
    from ipfm.recipes import fashion_ipfm, shapes_ipfm

    teaching = TrainAndDistil.teaching
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "TABLE", stand_ins.THIN_PRESETS)
        for recipe in (shapes_ipfm.RECIPE, fashion_ipfm.RECIPE):
            patch.setitem(vars(recipe), "network", made_thin(recipe.network))
        patch.setattr(fashion_ipfm, "small_network", made_thin(fashion_ipfm.small_network))
        patch.setattr("ipfm.engine.experiments.fashion.DEBIAN", stand_in_set)
        patch.setattr("ipfm.recipes.shapes_ipfm.shapes", lambda count, side: shapes(64, side=side))
        laid_out = {"batch": 4, "activation_checkpointing": "off"}
        patch.setattr(TrainAndDistil, "teaching", lambda *_: replace(teaching(*_), **laid_out))
        patch.setattr("ipfm.engine.training.loop.PICTURE_IMAGES", 4)
        patch.setattr("ipfm.engine.commands.bench.step.ROUNDS_QUICK", 1)
        patch.setattr("ipfm.engine.commands.bench.step.WARM_UP", 0)
        patch.setattr("ipfm.engine.experiments.dry_run.layout_table", lambda *_, **__: "layouts")
        patch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(1.0))
        # Where the parts of a plot stand takes as long as drawing them, and nobody looks at these plots.
        patch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda *_: None)
        patch.setattr("ipfm.engine.commands.bench.memory.subprocess", types.SimpleNamespace(run=measured_here))
        # DeepSpeed does not get over the end of the process group that it began with.
        patch.setattr("ipfm.engine.runtime.launcher.stop_world", lambda: None)
        patch.setattr("ipfm.engine.commands.bench.step.stop_world", lambda: None)
        patch.setattr("ipfm.engine.commands.export.program.make_program", traced_once(program.make_program))
        yield
    vars(shapes_ipfm.RECIPE).pop("dataset", None)


def made_thin(network: Callable[..., NetworkConfig]) -> Callable[..., NetworkConfig]:
    """What a recipe makes its teacher's network by, of networks that are thin."""
    return lambda *chosen: stand_ins.thin(network(*chosen))


def measured_here(command: list[str], **_: object) -> types.SimpleNamespace:
    """What `ipfm bench --memory` starts a process for, in this one."""
    from ipfm.engine.commands.bench import memory_step as bench_step

    assert command[1:3] == ["-m", bench_step.__name__]
    bench_step.main(*command[3:])
    return types.SimpleNamespace(returncode=0)


@contextlib.contextmanager
def prepared(text: str, place: Path, cache: Path) -> Iterator[None]:
    """In the page's folder, with stand-ins for what `text` names; afterwards everything is as it was."""
    place.mkdir(parents=True, exist_ok=True)
    stand_ins.provide(text, place, cache)
    rng, before = torch.get_rng_state(), dict(os.environ)
    try:
        with contextlib.chdir(place), lpips_package():
            yield
    finally:
        torch.set_rng_state(rng)
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def lpips_package() -> Iterator[None]:
    """The package lpips, with random weights in the place of published ones."""

    class LPIPS:
        def __init__(self, net: str) -> None:
            assert net == "vgg"

        def state_dict(self) -> dict[str, torch.Tensor]:
            return stand_ins.lpips_weights()

    module = types.ModuleType("lpips")
    vars(module)["LPIPS"] = LPIPS
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lpips", module)
        yield


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=identity)
def test_a_command(command: Command, places: dict[str, Path], cache: Path, seen: dict[tuple[str, ...], str]) -> None:
    done = documented_run.how(command)
    if done == "covered":
        for test in documented_run.covering(command):
            file, _, name = test.partition("::")
            assert f"\ndef {name}(" in (launch.ROOT / "tests" / file).read_text(), (
                f"COVERED names {test}: there is none"
            )
        return
    words = (done, *command.words)
    if words in seen and command.page not in WALKS:
        return  # the same has been executed for another page
    place = places[command.page]
    execute = documented_run.run if done == "executed" else documented_run.accept
    with prepared(documented_run.inputs(command), place, cache):
        try:
            try:
                execute(command)
            except BadInput as error:
                # Pages show alternatives, whose runs have one folder; a walk must not.
                if "belongs to another configuration" not in str(error) or command.page in WALKS:
                    raise
                shutil.rmtree("runs")
                execute(command)
        except (BadInput, SystemExit, OSError) as error:
            if not isinstance(error, SystemExit) or error.code:  # --help ends with none
                pytest.fail(
                    f"{command.where}: `{command.text}` ends with: {error}. Where a file is missing, tests/helpers/"
                    "stand_ins.py makes stand-ins by their names"
                )
    seen[words] = command.where


def test_nothing_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Every page's commands by what is done about them."""
    kinds = ("executed", "marked", "covered")
    rows = {}
    for page in documented.pages():
        found = [documented_run.how(command) for command in documented.commands(page)]
        name = str(page.relative_to(launch.ROOT))
        rows[name] = [found.count(kind) for kind in kinds]
        with capsys.disabled():
            if found:
                print(f"\n{name}: " + ", ".join(map("{} {}".format, rows[name], kinds)), end="")
    assert sum(map(sum, rows.values())) == len(COMMANDS)
    assert rows["README.md"][1] == 0, "README.md: none of its commands needs a GPU to be tried"
    assert rows["docs/commands.md"][0] >= 20 > rows["docs/commands.md"][1], "most commands of ipfm are executed"
    executed, marked, _ = map(sum, zip(*rows.values(), strict=True))
    assert executed >= 140 and executed > 4 * marked, "most commands are executed"


def test_documented_tests_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """pytest itself finds them, by its own rules for -k."""
    whole = [command.words[1] for command in TESTS if len(command.words) == 2]
    assert whole, "no file of tests is documented: this test would be empty"
    found = {item.path.relative_to(launch.ROOT).as_posix() for item in collect(whole)}
    assert found == set(whole), f"{capsys.readouterr().out}: not every documented file has tests"
    for command in TESTS:
        if len(command.words) > 2:
            assert collect(command.words[1:]), f"{command.where}: {capsys.readouterr().out}"


def collect(arguments: list[str]) -> list[pytest.Item]:
    """What `pytest` would run with these arguments."""

    class Collector:
        items: list[pytest.Item]

        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.items = session.items

    collector = Collector()
    with contextlib.chdir(launch.ROOT):
        code = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *arguments], plugins=[collector])
    return collector.items if code == pytest.ExitCode.OK else []


def test_what_make_starts_is_there() -> None:
    """The programs and the files of every documented target."""
    targets = {target for command in COMMANDS if command.words[0] == "make" for target in command.words[1:]}
    assert targets >= {"demo", "test", "quick"}
    for target in sorted(targets):
        printed = subprocess.run(
            ["make", "--always-make", "--dry-run", target], cwd=launch.ROOT, capture_output=True, text=True
        )
        assert not printed.returncode, printed.stderr
        words = printed.stdout.replace("$(", " ").replace(")", " ").split()
        programs = {word.removeprefix(".venv/bin/") for word in words if word.startswith(".venv/bin/")}
        assert programs and all(any(launch.BIN.glob(program)) for program in programs), programs
        assert all((launch.ROOT / word).exists() for word in words if word.startswith(("recipes/", "tests/helpers/")))


# -- blocks of Python --------------------------------------------------------------------------------------------------


def only_compiled(block: Block) -> bool:
    """Whether its first line says that it needs a GPU."""
    return block.lines[0].startswith("#") and "GPU" in block.lines[0]


SNIPPETS = "docs/test_documented_code.py::test_the_snippets_for_other_code"
# Page and heading of blocks that another test runs, as printed.
ELSEWHERE = {
    ("docs/checkpoints-and-export.md", "Plain PyTorch"): (
        "engine/commands/test_export.py::test_the_documented_loader_draws_the_same_images_without_this_package"
    ),
    ("docs/checkpoints-and-export.md", "ONNX"): "engine/commands/test_export.py::test_a_one_step_generator_in_onnx",
    ("docs/kernels.md", "perturb in a training loop of PFGM++"): SNIPPETS,
    ("docs/kernels.md", "group_norm_silu in a module"): SNIPPETS,
    ("docs/kernels.md", "AdamEMA as an optimiser"): SNIPPETS,
    ("docs/kernels.md", "ipfm_loss by hand"): SNIPPETS,
}


def blocks_here(page: Path) -> list[Block]:
    """The blocks of Python of a page that no other test runs."""
    return [block for block in documented.python_blocks(page) if (block.page, block.heading) not in ELSEWHERE]


@pytest.mark.parametrize("place", ELSEWHERE, ids=" ".join)
def test_blocks_that_are_run_elsewhere(place: tuple[str, str]) -> None:
    page, heading = place
    assert heading in {block.heading for block in documented.python_blocks(launch.ROOT / page)}
    file, _, name = ELSEWHERE[place].partition("::")
    assert f"def {name}(" in (launch.ROOT / "tests" / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [p for p in documented.pages() if blocks_here(p)], ids=lambda page: page.name)
def test_blocks_of_python(page: Path, places: dict[str, Path], cache: Path) -> None:
    """As printed, one after the other, as they continue each other."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_here(page):
        tree = ast.parse(block.code)
        if only_compiled(block):
            tree.body = [line for line in tree.body if isinstance(line, ast.Import | ast.ImportFrom)]
        with prepared(block.code, places[block.page], cache):
            exec(compile(ast.increment_lineno(tree, block.line - 1), str(page), "exec"), names)


# -- the reading of pages ----------------------------------------------------------------------------------------------


PAGE = """\
## A heading

Prose with `ipfm nothing`.

    ipfm info "a # b" \\
      --json    # needs a GPU
    A=1 .venv/bin/python -c 'print(1)'
    table  of  ipfm

```python
ipfm = 1
```

```sh
# a comment
$ make demo
```

1. an item

   ```
   deepspeed recipes/x.py
   output
   ```
"""


def test_pages_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    info, python, make, deepspeed = documented.commands(page)
    assert (info.words, info.marked, info.where) == (["ipfm", "info", "a # b", "--json"], True, "page.md:5")
    assert (python.words, python.marked) == (["python", "-c", "print(1)"], False)
    assert (make.words, deepspeed.words, deepspeed.line) == (["make", "demo"], ["deepspeed", "recipes/x.py"], 22)
    (block,) = documented.python_blocks(page)
    assert (block.code, block.line, block.heading) == ("ipfm = 1\n", 11, "A heading")
    page.write_text(PAGE.replace("$ make demo", "cd somewhere"))
    with pytest.raises(ValueError, match=r"page.md:16: 'cd somewhere' begins with none of deepspeed, ipfm"):
        documented.commands(page)


def test_what_cannot_be_executed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text, message in {
        "python my_script.py": "no file that the page makes",
        "deepspeed recipes/nowhere.py": "names recipes/nowhere.py, which does not exist",
        "pytest2 x": "starts 'pytest2'",
        "tensorboard": "has no --logdir",
    }.items():
        with pytest.raises(documented_run.Unknown, match=message):
            documented_run.run(Command("page.md", 1, text))
    nothing_runs_it = ("make nothing", "pip install something-else", "make demo nothing")
    for text in (*nothing_runs_it, "ipfm info x | less", "ipfm info x > y z"):
        why = "is run by no test" if text in nothing_runs_it else "is more than one command, or reads by the"
        with pytest.raises(documented_run.Unknown, match=rf"^page.md:1: `{re.escape(text)}` {why}"):
            documented_run.how(Command("page.md", 1, text))
    assert documented_run.how(Command("page.md", 1, "ipfm info x > y")) == "executed"
    with pytest.raises(BadInput, match="unknown option --nothing"):
        documented_run.accept(Command("page.md", 1, "ipfm info x --nothing  # GPU"))
