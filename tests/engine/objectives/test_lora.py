"""Networks on the teacher's weights with low-rank factors, against a plain loop by autograd through W + s B A."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equivalence
import pytest
import torch
from plain_lora import BOTH, check_equals, plain, weights_of

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench.equivalence import trained_tensors
from ipfm.engine.distributed.world import World

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 2
BASE: Mapping[str, Any] = {**equivalence.BASE, "max_steps": STEPS, **BOTH}
CASES: dict[str, dict[str, Any]] = {
    "both": {},
    "both-phased": {"backward": "phased", "micro_batch": 4, "activation_checkpointing": "on"},
    "student": {"generator": "full"},
    "generator": {"student": "full", "backward": "phased"},
    "k2": {"steps": 2, "backward": "phased", "student_beta1": 0.5},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_loop(name: str) -> None:
    """The factors and averages of autograd's; the teacher's weights are those of all networks, and stay."""
    teacher = equivalence.compared_teacher().eval().requires_grad_(False)
    config = DistillConfig(**{**BASE, **CASES[name]})
    run = Distiller(config, teacher, world=ALONE)
    first = weights_of(run)
    expected = plain(run.config, teacher, first, STEPS)
    measured = [run.iteration(step) for step in range(STEPS)]
    losses = {n: torch.stack([m.sums[n] / m.counts[n] for m in measured]) for n in measured[0].sums}
    check_equals(expected, trained_tensors(run), losses, first)
    for ours, theirs in zip(run.teacher.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.grad is None
