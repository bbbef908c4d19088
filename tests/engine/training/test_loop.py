"""The loop around the steps: when the processes talk, what stops it, what the disk may refuse."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ipfm.engine.config import TeacherConfig
from ipfm.engine.distributed.signals import check_stop
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.phases import mark
from ipfm.engine.objectives.step_metrics import StepMetrics
from ipfm.engine.runtime.errors import Interrupted, ProcessLost, TrainingFailed
from ipfm.engine.training import loop
from ipfm.engine.training.checkpoint import find_checkpoint
from ipfm.engine.training.loop import train
from ipfm.engine.training.run_folder import (
    RunFolder,
    check_run_folder,
    folder_user,
    open_run_folder,
    release_folder,
)
from ipfm.engine.training.task import NotFinite


class Net:
    """A network of one weight, which counts the steps."""

    state_kinds = ("weight",)

    def __init__(self) -> None:
        self.weight = torch.zeros(1)
        self.steps_applied = 0
        self.exact_buffers: dict[str, Tensor] = {}
        self.loss_scale_state: dict[str, float] = {}
        self.rates: dict[str, float] = {"lr": 0.5}

    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        yield "w", self.weight

    def load(self, kind: str, tensors: dict[str, Tensor]) -> None:
        self.weight.copy_(tensors["w"])

    def load_buffers(self, tensors: dict[str, Tensor]) -> None:
        assert not tensors


@dataclass
class Counting:
    """A task that counts its steps; `looks` are those that were looked at.

    Things happen in a step, `at` the update or `before` it, or at a look.
    """

    at: dict[int, Callable[[], None]] = field(default_factory=dict)
    before: dict[int, Callable[[], None]] = field(default_factory=dict)
    looking: Callable[[], None] = lambda: None
    picturing: Callable[[], None] = lambda: None
    title: str = "count"
    world: World = field(default_factory=lambda: World(0, 1, torch.device("cpu")))
    first_step: int = 0
    metrics: tuple[str, ...] = ()
    looks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.net = Net()
        self.networks = {"net": self.net}

    def iteration(self, step: int) -> StepMetrics:
        assert int(self.net.weight) == step
        self.before.get(step, lambda: None)()
        mark("net: optimiser")
        self.net.weight += 1
        self.net.steps_applied += 1
        self.at.get(step, lambda: None)()
        value = torch.tensor(float(step))
        return StepMetrics({"loss": value}, {"loss": torch.ones(())}, {"net": torch.zeros(())})

    def refresh(self) -> None: ...

    def average_said(self, step: int) -> None: ...

    def evaluate(self) -> None:
        self.looking()
        check_stop(self.world)
        self.looks.append(int(self.net.weight))

    def picture(self, count: int, seed: int) -> Tensor:
        self.picturing()
        return torch.zeros(count, 1, 2, 2)


def config(**settings) -> TeacherConfig:
    given = {"batch": 1, "max_steps": 12, "log_every": 5, "checkpoint_every": 4, "async_checkpoints": False, **settings}
    return TeacherConfig(**given)


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("seconds", "exchanges"),
    [
        (0.01, [1, 10, 20, 30, 40]),
        (1.0, [1, 10, 20, 30, 40]),
        (4.0, [1, 3, 5, 7, 9, *range(10, 41, 2)]),
        (60.0, range(1, 41)),
    ],
)
def test_slow_steps_are_reported_more_often(tmp_path, monkeypatch, seconds: float, exchanges) -> None:
    """Every 10 steps, but at least every 10 seconds; after the first step, which is the first to be timed."""
    now, seen = [0.0], []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    exchange = loop._Run._log_pending
    monkeypatch.setattr(loop._Run, "_log_pending", lambda self: (seen.append(self.progress.step), exchange(self))[1])

    def tick() -> None:
        now[0] += seconds

    task = Counting(at=dict.fromkeys(range(40), tick))
    train(task, config(max_steps=40, log_every=10, checkpoint_every=40), RunFolder(tmp_path))
    assert seen == list(exchanges)
    assert steps(tmp_path) == list(range(40))


@pytest.mark.quick
def test_a_signal_in_the_first_step_saves_it(tmp_path) -> None:
    task = Counting(at={0: lambda: signal.raise_signal(signal.SIGTERM)})
    with pytest.raises(Interrupted) as stopped:
        train(task, config(log_every=1000), RunFolder(tmp_path))
    assert stopped.value.signum == signal.SIGTERM
    found = find_checkpoint(tmp_path / "checkpoints")
    assert found is not None and found.name == "step-0000001"


@pytest.mark.parametrize("background", [False, True])
def test_an_evaluation_that_a_signal_cut_off_comes_at_the_next_start(tmp_path, background: bool) -> None:
    """In the middle, and at the end, where nothing else is left to do."""
    settings = config(eval_every=6, async_checkpoints=background)
    for expected in (6, 12):
        task = Counting(looking=lambda: signal.raise_signal(signal.SIGUSR1))
        with pytest.raises(Interrupted):
            train(task, settings, RunFolder(tmp_path))
        found = find_checkpoint(tmp_path / "checkpoints")
        assert found is not None and found.name == f"step-{expected:07d}" and task.looks == []
        if expected == 6:
            task = Counting(at={8: lambda: signal.raise_signal(signal.SIGTERM)})
            with pytest.raises(Interrupted):
                train(task, settings, RunFolder(tmp_path))
            assert task.looks == [6]
    task = Counting()
    assert train(task, settings, RunFolder(tmp_path)).step == 12
    assert task.looks == [12] and steps(tmp_path) == list(range(12))
    # From here on there is nothing to do.
    task = Counting()
    assert train(task, settings, RunFolder(tmp_path)).step == 12
    assert task.looks == []


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, background: bool) -> None:
    folder = tmp_path / "checkpoints"

    def block() -> None:
        folder.mkdir(exist_ok=True)
        (folder / ".partial-step-0000008").write_text("a file in the way of the folder")

    task = Counting(at={6: block})
    message = r"step-0000008 cannot be written \(File exists\); the last good one is step-0000004"
    with pytest.raises(TrainingFailed, match=message):
        train(task, config(async_checkpoints=background, max_steps=1000), RunFolder(tmp_path))
    # In the background it is known at the next checkpoint, if not before.
    assert int(task.net.weight) < 20
    (folder / ".partial-step-0000008").unlink()
    assert train(Counting(), config(async_checkpoints=background), RunFolder(tmp_path)).step == 12


def test_a_damaged_checkpoint_is_skipped_and_a_foreign_one_is_named(tmp_path, capsys) -> None:
    train(Counting(), config(), RunFolder(tmp_path))
    (tmp_path / "checkpoints" / "step-0000012" / "net.safetensors").write_bytes(b"")
    assert train(Counting(), config(max_steps=13), RunFolder(tmp_path)).step == 13
    shown = capsys.readouterr().err
    assert shown.count("skipping a damaged checkpoint") == 1 and "continuing at step 8" in shown
    other = Counting()
    other.networks = {"another": other.net}
    with pytest.raises(TrainingFailed, match=r"another\.safetensors cannot be read as the state of network 'another'"):
        train(other, config(max_steps=14), RunFolder(tmp_path))


def test_a_lost_process_says_where_to_continue(tmp_path) -> None:
    def lose() -> None:
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:15591.")

    message = r"has ended or does not answer \(Connection closed by peer\): the same command continues .* from "
    with pytest.raises(ProcessLost, match=f"{message}the start, it has no checkpoint"):
        train(Counting(at={1: lose}), config(), RunFolder(tmp_path))
    with pytest.raises(ProcessLost, match=f"{message}its checkpoint step-0000004"):
        train(Counting(at={5: lose}), config(), RunFolder(tmp_path))
    # What a process leaves that is killed between its first checkpoint's two renamings.
    (tmp_path / "checkpoints" / "latest").unlink()
    with pytest.raises(ProcessLost, match=f"{message}its checkpoint step-0000004"):
        train(Counting(at={5: lose}), config(), RunFolder(tmp_path))


def fail(error: Exception) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "/data/7.png"), "/data/7.png: No such file or directory"),
        (ValueError("data.zip: 7.png cannot be read"), "data.zip: 7.png cannot be read"),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "OutOfMemoryError: CUDA out of memory.; a smaller --micro-batch",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            "RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory; a smaller "
            "--micro-batch",
        ),
        (RuntimeError("a defect"), "RuntimeError: a defect ("),
    ],
)
@pytest.mark.parametrize("background", [False, True])
def test_an_error_in_a_step_saves_the_steps_before_it(tmp_path, error: Exception, said: str, background: bool) -> None:
    settings = config(async_checkpoints=background)
    with pytest.raises(TrainingFailed) as failed:
        train(Counting(before={6: fail(error)}), settings, RunFolder(tmp_path))
    text = str(failed.value)
    assert text.startswith(said) and "\n" not in text
    assert text.endswith(
        f"; the state is saved: the same command continues {tmp_path} from its checkpoint step-0000006"
    )
    defect = "a defect" in said
    assert (tmp_path / "traceback.txt").exists() == defect == (f"({tmp_path / 'traceback.txt'})" in text)
    assert steps(tmp_path) == list(range(6))
    assert train(Counting(), settings, RunFolder(tmp_path)).step == 12
    assert steps(tmp_path) == list(range(12)) and not (tmp_path / "traceback.txt").exists()


def test_an_error_between_the_updates_of_a_step_saves_nothing_of_it(tmp_path) -> None:
    """Networks of half a step would be a state that no run has."""
    message = r"^late: the same command continues .* from its checkpoint step-0000004$"
    with pytest.raises(TrainingFailed, match=message):
        train(Counting(at={6: fail(ValueError("late"))}), config(), RunFolder(tmp_path))
    with pytest.raises(TrainingFailed, match="from the start, it has no checkpoint"):
        train(Counting(before={0: fail(ValueError("at once"))}), config(), RunFolder(tmp_path / "b"))
    assert not (tmp_path / "b" / "checkpoints").exists()


def test_an_error_whose_state_cannot_be_saved_says_both(tmp_path) -> None:
    def block_and_fail() -> None:
        (tmp_path / "checkpoints" / ".partial-step-0000006").write_text("a file in the way of the folder")
        raise ValueError("unreadable")

    message = (
        r"^unreadable; and the state could not be saved \(the checkpoint .*step-0000006 cannot be written "
        r"\(File exists\); the last good one is step-0000004\): the same command continues .* from its checkpoint "
        r"step-0000004$"
    )
    with pytest.raises(TrainingFailed, match=message):
        train(Counting(before={6: block_and_fail}), config(), RunFolder(tmp_path))


@pytest.mark.parametrize(
    "error", [ValueError("no file"), RuntimeError("svd did not converge"), MemoryError(), OSError(5, "I/O")]
)
def test_an_evaluation_or_a_picture_that_fails_is_a_warning(tmp_path, capsys, error: Exception) -> None:
    task = Counting(looking=fail(error), picturing=fail(error))
    assert train(task, config(eval_every=6), RunFolder(tmp_path)).step == 12
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [line.partition(" failed: ")[0] for line in shown] == [
        f"warning: the {what} after step {step}" for step in (6, 12) for what in ("evaluation", "picture")
    ]
    assert steps(tmp_path) == list(range(12)) and find_checkpoint(tmp_path / "checkpoints").name == "step-0000012"


def test_a_profile_of_memory_that_fails_is_a_warning(tmp_path, capsys) -> None:
    assert train(Counting(), config(profile_memory=2), RunFolder(tmp_path)).step == 12
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert line.startswith("warning: no profile of memory: AttributeError: 'Counting' object has no attribute")


def test_a_second_ctrl_c_within_an_evaluation_says_where_the_run_continues(tmp_path, usual_ctrl_c) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    message = f"the same command continues {tmp_path} from its checkpoint step-0000004"
    with pytest.raises(KeyboardInterrupt, match=message):
        train(Counting(looking=twice), config(eval_every=6), RunFolder(tmp_path))


@pytest.fixture
def usual_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_too_many_bad_steps_are_noted_in_the_folder_until_the_next_start(tmp_path) -> None:
    class Bad(Counting):
        def iteration(self, step: int) -> StepMetrics:
            found = super().iteration(step)
            return StepMetrics(found.sums, found.counts, {"net": torch.tensor(float(step >= 6))})

    with pytest.raises(NotFinite):
        train(Bad(), config(max_bad_steps=1), RunFolder(tmp_path))
    noted = json.loads((tmp_path / "diverged.json").read_text())
    assert noted["step"] == 8 and "net in 2" in noted["reason"]
    assert train(Counting(), config(), RunFolder(tmp_path)).step == 12
    assert not (tmp_path / "diverged.json").exists()


def test_a_run_goes_back_to_an_earlier_checkpoint_and_forgets_what_came_after(tmp_path) -> None:
    settings = {"eval_every": 2, "keep_checkpoints": 5}
    train(Counting(), config(**settings), RunFolder(tmp_path))
    with pytest.raises(Interrupted):
        task = Counting(before={9: lambda: signal.raise_signal(signal.SIGTERM)})
        train(task, config(**settings, from_step=8, log_every=1), RunFolder(tmp_path))
    assert steps(tmp_path) == list(range(10))
    names = [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))]
    assert names == ["step-0000004", "step-0000008", "step-0000010"]
    assert [p.stem[-2:] for p in sorted((tmp_path / "samples").iterdir())] == ["02", "04", "06", "08"]
    task = Counting()
    train(task, config(**settings, from_step=0), RunFolder(tmp_path))
    assert task.looks == [2, 4, 6, 8, 10, 12] and steps(tmp_path) == list(range(12))


def test_a_step_that_is_gone_back_to_and_is_the_last_one_loses_what_came_after_it_too(tmp_path) -> None:
    settings = {"eval_every": 4, "keep_checkpoints": 5}
    train(Counting(), config(**settings), RunFolder(tmp_path))
    (tmp_path / "results.json").write_text("[]")
    task = Counting()
    assert train(task, config(**settings, max_steps=8, from_step=8), RunFolder(tmp_path)).step == 8
    assert task.looks == [8] and steps(tmp_path) == list(range(8))
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-0000004", "step-0000008"]
    assert sorted(p.stem[-2:] for p in (tmp_path / "samples").iterdir()) == ["04", "08"]
    assert not (tmp_path / "results.json").exists()


def test_a_run_folder_that_is_removed_meanwhile_is_made_again(tmp_path, capsys) -> None:
    path = tmp_path / "run"
    record = check_run_folder(path, "teacher", config(), {})
    folder = open_run_folder(path, record, write=True)
    # In one move: the checkpoint of step 4 is perhaps being written there.
    train(Counting(at={5: lambda: path.rename(tmp_path / "removed")}), config(), folder)
    assert capsys.readouterr().err.count(f"warning: {path} was removed while the run goes on: made again") == 1
    assert check_run_folder(path, "teacher", config(), {}) == record
    assert folder_user(path) == str(os.getpid()) and steps(path)[-1] == 11
    release_folder(path)


def test_logs_that_cannot_be_opened_end_the_run_before_it_begins(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    task = Counting()
    with pytest.raises(TrainingFailed, match=r"the logs in .* cannot be written \(.*/metrics\.jsonl: Is a directory\)"):
        train(task, config(), RunFolder(tmp_path))
    assert int(task.net.weight) == 0


def test_logs_that_fail_later_are_warnings(tmp_path, capsys) -> None:
    def block() -> None:
        for name in ("metrics.jsonl", "samples"):
            (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / "metrics.jsonl").mkdir()
        (tmp_path / "samples").write_text("a file in the way")

    def clear() -> None:
        (tmp_path / "metrics.jsonl").rmdir()

    task = Counting(at={0: block, 10: clear})
    assert train(task, config(eval_every=3), RunFolder(tmp_path)).step == 12
    shown = capsys.readouterr().err.splitlines()
    assert sum("metrics.jsonl cannot be written: Is a directory" in line for line in shown) == 1
    assert sum("samples cannot be written: " in line for line in shown) == 1
    # The lines have waited in memory.
    assert steps(tmp_path) == list(range(12))
    found = find_checkpoint(tmp_path / "checkpoints")
    assert found is not None and found.name == "step-0000012"
