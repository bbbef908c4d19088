"""Checkpoints: portable between stages and process counts, checked, never half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import launch
import pytest
import torch
from safetensors.torch import load_file

from ipfm.engine.training.checkpoint import DamagedCheckpoint, find_checkpoint, verify_checkpoint
from ipfm.models import EDMPrecond, NetworkConfig, save_model

BASE = {"batch": 8, "max_steps": 6, "lr": 1e-3, "eps": 1e-3, "ema_kimg": 0.05, "seed": 5, "dropout": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:
    torch.manual_seed(1)
    net = EDMPrecond(
        NetworkConfig(img_resolution=4, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1,
                      attn_resolutions=(), dropout=0.0, D=16.0)
    )  # fmt: skip
    save_model(net, folder / "teacher")
    return folder / "teacher"


@pytest.fixture(scope="module")
def saved(folder: Path, teacher: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Six steps in one go, and three steps saved at stage 0 on one process and at stage 2 on two."""

    def case(name: str, steps: int, stage: int, **where: str) -> dict:
        # Dropout is seeded by the position of a micro-batch: the same four images at a time everywhere.
        return {"name": name, "steps": steps, "config": {**BASE, "zero": stage, "micro_batch": 4}, **where}

    def go(ranks: int, *cases: dict) -> None:
        job = {"teacher": str(teacher), "out": str(folder), "cases": list(cases)}
        launch.run_workers("distill_steps.py", ranks, job)

    one, two = str(folder / "one"), str(folder / "two")
    go(1, case("whole", 6, 0), case("half", 3, 0, save=one))
    go(2, case("whole", 6, 2), case("half", 3, 2, save=two), case("2to2", 6, 2, load=two), case("1to2", 6, 1, load=one))
    go(1, case("1to1", 6, 0, load=one), case("2to1", 6, 1, load=two))
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


@pytest.mark.distributed
@pytest.mark.parametrize(("resumed", "whole"), [("1to1-1", "whole-1"), ("2to2-2", "whole-2")])
def test_same_stage_and_processes_continue_bit_for_bit(saved, resumed: str, whole: str) -> None:
    assert saved[resumed].keys() == saved[whole].keys()
    for name, tensor in saved[whole].items():
        tail = tensor[3:] if name.startswith("loss/") else tensor
        assert torch.equal(saved[resumed][name], tail), name


@pytest.mark.distributed
@pytest.mark.parametrize("resumed", ["2to1-1", "1to2-2"])
def test_other_stages_and_processes_continue_to_rounding(saved, resumed: str) -> None:
    for name, tensor in saved["whole-1"].items():
        tail = tensor[3:] if name.startswith("loss/") else tensor
        torch.testing.assert_close(saved[resumed][name], tail, rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
def test_content_is_tensors_and_json(saved, folder: Path) -> None:
    checkpoint = find_checkpoint(folder / "two")
    assert checkpoint is not None and checkpoint.name == "step-0000003"
    assert (folder / "two" / "latest").read_text() == "step-0000003\n"
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "generator.safetensors", "manifest.json", "progress.json", "student.safetensors",
    ]  # fmt: skip
    kinds = {name.split("/")[0] for name in load_file(checkpoint / "generator.safetensors")}
    assert kinds == {"weight", "exp_avg_sq", "ema"}
    progress = json.loads((checkpoint / "progress.json").read_text())
    assert progress == {"format": 1, "step": 3, "steps_applied": {"student": 3, "generator": 3}}


@pytest.mark.distributed
def test_damage_is_reported_and_skipped(
    saved, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = find_checkpoint(folder / "one")
    assert whole is not None

    def damaged(step: int) -> Path:
        return Path(shutil.copytree(whole, tmp_path / f"step-{step:07d}"))

    damaged(3)
    (damaged(4) / "student.safetensors").unlink()
    file = damaged(5) / "generator.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    truncated = damaged(6) / "student.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-7])
    (damaged(7) / "manifest.json").write_text("{")
    (tmp_path / "step-0000008").mkdir()
    (tmp_path / ".partial-step-0000009").mkdir()
    found = find_checkpoint(tmp_path)
    assert found is not None and found.name == "step-0000003"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    for line, reason in zip(
        lines, ["cannot be read", "cannot be read", "does not match", "does not match", "is missing"], strict=True
    ):
        assert line.startswith("ipfm: skipping a damaged checkpoint: ") and reason in line
    assert find_checkpoint(tmp_path / "nothing") is None


@pytest.mark.distributed
def test_every_flipped_byte_is_noticed(saved, folder: Path, tmp_path: Path) -> None:
    whole = find_checkpoint(folder / "one")
    assert whole is not None
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    verify_checkpoint(copy)
    for name in ("progress.json", "student.safetensors"):
        original = (copy / name).read_bytes()
        for position in range(0, len(original), max(1, len(original) // 50)):
            changed = bytearray(original)
            changed[position] ^= 0x40
            (copy / name).write_bytes(changed)
            with pytest.raises(DamagedCheckpoint, match=name):
                verify_checkpoint(copy)
        (copy / name).write_bytes(original)
    verify_checkpoint(copy)
