"""How long a step takes on this machine: some of the run's own, or passes, measured on networks that nobody trained."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ipfm.engine.config import Resolved, RunConfig, TeacherConfig
from ipfm.engine.data.real_images import BlankImages
from ipfm.engine.distributed.compilation import set_execution
from ipfm.engine.distributed.pieces import CAPTURES, WARM_UPS, Number, whole
from ipfm.engine.distributed.precision import apply_precision
from ipfm.engine.distributed.world import World
from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.engine.objectives.base import Distillation, Role, StepContext
from ipfm.engine.objectives.captured import pieces_of
from ipfm.engine.objectives.losses import add_noise, bind, denoising_objective
from ipfm.engine.objectives.phases import Phase, listening, mark
from ipfm.engine.random_streams import Stream
from ipfm.engine.runtime.cores import usable_cores
from ipfm.engine.runtime.launcher import launched_processes, local_processes
from ipfm.engine.runtime.wording import counted
from ipfm.models import NetworkConfig, Precond, build_network
from ipfm.models.low_rank import low_rank_network
from ipfm.models.precond import unguided

# Seconds that the steps which are measured take, about: a dry run answers while one waits.
PATIENCE = 0.5
# A step of more images is measured up to this many seconds, for images take less time each together: those of a quarter
# of a micro-batch were found to take half as long again.
WHOLE = 2.0
# Where the step of a single image takes longer, by its forward pass, that pass alone is measured, and one of several
# images, unless by the first it takes longer than the other number.
LONGEST, LONGEST_FORWARD, SEVERAL = 1.0, 20.0, 4
# The same of several images which take little more than one.
LONGEST_OF_MORE = 4.0

Iteration = Callable[[int], object]


class StepTime(NamedTuple):
    """How long a step takes."""

    seconds: float
    forward_of: int = 0
    """Number of images whose forward pass is all that was measured, the step being reckoned from it; 0 where whole
    steps were."""
    pass_seconds: float = 0.0
    """Of a forward pass of an image among others, which was measured too."""

    def how(self) -> str:
        """Where it comes from, for people."""
        if not self.forward_of:
            return "measured"
        return f"reckoned from a forward pass of {counted(self.forward_of, 'image')}, which was measured"


def step_time(form: Resolved[Any], network: NetworkConfig, forwards: float, device: torch.device) -> StepTime:
    """How long a step of one process takes, evaluations, checkpoints and communication left out.

    Whole steps are measured, optimisers included, on a micro-batch or as many of its images as are done in a second or
    two; the others are in proportion. The networks compute as the run's: in its memory format, and compiled where it
    compiles, which takes as long as it takes there; sharding is left out of what is measured. Where a step of one image
    takes longer, or more memory than there is, it is reckoned from forward passes.

    Args:
        form: the settings of a distillation or of a teacher's training, as they are laid out.
        network: architecture as it is trained.
        forwards: forward passes, or as much arithmetic, of one image in a step.
        device: where it will run.
    """
    local = form.config.batch // launched_processes()
    with _threads_of_a_run():
        net = _network(network, form, device, compiled=False).eval()
        least = min(form.config.images_together, local)
        count, passes = _measurable(net, form.micro_batch, forwards, device, least)
        if forwards * passes > (LONGEST if count == 1 else LONGEST_OF_MORE):
            count, passes = _several(net, count, passes, form.micro_batch, device)
            if form.config.compile:
                passes = _compiled_seconds(form, network, count, device)
        else:
            del net
            if form.config.compile:
                passes = _compiled_seconds(form, network, count, device)
            with contextlib.suppress(torch.OutOfMemoryError, MemoryError):
                images, optimisers = _measured(form, network, count, device)
                return StepTime(images * local / count + optimisers, pass_seconds=passes / count)
    return StepTime(forwards * passes * local / count, count, passes / count)


class PassesTime(NamedTuple):
    """Seconds of a step, and of the forward passes by which it is counted."""

    forward: float
    """Of a forward pass of all images."""
    step: float
    """Of a step without its optimisers."""
    optimisers: float


def passes_time(form: Resolved[Distillation], network: NetworkConfig, device: torch.device, rounds: int) -> PassesTime:
    """A step of a distillation beside a forward pass of its images, in alternation: the shortest of each.

    On a CPU they are seconds of its time, which other programs do not lengthen; with several threads those of all.

    Args:
        form: the settings, laid out for one process that takes the whole batch at once.
        network: architecture as it is trained.
        device: where.
        rounds: how often each is measured.
    """
    now = _now if device.type != "cpu" else _cpu_time
    count = form.config.batch
    with _threads_of_a_run():
        net = _network(network, form, device).eval()
        step = _distillation(form, network, device)(count)
        slow = 1 if device.type not in CAPTURES else WARM_UPS + 1
        for number in range(slow):
            step(number)
        passes, parts = [], []
        for number in range(rounds):
            passes.append(_forward_seconds(net, count, device, times=1, now=now))
            parts.append(_timed(step, slow + number, device, now=now))
    return PassesTime(min(passes), min(p[0] for p in parts), min(p[1] for p in parts))


def _measurable(
    net: Precond, micro_batch: int, forwards: float, device: torch.device, least: int = 1
) -> tuple[int, float]:
    """How many images of a micro-batch a step is measured on, and the seconds of a forward pass of so many.

    At least `least`, and times that of a number: what belongs together is measured together, unless a single one takes
    too long already.

    As many as can be: together they take less time each, above all on a GPU or where cores are shared. Where other
    programs want the cores too an image alone may take as long as a hundred: so it goes on beyond the patience as long
    as images cost less than half.
    """
    count, seconds = 1, _forward_seconds(net, 1, device)
    if least > 1:
        if forwards * seconds > LONGEST:
            return count, seconds
        count, seconds = least, _forward_seconds(net, least, device)
    most = micro_batch - micro_batch % least
    while count < most and forwards * seconds < LONGEST_OF_MORE:
        more = min(most, 4 * count)
        longer = _forward_seconds(net, more, device)
        if forwards * longer > WHOLE and 2 * longer * count > seconds * more:
            break
        count, seconds = more, longer
    return count, seconds


def _several(net: Precond, count: int, seconds: float, micro_batch: int, device: torch.device) -> tuple[int, float]:
    """As `_measurable` for a step that is reckoned: a single image alone may take twice its time among several."""
    more = min(micro_batch, SEVERAL * count)
    if more * seconds > LONGEST_FORWARD * count:
        return count, seconds
    try:
        longer = _forward_seconds(net, more, device, times=1)
    except (torch.OutOfMemoryError, MemoryError):
        return count, seconds
    return (more, longer) if longer * count < seconds * more else (count, seconds)


@contextlib.contextmanager
def _threads_of_a_run() -> Iterator[None]:
    """As many threads as a process of the run will have."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, max(1, usable_cores() // max(1, local_processes()))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(form: Resolved[Any], network: NetworkConfig, count: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a step of `count` images: without its optimisers, and of these."""
    kind = _distillation if isinstance(form.config, Distillation) else _training
    step = kind(form, network, device)(count)
    # The first one is slow; with CUDA graphs further ones are, and then the one that is captured.
    slow = 1 if device.type not in CAPTURES else WARM_UPS + 1
    for number in range(slow):
        _timed(step, number, device)
    parts = [_timed(step, slow, device)]
    more = min(9, max(2, int(PATIENCE / max(1e-9, sum(parts[0])))))
    parts += [_timed(step, slow + 1 + number, device) for number in range(more)]
    return statistics.median(p[0] for p in parts), statistics.median(p[1] for p in parts)


def _timed(
    step: Iteration, number: int, device: torch.device, now: Callable[[torch.device], float] | None = None
) -> tuple[float, float]:
    """Seconds of an iteration: without its optimisers, and of these; by the clock `now`."""
    read = now or _now
    seconds = {False: 0.0, True: 0.0}
    since, optimiser = read(device), False

    def begin(phase: Phase) -> None:
        nonlocal since, optimiser
        at = read(device)
        seconds[optimiser] += at - since
        since, optimiser = at, "optimiser" in phase

    with listening(begin):
        step(number)
        begin("")
    return seconds[False], seconds[True]


def _distillation(
    form: Resolved[Distillation], network: NetworkConfig, device: torch.device
) -> Callable[[int], Iteration]:
    """Number of images -> an iteration on so many, of the objective's own steps."""
    world = World(0, 1, device)
    teacher = _network(network, form, device).eval().requires_grad_(False)
    roles = form.config.objective(network).roles
    networks = {role.name: _under_optimiser(form, role, world, teacher) for role in roles}
    real = BlankImages(network, device) if form.config.takes_real_images else None

    def at(count: int) -> Iteration:
        config = replace(form.config, batch=count, micro_batch=None)
        # Of what belongs together there may be more than a micro-batch.
        micro_batch = count if count <= form.micro_batch else math.gcd(count, form.micro_batch)
        settings = replace(form, config=config, micro_batch=micro_batch)
        pieces = pieces_of(settings, network, networks, world, tell=lambda line: None)
        context = StepContext(networks, teacher, settings, world, pieces, real)
        iteration = config.objective(network).steps(context).iteration
        return lambda number: iteration(config.planned_step + number)

    return at


def _training(
    form: Resolved[TeacherConfig], network: NetworkConfig, device: torch.device
) -> Callable[[int], Iteration]:
    """Number of images -> a step of a teacher's training on so many."""
    config = form.config
    role = Role("teacher", network, "random", config.lr, config.beta1, averaged=True)
    world = World(0, 1, device)
    net = _under_optimiser(form, role, world)
    net.module.train()

    def at(count: int) -> Iteration:
        y = torch.randn(count, *network.image_shape, device=device)
        index = torch.arange(count, device=device)
        settings = replace(form, config=replace(config, batch=count, micro_batch=None), micro_batch=count)
        pieces = pieces_of(settings, network, {"teacher": net}, world, tell=lambda line: None)

        def gradients(numbers: Mapping[str, Number]) -> None:
            step = whole(numbers["step"])
            sigma = config.noise.denoising(index, seed=0, stream=Stream.TEACHER_SIGMA, step=step)
            noisy = add_noise(
                y, sigma, form.D, net.module, seed=0, stream=Stream.TEACHER_NOISE, step=step, sample_index=index
            )
            result = denoising_objective(bind(net, None), y, noisy, sigma_data=config.noise.sigma_data)
            net.backward(result.surrogate / count)

        def update(numbers: Mapping[str, Any]) -> torch.Tensor:
            return net.step(grad_scale=None, **numbers)

        def iteration(step: int) -> None:
            mark("teacher: forward and backward")
            pieces.run(("gradients",), gradients, 0, step=step)
            mark("teacher: optimiser")
            pieces.run(("update",), update, lr=config.lr, ema_decay=0.9)

        return iteration

    return at


def _under_optimiser(
    form: Resolved[RunConfig], role: Role, world: World, teacher: Precond | None = None
) -> TrainedNetwork:
    """A network that computes as the run's, with fp32 weights and by itself: nothing is shared."""
    config = replace(form.config, zero=0, precision="fp32", offload="none", **_stored_whole(form.config))
    alone = replace(form, config=config, precision="fp32", stage=0, teacher_storage="fp32")
    if role.lora is None or teacher is None:
        net = _network(role.network, form, world.device)
    else:
        net = _as_set(low_rank_network(role.network, unguided(teacher), role.lora), form, world.device)
    return TrainedNetwork(
        net,
        alone,
        world=world,
        lr=role.lr,
        beta1=role.beta1,
        ema=role.kept(config.average_names),
        rectified=role.rectified,
        followed=role.followed,
    )


def _stored_whole(config: RunConfig) -> dict[str, Any]:
    return {"teacher_storage": "fp32"} if isinstance(config, Distillation) else {}


def _network(
    network: NetworkConfig, form: Resolved[Any], device: torch.device, *, compiled: bool | None = None
) -> Precond:
    """A network that computes as the run's; `compiled`: None as the settings say."""
    return _as_set(build_network(network).to(device), form, device, compiled=compiled)


def _as_set(net: Precond, form: Resolved[Any], device: torch.device, *, compiled: bool | None = None) -> Precond:
    net = apply_precision(net, form.precision)
    net.activation_checkpointing = form.checkpointed
    config = form.config
    compiled = config.compile if compiled is None else compiled
    set_execution(net, memory_format=config.memory_format, compiled=compiled, device=device)
    return net


def _compiled_seconds(form: Resolved[Any], network: NetworkConfig, count: int, device: torch.device) -> float:
    """Seconds of a compiled forward pass of so many images, once it is compiled."""
    net = _network(network, form, device).eval()
    _forward_seconds(net, count, device, times=1)
    return _forward_seconds(net, count, device)


def _forward_seconds(
    net: Precond,
    count: int,
    device: torch.device,
    times: int = 2,
    now: Callable[[torch.device], float] | None = None,
) -> float:
    """Seconds of a forward pass of so many images: the shortest of some, by the clock `now`."""
    read = now or _now
    x, sigma = torch.randn(count, *net.config.image_shape, device=device), torch.ones(count, device=device)
    seconds = []
    with torch.no_grad():
        for _ in range(times):
            start = read(device)
            net(x, sigma)
            seconds.append(read(device) - start)
    return min(seconds)


def _cpu_time(device: torch.device) -> float:
    return time.process_time()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
