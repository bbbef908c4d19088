"""What a run takes of rented GPUs, by arithmetic alone: hours, memory, host memory and disk, for several layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ipfm.engine.config import TeacherConfig
from ipfm.engine.memory.arithmetic import (
    TRAINING_FORWARDS,
    Gpu,
    forward_flops,
    guide_flops,
    share_at_first,
    step_forwards,
)
from ipfm.engine.memory.fits import LayoutOnGpu, fits
from ipfm.engine.memory.plan import MemoryPlan
from ipfm.engine.memory.state import InTraining, Sharding, parameter_count
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.sampling.samplers import nfe
from ipfm.engine.training.disk import DiskUse, disk_use
from ipfm.models import NetworkConfig

# GPUs of a node: with more of them there are several, of which each has memory of its own.
OF_A_NODE = 8


@dataclass(frozen=True)
class Run:
    """A run whose costs are asked for."""

    config: Distillation | TeacherConfig
    """Settings, with a precision and a length. What they leave open of the layout is chosen for each GPU."""
    network: NetworkConfig
    """Architecture as it is trained, see `trained_config`."""

    @functools.cached_property
    def forward_flops(self) -> int:
        """Floating-point operations of a forward pass of one image."""
        return forward_flops(self.network)

    @functools.cached_property
    def forwards(self) -> float:
        """Forward passes, or as much arithmetic, of one image in the plainest form of a step."""
        if not isinstance(self.config, Distillation):
            return TRAINING_FORWARDS
        return step_forwards(self.config.objective(self.network), self.network, phased=False, checkpointed=False)

    @functools.cached_property
    def further_flops(self) -> int:
        """Operations of one image in a step that are no pass of the networks: those of LPIPS."""
        return self.config.further_flops(self.network) if isinstance(self.config, Distillation) else 0

    def steps_from(self, first: int = 0) -> float:
        """Steps of the run from `first` on; one in which the student alone is trained counts as what it costs."""
        config = self.config
        left, alone = config.total_steps - first, min(config.first_whole_step, config.total_steps) - first
        if alone <= 0 or not isinstance(config, Distillation):
            return left
        return left - alone * (1 - share_at_first(config.objective(self.network), self.network))

    @property
    def remark(self) -> str:
        """What is not right of the operations, in words; mostly nothing."""
        if not isinstance(self.config, Distillation):
            return ""
        objective = self.config.objective(self.network)
        narrower = any(role.network.model_channels != self.network.model_channels for role in objective.roles)
        if hasattr(objective, "passes"):
            return ""
        return "a network of another width is counted as wide as the teacher" if narrower else ""

    def step_flops(self, relative_cost: float = 1.0) -> float:
        """Operations of a step of all GPUs together; `relative_cost`: of its form, as in `Layout`."""
        return (self.forward_flops * self.forwards * relative_cost + self.further_flops) * self.config.batch

    @functools.cached_property
    def trained(self) -> tuple[tuple[int, int, int], ...]:
        """Of each network in training: parameters, fp32 values that its optimiser keeps of each, averages in them."""
        averages = len(self.config.averages)
        if isinstance(self.config, Distillation):
            roles = self.config.objective(self.network).roles
            return tuple(
                (
                    InTraining(role.network, 0, role.lora).numbers,
                    role.moments(averages),
                    averages * role.averaged,
                )
                for role in roles
            )
        return ((parameter_count(self.network), 1 + (self.config.beta1 > 0) + averages, averages),)

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights, moments and averages in fp32."""
        return sum(4 * count * (1 + moments) for count, moments, _ in self.trained)

    @property
    def disk(self) -> DiskUse:
        """What the run writes, at most."""
        # What is exported is whole, also where factors alone are trained.
        networks = [self.network]
        if isinstance(self.config, Distillation):
            networks = [role.network for role in self.config.objective(self.network).roles]
        return disk_use(self.config, checkpoint=self.checkpoint, model=4 * max(map(parameter_count, networks)))

    @property
    def teacher_nfe(self) -> int:
        """Evaluations of the teacher for an image of it, as it is measured; not those of its guide."""
        return nfe(self.config.heun_steps, "heun")

    @property
    def generator_nfe(self) -> int | None:
        """The same of the generator; None where a teacher is trained."""
        return self.config.objective(self.network).nfe if isinstance(self.config, Distillation) else None

    @property
    def evaluations(self) -> int:
        """How often the network in training is measured: along the way, and at the end."""
        config = self.config
        along = (config.total_steps - 1) // config.eval_every if config.eval_every else 0
        return along + 1

    def evaluation_passes(self, images: int) -> int:
        """Forward passes that draw `images` for each evaluation, and of the teacher once."""
        if self.generator_nfe is None:
            return images * self.teacher_nfe * self.evaluations
        return images * (self.teacher_nfe + self.generator_nfe * self.evaluations)

    def evaluation_flops(self, images: int) -> int:
        """Operations of these, by the width of the generator."""
        flops = (
            self.forward_flops * self.evaluation_passes(images) + guide_flops(self.network) * images * self.teacher_nfe
        )
        if self.generator_nfe is None or not isinstance(self.config, Distillation):
            return flops
        objective = self.config.objective(self.network)
        (generator,) = (role.network for role in objective.roles if role.name == objective.generator)
        of_it = images * self.generator_nfe * self.evaluations
        return flops + of_it * (forward_flops(generator) - self.forward_flops)

    def evaluation_words(self, images: int) -> str:
        """As in "2,000 images of the teacher, 35 passes an image, and 6 times the generator, 1"."""
        times = f"{self.evaluations} times " if self.evaluations > 1 else ""
        of = f"{images:,} images of the teacher, {self.teacher_nfe} passes an image"
        if self.generator_nfe is None:
            return f"{of}, {times or 'once '}".rstrip()
        return f"{of}, and {times}the generator, {self.generator_nfe}"


@dataclass(frozen=True)
class Parts:
    """Bytes on one GPU; the parts add up to the peak."""

    teacher: int
    """The frozen one."""
    weights: int
    """Of the networks in training, with ZeRO's fp32 copies."""
    gradients: int
    """With the buffers by which they are sent."""
    moments: int
    """Adam's."""
    ema: int
    """The averages of the weights."""
    activations: int
    """With temporaries, as far as they are beside the other parts at the peak."""

    @property
    def peak(self) -> int:
        """All together."""
        return self.teacher + self.weights + self.gradients + self.moments + self.ema + self.activations


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the memory of a node, beside what its processes are themselves."""

    offloaded: int
    """What --offload keeps there, pinned."""
    start: int
    """Weights that the processes hold there until they are on the GPUs."""
    checkpoint: int
    """A checkpoint that is gathered and written."""

    @property
    def total(self) -> int:
        """At most at a time."""
        return self.offloaded + max(self.start, self.checkpoint)


@dataclass(frozen=True)
class GpuCost:
    """What a run takes on so many GPUs of one kind."""

    gpu: Gpu
    fit: LayoutOnGpu
    """The layout, or why there is none."""
    step_flops: float
    """Operations of a step of all GPUs in this form; 0 without a layout, as are all numbers."""
    gpu_seconds: float
    """Of all GPUs together, for the whole run."""
    parts: Parts
    host: HostMemory
    sent: int
    """Bytes that a GPU sends a step at least: gradients reduced once, weights gathered once, of each network."""
    price: float | None
    """Of the whole run; None where no price of an hour is given."""

    @property
    def wall_seconds(self) -> float:
        """From start to end."""
        return self.gpu_seconds / self.fit.ranks


_NOTHING = Parts(0, 0, 0, 0, 0, 0), HostMemory(0, 0, 0)


def gpu_costs(
    run: Run,
    *,
    counts: Sequence[int],
    gpus: Sequence[Gpu],
    share: float,
    prices: Callable[[Gpu], float | None] = lambda gpu: None,
    done: Callable[[], None] = lambda: None,
) -> Iterator[GpuCost]:
    """What a run takes, for each number of GPUs and each kind.

    Args:
        run: the run.
        counts: numbers of GPUs, a process each.
        gpus: kinds.
        share: of the peak, that a step reaches: an assumption.
        prices: GPU -> price of an hour of one, None where it is not known.
        done: called after each layout.
    """
    # Layouts go by memory, which kinds of GPUs share.
    sizes = sorted({gpu.memory for gpu in gpus})
    for count in counts:
        found: dict[float, LayoutOnGpu] = {}
        for size in sizes:
            (found[size],) = fits(run.config, run.network, ranks=(count,), gpus=(size,))
            done()
        for gpu in gpus:
            yield _cost(run, gpu, found[gpu.memory], share, prices(gpu))


def _cost(run: Run, gpu: Gpu, fit: LayoutOnGpu, share: float, price: float | None) -> GpuCost:
    if fit.layout is None:
        return GpuCost(gpu, fit, 0.0, 0.0, *_NOTHING, 0, None)
    config, plan = run.config, fit.layout.plan
    flops = run.step_flops(fit.layout.relative_cost)
    seconds = flops * run.steps_from() / (share * gpu.peak(config.decided_precision, config.tf32))
    cost = None if price is None else price * seconds / 3600
    sharding = Sharding(fit.ranks, plan.parts.stage, config.decided_precision, config.offload, config.decided_storage)
    return GpuCost(
        gpu, fit, flops, seconds, _parts(run, plan, sharding), _host(run, plan, fit.ranks), _sent(run, sharding), cost
    )


def _parts(run: Run, plan: MemoryPlan, sharding: Sharding) -> Parts:
    parts = plan.parts
    averages = sum(4 * kept * sharding.share(count, 1) for count, _, kept in run.trained)
    ema = 0 if sharding.offload != "none" else averages
    weights, gradients = parts.weights + parts.masters, parts.gradients + parts.buckets
    known = parts.teacher + weights + parts.optimizer
    # Where the peak is in a phase without gradients, these are not beside its activations.
    gradients = min(gradients, max(0, plan.peak - known))
    activations = plan.peak - known - gradients
    return Parts(parts.teacher, weights, gradients, parts.optimizer - ema, ema, activations)


def _host(run: Run, plan: MemoryPlan, ranks: int) -> HostMemory:
    config, local = run.config, min(ranks, OF_A_NODE)
    # A network is made there, and its exact weights wait there while the engine rounds them; beside the teacher.
    start = 4 * (plan.parts.trained + (parameter_count(run.network) if isinstance(config, Distillation) else 0))
    networks = [4 * count * (1 + moments) for count, moments, _ in run.trained]
    return HostMemory(
        plan.parts.host * local, start * local, sum(networks) if config.async_checkpoints else max(networks)
    )


def _sent(run: Run, sharding: Sharding) -> int:
    """Each of a ring of N sends (N - 1)/N of what is reduced, and as much of what is gathered."""
    once = sharding.element * sum(count for count, *_ in run.trained)
    return 2 * once * (sharding.ranks - 1) // sharding.ranks
