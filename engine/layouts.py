"""What a run would look like on other machines: the table of --dry-run and of `ipfm plan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ipfm.engine.config import Distillation, TeacherConfig, ZeroStage
from ipfm.engine.memory import Fit, MemoryPlan, fits
from ipfm.engine.precision import Precision
from ipfm.models import NetworkConfig

RANKS = (1, 4, 8)
# GPUs by their memory in GB: consumer, A100/H100, H200.
GPUS = (24, 80, 141)


def layout_table(
    config: Distillation,
    network: NetworkConfig,
    *,
    ranks: Sequence[int] = RANKS,
    gpus: Sequence[float] = GPUS,
    zero: ZeroStage | None = None,
) -> str:
    """The cheapest layout for each number of processes and each GPU, a row each.

    Args:
        config: settings; what they fix stands. bf16 where they leave the precision open.
        network: architecture as it is trained.
        ranks: numbers of processes, one GPU each.
        gpus: memory of a GPU in GB.
        zero: the ZeRO stage, None: any.

    Returns:
        Lines of text: micro-batch x accumulation, form, memory by part in GB, arithmetic relative to the joint form.
    """
    precision: Precision = "bf16" if config.precision == "auto" else config.precision
    if zero == 0 and precision != "fp32":
        precision = "fp32"
    storage = config.teacher_storage
    if storage == "half" and precision == "fp32":
        storage = "auto"
    config = replace(config, precision=precision, zero=zero, teacher_storage=storage)
    return "\n".join(fit_table(config, fits(config, network, ranks=ranks, gpus=gpus)))


def fit_table(config: Distillation | TeacherConfig, found: Iterable[Fit]) -> list[str]:
    """A title, a head, a row for each layout, and what the columns are."""
    head = (
        f"{'ranks':>5} {'GPU':>6} {'micro x accum.':>14} {'backward':>8} {'checkpointed':>12} {'ZeRO':>4} "
        f"{'weights':>8} {'masters':>8} {'Adam+EMA':>8} {'grads':>6} {'buckets':>7} {'step':>7} {'peak GB':>8} "
        f"{'cost':>5}"
    )
    lines = [f"layouts on GPUs, {config.precision}, global batch {config.batch} (prediction)", head]
    for fit in found:
        start = f"{fit.ranks:>5} {fit.gpu:>3g} GB"
        if fit.choice is None:
            lines.append(f"{start} {fit.reason}")
        else:
            row = _row(fit.choice.plan, fit.choice.accumulation)
            lines.append(f"{start} {row} {fit.choice.relative_cost:>5.2f}")
    plainest = "joint without checkpointing" if isinstance(config, Distillation) else "a step without checkpointing"
    return [
        *lines,
        f"step: activations and temporaries at the peak; cost: arithmetic relative to {plainest};",
        "at least 16 images at a time are preferred (an assumption: fewer leave a GPU idle)",
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
