"""Learning rates as functions of the update alone: whatever process, micro-batch or part of a run asks."""

from __future__ import annotations

import math
from typing import Literal, get_args

LrSchedule = Literal["constant", "linear", "rsqrt"]
SCHEDULES: tuple[LrSchedule, ...] = get_args(LrSchedule)


def learning_rate(
    lr: float,
    update: int,
    schedule: LrSchedule = "constant",
    *,
    grown: float = 1.0,
    total: int | None = None,
    end: float = 0.0,
    hold: float = 1.0,
) -> float:
    """The learning rate of an update.

    constant: lr; linear: lr (1 - (1 - end) update / total); rsqrt: lr / sqrt(max(update / hold, 1)), EDM2's; each
    times `grown`.

    Args:
        lr: the full rate.
        update: counted from 0.
        schedule: how the rate falls.
        grown: share of the rate that a warm-up has reached.
        total: updates in all, for "linear".
        end: for "linear": share of the rate that is left after the last update.
        hold: for "rsqrt": updates before the rate falls.

    Raises:
        ValueError: "linear" without `total`.
    """
    if schedule == "linear":
        if total is None:
            raise ValueError("a linear schedule needs the number of updates")
        return lr * grown * (1 - (1 - end) * min(1.0, update / total))
    if schedule == "rsqrt":
        return lr * grown / math.sqrt(max(update / hold, 1.0))
    return lr * grown


def warmed_up(done: float, length: float) -> float:
    """Share of the rate that a linear warm-up has reached: done / length, at most 1; 1 without one (0)."""
    return min(1.0, done / length) if length else 1.0
