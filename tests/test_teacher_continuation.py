"""A training that began elsewhere is continued as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import launch
import pytest
import torch
from safetensors.torch import load_file


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
