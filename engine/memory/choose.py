"""The choice of micro-batch, backward pass, activation checkpointing and ZeRO stage for a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ipfm.engine.config import Resolved, RunConfig, TeacherConfig, ZeroStage
from ipfm.engine.memory.arithmetic import step_forwards
from ipfm.engine.memory.plan import (
    MemoryPlan,
    backward_forms,
    distillation_bytes,
    plan_teacher_training,
    with_gradients,
)
from ipfm.engine.memory.simulate import StepSettings, simulate_distillation
from ipfm.engine.memory.state import Sharding, StateBytes
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.phases import Phase
from ipfm.engine.runtime.wording import counted, size
from ipfm.models import NetworkConfig

# An assumption, not a measurement: with fewer images at a time a GPU is not busy.
COMFORTABLE = 16
# Micro-batches that are simulated; in between, peaks are convex, so that a chord is on the safe side.
POINTS = (1, 16, 128)


@dataclass(frozen=True)
class Layout:
    """How a run is laid out."""

    plan: MemoryPlan
    accumulation: int
    """Micro-batches a step on each process."""
    relative_cost: float
    """Arithmetic of an iteration over that of the joint form without activation checkpointing."""


def choose_layout(config: Distillation, network: NetworkConfig, *, ranks: int, budget: int | None) -> Layout:
    """The cheapest layout that fits; what the configuration fixes stands.

    Preferred are, in this order: at least `COMFORTABLE` images at a time, the least arithmetic, the lowest ZeRO stage
    (3, which sends weights about, last of all). Without a budget: everything at once, joint.

    Args:
        config: settings; its precision must not be "auto". A stage of None is open.
        network: architecture as it is trained.
        ranks: number of processes.
        budget: bytes that a process may use; None: not known.

    Raises:
        ValueError: nothing fits, or the batch does not divide among the processes.
    """
    sizes = _sizes(config, ranks)

    def plans(stage: ZeroStage, phased: bool, checkpointed: bool) -> Iterator[MemoryPlan]:
        forms = [
            config.laid_out(D=network.D, stage=stage, micro_batch=micro, phased=phased, checkpointed=checkpointed)
            for micro in sizes
        ]
        return _plans(forms, network, ranks)

    return _layout(config, network, _cheapest(config, config.backward, plans, sizes, ranks, budget), ranks)


def choose_training(config: TeacherConfig, network: NetworkConfig, *, ranks: int, budget: int | None) -> MemoryPlan:
    """The same for the training of a teacher, with the same preferences: without checkpointing where that fits.

    Raises:
        ValueError: nothing fits, or the batch does not divide among the processes.
    """
    sizes = _sizes(config, ranks)

    def plans(stage: ZeroStage, _: bool, checkpointed: bool) -> Iterator[MemoryPlan]:
        for micro in sizes:
            form = config.laid_out(D=network.D, stage=stage, micro_batch=micro, phased=False, checkpointed=checkpointed)
            yield plan_training(form, network, ranks=ranks, budget=budget)

    return _cheapest(config, "joint", plans, sizes, ranks, budget)


def _cheapest(
    config: RunConfig,
    backward: str,
    plans: Callable[[ZeroStage, bool, bool], Iterator[MemoryPlan]],
    sizes: list[int],
    ranks: int,
    budget: int | None,
) -> MemoryPlan:
    """The first plan in the order of preference that fits.

    Args:
        config: settings.
        backward: the forms of the step that are possible, as of `Distillation`.
        plans: for (stage, phased, checkpointed) the plans of `sizes`, in their order.
        sizes: micro-batches, the largest first.
        ranks: number of processes.
        budget: bytes that a process may use; None: not known.

    Raises:
        ValueError: nothing fits.
    """
    best: MemoryPlan | None = None
    tried: list[MemoryPlan] = []
    for stages in _stages(config, ranks):
        for phased, checkpointed in backward_forms(backward, config.activation_checkpointing):
            for stage in stages:
                for plan in plans(stage, phased, checkpointed):
                    plan = replace(plan, budget=budget)
                    tried.append(plan)
                    if plan.fits:
                        if plan.micro_batch >= min(sizes[0], COMFORTABLE):
                            return plan
                        if best is None or plan.micro_batch > best.micro_batch:
                            best = plan
                        break
    if best is not None:
        return best
    raise _too_small(config, min(tried, key=lambda plan: plan.peak), ranks)


def _sizes(config: RunConfig, ranks: int) -> list[int]:
    """The micro-batches that are possible, the largest first."""
    local, fixed = config.split(ranks)
    return [fixed] if config.micro_batch is not None else [m for m in range(local, 0, -1) if local % m == 0]


def _stages(config: RunConfig, ranks: int) -> list[list[ZeroStage]]:
    """The ZeRO stages that are possible, in the groups in which they are tried."""
    if config.zero is not None:
        return [[config.zero]]
    return [[0, 1, 2] if config.precision == "fp32" or ranks == 1 else [1, 2], [3]]


def _too_small(config: RunConfig, smallest: MemoryPlan, ranks: int) -> ValueError:
    helps = [
        "more processes",
        *(["--zero 3"] if config.zero not in (None, 3) else []),
        *(["--offload"] if config.offload == "none" else []),
        *(["--precision bf16"] if config.precision == "fp32" else []),
    ]
    form = f"{smallest.backward}, " if smallest.backward else ""
    return ValueError(
        f"a process may use {size(smallest.budget or 0)}, but needs at least {size(smallest.peak)} (micro-batch "
        f"{smallest.micro_batch}, {form}ZeRO {smallest.parts.stage}, {counted(ranks, 'process')}): "
        f"{' or '.join(helps)} help{'s' * (len(helps) == 1)}"
    )


def _layout(config: Distillation, network: NetworkConfig, plan: MemoryPlan, ranks: int) -> Layout:
    objective, phased, checkpointed = config.objective(network), plan.phased, plan.activation_checkpointing
    cost = 1.0
    if phased or checkpointed:
        cost = step_forwards(objective, network, phased=phased, checkpointed=checkpointed)
        cost /= step_forwards(objective, network, phased=False, checkpointed=False)
    return Layout(plan, config.batch // ranks // plan.micro_batch, cost)


def plan_layout(
    settings: Resolved[Distillation], network: NetworkConfig, *, ranks: int, budget: int | None
) -> MemoryPlan:
    """The plan of a distillation as it is laid out.

    Args:
        settings: settings with nothing left open.
        network: the teacher's architecture as it is trained.
        ranks: number of processes.
        budget: bytes that a process may use; None: not known.

    Returns:
        The plan, whether it fits or not.
    """
    (plan,) = _plans([settings], network, ranks)
    return replace(plan, budget=budget)


def plan_training(
    settings: Resolved[TeacherConfig], network: NetworkConfig, *, ranks: int, budget: int | None
) -> MemoryPlan:
    """The plan of a teacher's training as it is laid out. Arguments and result as in `plan_layout`."""
    return plan_teacher_training(
        network,
        micro_batch=settings.micro_batch,
        ranks=ranks,
        stage=settings.stage,
        precision=settings.precision,
        offload=settings.config.offload,
        beta1=settings.config.beta1,
        averages=len(settings.config.averages),
        activation_checkpointing=settings.checkpointed,
        accumulates=settings.micro_batch < settings.config.batch // ranks,
        graphs=_graphs(settings, network, ranks),
        budget=budget,
    )


def _graphs(form: Resolved[RunConfig], network: NetworkConfig, ranks: int) -> bool:
    """Whether CUDA graphs run the step, on a GPU."""
    phased, checkpointed = form.phased, form.checkpointed
    return not form.config.without_graphs(
        network, ranks=ranks, stage=form.stage, phased=phased, checkpointed=checkpointed
    )


def _plans(forms: Sequence[Resolved[Distillation]], network: NetworkConfig, ranks: int) -> Iterator[MemoryPlan]:
    """Plans of one form of the step at several micro-batches, the largest first.

    The largest is simulated as it is, the others are interpolated.
    """
    exact = forms[0].micro_batch <= POINTS[-1] or len(forms) == 1
    for form in forms:
        micro, local = form.micro_batch, form.config.batch // ranks
        graphs = _graphs(form, network, ranks)
        accumulates, kept = micro < local, exact and form.stage < 2 and micro == local and not graphs
        settings = StepSettings.of(form, network, ranks, keeps_gradients=kept)
        parts = distillation_bytes(settings)
        phases = simulate_distillation(settings) if exact else _interpolated(settings, parts)
        backward = "phased" if form.phased else "joint"
        phases = with_gradients(phases, parts, accumulates, kept, graphs=graphs)
        yield MemoryPlan(micro, backward, form.checkpointed, parts, phases)
        exact = False


def _interpolated(settings: StepSettings, parts: StateBytes) -> dict[Phase, int]:
    """The phases of any micro-batch from those of `POINTS`, which all stages and process counts share."""
    common = Sharding(1, 2, settings.sharding.precision, "none", settings.sharding.teacher_storage)
    upper = next((i for i, point in enumerate(POINTS) if settings.micro_batch <= point), len(POINTS) - 1)
    low, high = POINTS[max(0, upper - 1)], POINTS[max(1, upper)]
    a, b = (simulate_distillation(replace(settings, micro_batch=point, sharding=common)) for point in (low, high))
    phases: dict[Phase, int] = {}
    for phase, value in a.items():
        phases[phase] = value + (b[phase] - value) * (settings.micro_batch - low) // (high - low)
        if "optimiser" in phase:
            phases[phase] = settings.sharding.update(parts.trained)
    return phases
