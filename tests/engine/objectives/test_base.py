"""Objectives: what they say of themselves, other first weights and widths, and a new one that the trainer never saw."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from regression import RegressionConfig

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.initial_networks import generator_network, starting_network
from ipfm.engine.objectives.pid import PidConfig
from ipfm.engine.random_streams import Stream, draw_number
from ipfm.engine.sampling.stored_model import sample_model
from ipfm.models import EDMPrecond, NetworkConfig, Precond, load_model, read_config

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
NETWORK = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
    dropout=0.0, D=16.0, label_dim=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Precond:
    torch.manual_seed(0)
    net = EDMPrecond(NETWORK)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return net.eval().requires_grad_(False)


# -- a third objective: tests/helpers/regression.py -------------------------------------------------------------------


def test_a_new_objective_needs_nothing_but_itself(teacher: Precond, tmp_path: Path) -> None:
    """Trained, planned, checkpointed, exported, sampled and continued by the trainer as it is, at half the width."""
    config = RegressionConfig(
        batch=8, micro_batch=4, max_steps=30, lr=1e-2, zero=0, width=0.5, log_every=1, checkpoint_every=10
    )
    run = Distiller(config, teacher, world=ALONE)
    plan = run.memory_plan()
    assert plan.phases.keys() == {"pupil: forward and backward", "pupil: optimiser"}
    # The teacher's 4 bytes a parameter; the pupil's weights, two moments and an average.
    assert plan.state == 4 * plan.parts.parameters + 16 * plan.parts.trained < 20 * plan.parts.parameters
    first = run.iteration(0)
    run = Distiller(config, teacher, world=ALONE)
    made = run.run(tmp_path / "run")
    last = run.iteration(30)
    assert last.sums["pupil_loss"] < 0.6 * first.sums["pupil_loss"]
    facts = read_config(tmp_path / "run" / "generator")
    assert facts.network.model_channels == 4 and facts.extra["sigmas"] == [2.5]
    drawn = sample_model(tmp_path / "run" / "generator", CPU, heun_steps=1, seed=3)
    assert drawn.nfe == 1 and torch.equal(drawn.draw(0, 2), run.objective.sample(made, 0, 2, seed=3))
    # A folder belongs to its objective.
    with pytest.raises(ValueError, match="belongs to another configuration"):
        Distiller(DistillConfig(batch=8, max_steps=30), teacher, world=ALONE).run(tmp_path / "run")


# -- first weights and widths ------------------------------------------------------------------------------------------


def test_first_weights(teacher: Precond) -> None:
    run = Distiller(DistillConfig(batch=4, max_steps=1), teacher, world=ALONE)
    for net in run.networks.values():
        assert all(torch.equal(p, q) for p, q in zip(net.module.parameters(), teacher.parameters(), strict=True))
    config = DistillConfig(batch=4, max_steps=1, init="random", student_width=0.5)
    state = torch.random.get_rng_state()
    runs = [Distiller(replace(config, seed=seed), teacher, world=ALONE) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (dict(run.networks["generator"].module.named_parameters()) for run in runs)
    name = "model.enc.8x8_conv.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
    assert not torch.equal(a[name], dict(teacher.named_parameters())[name])
    # Untrained, its output layer is zero: a denoiser that returns c_skip x.
    assert float(a["model.dec.8x8_aux_conv.weight"].detach().abs().max()) < 1e-4
    assert runs[0].networks["student"].module.config.model_channels == 4  # type: ignore[union-attr]
    measured = runs[0].iteration(0)
    assert set(measured.bad) == {"student", "generator"} and all(float(bad) == 0 for bad in measured.bad.values())
    runs[0].refresh()
    assert runs[0].sample(0, 2, seed=0).isfinite().all()


def test_widths() -> None:
    assert generator_network(NETWORK, 1.0) is NETWORK
    assert generator_network(NETWORK, 0.5).model_channels == 4 and generator_network(NETWORK, 2).model_channels == 16
    with pytest.raises(ValueError, match=r"^width 0.3 makes 2.4 channels of 8: give a divisor$"):
        generator_network(NETWORK, 0.3)
    for config in (PidConfig(width=0.3), DistillConfig(width=0.3)):
        with pytest.raises(ValueError, match=r"^width 0.3 makes 2.4 channels of 8: give a divisor$"):
            config.check_network(NETWORK)
    with pytest.raises(ValueError, match=r"^init teacher needs width 1, got 0.5: give init random$"):
        DistillConfig(init="teacher", width=0.5)
    with pytest.raises(ValueError, match=r"^student-init teacher needs student-width 1, got 2: give"):
        DistillConfig(student_init="teacher", student_width=2)
    odd = starting_network(replace(NETWORK, model_channels=12), "random", EDMPrecond(NETWORK), 5)
    assert odd.config.model_channels == 12 and all(p.requires_grad for p in odd.parameters())


def test_the_result_of_a_narrow_run_can_be_loaded(teacher: Precond, tmp_path: Path) -> None:
    config = DistillConfig(batch=4, max_steps=2, width=0.5, zero=0, steps=2, gradient="last", log_every=1)
    run = Distiller(config, teacher, world=ALONE)
    net = run.run(tmp_path / "run")
    loaded = load_model(tmp_path / "run" / "generator")
    assert loaded.config == net.config and loaded.config.model_channels == 4
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), loaded.parameters(), strict=True))


# -- numbers that the host draws ---------------------------------------------------------------------------------------


def test_numbers_of_the_host() -> None:
    at = {"seed": 7, "stream": Stream.GENERATOR_LAST}
    drawn = [draw_number(4, step=step, **at) for step in range(2000)]
    assert drawn == [draw_number(4, step=step, **at) for step in range(2000)]
    assert drawn != [draw_number(4, step=step, seed=8, stream=Stream.GENERATOR_LAST) for step in range(2000)]
    counts = Counter(drawn)
    # 500 each, standard deviation 19.4: six of them fail with probability below 1e-8.
    assert set(counts) == {0, 1, 2, 3} and all(abs(count - 500) < 6 * 19.4 for count in counts.values())
    assert {draw_number(1, step=step, **at) for step in range(20)} == {0}


# -- D = inf -----------------------------------------------------------------------------------------------------------


def test_large_D_is_diffusion(teacher: Precond) -> None:
    """D = 1e7 and D = inf: the same losses and samples to 1e-3 at the same seed."""
    losses, images = [], []
    for D in (1e7, math.inf):
        net = EDMPrecond(replace(NETWORK, D=D))
        net.load_state_dict(teacher.state_dict())
        run = Distiller(DistillConfig(batch=8, max_steps=3, lr=1e-4, zero=0), net.requires_grad_(False), world=ALONE)
        measured = [run.iteration(step) for step in range(3)]
        losses.append(torch.stack([m.sums[name] for m in measured for name in sorted(m.sums)]))
        run.refresh()
        images.append(run.sample(0, 8, seed=1))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3 * float(losses[1].abs().max()))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-3)
    assert not torch.equal(images[0], images[1])
