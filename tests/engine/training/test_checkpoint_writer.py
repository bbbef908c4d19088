"""Writing checkpoints: in the background and not, full disks, kills at every system call, and how many are kept."""

from __future__ import annotations

import os
import shutil
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import launch
import prepared
import pytest
import torch
from safetensors.torch import load_file

from ipfm.engine.distributed.world import World
from ipfm.engine.training import checkpoint as checkpoints
from ipfm.engine.training.checkpoint import Draft, find_checkpoint, is_whole
from ipfm.engine.training.checkpoint_writer import CheckpointFailed, CheckpointWriter
from ipfm.models.atomic_files import forget_unfinished

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


class Network:
    """What a checkpoint needs of a network in training."""

    state_kinds = ("weight", "ema")

    def __init__(self, seed: int) -> None:
        values = torch.Generator().manual_seed(seed)
        self.tensors = {
            # The second is not contiguous, the third not of 32 bits.
            "weight": {"a": torch.randn(5, 3, generator=values), "b": torch.randn(4, 6, generator=values).t()},
            "ema": {"a": torch.randn(5, 3, generator=values).double(), "b": torch.randn(6, 4, generator=values)},
        }
        self.exact_buffers = {"freqs": torch.randn(3, generator=values)}
        self.steps_applied = seed
        self.loss_scale_state: dict[str, float] = {}

    def full(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors[kind].items()

    def change(self) -> None:
        for tensors in self.tensors.values():
            for tensor in tensors.values():
                tensor.fill_(float("nan"))


def networks() -> dict[str, Network]:
    return {"student": Network(3), "generator": Network(4)}


def writer(folder: Path, *, background: bool, keep: int = 2, last: Path | None = None) -> CheckpointWriter:
    return CheckpointWriter(folder, ALONE, keep=keep, background=background, last=last)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.quick
def test_both_ways_write_the_same_bytes(tmp_path: Path) -> None:
    for background in (False, True):
        one = writer(tmp_path / str(background), background=background)
        one.save(7, networks())
        one.wait()
        assert one.last == tmp_path / str(background) / "step-0000007" and is_whole(one.last)
        one.settle()
    assert contents(tmp_path / "True") == contents(tmp_path / "False")
    stored = load_file(tmp_path / "True" / "step-0000007" / "student.safetensors")
    for kind, tensors in networks()["student"].tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(stored[f"{kind}/{name}"], tensor.float())


def test_training_goes_on_while_the_state_of_the_call_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held until the weights have changed; the checkpoint holds what they were."""
    go_on, add = threading.Event(), Draft.add
    monkeypatch.setattr(Draft, "add", lambda *a: (go_on.wait(60), add(*a))[1])
    trained = networks()
    one = writer(tmp_path / "changed", background=True)
    one.save(1, trained)
    assert one.last is None and find_checkpoint(tmp_path / "changed") is None
    for network in trained.values():
        network.change()
    go_on.set()
    one.wait()
    one.settle()
    plain = writer(tmp_path / "plain", background=False)
    plain.save(1, networks())
    assert contents(tmp_path / "changed") == contents(tmp_path / "plain")


def test_the_next_checkpoint_waits_for_the_one_in_the_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, add, finish = [], Draft.add, Draft.finish
    monkeypatch.setattr(Draft, "add", lambda self, *a: (order.append(self.target.name), add(self, *a))[1])
    monkeypatch.setattr(Draft, "finish", lambda self: (order.append("done"), finish(self))[1])
    one = writer(tmp_path, background=True)
    for step in (1, 2, 3):
        one.save(step, networks())
    one.wait()
    one.settle()
    assert order == [name for step in (1, 2, 3) for name in [f"step-000000{step}"] * 2 + ["done"]]


def test_without_a_thread_one_network_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref] = []
    most = []
    add = Draft.add

    def counted(self, name, tensors, *counters) -> None:
        held.extend(weakref.ref(tensor) for tensor in tensors.values())
        most.append(sum(ref() is not None for ref in held))
        add(self, name, tensors, *counters)

    monkeypatch.setattr(Draft, "add", counted)
    writer(tmp_path, background=False).save(1, networks())
    assert most == [5, 5] and not any(ref() is not None for ref in held)


# -- a disk that refuses ---------------------------------------------------------------------------------------------

FULL_DISK = """
    import resource, sys
    from pathlib import Path
    sys.path[:0] = sys.argv[3:]
    from test_checkpoint_writer import Network, contents, networks, writer
    from ipfm.engine.training.checkpoint import find_checkpoint
    from ipfm.engine.training.checkpoint_writer import CheckpointFailed

    folder, background = Path(sys.argv[1]), sys.argv[2] == "True"
    one = writer(folder, background=background)
    one.save(1, networks())
    one.wait()
    before = contents(folder)
    # Python ignores SIGXFSZ, so that a file that grows beyond this is an error, as on a full disk.
    sys.dont_write_bytecode = True  # Python would not miss the rest of it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    try:
        one.save(2, networks())
        one.wait()
        sys.exit("nothing was raised")
    except CheckpointFailed as error:
        print(error)
    assert contents(folder) == before, sorted(contents(folder))
    assert not list(folder.glob(".partial-*"))
    assert find_checkpoint(folder) == folder / "step-0000001"
    one.settle()
"""


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(tmp_path: Path, background: bool) -> None:
    places = [str(Path(__file__).parent), str(Path(launch.__file__).parent)]
    program = tmp_path / "full_disk.py"
    program.write_text(textwrap.dedent(FULL_DISK))
    done = prepared.run(program, tmp_path / "run", background, *places, env=launch.environment())
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"the checkpoint {tmp_path / 'run' / 'step-0000002'} cannot be written (")
    assert "File too large" in line and line.endswith("); the last good one is step-0000001")


@pytest.mark.parametrize("background", [False, True])
def test_a_folder_that_cannot_be_made(tmp_path: Path, background: bool) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    one = writer(tmp_path / "checkpoints", background=background)
    with pytest.raises(CheckpointFailed, match=r"cannot be written \(File exists\); there is none before it"):
        one.save(1, networks())
        one.wait()
    one.settle()


def test_a_failure_in_the_background_is_known_before_anybody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, write = threading.Event(), CheckpointWriter._write

    def watched(self, *arguments) -> None:
        try:
            write(self, *arguments)
        finally:
            ended.set()

    monkeypatch.setattr(CheckpointWriter, "_write", watched)
    (tmp_path / "checkpoints").write_text("a file in the way")
    one = writer(tmp_path / "checkpoints", background=True)
    assert not one.failed
    one.save(1, networks())
    assert ended.wait(60)
    while not one._pending.done():  # the thread has nothing else left to do
        pass
    assert one.failed
    # The next one says so, and is not begun.
    with pytest.raises(CheckpointFailed, match="step-0000001 cannot be written"):
        one.save(2, networks())
    assert not one.failed
    one.settle()


def test_a_folder_that_is_removed_while_a_checkpoint_is_written_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, add = tmp_path / "run" / "checkpoints", Draft.add
    left = [folder.parent]

    def removing(self: Draft, *state) -> None:
        if left:
            shutil.rmtree(left.pop())
        add(self, *state)

    monkeypatch.setattr(Draft, "add", removing)
    one, whole = writer(folder, background=True), writer(tmp_path / "whole", background=False)
    one.save(1, networks())
    one.wait()
    one.settle()
    whole.save(1, networks())
    assert not left and contents(folder) == contents(tmp_path / "whole")


# -- kills -----------------------------------------------------------------------------------------------------------


def failing_at(patch: pytest.MonkeyPatch, call: int, fail: Callable[[], None]) -> list[int]:
    """Lets `fail` happen before the call-th (from 0) of the system calls that change a folder or sync; their count."""
    count = [0]

    def guarded(original):
        def wrapped(*arguments, **keywords):
            count[0] += 1
            if count[0] == call + 1:
                fail()
            return original(*arguments, **keywords)

        return wrapped

    for name in ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink"):
        patch.setattr(os, name, guarded(getattr(os, name)))
    patch.setattr(checkpoints, "save_file", guarded(checkpoints.save_file))
    return count


def calls(save: Callable[[], None]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        count = failing_at(patch, -1, lambda: None)
        save()
    return count[0]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
def test_a_kill_at_every_system_call_loses_nothing(tmp_path: Path, again: bool) -> None:
    """Of a second checkpoint, also of the same step, with keep=1: at every moment the old or the new one is whole."""
    old, new = {"net": Network(1)}, {"net": Network(2)}
    step = 1 if again else 2

    def begin(folder: Path) -> CheckpointWriter:
        one = writer(folder, background=False, keep=1)
        one.save(1, old)
        return one

    last = begin(tmp_path / "count")
    total = calls(lambda: last.save(step, new))
    assert total > 15
    found = []
    for call in range(total):
        folder = tmp_path / str(call)
        one = begin(folder)
        child = os.fork()
        if child == 0:
            failing_at(pytest.MonkeyPatch(), call, lambda: os._exit(9))
            one.save(step, new)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        checkpoint = find_checkpoint(folder)
        assert checkpoint is not None, call
        weights = load_file(checkpoint / "net.safetensors")
        is_new = torch.equal(weights["weight/a"], new["net"].tensors["weight"]["a"])
        assert is_new or torch.equal(weights["weight/a"], old["net"].tensors["weight"]["a"])
        found.append(is_new)
        # The next start goes on from there and tidies up.
        forget_unfinished(folder)
        following = writer(folder, background=False, keep=1, last=checkpoint)
        following.save(3, new)
        assert names(folder) == ["latest", "step-0000003"]
    assert found == sorted(found) and found[0] is False and found[-1] is True


@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
def test_an_error_at_every_system_call_loses_nothing(tmp_path: Path, again: bool) -> None:
    step = 1 if again else 2

    def refuse() -> None:
        raise OSError(28, "No space left on device")

    counted = writer(tmp_path / "count", background=False)
    counted.save(1, networks())
    failures = 0
    for call in range(calls(lambda: counted.save(step, networks()))):
        folder = tmp_path / str(call)
        one = writer(folder, background=False)
        one.save(1, networks())
        with pytest.MonkeyPatch.context() as patch:
            failing_at(patch, call, refuse)
            try:
                one.save(step, networks())
            except CheckpointFailed as error:
                failures += 1
                assert "(No space left on device); the last good one is step-0000001" in str(error)
        found = find_checkpoint(folder)
        assert found is not None and is_whole(found)
    assert failures > 8


# -- how many are kept -----------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_newest_whole_ones_stay(tmp_path: Path) -> None:
    one = writer(tmp_path, background=False, keep=2)
    for step in (1, 2, 3, 4):
        one.save(step, networks())
    assert names(tmp_path) == ["latest", "step-0000003", "step-0000004"]
    assert (tmp_path / "latest").read_text() == "step-0000004\n"


def test_damaged_ones_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    one = writer(tmp_path, background=False, keep=3)
    for step in (1, 2, 3):
        one.save(step, networks())
    (tmp_path / "step-0000003" / "student.safetensors").write_bytes(b"")
    (tmp_path / "step-0000009").mkdir()
    found = find_checkpoint(tmp_path)
    assert found == tmp_path / "step-0000002"
    # It goes on from there, with a checkpoint every half step, so to say: 1 and 2 are the two whole ones before.
    following = writer(tmp_path, background=False, keep=3, last=found)
    following.save(4, networks())
    whole = [name for name in names(tmp_path) if (tmp_path / name).is_dir() and is_whole(tmp_path / name)]
    assert whole == ["step-0000001", "step-0000002", "step-0000004"]
    # Damaged ones go once enough whole ones are newer.
    for step in (5, 6):
        following.save(step, networks())
    whole = ["step-0000004", "step-0000005", "step-0000006"]
    assert names(tmp_path) == ["latest", *whole, "step-0000009"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    one = writer(tmp_path, background=False)
    one.save(1, networks())
    one.save(2, networks())
    (tmp_path / "step-0000002" / "manifest.json").unlink()
    following = writer(tmp_path, background=False, last=find_checkpoint(tmp_path))
    following.save(2, networks())
    assert find_checkpoint(tmp_path) == tmp_path / "step-0000002"
    assert names(tmp_path) == ["latest", "step-0000001", "step-0000002"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    one = writer(tmp_path, background=False, keep=2)
    for step in (9_999_998, 9_999_999, 10_000_000):
        one.save(step, {"net": Network(1)})
    assert names(tmp_path) == ["latest", "step-10000000", "step-9999999"]
    assert find_checkpoint(tmp_path) == tmp_path / "step-10000000"
