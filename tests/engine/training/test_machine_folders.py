"""What of a run folder goes to machines that do not share it; the sending itself is in test_two_nodes.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ipfm.engine.distributed.world import World
from ipfm.engine.training import machine_folders
from ipfm.engine.training.machine_folders import contents, newest_elsewhere, seen_elsewhere

ALONE = World(0, 1, torch.device("cpu"))
READ = (
    "config.json", "results.json", "generator/config.json", "generator/model.safetensors",
    "teacher/model/model.safetensors", "teacher/checkpoints/step-0000003/manifest.json",
    "checkpoints/step-0000004/manifest.json", "checkpoints/step-0000004/student.safetensors",
)  # fmt: skip
LEFT = (
    "metrics.jsonl", "convergence.png", "run.lock", ".config.json.x.tmp", "samples/step-0000004.png",
    "generator-best/model.safetensors", "set-aside/step-0000009/config.json",
    "checkpoints/step-0000002/manifest.json", "checkpoints/.partial-step-0000006/manifest.json", "checkpoints/latest",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*READ, *LEFT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_what_a_start_reads_is_sent_and_nothing_else(folder: Path) -> None:
    found = contents(folder)
    assert sorted(found.files) == sorted(READ) and found.size == sum(map(len, READ))
    assert (found.newest, found.copy, found.free) == (4, False, False)
    # A step that is gone back to, in the run and not in its teacher.
    back = contents(folder, 2)
    assert set(READ) ^ set(back.files) == {
        "checkpoints/step-0000002/manifest.json", "checkpoints/step-0000004/manifest.json",
        "checkpoints/step-0000004/student.safetensors",
    }  # fmt: skip
    # Damaged checkpoints are not sent.
    assert not [name for name in contents(folder, whole=True).files if "checkpoints" in name]


def test_folders_are_compared_by_their_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    assert contents(other).free and contents(other / "nowhere").free
    assert newest_elsewhere(contents(folder), contents(other)) and not newest_elsewhere(
        contents(other), contents(folder)
    )
    before = contents(folder).files
    large = folder / "generator" / "model.safetensors"
    for first, second in (
        (b"a", b"b"),
        (b"a" + bytes(2**18), b"b" + bytes(2**18)),
        (bytes(2**18) + b"a", bytes(2**18) + b"b"),
    ):
        large.write_bytes(first)
        one = contents(folder).files
        large.write_bytes(second)
        two = contents(folder).files
        assert {name for name in before if one[name] != two[name]} == {"generator/model.safetensors"}


def test_a_folder_that_all_see_is_nobodys_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is below a folder of another machine is that machine's too."""
    monkeypatch.setattr(machine_folders, "_elsewhere", {})
    assert seen_elsewhere(folder) == ""
    machine_folders._elsewhere[folder.resolve()] = "node1"
    assert seen_elsewhere(folder / "teacher") == "node1" and seen_elsewhere(folder.parent) == ""
    machine_folders.fetch(folder, ALONE)
