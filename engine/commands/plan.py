"""`ipfm plan`: the memory of a distillation or of a teacher's training, predicted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from ipfm.engine.objectives import DEFAULT, OBJECTIVES, Offered, declared
from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.json_output import Write, output, plain

if TYPE_CHECKING:
    from ipfm.engine.config import TeacherConfig
    from ipfm.engine.memory import Layout
    from ipfm.engine.objectives.base import Distillation
    from ipfm.models import NetworkConfig

K = TypeVar("K", bound=type)

# What each objective offers, and the options that a distillation alone has; others would not change the plan of a
# teacher's training.
DECLARED = declared()
OF_EVERY_DISTILLATION = ("objective", "teacher_storage", "backward")


def _with_objectives(plan: K) -> K:
    """The class with the options and examples of the objectives, after the settings that all of them have."""
    own = dict(plan.__annotations__)
    offered: dict[str, Offered] = {}
    for kind, said in DECLARED.items():
        for name, option in said.offered.items():
            before = offered.get(name, Offered(option.type, ""))
            if name in own or before.type != option.type:
                raise ValueError(f"the objective {kind} offers {name} to `ipfm plan`, which has another such option")
            offered[name] = Offered(option.type, f"{before.help} {option.help}".strip())
    options = {name: Annotated[o.type | None, tyro.conf.arg(help=o.help)] for name, o in offered.items()}
    for name in options:
        setattr(plan, name, None)
    plan.__annotations__ = {}
    for name, annotation in own.items():
        plan.__annotations__ |= options if name == "teacher_training" else {}
        plan.__annotations__[name] = annotation
    plan.__annotations__["objective"] = Literal[tuple(DECLARED)] | None
    examples = [said.example for said in DECLARED.values() if said.example]
    plan.__doc__ = "\n\n    ".join([(plan.__doc__ or "").strip(), *(f"Example: {example}" for example in examples)])
    return plan


@dataclass(frozen=True, kw_only=True)
@_with_objectives
class Plan:
    """Predict the memory of a distillation on each process, by part and by phase of a step.

    With --gpu-memory: the largest micro-batch, and the cheapest form of the step that fits; --fits: for several GPUs.
    How long GPUs compute follows from the arithmetic of a step.
    """

    model: str
    """Network preset (or ncsnpp, ddpmpp, adm), a model folder, or a checkpoint of EDM, PFGM++ or SiD."""
    objective: str | None = None
    """What is distilled by. Default: ipfm, which SiD shares."""
    batch: int = 256
    """Global batch."""
    ranks: int = 1
    """Number of processes."""
    micro_batch: int | None = None
    """Images one process handles at a time. Default: what memory allows, else its whole share of the batch."""
    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage. Default: the lowest that fits; at least 1 in bf16 and fp16."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Arithmetic of the networks. Default: that of a run, bf16 for --gpu-memory and --fits (fp32 at --zero 0), else
    fp32."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in the host's memory."""
    teacher_storage: Literal["auto", "fp32", "half", "sharded"] | None = None
    """How the frozen teacher is kept. Default: auto."""
    backward: Literal["auto", "joint", "phased"] | None = None
    """Form of the generator's step. Default: auto."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute activations again on the way back."""
    teacher_training: bool = False
    """Plan the training of a teacher instead."""
    gpu_memory: float | None = None
    """Memory of one GPU in GB."""
    fits: tuple[float, ...] = ()
    """Memory of several GPUs in GB: a table of what fits on each."""
    json: bool = False
    """Print JSON, in bytes."""

    def run(self) -> None:
        """Print the plan, or the table."""
        with output(as_json=self.json) as write:
            with user_input():
                self._check()
                network = read_network(self.model)
                config = self._training() if self.teacher_training else self._distillation(network)
                config.split(self.ranks)
            (self._fits if self.fits else self._plan)(config, network, write)

    def _plan(self, config: Distillation | TeacherConfig, network: NetworkConfig, write: Write) -> None:
        from ipfm.engine.memory import gpu_budget, layout_of
        from ipfm.engine.memory.arithmetic import SHARE, flops_in_words

        budget = None if self.gpu_memory is None else gpu_budget(self.gpu_memory * 1e9)
        with user_input():
            layout = layout_of(config, network, ranks=self.ranks, budget=budget)
        plan = layout.plan
        flops, seconds = self._arithmetic(config, network, layout)
        lines = [
            str(plan),
            f"{'precision':<34}{config.decided_precision:>12}",
            f"{'micro-batch x accumulation':<34}{f'{plan.micro_batch} x {layout.accumulation}':>12}",
            f"{'ZeRO stage':<34}{plan.parts.stage:>12}",
            f"{'arithmetic, relative':<34}{layout.relative_cost:>12.2f}",
            f"{'arithmetic of a step':<34}{flops_in_words(flops):>12}",
            f"GPU seconds a step at {SHARE:.0%} of the peak (an assumption): "
            + ", ".join(f"{name} {value:.3g}" for name, value in seconds.items()),
        ]
        arithmetic = {"flops": flops, "share_of_peak": SHARE, "gpu_seconds": seconds}
        write(self._kind(config) | _facts(layout) | arithmetic, "\n".join(lines))

    def _arithmetic(
        self, config: Distillation | TeacherConfig, network: NetworkConfig, layout: Layout
    ) -> tuple[float, dict[str, float]]:
        """Floating-point operations of a step of all processes, and the seconds that one GPU of each kind needs."""
        from ipfm.engine.memory.arithmetic import forward_flops, gpu_seconds
        from ipfm.engine.objectives.base import Distillation

        # A backward pass is twice a forward pass.
        passes, further = 3, 0
        if isinstance(config, Distillation):
            passes = config.objective(network).forwards(phased=False, checkpointed=False)
            further = config.further_flops(network)
        flops = (forward_flops(network) * passes * layout.relative_cost + further) * config.batch
        return flops, gpu_seconds(flops, config.decided_precision)

    def _fits(self, config: Distillation | TeacherConfig, network: NetworkConfig, write: Write) -> None:
        from ipfm.engine.memory import fits
        from ipfm.engine.memory.fits import fit_table

        found = list(fits(config, network, ranks=(self.ranks,), gpus=self.fits))
        facts = [
            {
                "gpu_memory": fit.gpu,
                "fits": fit.layout is not None,
                "reason": fit.reason or None,
                **({} if fit.layout is None else _facts(fit.layout)),
            }
            for fit in found
        ]
        write(self._kind(config) | {"gpus": facts}, "\n".join(fit_table(config, found)))

    def _kind(self, config: Distillation | TeacherConfig) -> dict[str, Any]:
        return {
            "model": self.model,
            "objective": None if self.teacher_training else self._objective(),
            "batch": self.batch,
            "ranks": self.ranks,
            "precision": config.decided_precision,
        }

    def _check(self) -> None:
        """Check the options together.

        Raises:
            ValueError: some cannot be, or do not change this plan.
        """
        if self.ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}")
        for name, sizes in (("gpu-memory", () if self.gpu_memory is None else (self.gpu_memory,)), ("fits", self.fits)):
            for size in sizes:
                if not 0 < size < math.inf:
                    raise ValueError(f"{name} must be a finite number > 0, got {size}")
        if self.gpu_memory is not None and self.fits:
            raise ValueError("gpu-memory and fits exclude each other: give one of them")
        if self.teacher_training:
            every = (name for said in DECLARED.values() for name in said.offered)
            self._refuse("the training of a teacher has no", (*OF_EVERY_DISTILLATION, *every))
        chosen = self._objective()
        for kind, said in DECLARED.items():
            if kind != chosen:
                # Where none is named, or the usual one, it is the name of the other that is missing.
                named = f"only the objective {kind} has" if chosen == DEFAULT else f"the objective {chosen} has no"
                self._refuse(named, [name for name in said.offered if name not in DECLARED[chosen].offered])

    def _refuse(self, named: str, names: Iterable[str]) -> None:
        given = [name.replace("_", "-") for name in names if getattr(self, name) is not None]
        if given:
            raise ValueError(f"{named} {' and '.join(given)}: leave it out")

    def _objective(self) -> str:
        return self.objective or DEFAULT

    def _training(self) -> TeacherConfig:
        from ipfm.engine.config import TeacherConfig

        return TeacherConfig(**self._common())

    def _distillation(self, network: NetworkConfig) -> Distillation:
        kind = self._objective()
        config = OBJECTIVES[kind](
            **self._common(), **self._given(("teacher_storage", "backward", *DECLARED[kind].offered))
        )
        config.check_network(network)
        return config

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _common(self) -> dict[str, Any]:
        names = ("batch", "micro_batch", "zero", "offload", "activation_checkpointing")
        on_gpu = self.gpu_memory is not None or self.fits
        usual = "bf16" if on_gpu and self.zero != 0 else "fp32"
        return {name: getattr(self, name) for name in names} | {"precision": self.precision or usual}


def _facts(layout: Layout) -> dict[str, Any]:
    plan = layout.plan
    more = {"accumulation": layout.accumulation, "relative_cost": layout.relative_cost}
    return plain(plan) | more | {"stage": plan.parts.stage, "state": plan.state, "peak": plan.peak}


def read_network(model: str) -> NetworkConfig:
    """The architecture that `model` names: a preset, a family of presets, a model folder or a checkpoint.

    Raises:
        ValueError: there is none.
    """
    from ipfm.models import presets, read_config
    from ipfm.models.checkpoints.reader import open_checkpoint
    from ipfm.models.checkpoints.run_models import locate

    path = Path(model).expanduser()
    if path.is_file():
        return open_checkpoint(path).read().config
    # A name with a slash is no preset's.
    return read_config(locate(path).path).network if path.is_dir() or "/" in model else presets.get(model)
