"""Prediction of the memory that a run needs on one process: permanent state, and the peak of each part of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ipfm.engine.config import Offload, Precision, TeacherStorageOption, ZeroStage, check_sharding, decide_storage
from ipfm.engine.memory.simulate import StepSettings, simulate_distillation, simulate_teacher
from ipfm.engine.memory.state import InTraining, Sharding, StateBytes, state_bytes
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.objectives.phases import Phase
from ipfm.engine.runtime.wording import size
from ipfm.models import NetworkConfig


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one process, by part and by phase of a step."""

    micro_batch: int
    """Images a process handles at a time."""
    backward: str
    """"joint" or "phased"; "" for a teacher's training."""
    activation_checkpointing: bool
    parts: StateBytes
    """Permanent state and gradients."""
    phases: Mapping[Phase, int]
    """Bytes above the permanent state at the peak of each phase, gradients and buckets included."""
    budget: int | None = None
    """Bytes that the process may use; None: not known."""

    @property
    def parameters(self) -> int:
        """Number of parameters of the teacher, or of the network where there is none."""
        return self.parts.parameters

    @property
    def phased(self) -> bool:
        """One network's activations at a time."""
        return self.backward == "phased"

    @property
    def state(self) -> int:
        """Bytes that are there at all times."""
        return self.parts.permanent

    @property
    def working(self) -> int:
        """Bytes above the permanent state at the step's peak."""
        return max(self.phases.values())

    @property
    def peak(self) -> int:
        """Bytes at the step's peak."""
        return self.state + self.working

    @property
    def fits(self) -> bool:
        """The peak is within the budget, as far as that is known."""
        return self.budget is None or self.peak <= self.budget

    def __str__(self) -> str:
        parts = self.parts
        kept = [
            ("teacher", parts.teacher),
            ("weights in training", parts.weights),
            ("fp32 masters", parts.masters),
            ("optimiser state and EMA", parts.optimizer),
        ]
        if parts.stage == 3:
            kept += [("gradients", parts.gradients), ("communication buckets", parts.buckets)]
        kept += [("permanent state", self.state)]
        rows = [(name, value) for name, value in kept if value or name == "permanent state"]
        rows += [(f"+ {phase}", value) for phase, value in self.phases.items()]
        lines = [f"{name:<34}{size(value):>12}" for name, value in [*rows, ("peak", self.peak)]]
        if parts.host:
            lines.append(f"{'in the host memory':<34}{size(parts.host):>12}")
        limit = "not known" if self.budget is None else size(self.budget) + ("" if self.fits else ", TOO SMALL")
        lines.append(f"{'budget':<34}{limit:>12}")
        if self.backward:
            again = "with" if self.activation_checkpointing else "without"
            lines.append(f"{'backward':<34}{self.backward:>12}, {again} activation checkpointing")
        return "\n".join([*lines, f"{'bytes a parameter, all networks':<34}{parts.per_parameter:>12.1f}"])


def plan_memory(
    network: NetworkConfig,
    *,
    micro_batch: int,
    ranks: int = 1,
    stage: ZeroStage = 0,
    precision: Precision = "fp32",
    offload: Offload = "none",
    teacher_storage: TeacherStorageOption = "auto",
    backward: str = "auto",
    activation_checkpointing: str = "off",
    accumulates: bool = False,
    budget: int | None = None,
    config: Distillation | None = None,
) -> MemoryPlan:
    """Predict the memory of a distillation on each process.

    The state is counted; the rest is found by running the engine's own step on the meta device, which computes nothing,
    and adding up what lives. Not included: what single operations need within themselves (workspaces of convolutions)
    and the allocator's fragmentation.

    Args:
        network: the teacher's architecture, as it is trained.
        micro_batch: images a process handles at a time.
        ranks: number of processes.
        stage: ZeRO stage 0 to 3.
        precision: "fp32", or "bf16" or "fp16" (stage 1 to 3; 0 on one process).
        offload: "none", "optimizer" or "all", see `RunConfig`.
        teacher_storage: "fp32", "half", "sharded"; "auto" as in `Distillation`.
        backward: "joint", "phased"; "auto" chooses joint where the budget allows it.
        activation_checkpointing: "on", "off"; "auto" turns it on where even phased does not fit without.
        accumulates: several micro-batches make a step.
        budget: bytes that a process may use; None: everything fits.
        config: what is distilled, and how, such as the generator's steps and width; by default as `DistillConfig`. What
            the other arguments say is not taken from it.

    Returns:
        The plan of the cheapest form that fits the budget, or of the smallest one where none does.

    Raises:
        ValueError: a number out of its range, or settings that do not go together.
    """
    sharding = check_plan(micro_batch, ranks, stage, precision, offload, teacher_storage, budget)
    kept = stage < 2 and not accumulates
    settings = StepSettings(network, micro_batch, sharding, keeps_gradients=kept, config=config or DistillConfig())
    parts = distillation_bytes(settings)

    def plan(phased: bool, checkpointed: bool) -> MemoryPlan:
        simulated = simulate_distillation(replace(settings, phased=phased, activation_checkpointing=checkpointed))
        phases = with_gradients(simulated, parts, accumulates, kept)
        return MemoryPlan(micro_batch, "phased" if phased else "joint", checkpointed, parts, phases, budget)

    *cheaper, smallest = backward_forms(backward, activation_checkpointing)
    return next((found for form in cheaper if (found := plan(*form)).fits), None) or plan(*smallest)


def distillation_bytes(settings: StepSettings) -> StateBytes:
    """What the networks of a distillation hold."""
    roles = settings.config.objective(settings.network).roles
    averages = len(settings.config.averages)
    trained = [InTraining(role.network, role.moments(averages), role.lora) for role in roles]
    followed = [role.network for role in roles if role.followed]
    return state_bytes(settings.network, settings.sharding, trained, teacher=True, followed=followed)


def plan_teacher_training(
    network: NetworkConfig,
    *,
    micro_batch: int,
    ranks: int = 1,
    stage: ZeroStage = 0,
    precision: Precision = "fp32",
    offload: Offload = "none",
    beta1: float = 0.9,
    averages: int = 1,
    activation_checkpointing: bool = False,
    accumulates: bool = False,
    graphs: bool = False,
    budget: int | None = None,
) -> MemoryPlan:
    """The same for the training of a teacher: one network, its optimiser and so many averages.

    Arguments as in `plan_memory`. With `graphs`, CUDA graphs run the step, see `with_gradients`.
    """
    sharding = check_plan(micro_batch, ranks, stage, precision, offload, "fp32", budget)
    parts = state_bytes(network, sharding, [(network, 1 + (beta1 > 0) + averages)], teacher=False)
    kept = stage < 2 and not accumulates and not graphs
    settings = StepSettings(
        network, micro_batch, sharding, activation_checkpointing=activation_checkpointing, keeps_gradients=kept
    )
    phases = with_gradients(simulate_teacher(settings), parts, accumulates, kept, graphs=graphs)
    return MemoryPlan(micro_batch, "", activation_checkpointing, parts, phases, budget)


def backward_forms(backward: str, activation_checkpointing: str) -> list[tuple[bool, bool]]:
    """(phased, checkpointed) in the order of their cost, as far as the settings leave it open.

    Raises:
        ValueError: another word than the settings know.
    """
    if backward not in ("auto", "joint", "phased"):
        raise ValueError(f"backward must be auto, joint or phased, got {backward!r}")
    if activation_checkpointing not in ("auto", "on", "off"):
        raise ValueError(f"activation-checkpointing must be auto, on or off, got {activation_checkpointing!r}")
    return [
        (phased, checkpointed)
        for checkpointed in (False, True)
        for phased in (False, True)
        if backward in ("auto", "phased" if phased else "joint")
        and activation_checkpointing in ("auto", "on" if checkpointed else "off")
    ]


def with_gradients(
    phases: Mapping[Phase, int], parts: StateBytes, accumulates: bool, kept: bool, *, graphs: bool = False
) -> dict[Phase, int]:
    """The phases with gradients and communication buckets, which at stage 3 are there at all times.

    Args:
        phases: as simulated.
        parts: what the networks hold.
        accumulates: from the second micro-batch on gradients are there all the time.
        kept: `phases` have the gradients, but not the buckets.
        graphs: CUDA graphs run the step, for which gradients are there all the time, and of 16 bits their wide copies
            too.
    """
    accumulates = accumulates or graphs
    wide = 4 * parts.trained if graphs and parts.masters else 0
    extra = 0 if parts.stage == 3 else parts.buckets + (0 if kept else parts.gradients)
    at_step = 0 if kept or parts.stage == 3 else parts.gradients
    return {
        phase: value
        + (at_step if "optimiser" in phase else wide + (extra if accumulates or "backward" in phase else 0))
        for phase, value in phases.items()
    }


def check_plan(
    micro_batch: int,
    ranks: int,
    stage: ZeroStage,
    precision: Precision,
    offload: Offload,
    teacher_storage: TeacherStorageOption,
    budget: int | None,
) -> Sharding:
    """The sharding, its parts checked.

    Raises:
        ValueError: a number out of its range, or parts that do not go together.
    """
    for name, value in (("micro-batch", micro_batch), ("ranks", ranks)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}")
    check_sharding(stage, precision, offload, ranks)
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision must be fp32, bf16 or fp16, got {precision!r}")
    if teacher_storage not in ("auto", "fp32", "half", "sharded"):
        raise ValueError(f"teacher-storage must be auto, fp32, half or sharded, got {teacher_storage!r}")
    if teacher_storage == "half" and precision == "fp32":
        raise ValueError("teacher-storage half needs precision bf16 or fp16, got fp32")
    if budget is not None and budget < 0:
        raise ValueError(f"the budget must be >= 0 bytes, got {budget}")
    return Sharding(ranks, stage, precision, offload, decide_storage(teacher_storage, precision))
