"""What a run would look like on other machines: the table of --dry-run and of `ipfm plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ipfm.engine.config import Distillation, ZeroStage
from ipfm.engine.memory import MemoryPlan, choose, gpu_budget
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
    head = (
        f"{'ranks':>5} {'GPU':>6} {'micro x accum.':>14} {'backward':>8} {'checkpointed':>12} {'ZeRO':>4} "
        f"{'weights':>8} {'masters':>8} {'Adam+EMA':>8} {'grads':>6} {'buckets':>7} {'step':>7} {'peak GB':>8} "
        f"{'cost':>5}"
    )
    lines = [f"layouts on GPUs, {precision}, global batch {config.batch} (prediction)", head]
    for count in ranks:
        for gpu in gpus:
            start = f"{count:>5} {gpu:>3g} GB"
            try:
                choice = choose(config, network, ranks=count, budget=gpu_budget(gpu * 1e9))
            except ValueError as error:
                lines.append(f"{start} {error}")
                continue
            lines.append(f"{start} {_row(choice.plan, choice.accumulation)} {choice.relative_cost:>5.2f}")
    lines.append(
        "step: activations and temporaries at the peak; cost: arithmetic relative to joint "
        "without checkpointing;\nat least 16 images at a time are preferred (an assumption: fewer leave a GPU idle)"
    )
    return "\n".join(lines)


def _row(plan: MemoryPlan, accumulation: int) -> str:
    parts = plan.parts
    numbers = (parts.teacher + parts.weights, parts.masters, parts.optimizer, parts.gradients, parts.buckets)
    widths = (8, 8, 8, 6, 7)
    shown = " ".join(f"{value / 1e9:>{width}.2f}" for value, width in zip(numbers, widths, strict=True))
    return (
        f"{f'{plan.micro_batch} x {accumulation}':>14} {plan.backward:>8} "
        f"{'yes' if plan.activation_checkpointing else 'no':>12} {parts.stage:>4} {shown} "
        f"{max(0, plan.peak - sum(numbers)) / 1e9:>7.2f} {plan.peak / 1e9:>8.2f}"
    )
