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


def test_a_folder_is_no_file_for_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is said before an hour of compiling."""
    monkeypatch.setattr(sys, "argv", ["rehearsal.py", "--recipe", "digits", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        rehearsal.main()
    assert f"--out {tmp_path} is a folder: give a file" in capsys.readouterr().err


def test_an_interrupted_rehearsal_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled is not compiled again, also not what another recipe launches; by other kernels all is."""
    from ipfm.kernels.bench import rehearsal as compiling
    from ipfm.kernels.bench.fake_driver import Launch, Variant

    def launch(elements: int) -> Launch:
        variant = Variant("module", f"kernel{elements % 2}", (), (("BLOCK", elements), ("EPS", 1e-4)), (), 4, 3)
        return Launch(variant, (1, 1, 1), {"x": elements}, {})

    class InTurn:
        """In place of a pool of processes."""

        def __init__(self, *settings: object, **more: object) -> None: ...

        def __enter__(self) -> InTurn:
            return self

        def __exit__(self, *error: object) -> None: ...

        map = staticmethod(map)

    compiled: list[tuple[int, int]] = []
    dies_after = [3]

    def compile_some(variants: list[Variant], capability: int) -> list[Compiled]:
        if len(compiled) >= dies_after[0]:
            raise KeyboardInterrupt
        compiled.extend((variant.constant("BLOCK"), capability) for variant in variants)
        return [Compiled(v, capability, 40, int(v.constant("BLOCK") == 4), 0, 9, 128, 64) for v in variants]

    monkeypatch.setattr(compiling, "ProcessPoolExecutor", InTurn)
    monkeypatch.setattr(compiling, "compile_some", compile_some)
    monkeypatch.setattr(compiling, "TOGETHER", 1)
    launches = [launch(n) for n in (2, 4, 5, 4, 2)]
    kept = tmp_path / "new" / "r.compiled.jsonl"

    def once() -> dict[str, object]:
        compiled.clear()
        return rehearsal._compiled(7, launches, ["x is not recorded"], 1, compiling.Kept(kept))

    with pytest.raises(KeyboardInterrupt):
        once()
    first = list(compiled)
    assert first == [(2, 80), (2, 90), (2, 100)]
    # In the middle of a line.
    text = kept.read_text()
    kept.write_text(text[: text.rindex("{") + 9])
    dies_after[0] = 10**6
    counts = once()
    # The heaviest of each kernel for four more.
    heavy = [(n, capability) for capability in (75, 86, 89, 120) for n in (4, 5)]
    rest = [(2, 100), *((n, capability) for n in (4, 5) for capability in (80, 90, 100))]
    assert sorted(compiled) == sorted(rest + heavy)
    assert counts["variants"] == 3 and counts["spills"] == 7 and counts["steps"] == 7
    assert counts["faults"][0] == "x is not recorded" and len(counts["faults"]) == 8
    assert once() == counts and not compiled
    monkeypatch.setattr(compiling, "sources", lambda: "other kernels")
    assert once() == counts and len(compiled) == 17
    launches.append(launch(6))
    assert once()["variants"] == 4
    assert sorted(compiled) == [(6, capability) for capability in (75, 80, 86, 89, 90, 100, 120)]
