"""Dropout acts in the network that is being trained, and there alone: what is made as data is made without it."""

from __future__ import annotations

from typing import Any

import pytest
import random_values
import torch
from torch import Tensor, nn

from ipfm.engine import DistillConfig, Distiller, PidConfig
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives import student_steps
from ipfm.models import NetworkConfig, Precond, build_network

ALONE = World(0, 1, torch.device("cpu"))
NETWORK = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
    dropout=0.1, D=16.0,
)  # fmt: skip
COMMON: dict[str, Any] = {
    "batch": 4, "micro_batch": 4, "max_steps": 3, "lr": 1e-3, "zero": 0, "activation_checkpointing": "off",
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Precond:
    net = build_network(NETWORK).eval().requires_grad_(False)
    random_values.randomise(net)
    return net


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images that the student has been shown."""
    images: list[Tensor] = []
    original = student_steps.denoising_objective

    def recording(student: Any, y: Tensor, *args: Any, **keywords: Any) -> Any:
        images.append(y.detach().clone())
        return original(student, y, *args, **keywords)

    monkeypatch.setattr(student_steps, "denoising_objective", recording)
    return images


def modes(module: nn.Module) -> list[bool]:
    """Whether each evaluation of the module from now on is one in training mode."""
    found: list[bool] = []
    module.register_forward_pre_hook(lambda module, _: found.append(module.training))
    return found


@pytest.mark.parametrize("backward", ["joint", "phased"])
@pytest.mark.parametrize(("steps", "gradient"), [(1, "all"), (2, "all"), (3, "last")])
def test_images_for_the_student_are_made_without(
    teacher: Precond, shown: list[Tensor], steps: int, gradient: str, backward: str
) -> None:
    """Whatever the dropout, equal images of equal generators; by rules 1, those of version 0.1, they had it too."""
    settings = {**COMMON, "steps": steps, "gradient": gradient, "backward": backward}
    for dropout, rules in ((0.0, 2), (0.5, 2), (0.5, 1)):
        run = Distiller(DistillConfig(**settings, dropout=dropout, rules=rules), teacher, world=ALONE)
        run.steps.student_step(0)
    without, now, before = shown
    assert torch.equal(now, without) and not torch.allclose(before, without, atol=1e-2)


@pytest.mark.parametrize("backward", ["joint", "phased"])
def test_what_the_gradient_passes_through_has_it(teacher: Precond, backward: str) -> None:
    """Every evaluation of the generator in its own step; with the gradient through one alone, not those before it."""
    for gradient, rules in (("all", 2), ("last", 2), ("last", 1)):
        settings = {**COMMON, "steps": 3, "gradient": gradient, "backward": backward, "dropout": 0.5, "rules": rules}
        run = Distiller(DistillConfig(**settings), teacher, world=ALONE)
        generator, student = (modes(run.networks[name].module) for name in ("generator", "student"))
        step = next(s for s in range(99) if run.steps._last(student_steps.Stream.GENERATOR_LAST, s) == 2)
        run.steps.generator_step(step)
        made, trained = generator[:2], generator[2:]
        assert made == ([False, False] if (gradient, rules) == ("last", 2) else [True, True]), gradient
        assert trained and all(trained) and not any(student)
        run.steps.student_step(0)
        assert student[-1] is True


@pytest.mark.parametrize("difference", ["first", "central"])
@pytest.mark.parametrize("backward", ["joint", "phased"])
def test_the_teacher_is_asked_about_a_trajectory_without_it(teacher: Precond, difference: str, backward: str) -> None:
    asked: list[Tensor] = []
    for dropout, rules in ((0.0, 2), (0.5, 2), (0.5, 1)):
        settings = {**COMMON, "difference": difference, "backward": backward, "points": 5}
        run = Distiller(PidConfig(**settings, dropout=dropout, rules=rules), teacher, world=ALONE)
        run.teacher.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].clone()))
        run.iteration(0)
        assert run.generator.module.training is (dropout > 0)
        assert run.objective.forwards(phased=False, checkpointed=False) == 7 + 2 * (dropout > 0 and rules == 2)
    without, now, before = asked
    torch.testing.assert_close(now, without, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, without, atol=1e-2)


def test_a_compiled_network_is_traced_once_in_each_mode(teacher: Precond, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modes change twice a step, which compiles nothing anew."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend=backend, **options))
    run = Distiller(DistillConfig(**COMMON, dropout=0.5, compile=True, backward="joint"), teacher, world=ALONE)
    counts = []
    for step in range(3):
        run.iteration(step)
        counts.append(len(graphs))
    # Trained, frozen with a gradient to its input, without gradients; networks alike share what was compiled.
    assert counts[0] == counts[1] == counts[2] <= 5
