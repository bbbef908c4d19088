"""A run that goes on elsewhere: other numbers of processes, other ZeRO stages, and exports that are the same."""

from __future__ import annotations

import sys
from pathlib import Path

import compared_cases
import equivalence
import launch
import pytest
import torch
from safetensors.torch import load_file

from ipfm.engine import generate
from ipfm.models import load_model

STEPS, MORE = 2, 2
CONFIG = {**equivalence.BASE, "max_steps": STEPS + MORE, "backward": "phased", "generator_beta1": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of stage 2 on two processes after two steps; two more from it in several ways; exports."""
    folder = tmp_path_factory.mktemp("elsewhere")
    teacher = compared_cases.make_small_teacher(folder)

    def case(name: str, stage: int, micro: int, **more: str | int) -> dict:
        config = {**CONFIG, "zero": stage, "micro_batch": micro}
        return {"name": name, "steps": STEPS + MORE, "config": config, "persistent": compared_cases.WHOLE, **more}

    def go(ranks: int, *cases: dict) -> None:
        job = {"teacher": str(teacher), "out": str(folder), "cases": list(cases)}
        launch.run_workers("distill_steps.py", ranks, job)

    def exported(stage: int) -> dict:
        start = {**case(f"export{stage}", stage, 4, load=saved), "steps": STEPS}
        return {**start, "export": str(folder / f"generator-{stage}-{ranks}")}

    saved = str(folder / "checkpoints")
    first = {**case("first", 2, 4, save=saved), "steps": STEPS}
    ranks = 2
    go(2, first, *(case(f"stage{z}", z, 4, load=saved) for z in (2, 3, 0)), *map(exported, range(4)))
    ranks = 1
    go(1, case("stage1", 1, 4, load=saved), case("stage3", 3, 8, load=saved), *map(exported, range(4)))
    return folder


@pytest.mark.distributed
def test_same_losses_on_other_processes_and_stages(folder: Path) -> None:
    """Stage 2 on two processes, continued on one at stages 1 and 3, and on two at stages 3 and 0: two losses."""
    expected = load_file(folder / "stage2-2.safetensors")
    for name in ("stage1-1", "stage3-1", "stage3-2", "stage0-2"):
        found = load_file(folder / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        for which in ("loss/student_loss", "loss/generator_loss"):
            assert len(found[which]) == MORE
            torch.testing.assert_close(found[which], expected[which], rtol=1e-5, atol=1e-5)
        for key, tensor in expected.items():
            assert (found[key] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-7, f"{name} {key}"


@pytest.mark.distributed
def test_every_stage_exports_the_same(folder: Path) -> None:
    """Bit for bit, configuration included."""
    folders = [folder / f"generator-{stage}-{ranks}" for stage in range(4) for ranks in (1, 2)]
    for name in ("model.safetensors", "config.json"):
        contents = {(one / name).read_bytes() for one in folders}
        assert len(contents) == 1, name


def test_exports_load_without_deepspeed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And sample, where importing it fails; that nothing imported here has: tests/engine/test_imports.py."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    net = load_model(folder / "generator-3-2")
    images = generate(net, 3, D=net.D, sigmas=[2.5], seed=0)
    assert images.shape == (3, 1, 8, 8) and bool(torch.isfinite(images).all())
