"""What fits on which GPUs: the layouts of one run for several sizes of memory and numbers of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ipfm.engine.config import Distillation, TeacherConfig
from ipfm.engine.memory.budget import gpu_budget
from ipfm.engine.memory.choose import Choice, choose, choose_training
from ipfm.models import NetworkConfig


@dataclass(frozen=True)
class Fit:
    """The layout of a run on some GPUs."""

    ranks: int
    """Number of processes, a GPU each."""
    gpu: float
    """Memory of a GPU in GB."""
    choice: Choice | None
    """None where the run does not fit."""
    reason: str = ""
    """Why it does not, or why so many processes cannot share the batch."""


def layout(config: Distillation | TeacherConfig, network: NetworkConfig, *, ranks: int, budget: int | None) -> Choice:
    """The cheapest layout that fits, of a distillation as of a teacher's training: arguments and errors of `choose`."""
    if isinstance(config, Distillation):
        return choose(config, network, ranks=ranks, budget=budget)
    plan = choose_training(config, network, ranks=ranks, budget=budget)
    # A forward and a backward pass are three forward passes' arithmetic; checkpointing computes one again.
    return Choice(plan, config.batch // ranks // plan.micro_batch, 1 + plan.activation_checkpointing / 3)


def fits(
    config: Distillation | TeacherConfig, network: NetworkConfig, *, ranks: Sequence[int], gpus: Sequence[float]
) -> Iterator[Fit]:
    """The cheapest layout, with its largest micro-batch, for each number of processes and each GPU.

    Args:
        config: settings; its precision must not be "auto". What is open of micro-batch, ZeRO stage, form of the step
            and activation checkpointing is chosen, see `choose`.
        network: architecture as it is trained.
        ranks: numbers of processes, one GPU each.
        gpus: memory of a GPU in GB, of which a plan uses 85 %.
    """
    for count in ranks:
        for gpu in gpus:
            try:
                yield Fit(count, gpu, layout(config, network, ranks=count, budget=gpu_budget(gpu * 1e9)))
            except ValueError as error:  # nothing fits, or the batch does not divide
                yield Fit(count, gpu, None, str(error))
