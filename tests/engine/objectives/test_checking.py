"""`check_objective` passes this project's objectives, and says of one that does not hold what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import regression
import torch
from torch import Tensor

from ipfm.engine import DistillConfig, Distiller, PidConfig
from ipfm.engine.objectives import Distillation, Role, StepContext, check_objective
from ipfm.engine.objectives.base import check_objective_says
from ipfm.models import EDMPrecond, NetworkConfig, Precond


@pytest.fixture(scope="module")
def teacher() -> Precond:
    torch.manual_seed(0)
    return EDMPrecond(
        NetworkConfig(
            img_resolution=4, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
            dropout=0.0, label_dim=2, D=16.0,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "updates"),
    [
        (DistillConfig(batch=4, steps=2, student_updates=2), {"student": 2, "generator": 1}),
        (PidConfig(batch=4, points=9), {"generator": 1}),
        (PidConfig(batch=4, points=9, dropout=0.3), {"generator": 1}),
    ],
    ids=["ipfm", "pid", "dropout"],
)
def test_objectives_of_this_project_hold(config: Distillation, updates: dict[str, int], teacher: Precond) -> None:
    before = [p.detach().clone() for p in teacher.parameters()]
    gradients = check_objective(config, teacher)
    assert {name: len(found) for name, found in gradients.items()} == updates
    assert all(map(torch.equal, teacher.parameters(), before)) and next(teacher.parameters()).requires_grad


class Wrong(regression.Regression):
    """The toy with a defect."""

    facts: Any
    change: Callable[[Tensor, int], Tensor] | None = None

    def steps(self, context: StepContext) -> regression.RegressionStep:
        calls = [0]

        def teacher(x: Tensor, sigma: Tensor) -> Tensor:
            calls[0] += 1
            return context.teacher(x, sigma, torch.eye(2)[[0] * len(x)]) + self.change(x, calls[0])

        if self.change is None:
            return super().steps(context)
        return super().steps(replace(context, teacher=teacher))  # type: ignore[arg-type]


def wrong(**defects: Any) -> type[regression.RegressionConfig]:
    """Settings whose objective has these attributes."""

    @dataclass(frozen=True, kw_only=True)
    class Config(regression.RegressionConfig):
        def objective(self, network: NetworkConfig) -> Wrong:  # type: ignore[override]
            made = Wrong(self, network)
            for name, value in defects.items():
                setattr(made, name, value(made) if name in ("roles", "sample") else value)
            return made

    return Config


@pytest.mark.parametrize(
    ("defects", "said"),
    [
        ({"change": lambda x, call: torch.randn(())}, "iteration 0 gives another loss or gradient the second time"),
        ({"change": lambda x, call: torch.tensor(float(call))}, "iteration 1 depends on iteration 0 by more than"),
        ({"change": lambda x, call: torch.tensor(float(len(x)))}, "two micro-batches give another loss or gradient"),
        ({"change": lambda x, call: torch.tensor(float("nan"))}, "the gradient of the network pupil is not finite"),
        (
            {"roles": lambda made: (*made.roles, Role("other", made.network, "teacher", 1e-3, 0.0))},
            "the network other is updated by no call of step",
        ),
        ({"change": lambda x, call: x.new_tensor(float(x.isfinite().all()))}, "iteration 0 fails on the meta device"),
        ({"change": lambda x, call: torch.zeros(len(x), 1, 1, 1)}, "iteration 0 fails on the meta device, .*meta"),
        ({"generator": "other"}, "generator is 'other', which is none of its roles: pupil"),
        ({"roles": lambda made: (replace(made.roles[0], averaged=False),)}, "and must have averaged=True"),
        ({"facts": {"sigmas": [torch.ones(())]}}, "facts must be plain JSON values: "),
        ({"facts": {"level": 2.5}}, "facts must say how the result is drawn from: "),
        ({"sample": lambda made: lambda *_, **__: torch.zeros(1, 1, 4, 4)}, "sample must return images of shape"),
    ],
)  # fmt: skip
def test_what_does_not_hold_is_said(defects: dict[str, Any], said: str, teacher: Precond) -> None:
    defects = {"change": lambda x, call: torch.zeros(()), **defects}
    with pytest.raises(ValueError, match=said):
        check_objective(wrong(**defects)(batch=4, D=16.0), teacher)


@pytest.mark.parametrize(
    ("defects", "said"),
    [
        ({"facts": {}}, "facts must say how the result is drawn from: "),
        ({"generator": "other"}, "generator is 'other', which is none of its roles: pupil"),
        ({"roles": lambda made: (replace(made.roles[0], averaged=False),)}, "and must have averaged=True"),
    ],
)  # fmt: skip
def test_nothing_is_trained_whose_result_could_not_be_drawn_from(
    defects: dict[str, Any], said: str, teacher: Precond
) -> None:
    with pytest.raises(ValueError, match=said):
        Distiller(wrong(**defects)(batch=4, max_steps=1, D=16.0), teacher)


def test_what_an_objective_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"^SimpleNamespace has no facts, sample$"):
        check_objective_says(
            SimpleNamespace(title="", summary="", roles=(), generator="", nfe=1, steps=None, forwards=None)  # type: ignore[arg-type]
        )


def test_the_batch_is_even(teacher: Precond) -> None:
    with pytest.raises(ValueError, match=r"^batch must be even, to be tried in two halves, got 3$"):
        check_objective(DistillConfig(batch=3), teacher)
