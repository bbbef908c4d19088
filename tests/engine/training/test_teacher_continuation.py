"""A training that began elsewhere is continued as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import launch
import official_files
import pytest
import torch
from safetensors.torch import load_file

from ipfm.engine.config import TeacherConfig
from ipfm.engine.training.run_folder import check_run_folder, open_run_folder
from ipfm.engine.training.teacher import training_facts
from ipfm.models import EDMPrecond, presets
from ipfm.models.checkpoints.training_state import read_training_state


@pytest.mark.distributed
@pytest.mark.parametrize(("zero", "ranks"), [(0, 1), (1, 2)])
def test_weights_optimiser_and_average_continue(tmp_path: Path, zero: int, ranks: int) -> None:
    launch.run_workers("continue_teacher.py", ranks, {"out": str(tmp_path), "zero": zero, "ema": True})
    whole, part = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "part"))
    assert {key.partition("/")[0] for key in whole} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    for key in whole:
        assert torch.equal(part[key], whole[key]), key


@pytest.mark.distributed
def test_without_an_average_it_starts_from_the_weights(tmp_path: Path) -> None:
    launch.run_workers("continue_teacher.py", 1, {"out": str(tmp_path), "zero": 0, "ema": False})
    start, whole, part = (load_file(tmp_path / f"{name}.safetensors") for name in ("start", "whole", "part"))
    for key in whole:
        kind, _, name = key.partition("/")
        if kind == "ema":
            assert torch.equal(start[key], start[f"weight/{name}"]), key
        else:
            assert torch.equal(part[key], whole[key]), key
    assert any(not torch.equal(part[key], whole[key]) for key in whole if key.startswith("ema/"))


def test_the_folder_of_a_fresh_training_is_not_taken(tmp_path: Path) -> None:
    """It would go on from its own checkpoint, and the state that was given would count for nothing."""
    config, network = TeacherConfig(D=128.0, max_steps=1), presets.get("digits", D=128.0)
    net = official_files.randomize(EDMPrecond(network))
    path = official_files.write_torch(
        tmp_path / "training-state-000001.pt", official_files.pfgmpp_state(net, net, step=1000, pfgmpp=True, D=128)
    )
    fresh = training_facts(config, network, None, None)
    continued = training_facts(config, network, None, read_training_state(path))
    for name, ours, others in (("a", fresh, continued), ("b", continued, fresh)):
        folder = tmp_path / name
        open_run_folder(folder, check_run_folder(folder, "teacher", config, ours), write=True)
        check_run_folder(folder, "teacher", config, ours)
        with pytest.raises(ValueError, match=rf"{name} belongs to another configuration \(continues is .* here\)"):
            check_run_folder(folder, "teacher", config, others)
