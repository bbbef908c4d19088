"""The memory plan: state against what DeepSpeed holds, phases against real steps, and what is chosen for a budget."""

from __future__ import annotations

import gc
import math
from contextlib import contextmanager
from dataclasses import replace

import launch
import pytest
import torch
from parts import parts

from ipfm.engine import DistillConfig, plan_memory
from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.real_images import BlankImages
from ipfm.engine.distributed.precision import DTYPES, apply_precision, halve_storage
from ipfm.engine.distributed.single_process import WIDENED
from ipfm.engine.distributed.world import World
from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.engine.memory import choose_layout, choose_training, device_budget, gpu_budget, plan_teacher_training
from ipfm.engine.memory.autoencoder import autoencoder_bytes
from ipfm.engine.memory.choose import POINTS
from ipfm.engine.memory.live import LiveBytes, tensor_bytes
from ipfm.engine.memory.simulate import StepSettings, simulate_distillation, simulate_teacher
from ipfm.engine.memory.state import Sharding, parameter_count, state_bytes
from ipfm.engine.objectives.base import StepContext
from ipfm.engine.objectives.phases import listening
from ipfm.engine.objectives.student_steps import DistillSteps
from ipfm.engine.training.resolve import complete, resolve, resolve_training
from ipfm.models import NetworkConfig, build_network, presets
from ipfm.models.config import Guide
from ipfm.models.low_rank import low_rank_network
from ipfm.models.precond import unguided

SMALL = NetworkConfig(
    img_resolution=16, img_channels=2, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(),
    dropout=0.0,
)  # fmt: skip
NETWORKS = {
    "ddpm++": SMALL,
    "attention": replace(SMALL, attn_resolutions=(16, 8)),
    "dropout": replace(SMALL, dropout=0.2),
    "ncsn++": replace(
        SMALL, embedding_type="fourier", encoder_type="residual", resample_filter=(1, 3, 3, 1), channel_mult_noise=2
    ),
    "conditional": replace(SMALL, label_dim=3, augment_dim=9),
    "edm2": NetworkConfig(
        img_resolution=16,
        img_channels=2,
        label_dim=3,
        model_type="EDM2UNet",
        model_channels=16,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(8,),
        channels_per_head=16,
        resample_filter=(1, 1),
        channel_mult_noise=1,
        dropout=0.0,
    ),
    "guided": replace(SMALL, guide=Guide(replace(SMALL, channel_mult=(1, 1)), 1.5)),
}
CPU = torch.device("cpu")


class Real:
    """A network in training on the CPU: what DeepSpeed's stage 0 does, but for the update."""

    loss_scale = 1.0

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, *args, **keywords):
        return self.module(*args, **keywords)

    def backward(self, loss):
        loss.backward()

    def step(self, **_):
        for p in self.module.parameters():
            p.grad = None
        return torch.ones((), dtype=torch.bool)

    @contextmanager
    def frozen(self):
        self.module.requires_grad_(False)
        yield self.module
        self.module.requires_grad_(True)


def measured(settings: StepSettings) -> dict[str, int]:
    """The peaks of a real step on the CPU, without the optimiser's."""
    precision = settings.sharding.precision
    teacher = apply_precision(build_network(settings.network), precision).eval().requires_grad_(False)
    if settings.sharding.teacher_storage == "half":
        halve_storage(teacher, precision)
    trained = {}
    for name in ("student", "generator"):
        network, lora = settings.network.unguided, settings.config.lora_of(name)
        net = build_network(network) if lora is None else low_rank_network(network, unguided(teacher), lora)
        trained[name] = Real(apply_precision(net, precision).to(DTYPES[precision]))
    for net in (teacher, *(one.module for one in trained.values())):
        net.activation_checkpointing = settings.activation_checkpointing
    real = BlankImages(settings.network, CPU)
    context = StepContext(trained, teacher, settings.resolved, World(0, 1, CPU), real=real)
    steps = DistillSteps(settings.resolved.config, context, settings.network)
    gc.collect()
    peaks: dict[str, int] = {}
    current = ["start"]
    with LiveBytes() as live:

        def begin(phase):
            peaks[current[0]] = max(peaks.get(current[0], 0), live.peak)
            live.reset_peak()
            current[0] = phase

        with listening(begin):
            steps.student_step(0)
            steps.generator_step(settings.resolved.config.first_whole_step)
    return {name: value for name, value in peaks.items() if name != "start" and "optimiser" not in name}


STAGE0 = Sharding()
CASES = [
    *((name, {"phased": phased}) for name in NETWORKS for phased in (False, True)),
    *((name, {"phased": True, "activation_checkpointing": True}) for name in ("dropout", "ncsn++")),
    ("attention", {"phased": False, "activation_checkpointing": True}),
    ("ncsn++", {"phased": True, "config": DistillConfig(steps=2)}),
    ("conditional", {"phased": True, "config": DistillConfig(augment=0.5)}),
    ("conditional", {"phased": True, "config": DistillConfig(real_weights=(0.92, 0.94))}),
    ("conditional", {"phased": True, "config": DistillConfig(discriminator="encoder")}),
    ("ncsn++", {"phased": False, "sharding": Sharding(stage=1, precision="bf16", teacher_storage="half")}),
    ("attention", {"phased": True, "sharding": Sharding(stage=1, precision="bf16", teacher_storage="fp32")}),
    ("ncsn++", {"phased": True, "config": DistillConfig(student="lora", rank=2)}),
    ("edm2", {"phased": False, "config": DistillConfig(student="lora", generator="lora", rank=4)}),
]
# `make thorough`: two networks stay that are compared joint and phased, two with activation checkpointing; each of the
# others is compared with one of these or with further settings.
LATER = [
    *((name, {"phased": False}) for name in ("attention", "dropout", "ncsn++", "conditional", "guided")),
    *((name, {"phased": True}) for name in ("dropout", "ncsn++", "conditional")),
    ("ncsn++", {"phased": True, "activation_checkpointing": True}),
    ("attention", {"phased": True, "sharding": Sharding(stage=1, precision="bf16", teacher_storage="fp32")}),
]


@pytest.mark.parametrize(
    ("name", "settings"), parts(CASES, LATER), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_phase_is_that_of_a_real_step(name, settings):
    """Within 10 %, at two micro-batches: the same code runs, on another device."""
    for micro in (2, 12):
        one = StepSettings(NETWORKS[name], micro, **{"sharding": STAGE0, **settings})
        predicted, real = simulate_distillation(one), measured(one)
        assert real.keys() == {phase for phase in predicted if "optimiser" not in phase}
        for phase, value in real.items():
            assert predicted[phase] == pytest.approx(value, rel=0.1, abs=20_000), phase


def test_phased_needs_a_teachers_training_and_no_more():
    """The peak of a phased iteration is at most 1.05 x that of a training step, with ncsn++ and ADM."""
    for name in ("cifar10-ncsnpp", "imagenet64-adm"):
        settings = StepSettings(presets.get(name), 8, STAGE0)
        teacher = simulate_teacher(settings)["teacher: forward and backward"]
        # The optimiser's phase is the same in all three.
        joint, phased = (
            max(v for k, v in simulate_distillation(replace(settings, phased=p)).items() if "optimiser" not in k)
            for p in (False, True)
        )
        assert phased <= 1.05 * teacher < 1.8 * teacher < joint


def test_frozen_networks_keep_less():
    """T and S do not store what weight gradients alone need."""
    phases = simulate_distillation(StepSettings(presets.get("cifar10-ncsnpp"), 8, STAGE0, phased=True))
    for phase in ("generator: student", "generator: teacher"):
        assert phases[phase] < 0.65 * phases["generator: backward"]


def test_checkpointing_pays():
    without = simulate_distillation(StepSettings(presets.get("cifar10-ncsnpp"), 8, STAGE0))
    with_it = simulate_distillation(
        StepSettings(presets.get("cifar10-ncsnpp"), 8, STAGE0, activation_checkpointing=True)
    )
    for phase in ("student: forward and backward", "generator: student", "generator: teacher"):
        assert with_it[phase] < 0.65 * without[phase]


def test_memory_does_not_grow_with_k():
    """From the second evaluation on, beyond the evaluations' inputs, which are images."""
    two = StepSettings(SMALL, 8, STAGE0, phased=True, config=DistillConfig(steps=2))
    image = 8 * SMALL.img_channels * SMALL.img_resolution**2 * 4
    a, b = simulate_distillation(two), simulate_distillation(replace(two, config=DistillConfig(steps=5)))
    assert max(b.values()) <= max(a.values()) + 3 * 3 * image < 1.03 * max(a.values())


def test_what_changes_no_size_shares_a_simulation():
    one = StepSettings(SMALL, 8, STAGE0, config=DistillConfig(steps=2, alpha=0.5, student_updates=2, lr=1.0, seed=7))
    assert one == StepSettings(SMALL, 8, STAGE0, config=DistillConfig(sigmas=(3.0, 1.0), D=8.0, kimg=3.0))
    assert one.config != StepSettings(SMALL, 8, STAGE0, config=DistillConfig()).config
    assert one.config != StepSettings(SMALL, 8, STAGE0, config=DistillConfig(steps=2, width=0.5)).config


@pytest.mark.quick
def test_targets_in_bytes_a_parameter():
    """All networks together, gradients included: 32 on one process, 20 with ZeRO 2 on four, 12 in bf16."""
    for name in ("cifar10-ncsnpp", "cifar10-ddpmpp", "imagenet64-adm"):
        network = presets.get(name)

        def need(ranks, stage, precision, network=network):
            storage = "fp32" if precision == "fp32" else "half"
            sharding = Sharding(ranks, stage, precision, "none", storage)
            return state_bytes(network, sharding, [(network, 1), (network, 2)], teacher=True).per_parameter

        assert need(1, 0, "fp32") == pytest.approx(28)
        assert need(4, 2, "fp32") == pytest.approx(18, abs=0.01)
        assert need(4, 2, "bf16") < 12
        assert need(4, 3, "bf16") < need(4, 2, "bf16")


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_state_is_what_deepspeed_holds(ranks, tmp_path):
    """A network in training with an EMA: live tensors after a step, and before one with its gradients."""
    launch.run_workers("state_bytes.py", ranks, {"out": str(tmp_path / "found.pt")})
    for found in torch.load(tmp_path / "found.pt"):
        stage, precision, offload = found["stage"], found["precision"], found["offload"]
        network = presets.get("digits")
        sharding = Sharding(ranks, stage, precision, offload, "fp32")
        parts = state_bytes(network, sharding, [(network, 2)], teacher=False)
        n = parts.parameters
        buckets = parts.buckets - (0 if stage == 3 else parts.buckets)
        expected = parts.permanent - buckets + parts.host
        case = f"{stage} {precision} {offload}"
        if offload == "none":
            assert found["after"] == pytest.approx(expected, rel=0.03), case
            assert found["grads"] == pytest.approx(expected + parts.training - (0 if stage == 3 else parts.buckets),
                                                   rel=0.04), case  # fmt: skip
        else:
            # The buffers of the transfers depend on the largest parameter.
            assert found["after"] <= expected + 8 * n, case


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_of_plain_weights_is_what_one_process_holds(precision):
    """Weights, masters, moments and average of EDM2; its scales of rows and tables are next to nothing."""
    network = replace(NETWORKS["edm2"], model_channels=64)
    config = TeacherConfig(batch=1, max_steps=1, precision=precision, zero=0)
    settings = config.laid_out(D=math.inf, stage=0, micro_batch=1, phased=False, checkpointed=False)
    gc.collect()
    before = tensor_bytes()
    net = TrainedNetwork(build_network(network), settings, world=World(0, 1, CPU), lr=0.0, beta1=0.0, ema=True)
    gc.collect()
    parts = state_bytes(network, Sharding(precision=precision), [(network, 2)], teacher=False)
    assert parts.masters > 0.99 * 4 * parts.parameters
    assert tensor_bytes() - before == pytest.approx(parts.permanent, rel=0.01)
    assert net.parameter_count == parts.parameters


@pytest.mark.quick
def test_the_budget_decides():
    free = plan_memory(SMALL, micro_batch=4)
    assert (free.backward, free.budget, free.fits) == ("joint", None, True)
    forms = [
        plan_memory(SMALL, micro_batch=4, backward=b, activation_checkpointing=a)
        for a in ("off", "on")
        for b in ("joint", "phased")
    ]
    assert forms[0].peak > forms[1].peak > forms[3].peak
    auto = {"micro_batch": 4, "activation_checkpointing": "auto"}
    assert plan_memory(SMALL, **auto, budget=forms[0].peak).backward == "joint"
    tight = plan_memory(SMALL, **auto, budget=forms[0].peak - 1)
    assert (tight.backward, tight.activation_checkpointing, tight.fits) == ("phased", False, True)
    none = plan_memory(SMALL, **auto, budget=1)
    assert (none.backward, none.activation_checkpointing, none.fits) == ("phased", True, False)
    assert "TOO SMALL" in str(none) and "peak" in str(free)


def _config(**changes):
    return DistillConfig(**{"batch": 64, "max_steps": 1, "precision": "fp32", **changes})


def test_choice():
    network = NETWORKS["ncsn++"]
    everything = choose_layout(_config(), network, ranks=2, budget=None)
    assert (everything.plan.micro_batch, everything.accumulation, everything.relative_cost) == (32, 1, 1.0)
    budgets = [everything.plan.peak * share // 100 for share in (100, 45, 22)]
    costs, peaks = [], []
    for budget in budgets:
        choice = choose_layout(_config(), network, ranks=2, budget=budget)
        assert choice.plan.peak <= budget and choice.plan.micro_batch * choice.accumulation == 32
        costs.append((choice.plan.micro_batch < 16, choice.relative_cost))
        peaks.append(choice.plan.peak)
    assert costs == sorted(costs) and costs[0] < costs[-1]
    with pytest.raises(
        ValueError, match=r"but needs at least .*: more processes or --offload or --precision bf16 help$"
    ):
        choose_layout(_config(), network, ranks=2, budget=10_000)


def test_the_lowest_stage_that_fits():
    """Sharding before a second forward pass."""
    network = NETWORKS["attention"]
    config = _config(batch=8, micro_batch=2)
    assert choose_layout(config, network, ranks=4, budget=None).plan.parts.stage == 0
    large = replace(network, model_channels=256)
    budgets = [plan_memory(large, micro_batch=2, ranks=4, stage=s, backward="joint").peak for s in (0, 1, 2)]
    assert budgets == sorted(budgets, reverse=True)
    stages = [choose_layout(config, large, ranks=4, budget=budget).plan.parts.stage for budget in budgets]
    assert stages == [0, 1, 2]
    teaching = TeacherConfig(batch=8, micro_batch=2, max_steps=1, precision="fp32")
    for stage in (0, 1, 2):
        budget = plan_teacher_training(large, micro_batch=2, ranks=4, stage=stage).peak
        assert choose_training(teaching, large, ranks=4, budget=budget).parts.stage == stage
    bf16 = replace(config, precision="bf16")
    assert choose_layout(bf16, network, ranks=4, budget=None).plan.parts.stage == 1


@pytest.mark.quick
def test_16_bits_on_one_process_need_no_sharding():
    """Stage 0, which takes no more than stage 1: the same state, no buckets, and gradients that are widened in part."""
    for precision in ("bf16", "fp16"):
        config = _config(batch=32, micro_batch=None, precision=precision, backward="joint", cuda_graphs="off")
        plan = choose_layout(config, NETWORKS["attention"], ranks=1, budget=None).plan
        assert plan.parts.stage == 0
        sharded = choose_layout(replace(config, zero=1), NETWORKS["attention"], ranks=1, budget=None).plan
        assert plan.state == sharded.state and plan.peak <= sharded.peak
        assert plan.parts.per_parameter == sharded.parts.per_parameter
        teaching = TeacherConfig(batch=8, max_steps=1, precision=precision)
        assert choose_training(teaching, SMALL, ranks=1, budget=None).parts.stage == 0
    n = parameter_count(presets.get("cifar10-ncsnpp"))
    assert Sharding(1, 0, "bf16").update(n) == 2 * n + 2 * WIDENED < Sharding(1, 1, "bf16").update(n) == 4 * n
    assert Sharding().update(n) == 0


@pytest.mark.quick
def test_cuda_graphs_keep_the_gradients_at_all_times():
    """In 16 bits their wide copies too; where there are no graphs nothing changes."""
    for precision, kept in (("fp32", 4), ("bf16", 2 + 4)):
        config = _config(batch=32, micro_batch=None, precision=precision, backward="joint", zero=0)
        with_graphs, without = (
            choose_layout(replace(config, cuda_graphs=graphs), NETWORKS["attention"], ranks=1, budget=None).plan
            for graphs in ("auto", "off")
        )
        n, phase = with_graphs.parts.trained, "generator: student"
        assert with_graphs.state == without.state
        assert with_graphs.phases[phase] == without.phases[phase] + kept * n
        assert with_graphs.phases["generator: optimiser"] == pytest.approx(
            without.phases["generator: optimiser"], rel=1e-4
        )
    sharded = _config(batch=32, micro_batch=None, precision="bf16", backward="joint")
    plans = [
        choose_layout(replace(sharded, cuda_graphs=graphs), NETWORKS["attention"], ranks=2, budget=None).plan
        for graphs in ("auto", "off")
    ]
    assert plans[0] == plans[1]


def test_a_run_takes_the_stage_that_was_chosen(monkeypatch):
    network = replace(SMALL, model_channels=256)
    config = complete(_config(batch=8, micro_batch=2, D=math.inf), network, CPU)
    world = World(0, 4, CPU)
    budget = plan_memory(network, micro_batch=2, ranks=4, stage=2, backward="joint").peak
    monkeypatch.setattr("ipfm.engine.training.resolve.device_budget", lambda _: budget)
    run = resolve(config, network, world)
    assert (run.micro_batch, run.phased, run.checkpointed) == (2, False, False)
    assert run.stage == 2 and run.config == replace(config, zero=2)
    # What is given stands, and nothing is looked at when nothing is open.
    given = replace(config, zero=1, backward="phased", activation_checkpointing="on")
    monkeypatch.setattr("ipfm.engine.training.resolve.device_budget", pytest.fail)
    run = resolve(given, network, world)
    assert (run.micro_batch, run.phased, run.checkpointed) == (2, True, True) and run.config == given
    shape = {"batch": 8, "micro_batch": 2, "zero": 1, "activation_checkpointing": "on"}
    training = resolve_training(TeacherConfig(**shape, max_steps=1, precision="fp32"), network, world)
    assert (training.stage, training.micro_batch, training.checkpointed) == (1, 2, True)


def test_choice_respects_what_is_fixed():
    network = NETWORKS["ncsn++"]
    budget = choose_layout(_config(), network, ranks=1, budget=None).plan.peak // 3
    fixed = {"backward": "joint", "activation_checkpointing": "on", "zero": 0, "micro_batch": 4}
    plan = choose_layout(_config(**fixed), network, ranks=1, budget=budget).plan
    assert (plan.backward, plan.activation_checkpointing, plan.parts.stage, plan.micro_batch) == ("joint", True, 0, 4)


def test_interpolation_is_on_the_safe_side():
    """Where a micro-batch was not simulated itself, the plan is at most 10 % above what it would have been."""
    network, config = NETWORKS["attention"], _config(batch=1024, zero=0)
    for budget in (40_000_000, 90_000_000):
        plan = choose_layout(config, network, ranks=1, budget=budget).plan
        assert plan.micro_batch not in POINTS[:1]
        exact = plan_memory(
            network, micro_batch=plan.micro_batch, backward=plan.backward, accumulates=True,
            activation_checkpointing="on" if plan.activation_checkpointing else "off",
        )  # fmt: skip
        assert exact.peak <= plan.peak * 1.001
        assert plan.peak <= 1.1 * exact.peak


def test_costs():
    def forwards(*, phased: bool = False, checkpointed: bool = False, **changes) -> int:
        return _config(D=1.0, **changes).objective(SMALL).forwards(phased=phased, checkpointed=checkpointed)

    assert forwards() == 11
    assert forwards(phased=True) == 13
    assert forwards(checkpointed=True) == 15
    assert forwards(student_updates=2) == 15
    # Each evaluation more: a forward pass for the student; two and a backward pass where the gradient goes through it.
    assert forwards(steps=3) == 11 + 2 * 5
    assert forwards(steps=3, gradient="last") == 11 + 2 * 2


SIZES = [("s", 24), ("l", 48), ("xxl", 80)]


@pytest.mark.parametrize(("size", "gpu"), parts(SIZES, SIZES[:2]))
def test_three_networks_of_edm2_on_one_gpu(size, gpu):
    """In bf16, nothing offloaded, 16 images at a time: 28 bytes a parameter, effective weights, activations, VAE."""
    network = presets.get(f"edm2-img512-{size}")
    config = DistillConfig(batch=2048, max_steps=1, precision="bf16", micro_batch=16, backward="joint")
    plan = choose_layout(config, network, ranks=1, budget=gpu_budget(gpu * 1e9)).plan
    assert (plan.parts.stage, plan.activation_checkpointing) == (0, False)
    assert plan.parts.per_parameter == pytest.approx(28, abs=0.2)
    beside = autoencoder_bytes(network)
    assert beside is not None and beside.peak(plan.state, plan.peak) <= gpu_budget(gpu * 1e9)
    # The whole state on one GPU is what the size of the GPU decides; eight of them share it.
    shared = Sharding(8, 2, "bf16", "none", "half")
    assert state_bytes(network, shared, [(network, 1), (network, 2)], teacher=True).per_parameter < 10


def test_teacher_training():
    config = TeacherConfig(batch=64, max_steps=1, precision="fp32", zero=0)
    whole = choose_training(config, SMALL, ranks=1, budget=None)
    assert whole.micro_batch == 64 and whole.state == 16 * whole.parameters  # w, m, v, EMA
    less = choose_training(config, SMALL, ranks=1, budget=whole.peak // 2)
    assert less.micro_batch < 64 and less.peak <= whole.peak // 2
    assert plan_teacher_training(SMALL, micro_batch=8, beta1=0.0).state == 12 * whole.parameters
    with pytest.raises(ValueError, match="needs at least"):
        choose_training(config, SMALL, ranks=1, budget=1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 0}, r"micro-batch must be an integer >= 1, got 0"),
        ({"micro_batch": 1.5}, r"micro-batch must be an integer >= 1, got 1.5"),
        ({"ranks": 0}, r"ranks must be an integer >= 1, got 0"),
        ({"stage": 4}, r"zero must be one of the stages 0, 1, 2, 3, got 4"),
        ({"precision": "fp8"}, r"precision must be auto, fp32, bf16 or fp16, got 'fp8'"),
        ({"precision": "bf16", "ranks": 2}, r"precision bf16 on 2 processes needs zero 1, 2 or 3, .*, got 0"),
        ({"offload": "optimizer"}, r"offload optimizer needs zero 1, 2 or 3, got 0"),
        ({"offload": "all", "stage": 2}, r"offload all needs zero 3, which shards the weights, got 2"),
        ({"teacher_storage": "half"}, r"teacher-storage half needs precision bf16 or fp16, got fp32"),
        ({"backward": "both"}, r"backward must be auto, joint or phased, got 'both'"),
        ({"budget": -1}, r"the budget must be >= 0 bytes, got -1"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        plan_memory(SMALL, **{"micro_batch": 1, **changes})


def test_budget_of_this_machine(monkeypatch):
    """The same every time: a run that is continued must choose the same micro-batch."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    whole = device_budget(CPU)
    if whole is None:
        pytest.skip("this machine does not say how much memory it has")
    assert 2**20 < whole < 2**50
    assert device_budget(CPU) == whole
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert device_budget(CPU) == whole // 4
    assert gpu_budget(100) == 85
