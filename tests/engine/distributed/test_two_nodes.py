"""Two machines, each with its own start of the recipe: namespaces joined by a cable (tests/helpers/two_nodes.py).

`make nodes` runs all of it; `make test` what takes seconds.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import launch
import pytest
import soak
import two_nodes
from soak import settings
from two_nodes import Start, TwoNodes, wait_for

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
