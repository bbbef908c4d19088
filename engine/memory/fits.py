"""What fits on which GPUs: the layouts of one run for several sizes of memory and numbers of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ipfm.engine.config import Precision, RunConfig, TeacherConfig, ZeroStage
from ipfm.engine.memory.arithmetic import TRAINING_FORWARDS, training_forwards
from ipfm.engine.memory.autoencoder import AutoencoderBytes
from ipfm.engine.memory.budget import gpu_budget
from ipfm.engine.memory.choose import Layout, choose_layout, choose_training
from ipfm.engine.memory.plan import MemoryPlan
from ipfm.engine.objectives.base import Distillation
from ipfm.models import NetworkConfig


@dataclass(frozen=True)
class LayoutOnGpu:
    """The layout of a run on some GPUs."""

    ranks: int
    """Number of processes, a GPU each."""
    gpu: float
    """Memory of a GPU in GB."""
    layout: Layout | None
    """None where the run does not fit."""
    reason: str = ""
    """Why it does not, or why so many processes cannot share the batch."""


def layout_of(
    config: Distillation | TeacherConfig, network: NetworkConfig, *, ranks: int, budget: int | None
) -> Layout:
    """The cheapest layout that fits, of a distillation as of a teacher's training: arguments and errors as there."""
    if isinstance(config, Distillation):
        return choose_layout(config, network, ranks=ranks, budget=budget)
    plan = choose_training(config, network, ranks=ranks, budget=budget)
    cost = training_forwards(network, checkpointed=plan.activation_checkpointing) / TRAINING_FORWARDS
    return Layout(plan, config.batch // ranks // plan.micro_batch, cost)


def fits(
    config: Distillation | TeacherConfig, network: NetworkConfig, *, ranks: Sequence[int], gpus: Sequence[float]
) -> Iterator[LayoutOnGpu]:
    """The cheapest layout, with its largest micro-batch, for each number of processes and each GPU.

    Args:
        config: settings; its precision must not be "auto". What is open of micro-batch, ZeRO stage, form of the step
            and activation checkpointing is chosen, see `choose_layout`.
        network: architecture as it is trained.
        ranks: numbers of processes, one GPU each.
        gpus: memory of a GPU in GB, of which a plan uses 85 %.
    """
    for count in ranks:
        for gpu in gpus:
            try:
                yield LayoutOnGpu(count, gpu, layout_of(config, network, ranks=count, budget=gpu_budget(gpu * 1e9)))
            except ValueError as error:  # nothing fits, or the batch does not divide
                yield LayoutOnGpu(count, gpu, None, str(error))


RANKS = (1, 4, 8)
# GPUs by their memory in GB: consumer, A100/H100, H200.
GPUS = (24, 80, 141)
LAYOUTS = len(RANKS) * len(GPUS)


def gpu_precision(config: RunConfig) -> Precision:
    """What a run computes in on a GPU that has bf16: that, where the settings leave it open and the stage allows it."""
    return ("fp32" if config.zero == 0 else "bf16") if config.precision == "auto" else config.precision


def layout_table(
    config: Distillation,
    network: NetworkConfig,
    *,
    ranks: Sequence[int] = RANKS,
    gpus: Sequence[float] = GPUS,
    zero: ZeroStage | None = None,
    done: Callable[[], None] = lambda: None,
) -> str:
    """The cheapest layout for each number of processes and each GPU, a row each.

    Args:
        config: settings; what they fix stands. bf16 where they leave the precision open.
        network: architecture as it is trained.
        ranks: numbers of processes, one GPU each.
        gpus: memory of a GPU in GB.
        zero: the ZeRO stage, None: any.
        done: called after each layout.

    Returns:
        Lines of text: micro-batch x accumulation, form, memory by part in GB, arithmetic relative to the joint form.
    """
    precision = gpu_precision(replace(config, zero=zero))
    storage = config.teacher_storage
    if storage == "half" and precision == "fp32":
        storage = "auto"
    config = replace(config, precision=precision, zero=zero, teacher_storage=storage)

    def found() -> Iterator[LayoutOnGpu]:
        for fit in fits(config, network, ranks=ranks, gpus=gpus):
            done()
            yield fit

    return "\n".join(fit_table(config, found()))


def fit_table(config: Distillation | TeacherConfig, found: Iterable[LayoutOnGpu]) -> list[str]:
    """A title, a head, a row for each layout, and what the columns are."""
    head = (
        f"{'ranks':>5} {'GPU':>6} {'micro x accum.':>14} {'backward':>8} {'checkpointed':>12} {'ZeRO':>4} "
        f"{'weights':>8} {'masters':>8} {'Adam+EMA':>8} {'grads':>6} {'buckets':>7} {'step':>7} {'peak GB':>8} "
        f"{'cost':>5}"
    )
    lines = [f"layouts on GPUs, {config.precision}, global batch {config.batch} (prediction)", head]
    for fit in found:
        start = f"{fit.ranks:>5} {fit.gpu:>3g} GB"
        if fit.layout is None:
            lines.append(f"{start} {fit.reason}")
        else:
            row = _row(fit.layout.plan, fit.layout.accumulation)
            lines.append(f"{start} {row} {fit.layout.relative_cost:>5.2f}")
    plainest = "joint without checkpointing" if isinstance(config, Distillation) else "a step without checkpointing"
    return [
        *lines,
        "ranks: processes, a GPU each; micro x accum.: images at a time, and how often in a step;",
        "checkpointed: activations are computed again on the way back; GB of a GPU, weights: of the teacher and in",
        "training; masters: in fp32; Adam+EMA: moments and averages; grads: gradients, buckets: communication;",
        "step: activations and temporaries at the peak;",
        f"cost: arithmetic relative to {plainest};",
        "at least 16 images at a time are preferred (an assumption: fewer leave a GPU idle)",
    ]


def with_autoencoder(beside: AutoencoderBytes, found: Sequence[LayoutOnGpu]) -> list[str]:
    """Lines on what the autoencoder of latents adds to such a table, and where it does not fit."""
    plans = [(fit.gpu, fit.layout.plan) for fit in found if fit.layout is not None]
    small = [f"{gpu:g} GB" for gpu, plan in plans if beside.peak(plan.state, plan.peak) > (plan.budget or 0)]
    return [
        f"with --vae (sd-vae-ft-mse): {beside.weights / 1e9:.2f} GB more, and {beside.decoding / 1e9:.2f} GB beside",
        f"the state while {beside.pictures} pictures of {beside.side}x{beside.side} are decoded, between steps; "
        + (f"too much for GPUs of {', '.join(small)} as they are filled here" if small else "that fits in each row"),
    ]


def _row(plan: MemoryPlan, accumulation: int) -> str:
    parts = plan.parts
    numbers = (parts.teacher + parts.weights, parts.masters, parts.optimizer, parts.gradients, parts.buckets)
    widths = (8, 8, 8, 6, 7)
    shown = " ".join(f"{value / 1e9:>{width}.2f}" for value, width in zip(numbers, widths, strict=True))
    return (
        f"{f'{plan.micro_batch} x {accumulation}':>14} {plan.backward or '-':>8} "
        f"{'yes' if plan.activation_checkpointing else 'no':>12} {parts.stage:>4} {shown} "
        f"{max(0, plan.peak - sum(numbers)) / 1e9:>7.2f} {plan.peak / 1e9:>8.2f}"
    )
