"""Two machines, each with its own start of the recipe: namespaces joined by a cable (tests/helpers/two_nodes.py).

`make nodes` runs all of it; `make test` what takes seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import launch
import prepared
import pytest
import soak
import torch
import two_nodes
from soak import settings
from two_nodes import Start, TwoNodes, wait_for

from ipfm.models import load_model, save_model
from ipfm.models.store import TENSOR_FILE

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(bool(two_nodes.missing()), reason=two_nodes.missing() or "two nodes"),
]
FAILED, ERROR = "digits_ipfm.py: failed: ", "digits_ipfm.py: error: "
STEPS = 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return soak.make_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    with TwoNodes(tmp_path) as both:
        yield both


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """The folder of a finished run of two processes on one machine."""
    folder = tmp_path_factory.mktemp("one")
    group = soak.Group(settings(teacher, folder / "run", STEPS), "forked", folder / "log")
    try:
        assert group.wait(120) == [0, 0], group.output()
    finally:
        group.kill()
    return folder / "run"


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- a run on two machines is that of one ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher",
    ["forked", *(pytest.param(name, marks=pytest.mark.nodes) for name in ("slurm", "deepspeed", "torchrun", "c10d"))],
)
def test_two_machines_compute_what_one_does(tmp_path: Path, teacher: Path, nodes, one_node: Path, launcher) -> None:
    """Bit for bit: losses, checkpoint and result. Each machine knows its own name as 127.0.1.1, as Debian has it."""
    out = tmp_path / "run"
    start = Start(nodes, launcher, settings(teacher, out, STEPS), folder=tmp_path)
    assert start.wait() == [[0], [0]], start.said()
    assert losses(out) == losses(one_node)
    assert not soak.differences(out, one_node)
    assert (out / "generator" / TENSOR_FILE).read_bytes() == (one_node / "generator" / TENSOR_FILE).read_bytes()
    assert not start.lines(1, "step 4: ") and start.lines(0, "run folder: "), "the first process speaks"


# -- run folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.nodes)])
def test_machines_that_share_no_folder(tmp_path: Path, teacher: Path, nodes, one_node: Path, launcher: str) -> None:
    """All is saved on the first, which the start says; it goes on after that, and on that machine alone, the same."""
    start = Start(nodes, launcher, settings(teacher, "run", 2), folder=tmp_path)
    assert start.wait() == [[0], [0]], start.said()
    said = "run is not shared: everything is saved in that of node1 (process 0); node2 gets a copy of the newest "
    assert start.lines(0, said) == [f"{said}checkpoint at each start"]
    assert not (tmp_path / "node2" / "run").exists()
    shutil.copytree(tmp_path / "node1" / "run", tmp_path / "alone")

    start = Start(nodes, launcher, settings(teacher, "run", STEPS), folder=tmp_path)
    assert start.wait() == [[0], [0]], start.said()
    (line,) = start.lines(0, "run of node2 lacks ")
    assert line.startswith("run of node2 lacks what that of node1 has: got a copy of its checkpoint of step 2 (0.")
    assert start.lines(0, said) and start.lines(0, "continuing at step 2 from run/checkpoints/step-0000002")
    assert losses(tmp_path / "node1" / "run") == losses(one_node)
    assert not soak.differences(tmp_path / "node1" / "run", one_node)
    copy = tmp_path / "node2" / "run"
    assert json.loads((copy / "copy.json").read_text()) == {"of": "node1"}
    assert [c.name for c in (copy / "checkpoints").iterdir()] == ["step-0000002"]
    assert not (tmp_path / "node1" / "run" / "copy.json").exists()

    # A finished run is only read, on both, and copied nowhere.
    start = Start(nodes, launcher, settings(teacher, "run", STEPS), folder=tmp_path)
    assert start.wait() == [[0], [0]], start.said()
    assert start.lines(0, "run is finished: ") and "Traceback" not in start.said()
    assert [c.name for c in (copy / "checkpoints").iterdir()] == ["step-0000002"]

    # On the first machine alone, from the same checkpoint.
    alone = soak.Group(settings(teacher, tmp_path / "alone", STEPS), "forked", tmp_path / "log")
    assert alone.wait(60) == [0, 0], alone.output()
    assert not soak.differences(tmp_path / "alone", one_node)


@pytest.mark.nodes
def test_a_disk_that_is_full_on_the_second_machine(tmp_path: Path, teacher: Path, nodes) -> None:
    """It has no room for the copy: a line that names the machine, on both, and the first one's folder is as it was."""
    start = Start(nodes, "forked", settings(teacher, "run", 2), folder=tmp_path)
    assert start.wait() == [[0], [0]], start.said()
    (tmp_path / "node2" / "run").mkdir()
    nodes[1].call("mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path / "node2" / "run"))
    # A forked one does not see what is mounted in its machine.
    start = Start(nodes, "slurm", settings(teacher, "run", 4), folder=tmp_path)
    assert start.wait() == [[1], [1]], start.said()
    for index in (0, 1):
        (line,) = start.lines(index, FAILED)
        assert line.endswith("cannot be written on node2 (No space left on device), where the run folder is not shared")
    assert soak.newest(tmp_path / "node1" / "run") == 2


@pytest.mark.nodes
def test_an_ablation_of_machines_that_share_no_folder(tmp_path: Path, nodes) -> None:
    """It draws from the generators of its runs, which lie on the first machine."""
    recipe = launch.ROOT / "recipes" / "ablation_steps.py"
    for _ in range(2):
        quick = ["--quick", "--out", "run", "--seeds", "0", "--variants", "K1", "K2"]
        start = Start(nodes, "forked", quick, folder=tmp_path, script=recipe)
        assert start.wait(200) == [[0], [0]], start.said()
        assert start.lines(0, "curves: run/ablation.png") and "Traceback" not in start.said()


@pytest.mark.nodes
def test_clocks_that_differ(tmp_path: Path, teacher: Path, nodes, one_node: Path) -> None:
    """The second machine has been up for ten days longer, by the clock that durations are taken by."""
    start = Start(nodes, "slurm", settings(teacher, tmp_path / "run", STEPS), folder=tmp_path, only=(0,))
    later = ["unshare", "--time", "--fork", "--monotonic", "864000", "--boottime", "864000"]
    with open(tmp_path / "log2", "wb") as log:
        environ = {**launch.environment(**start.environment), **start.task(1, 0)}
        command = [*later, sys.executable, soak.RECIPE, *start.arguments[1]]
        start.started[1] = [nodes[1].start(command, env=environ, log=log)]
    assert start.wait() == [[0], [0]], start.said()
    assert losses(tmp_path / "run") == losses(one_node)


@pytest.mark.nodes
def test_machines_in_another_order_do_not_begin_anew(tmp_path: Path, teacher: Path, nodes) -> None:
    """The second has the run, the first one nothing: no start of it goes on from nothing without a word."""
    done = prepared.run(
        soak.RECIPE, *settings(teacher, tmp_path / "node2" / "run", 2, zero=0), env=launch.environment()
    )
    assert done.returncode == 0, done.stderr
    start = Start(nodes, "forked", settings(teacher, "run", STEPS, zero=0), folder=tmp_path)
    assert start.wait() == [[2], [2]], start.said()
    line = (
        f"{ERROR}run of node2 (process 1) is at step 2, and that of node1, where the run would go on, without a "
        "checkpoint: start with node2 as the first machine, or move its folder away"
    )
    assert start.lines(0, ERROR) == start.lines(1, ERROR) == [line]
    assert not (tmp_path / "node1" / "run").exists()


# -- commands, files and versions that differ ------------------------------------------------------------------------

ANOTHER_VERSION = """
import runpy, sys
from pathlib import Path
from ipfm.engine.runtime import versions
from ipfm.engine.experiments import machines
machines.installed = lambda package: "2.1.0" if package == "torch" else versions.installed(package)
sys.argv[0] = RECIPE
sys.path[0] = str(Path(RECIPE).parent)
runpy.run_path(RECIPE, run_name="__main__")
"""


@pytest.mark.parametrize("what", ["options", "teacher", "no teacher", "versions", "first alone", "typo"])
def test_machines_that_differ_end_with_a_line(tmp_path: Path, teacher: Path, nodes, what: str) -> None:
    """On both of them, with exit code 2 and before anything is written; neither waits for the other."""
    own, common = settings(teacher, "run", 2), settings(teacher, "run", 2)
    script: Path | str = soak.RECIPE
    expected = "process 1 on node2 "
    if what == "options":
        own += ["--lr", "1e-3"]
        expected += "was started otherwise (lr is 0.001 there, 0.0003 on node1): give every machine the same command"
    elif what == "teacher":
        torch.manual_seed(3)
        other = soak.make_teacher(tmp_path / "other")
        net = load_model(other)
        with torch.no_grad():
            next(net.parameters()).add_(1.0)
        save_model(net, other)
        own = settings(other, "run", 2)
        expected += "was started otherwise (teacher is another network, "
    elif what == "no teacher":
        own = settings(tmp_path / "nowhere", "run", 2)
        expected = f"process 1 on node2: {tmp_path / 'nowhere'} does not exist; "
    elif what == "versions":
        script = tmp_path / "digits_ipfm.py"
        script.write_text(f"RECIPE = {soak.RECIPE!r}\n{ANOTHER_VERSION}")
        expected += f"has torch 2.1.0, {torch.__version__} on node1: install the same on every machine"
    elif what == "typo":
        own += ["--lrr", "1e-3"]
        expected = "process 1 on node2: unknown option --lrr; perhaps you meant --lr"
    else:
        own, common = common, settings(tmp_path / "nowhere", "run", 2)
        expected = f"{tmp_path / 'nowhere'} does not exist; "
    start = Start(nodes, "forked", common, own, folder=tmp_path, only=(0,) if what == "versions" else (0, 1))
    if what == "versions":
        start.script = script
        start.start(1)
    assert start.wait(60) == [[2], [2]], start.said()
    for index in (0, 1):
        (line,) = start.lines(index, ERROR, FAILED)
        shown = line.removeprefix(ERROR)
        if what == "first alone" and index == 1:
            shown = shown.removeprefix("process 0 on node1: ")
        elif what in ("no teacher", "typo") and index == 1:
            expected = expected.removeprefix("process 1 on node2: ")
        assert shown.startswith(expected), start.said()
    assert not list(tmp_path.glob("node?/run/*"))


@pytest.mark.nodes
def test_a_teacher_at_another_place_on_each_machine(tmp_path: Path, teacher: Path, nodes, one_node: Path) -> None:
    shutil.copytree(teacher, tmp_path / "node2" / "models" / "t")
    mine, others = settings(teacher, tmp_path / "run", STEPS), settings(Path("models/t"), tmp_path / "run", STEPS)
    start = Start(nodes, "forked", mine, others, folder=tmp_path)
    assert start.wait() == [[0], [0]], start.said()
    assert losses(tmp_path / "run") == losses(one_node)


# -- machines and cables that are lost --------------------------------------------------------------------------------

LOST = f"{FAILED}another process of this run has ended or does not answer ("


def begun(start: Start, out: Path) -> None:
    """Return once a run has a checkpoint, and is in the middle of its steps."""
    wait_for(lambda: soak.newest(out) >= 2 or start.over(), 60, start.said)
    assert not start.over(), start.said()


def goes_on_alone(out: Path, teacher: Path) -> None:
    """The same command on one machine continues the run from its newest checkpoint."""
    at = soak.newest(out)
    done = prepared.run(soak.RECIPE, *settings(teacher, out, at + 2), env=launch.environment())
    assert done.returncode == 0 and f"continuing at step {at} from " in done.stderr, done.stderr
    assert soak.newest(out) == at + 2


@pytest.mark.parametrize(
    ("launcher", "lost"),
    [
        ("forked", 1),
        *(pytest.param(*case, marks=pytest.mark.nodes) for case in (("forked", 0), ("deepspeed", 1), ("torchrun", 1))),
    ],
)
def test_a_machine_that_is_gone(tmp_path: Path, teacher: Path, nodes, launcher: str, lost: int) -> None:
    """Its processes and its network at once; the other one ends within seconds and goes on alone."""
    out, left = tmp_path / "run", 1 - lost
    start = Start(nodes, launcher, settings(teacher, out, 2000), folder=tmp_path)
    begun(start, out)
    nodes[lost].kill()
    codes = start.wait(30)
    assert codes[left] == [1], start.said()
    (line,) = start.lines(left, FAILED)
    assert line.startswith(LOST) and f"): the same command continues {out} from its checkpoint step-" in line
    assert "Traceback" not in start.output(left) or launcher == "torchrun", "that of torchrun itself"
    goes_on_alone(out, teacher)


@pytest.mark.parametrize(
    ("launcher", "how"),
    [
        ("forked", "silence"),
        *(
            pytest.param(*case, marks=pytest.mark.nodes)
            for case in (("forked", "unplug"), ("deepspeed", "silence"), ("torchrun", "silence"), ("slurm", "unplug"))
        ),
    ],
)
def test_a_cable_that_is_cut_in_a_step(tmp_path: Path, teacher: Path, nodes, launcher: str, how: str) -> None:
    """Nothing closes the sockets: both machines learn it from the silence, well before IPFM_TIMEOUT, and say so."""
    out, silent = tmp_path / "run", {"IPFM_SILENCE": "4"}
    start = Start(nodes, launcher, settings(teacher, out, 2000), folder=tmp_path, environment=silent)
    begun(start, out)
    getattr(nodes, how)()
    cut = time.monotonic()
    codes = start.wait(40)
    assert codes == [[1], [1]], start.said()
    # Launchers take some seconds to notice and to end. Where more wants the cores than there are, so long for each.
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert time.monotonic() - cut < min(38.0, (15 if launcher == "forked" else 35) * crowd)
    for index, other in ((0, 1), (1, 0)):
        (line,) = start.lines(index, FAILED)
        assert line.startswith(f"{LOST}nothing was heard of process {other} of 2 for 4 s): the same command continues ")
        assert "Traceback" not in start.output(index) or launcher == "torchrun", "that of torchrun itself"
    goes_on_alone(out, teacher)


@pytest.mark.nodes
def test_a_run_goes_on_on_two_machines_after_the_cable_is_mended(tmp_path: Path, teacher: Path, nodes) -> None:
    out = tmp_path / "run"
    start = Start(nodes, "forked", settings(teacher, out, 2000), folder=tmp_path, environment={"IPFM_SILENCE": "4"})
    begun(start, out)
    nodes.unplug()
    assert start.wait(40) == [[1], [1]], start.said()
    nodes.plug()
    at = soak.newest(out)
    again = Start(nodes, "forked", settings(teacher, out, at + 2), folder=tmp_path)
    assert again.wait() == [[0], [0]], again.said()
    assert again.lines(0, f"continuing at step {at} from ") and soak.newest(out) == at + 2


@pytest.mark.nodes
def test_a_machine_that_comes_late_is_waited_for(tmp_path: Path, teacher: Path, nodes) -> None:
    start = Start(nodes, "forked", settings(teacher, tmp_path / "run", 2), folder=tmp_path, only=(1,))
    waits = "process 1 of 2 waits for the others at 10.77.0.1:12000, for at most 60 s (IPFM_TIMEOUT)"
    wait_for(lambda: start.lines(1, waits), 30, start.said)
    start.start(0)
    assert start.wait() == [[0], [0]], start.said()


@pytest.mark.nodes
@pytest.mark.parametrize(
    ("only", "line"),
    [
        (0, "1 of 2 processes came to {}: start the same command on every machine"),
        (1, "nobody answers at {}: is the first machine's command running, and its port open?"),
    ],
    ids=("first", "second"),
)
def test_a_machine_that_never_comes(tmp_path: Path, teacher: Path, nodes, only: int, line: str) -> None:
    few = {"IPFM_TIMEOUT": "4"}
    start = Start(
        nodes, "forked", settings(teacher, tmp_path / "run", 2), folder=tmp_path, environment=few, only=(only,)
    )
    assert start.wait(60) == [[1]], start.said()
    assert start.lines(only, FAILED) == [FAILED + line.format("10.77.0.1:12000 within 4 s (IPFM_TIMEOUT)")]
    assert not (tmp_path / "run").exists()


@pytest.mark.nodes
def test_a_port_that_is_in_use_on_the_first_machine(tmp_path: Path, teacher: Path, nodes) -> None:
    with open(tmp_path / "listener", "wb") as log:
        listen = "import socket, time; s = socket.create_server(('', 12000)); time.sleep(100)"
        nodes[0].start([sys.executable, "-c", listen], env=launch.environment(), log=log)
        wait_for(
            lambda: ":12000" in nodes[0].call("sh", "-c", "cat /proc/net/tcp | grep -io :2EE0 | sed s/:2EE0/:12000/"),
            10,
        )
    start = Start(nodes, "forked", settings(teacher, tmp_path / "run", 2), folder=tmp_path, only=(0,))
    assert start.wait(60) == [[1]], start.said()
    port = "port 12000 is in use: give another one (`deepspeed --master_port N`, `torchrun --master_port N`)"
    assert start.lines(0, FAILED) == [f"{FAILED}{port}"], start.said()


# -- the helper ------------------------------------------------------------------------------------------------------


def test_nothing_of_the_nodes_outlives_a_test_that_is_killed(tmp_path: Path) -> None:
    """Nor is any name taken: two pairs at a time have the same addresses."""
    script = textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from two_nodes import TwoNodes
        with TwoNodes(Path(sys.argv[1])) as one, TwoNodes(Path(sys.argv[1]) / "more") as other:
            with open(os.devnull, "wb") as log:
                one[0].start(["sleep", "1000"], env=os.environ, log=log)
                other[1].start(["sleep", "1000"], env=os.environ, log=log)
            assert one[0].address == other[0].address
            print(one[0].pid, one[1].pid, other[0].pid, other[1].pid, flush=True)
            time.sleep(1000)
    """)
    program = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=launch.environment(PYTHONPATH=str(launch.ROOT / "tests" / "helpers")),
    )  # fmt: skip
    assert program.stdout is not None
    pids = [int(pid) for pid in program.stdout.readline().split()]
    spaces = {Path(f"/proc/{pid}/ns/net").readlink() for pid in pids}
    assert len(spaces) == 4 and all(map(two_nodes.alive, pids))
    program.send_signal(signal.SIGKILL)
    program.wait()

    def left() -> set[Path]:
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                found.add((process / "ns" / "net").readlink())
            except OSError:
                continue
        return found & spaces

    wait_for(lambda: not left(), 10)
