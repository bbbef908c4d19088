"""A guided teacher distilled: against the plain loop, in plans and figures, by a recipe, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import compared_cases
import equivalence
import official_files as of
import pytest
import torch
from torch import Tensor

from ipfm.engine import DistillConfig, Distiller, plan_memory
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.bench.equivalence import NETWORK, trained_tensors
from ipfm.engine.commands.main import _main
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments.gpu_costs import Run
from ipfm.engine.memory.arithmetic import forward_flops, step_forwards
from ipfm.engine.objectives.pid import PidConfig
from ipfm.engine.runtime.commandline import BadInput, run_command
from ipfm.engine.training.resolve import complete
from ipfm.models import EDMPrecond, Precond, build_network, guided, load_teacher, presets, read_config, save_model
from ipfm.models.precond import unguided
from ipfm.recipes import digits_ipfm

STEPS, W = 2, 1.4
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
# Thinner than the teacher, and without classes.
WEAK = replace(NETWORK, channel_mult=(1, 1), label_dim=0, augment_dim=0)


def weak_network() -> Precond:
    return of.randomize(EDMPrecond(WEAK), 7).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compared_cases.make_small_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weak") / "model"
    save_model(weak_network(), folder)
    return folder


def loop(teacher: Path, weak: Path, config: DistillConfig) -> plain_loop.Plain:
    """The plain loop with the formula written out of the two denoisers; what it trains begins with the teacher."""
    strong, guide, guided_one = load_teacher(teacher), load_teacher(weak), load_teacher(teacher)

    def denoise(x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return W * strong(x, sigma, class_labels) + (1 - W) * guide(x, sigma)

    guided_one.forward = denoise  # type: ignore[method-assign, assignment]
    student, generator, average = (load_teacher(teacher) for _ in range(3))
    fresh = torch.optim.Adam(
        generator.parameters(), lr=config.lr, betas=(config.generator_beta1, 0.999), eps=config.eps
    ).state_dict()
    begun = plain_loop.Begun(student, generator, average, fresh, fresh, step=0)
    return plain_loop.distill(guided_one, config, STEPS, begun)


@pytest.fixture(scope="module")
def plain(teacher: Path, weak: Path) -> dict[str, plain_loop.Plain]:
    return {
        name: loop(teacher, weak, DistillConfig(**{**equivalence.BASE, "max_steps": STEPS, **more}))
        for name, more in (("k1", {}), ("k2", {"steps": 2}))
    }


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("k1", {"backward": "joint"}),
        ("k1", {"backward": "phased", "activation_checkpointing": "on"}),
        ("k2", {"backward": "joint", "micro_batch": 4}),
    ],
    ids=["joint", "phased", "accumulated"],
)
def test_the_guided_teacher_stands_for_the_teacher_everywhere(
    teacher: Path, weak: Path, plain: dict[str, plain_loop.Plain], name: str, more: dict[str, Any]
) -> None:
    """In the weight too; the student and the generator begin with the teacher, not with its guide."""
    net = guided(load_teacher(teacher), load_teacher(weak), W)
    settings = {**equivalence.BASE, "max_steps": STEPS, "zero": 0, "steps": 2 if name == "k2" else 1, **more}
    distiller = Distiller(DistillConfig(**settings), net, world=ALONE)
    for step in range(STEPS):
        distiller.iteration(step)
    assert max(equivalence.difference(plain[name], trained_tensors(distiller))) <= equivalence.LIMIT
    unlike = plain_loop.distill(load_teacher(teacher), DistillConfig(**settings), STEPS)
    assert max(equivalence.difference(unlike, trained_tensors(distiller))) > 10 * equivalence.LIMIT


@pytest.mark.distributed
def test_guided_by_two_processes(teacher: Path, weak: Path, plain: dict[str, plain_loop.Plain], tmp_path: Path) -> None:
    base = {**equivalence.BASE, "max_steps": STEPS, "micro_batch": 4, "guide": str(weak), "guidance": W}
    cases = {
        "k1-z1": {**base, "zero": 1, "backward": "joint"},
        "k1-z3": {**base, "zero": 3, "backward": "phased", "teacher_storage": "sharded"},
        "k2-z2": {**base, "zero": 2, "backward": "phased", "steps": 2, "micro_batch": 2},
    }
    for name, found in equivalence.run(teacher, tmp_path, 2, cases, STEPS, whole=compared_cases.WHOLE).items():
        assert max(equivalence.difference(plain[name[:2]], found)) <= equivalence.LIMIT, name


@pytest.mark.quick
@pytest.mark.parametrize("name", ["digits", "edm2-img64-s"])
def test_a_guided_network_is_the_formula_in_its_scalings(name: str) -> None:
    small: dict[str, Any] = {"img_resolution": 8, "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
    config = replace(presets.get(name, D=32.0), **small, attn_resolutions=(4,))
    net, weak = (of.randomize(build_network(config), seed).double().eval() for seed in (0, 1))
    x = torch.randn(2, *config.image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 20.0])
    labels = torch.eye(2, config.label_dim) if config.label_dim else None
    expected = weak(x, sigma, labels) + W * (net(x, sigma, labels) - weak(x, sigma, labels))
    one = guided(net, weak, W)
    torch.testing.assert_close(one(x, sigma, labels), expected, rtol=1e-12, atol=1e-12)
    assert unguided(one).config == net.config and unguided(one).model is net.model
    assert unguided(net) is net and guided(net, weak, 1.0) is net
    assert one.config.unguided == net.config and one.config.at(8.0).guide.network.D == 8.0  # type: ignore[union-attr]
    # What is set of the one is set of both.
    one.channels_last = one.activation_checkpointing = True
    assert weak.channels_last and net.channels_last and weak.activation_checkpointing


@pytest.mark.quick
def test_what_cannot_guide_or_be_guided_is_refused(tmp_path: Path) -> None:
    net = build_network(NETWORK)
    one = guided(net, weak_network(), W)

    def said(guide: Precond, weight: Any = W) -> str:
        with pytest.raises(ValueError) as error:
            guided(net, guide, weight)
        return str(error.value)

    assert said(build_network(replace(NETWORK, D=math.inf))) == "the guide must have the network's D, 16.0, got inf"
    assert said(build_network(replace(NETWORK, sigma_data=1.0))).endswith("network's sigma_data, 0.5, got 1.0")
    assert said(build_network(replace(NETWORK, label_dim=2))) == (
        "the guide must know the network's 3 classes or none, got 2"
    )
    assert said(one).startswith("a guide cannot be guided itself")
    assert said(weak_network(), -1) == "guidance must be a finite number of at least 0; 1 is without, got -1.0"
    assert said(weak_network(), "2") == "guidance must be a number, got '2'"
    with pytest.raises(ValueError, match="a guided network is not stored"):
        save_model(one, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.quick
def test_settings_and_teacher_agree_about_guidance() -> None:
    config = DistillConfig(batch=4, max_steps=1)
    one = guided(build_network(NETWORK), weak_network(), W).config
    assert complete(config, one, CPU).guidance == W == complete(replace(config, guidance=W), one, CPU).guidance
    assert complete(replace(config, guidance=1.0), NETWORK, CPU).guidance is None
    with pytest.raises(ValueError, match=r"^guidance 2 was given, but the teacher has 1\.4$"):
        complete(replace(config, guidance=2.0), one, CPU)
    with pytest.raises(ValueError, match=r"^guidance 1\.4 was given, but the teacher is not guided: guided\("):
        complete(replace(config, guidance=W), NETWORK, CPU)
    with pytest.raises(ValueError, match="was given without guidance"):
        DistillConfig(guide=Path("x"))
    with pytest.raises(ValueError, match=r"^guidance must be a finite number >= 0, got -1"):
        DistillConfig(guidance=-1.0)


@pytest.mark.quick
def test_plans_count_the_guide() -> None:
    one = guided(build_network(NETWORK), weak_network(), W).config
    weights = 4 * sum(p.numel() for p in weak_network().parameters())
    for form in ("joint", "phased"):
        with_guide, without = (plan_memory(net, micro_batch=64, backward=form) for net in (one, NETWORK))
        assert with_guide.parts.teacher == without.parts.teacher + weights
        assert with_guide.parts.weights == without.parts.weights and with_guide.parameters == without.parameters
        assert with_guide.peak > without.peak + weights
    # One pass there and one back, or one pass alone where nothing passes through the teacher.
    for config, passes in (
        (DistillConfig(batch=4, max_steps=1), 2),
        (PidConfig(batch=4, max_steps=1, distance="l2"), 1),
    ):
        more = Run(config, one).step_flops() - Run(config, NETWORK).step_flops()
        assert more == pytest.approx(4 * passes * forward_flops(WEAK))
    config = DistillConfig(batch=4, max_steps=1)
    for phased in (False, True):
        with_guide, without = (
            step_forwards(config.objective(net), net, phased=phased, checkpointed=False) for net in (one, NETWORK)
        )
        more = (with_guide - without) * forward_flops(NETWORK)
        assert more == pytest.approx((2 + phased) * forward_flops(WEAK))
    assert forward_flops(one) == forward_flops(NETWORK)


def test_no_figure_stands_beside_a_guided_result() -> None:
    settings = DistillConfig(batch=256, max_steps=1, alpha=1.0, D=128.0)
    network = presets.get("cifar10-ncsnpp", D=128.0)
    assert DistillConfig.figure("cifar10", settings.to_json(), network) is not None
    assert DistillConfig.figure("cifar10", replace(settings, guidance=W).to_json(), network) is None


def test_a_recipe_guides_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = replace(presets.get("digits", D=128.0), model_channels=4)
    for seed, name in enumerate(("teacher", "weak")):
        save_model(of.randomize(build_network(network), seed), tmp_path / name, extra={"task": "teacher"})
    short = ["--max-steps", "2", "--batch", "8", "--eval-images", "8", "--eval-every", "0", "--heun-steps", "2"]
    common = ["--teacher", str(tmp_path / "teacher"), *short, "--out", str(tmp_path / "run")]
    options = ["--guide", str(tmp_path / "weak"), "--guidance", "1.5"]
    digits_ipfm.main([*common, *options])
    table = capsys.readouterr().out
    assert [line.split()[2] for line in table.splitlines() if line.startswith(("teacher ", "generator "))] == ["6", "1"]
    assert read_config(tmp_path / "run" / "generator").facts.settings["guidance"] == 1.5
    run_command("ipfm", _main, ["info", str(tmp_path / "run" / "generator")])
    assert "1 step, teacher guided by 1.5" in capsys.readouterr().out
    # The same run goes on with the same guide alone.
    for guide, factor in (("weak", "2"), ("teacher", "1.5")):
        line = refused([*common, "--guide", str(tmp_path / guide), "--guidance", factor])
        assert line.startswith(f"{tmp_path / 'run'} belongs to another configuration")
    assert "guidance is 1.5 there, null here" in refused(common)
    assert "without a guide" in refused([*common, "--guidance", "2"])
    assert "without the teacher that it guides" in refused([*options, *short, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def refused(arguments: list[str]) -> str:
    with pytest.raises(BadInput) as error:
        digits_ipfm.main(arguments)
    return str(error.value)
