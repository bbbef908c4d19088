"""Learning rates of an update: by hand, and as a distillation's networks get them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ipfm.engine import DistillConfig, TeacherConfig
from ipfm.engine.averages import learning_rate, warmed_up
from ipfm.engine.config import added_settings
from ipfm.engine.objectives.cmt import CmtConfig


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, (2.0, 2.0, 2.0, 2.0)),
        # RealUID and DMD2: lr (u + 1) / N, then lr.
        ({"lr_warmup": 4}, (0.5, 1.0, 1.5, 2.0, 2.0)),
        # CMT: lr (1 - u / 8).
        ({"lr_schedule": "linear"}, (2.0, 1.75, 1.5, 1.25, 1.0)),
        ({"lr_schedule": "linear", "lr_end": 0.5}, (2.0, 1.875, 1.75)),
        ({"lr_schedule": "linear", "lr_end": 1.0}, (2.0, 2.0, 2.0)),
        # EDM2: lr / sqrt(max(u / N, 1)).
        ({"lr_schedule": "rsqrt", "lr_decay_batches": 2}, (2.0, 2.0, 2.0, 2 / math.sqrt(1.5), 2 / math.sqrt(2))),
        ({"lr_schedule": "linear", "lr_warmup": 2}, (1.0, 1.75, 1.5)),
    ],
)
def test_schedules_by_hand(settings, rates) -> None:
    config = DistillConfig(max_steps=8, lr=2.0, **settings)
    assert [config.lr_at(step) for step in range(len(rates))] == pytest.approx(rates, rel=1e-15)
    assert [config.student_lr_at(update) for update in range(len(rates))] == pytest.approx(rates, rel=1e-15)
    changes = config.changing_rates(1)
    assert changes == ({} if set(rates) == {2.0} else {"student_lr": rates[1], "generator_lr": rates[1]})


def test_each_network_counts_its_own_updates() -> None:
    """Five of the student for one of the generator: its warm-up is over after a step, and both end at once."""
    config = DistillConfig(max_steps=4, lr=1.0, student_lr=0.5, student_updates=5, lr_warmup=5, lr_schedule="linear")
    assert [config.student_lr_at(u) for u in (0, 4, 5, 19)] == pytest.approx([0.1, 0.4, 0.375, 0.025])
    assert [config.lr_at(step) for step in range(4)] == pytest.approx([0.2, 0.3, 0.3, 0.2])
    assert config.changing_rates(3) == {"student_lr": config.student_lr_at(19), "generator_lr": config.lr_at(3)}


def test_a_constant_rate_needs_no_length() -> None:
    assert DistillConfig(lr=1e-4, lr_warmup=2).lr_at(7) == 1e-4
    with pytest.raises(ValueError, match=r"^the length of the run is not set"):
        DistillConfig(lr_schedule="linear").lr_at(0)
    with pytest.raises(ValueError, match=r"^a linear schedule needs the number of updates$"):
        learning_rate(1.0, 0, "linear")
    assert warmed_up(3, 0) == 1.0


def test_a_longer_run_falls_less_steeply() -> None:
    assert [DistillConfig(max_steps=n, lr=1.0, lr_schedule="linear").lr_at(4) for n in (4, 8)] == [0.0, 0.5]


def test_a_run_that_ends_before_its_generator_is_trained_is_planned() -> None:
    """By the step in which the generator meets its discriminator, beyond the end of the fall."""
    told = DistillConfig(batch=8, max_steps=2, discriminator="encoder", discriminator_kimg=(0.016, 0.032))
    config = replace(told, lr_schedule="linear")
    assert (config.first_whole_step, config.planned_step) == (2, 4) and config.lr_at(config.planned_step) == 0.0


def test_older_runs_had_the_schedules_of_then() -> None:
    assert added_settings(DistillConfig)["lr_schedule"] == "constant"
    assert added_settings(CmtConfig)["lr_schedule"] == CmtConfig().lr_schedule == "linear"
    assert TeacherConfig(lr=1.0, lr_rampup_kimg=0).changing_rates(3) == {}
    assert TeacherConfig(batch=100, lr=1.0, lr_rampup_kimg=1).changing_rates(3) == {"teacher_lr": 0.4}
