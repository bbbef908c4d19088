"""The rehearsal of the first GPU: which steps it knows, what it counts, and what it takes for a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import rehearsal

from ipfm.engine.commands.recipes import project_recipes
from ipfm.engine.config import TeacherConfig
from ipfm.kernels.bench.rehearsal import Compiled
from ipfm.models import presets


def test_every_recipe_and_every_preset_is_rehearsed() -> None:
    steps = list(rehearsal.steps())
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for recipe in project_recipes():
        assert any(name.startswith(recipe.file.removesuffix(".py")) for name in names), recipe.file
    networks = [replace(step.network, D=1.0, dropout=0.0) for step in steps]
    assert all(replace(network, D=1.0, dropout=0.0) in networks for network in presets.TABLE.values())
    assert any(isinstance(step.config, TeacherConfig) and "digits" in step.name for step in steps)


def test_the_smallest_recipe_passes(tmp_path: Path) -> None:
    """Recorded, taken through Triton's own way and compiled: in a process whose kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "counts.json"
    script = Path(rehearsal.__file__)
    command = [sys.executable, str(script), "--recipe", "digits_pid, teacher", "--quick", "--out", str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    counts = json.loads(out.read_text())
    assert (counts["spills"], counts["faults"], counts["steps"]) == (0, [], 1)
    assert counts["by_architecture"] == {"sm_90": counts["variants"]}
    assert {"denoising_loss_kernel", "group_norm_silu_kernel", "update_kernel"} <= set(counts["by_kernel"])
    assert "no faults" in done.stdout


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        pytest.param({"spills": 2}, "2 spills", id="spills"),
        pytest.param({"shared": 200_000, "capability": 86}, "200000 bytes of shared memory of 101376", id="shared"),
        pytest.param({"registers": 140}, "140 registers a thread for 512 threads, of 65536 together", id="registers"),
        pytest.param({"warps": 64, "registers": 32}, "2048 threads of 1024", id="threads"),
        pytest.param({}, None, id="nothing"),
    ],
)
def test_what_would_not_run_is_a_fault(change: dict[str, int], fault: str | None) -> None:
    from ipfm.kernels.bench.fake_driver import Variant

    change = dict(change)
    variant = Variant("module", "kernel", (), (), (), warps=change.pop("warps", 16), stages=3)
    numbers = {"capability": 90, "registers": 96, "spills": 0, "shared": 0, "instructions": 1}
    found = Compiled(variant, **(numbers | change), load_bits=128, store_bits=128).faults
    assert found == ([] if fault is None else [fault])


def test_a_step_that_cannot_be_recorded_is_named_and_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(step: rehearsal.Step, gpus: int) -> tuple[str, list[object], int]:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(rehearsal, "recorded", recorded)
    name, kinds, operators = rehearsal.tried(next(rehearsal.steps()), 8)
    assert name.endswith(" on 8 GPUs is not recorded: RuntimeError: no such operator")
    assert (kinds, operators) == ([], 0)
