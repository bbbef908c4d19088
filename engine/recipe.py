"""What every recipe shares: its options, the way from a teacher to a run, and --dry-run."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ipfm.engine.config import Distillation, DistillConfig, RunConfig, TeacherConfig
from ipfm.engine.evaluation_options import EvaluationOptions
from ipfm.engine.layouts import layout_table
from ipfm.engine.memory import MemoryPlan, choose, choose_training, device_budget
from ipfm.engine.networks import trained_config
from ipfm.engine.pid import PidConfig
from ipfm.engine.resolve import resolve_precision, run_device
from ipfm.models import NetworkConfig, Precond, build_network, load_teacher

# Forward passes, or as much arithmetic, of a teacher's update: a backward pass is twice a forward pass.
TRAINING_FORWARDS = 3


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(Distillation, EvaluationOptions):
    """Options of every recipe that distils, beside those of its objective."""

    teacher_steps: int | None = None
    """Training steps of the teacher, in a recipe that trains one when --teacher is not given."""
    dry_run: bool = False
    """Print the resolved configuration, the memory plan and the expected duration, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_evaluation()
        if self.teacher_steps is not None and self.teacher_steps < 1:
            raise ValueError(f"teacher-steps must be at least 1, got {self.teacher_steps}")

    def distillation(self) -> Distillation:
        """The settings of the distillation alone."""
        kind = next(
            c for c in type(self).__mro__ if issubclass(c, Distillation) and not issubclass(c, EvaluationOptions)
        )
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind)})


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(DistillationOptions, DistillConfig):
    """Options of every recipe that distils by inverse Poisson flow matching or SiD."""


@dataclass(frozen=True, kw_only=True)
class PidOptions(DistillationOptions, PidConfig):
    """Options of every recipe that distils by physics informed distillation."""


def ema_kimg(decay: float, batch: int) -> float:
    """The half-life, in thousands of images, of a moving average with this decay a step."""
    return batch * math.log(0.5) / math.log(decay) / 1000


def read_teacher(options: DistillationOptions) -> Precond | None:
    """The teacher that --teacher names, its D checked against --D; None without --teacher.

    Raises:
        ValueError: there is no such model, it cannot be read, or D contradicts it.
    """
    if options.teacher is None:
        return None
    return load_teacher(options.teacher, D=options.D)


def check_images(network: NetworkConfig, shape: tuple[int, int, int], whose: str) -> None:
    """ValueError unless the network makes images (C, H, W); `whose`: "CIFAR-10 is"."""
    if (network.img_channels, network.img_resolution, network.img_resolution) != shape:
        side = network.img_resolution
        raise ValueError(
            f"the teacher makes images {network.img_channels}x{side}x{side}, {whose} {'x'.join(map(str, shape))}"
        )


def run_name(recipe: str, config: Distillation, D: float) -> Path:
    """Default run folder: runs/<recipe>-D<D>-<what the settings say>, e.g. runs/cifar-D2048-alpha1-K1."""
    return Path("runs") / f"{recipe}-D{D:g}-{config.name()}"


def launched_processes() -> int:
    """Number of processes that the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def describe(
    config: Distillation,
    network: NetworkConfig,
    path: Path,
    notes: tuple[str, ...] = (),
    *,
    given: Distillation | None = None,
) -> str:
    """What a run with this resolved configuration would do: settings, memory plan, expected duration on this machine;
    and how it would be laid out on GPUs.

    Runs a few forward passes of the network to estimate the duration.

    Args:
        config: settings with nothing left open but what memory decides.
        network: the teacher's architecture.
        path: the run folder.
        notes: lines to add.
        given: the settings as the user gave them, whose open ones the GPUs' layouts decide; default: `config`.
    """
    ranks = launched_processes()
    config.split(ranks)  # a batch that cannot be shared is bad input; too little memory is not
    trained = trained_config(network, config.dropout)
    parts: list[str] = []
    try:
        choice = choose(config, trained, ranks=ranks, budget=device_budget(run_device()))
    except ValueError as error:
        parts = [*_settings(config, path, D=network.D), f"memory: {error}"]
    else:
        plan = choice.plan
        objective = config.objective(trained)
        cost = objective.forwards(phased=plan.backward == "phased", checkpointed=plan.activation_checkpointing)
        parts = [
            *_settings(
                replace(config, micro_batch=plan.micro_batch),
                path,
                D=network.D,
                zero=plan.parts.stage,
                backward=plan.backward,
                activation_checkpointing="on" if plan.activation_checkpointing else "off",
            ),
            *_network(network, plan.parameters),
            *_memory(plan),
            _expected_duration(config, network, cost),
        ]
    given = given or config
    parts += [layout_table(given, trained, zero=given.zero), *notes]
    return "\n".join(parts)


def describe_training(config: TeacherConfig, network: NetworkConfig, path: Path, notes: tuple[str, ...] = ()) -> str:
    """What training a teacher with this resolved configuration would do: settings, network, expected duration.

    Runs a few forward passes of the network to estimate the duration.
    """
    plan = choose_training(
        resolve_precision(config, run_device()),
        network,
        ranks=launched_processes(),
        budget=device_budget(run_device()),
    )
    again = plan.activation_checkpointing
    parts = [
        *_settings(
            replace(config, micro_batch=plan.micro_batch),
            path,
            zero=plan.parts.stage,
            activation_checkpointing="on" if again else "off",
        ),
        *_network(network, plan.parameters),
        *_memory(plan),
        _expected_duration(config, network, TRAINING_FORWARDS + again),
        *notes,
    ]
    return "\n".join(parts)


def _settings(config: RunConfig, path: Path, **resolved: object) -> list[str]:
    ranks = launched_processes()
    local, micro = config.split(ranks)
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    settings |= {"out": path, "max_steps": config.total_steps, **resolved}
    settings["micro_batch"] = f"{micro} x {local // micro} on each of {ranks} process{'es' * (ranks > 1)}"
    lines = [f"  {name:<20} {_shown(value)}" for name, value in settings.items() if name not in ("kimg", "noise")]
    return ["configuration", *lines]


def _memory(plan: MemoryPlan) -> list[str]:
    return [
        "memory of one process (prediction; workspaces of convolutions not included)",
        *(f"  {line}" for line in str(plan).splitlines()),
    ]


def _network(network: NetworkConfig, parameters: int) -> list[str]:
    side = network.img_resolution
    labels = f", {network.label_dim} classes" if network.label_dim else ""
    return [
        "network",
        f"  {network.model_type}, {network.img_channels}x{side}x{side}{labels}, {parameters:,} parameters",
    ]


def _expected_duration(config: RunConfig, network: NetworkConfig, forwards: int) -> str:
    """`forwards`: forward passes, or as much arithmetic, of one image in one step."""
    device = run_device()
    local, _ = config.split(launched_processes())
    seconds = seconds_per_image(network, device, config.precision == "bf16") * local * forwards * config.total_steps
    return (
        f"expected duration on this {device.type.upper()}: {duration(seconds)} for {config.total_steps:,} steps "
        f"({seconds / config.total_steps:.3g} s a step)"
    )


def teacher_duration(config: TeacherConfig, network: NetworkConfig) -> str:
    """A line for the notes of `describe`: what the training of the run's teacher takes on this machine."""
    return f"training of the teacher, before it: {_expected_duration(config, network, TRAINING_FORWARDS)}"


def seconds_per_image(network: NetworkConfig, device: torch.device, bf16: bool) -> float:
    """Time of one forward pass per image, measured: the best of a few passes over a small batch."""
    net = build_network(network).to(device).eval()
    net.compute_dtype = torch.bfloat16 if bf16 else torch.float32
    batch = max(
        1, min(64, 65_536 // (network.img_channels * network.img_resolution**2)) // (1 if device.type == "cuda" else 8)
    )
    x = torch.randn(batch, network.img_channels, network.img_resolution, network.img_resolution, device=device)
    sigma = torch.ones(batch, device=device)
    best = float("inf")
    with torch.no_grad():
        for _ in range(3):
            _wait(device)
            start = time.perf_counter()
            net(x, sigma)
            _wait(device)
            best = min(best, time.perf_counter() - start)
    return best / batch


def first_process(call: Callable[[], None]) -> None:
    """Call on the one process that prints."""
    if os.environ.get("RANK", "0") == "0":
        call()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{v:g}" for v in value)
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """For people: "48 s", "12 min", "3.4 h", "2.1 days"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
