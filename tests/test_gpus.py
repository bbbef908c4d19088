"""No test takes a GPU by accident: `pytest -m gpu` asks for it, and all others run as on a machine without one."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gpus
import launch
import prepared
import pytest
import torch


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> ModuleType:
    """The conftest.py that is shared by all tests."""
    path = str(Path(__file__).parent / "conftest.py")
    return next(p for p in request.config.pluginmanager.get_plugins() if getattr(p, "__file__", "") == path)


@pytest.fixture
def machine_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that are seen as far as CUDA_VISIBLE_DEVICES shows them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != "")


@pytest.mark.parametrize(
    ("marks", "asks"),
    [
        ("", False), ("quick", False), ("not gpu", False), ("not distributed", False), ("not gpu and quick", False),
        ("gpu", True), ("gpu and not distributed", True), ("gpu or quick", True),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("machine_with_two_gpus")
def test_which_marks_ask_for_a_gpu(marks: str, asks: bool, suite: ModuleType) -> None:
    assert gpus.asked(marks) is asks
    suite.choose_device(marks)
    # Kernels are compiled on a GPU and interpreted elsewhere.
    seen = os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("TRITON_INTERPRET")
    assert seen == (("0,1", None) if asks else ("", "1"))


def test_this_very_process(request: pytest.FixtureRequest) -> None:
    if not gpus.asked(request.config.option.markexpr):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


SHOW = "import os; print([os.environ.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'DS_ACCELERATOR')])"


@pytest.mark.usefixtures("machine_with_two_gpus")
def test_a_started_program_sees_no_gpu_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked one, and one that is started as it may use a GPU; `deepspeed` hides by the second variable."""
    script = tmp_path / "show.py"
    script.write_text(SHOW, encoding="utf-8")
    begun: list[type] = []
    start = prepared.start

    def noted(*words: Any, **more: Any) -> Any:
        begun.append(type(program := start(*words, **more)))
        return program

    monkeypatch.setattr(prepared, "start", noted)
    assert prepared.run(script, env=launch.environment()).stdout == "['', 'cpu']\n"
    assert prepared.run(script, env=launch.environment(gpu=True)).stdout == "['0,1', None]\n"
    assert [kind.__name__ for kind in begun] == ["Program", "Popen"]


def test_workers_see_gpus_where_a_test_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def start(*words: Any, env: dict[str, str], **more: Any) -> SimpleNamespace:
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(kill=lambda: None, wait=lambda timeout: 0)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(prepared, "start", start)
    launch.run_workers("any.py", 2, None)
    launch.run_workers("any.py", 1, None, gpu=True)
    assert seen == ["", "", "0,1"]


class Item:
    """What is looked at of a test."""

    def __init__(self, *marks: str, fixtures: tuple[str, ...] = (), given: tuple[str, ...] = ()) -> None:
        self.marks = {name: getattr(pytest.mark, name).mark for name in marks}
        self.fixturenames = (*fixtures, *given)
        self.callspec = SimpleNamespace(params=dict.fromkeys(given))

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.marks[marker.name] = marker.mark


def marked(suite: ModuleType, cuda: bool, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str]]:
    """Whether `gpu` chooses it and why it is skipped, of four tests: a GPU's, any, the kernels', one given a device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    items = [Item("gpu"), Item("quick"), Item(fixtures=("device",)), Item(given=("device",))]
    suite.mark_by_device(items, "none here")
    skips = [item.marks.get("skip") for item in items]
    return [("gpu" in i.marks, s.kwargs["reason"] if s else "") for i, s in zip(items, skips, strict=True)]


def test_which_tests_are_left_out(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert marked(suite, False, monkeypatch) == [(True, "none here"), (False, ""), (False, ""), (False, "")]
    elsewhere = "is for the CPU: run it without `-m gpu`"
    assert marked(suite, True, monkeypatch) == [(True, ""), (False, elsewhere), (True, ""), (False, elsewhere)]
