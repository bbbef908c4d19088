"""What a distillation trains, and how: the frame that every objective fills in, and that the trainer knows.

An objective is made by its settings, `Distillation.objective`. Its file has both, and nothing else needs to know of it:
networks, optimisers, ZeRO, memory plans, checkpoints, evaluation, reports and export follow from what it says of
itself.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

from torch import Tensor, nn

from ipfm.engine.averages import SCHEDULES, Decay, LrSchedule, learning_rate, warmed_up
from ipfm.engine.checks import at_least, check_D, check_start, is_number, not_negative, option_name, positive
from ipfm.engine.config import (
    InitialWeights,
    Resolved,
    RunConfig,
    TeacherStorage,
    TeacherStorageOption,
    decide_storage,
    setting,
)
from ipfm.engine.data.real_images import RealImages
from ipfm.engine.distributed.pieces import AS_THEY_ARE, Pieces
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.initial_networks import generator_network
from ipfm.engine.objectives.published import PaperResult
from ipfm.engine.objectives.step_metrics import StepMetrics
from ipfm.models import NetworkConfig, Precond
from ipfm.models.low_rank import Lora

Start = Literal["teacher", "random"]
# As in peft.
DEFAULT_RANK = 8


# Name of the average of a role that is `followed`.
FOLLOWED = "followed"


@dataclass(frozen=True)
class Role:
    """A network that an objective trains."""

    name: str
    """In logs and checkpoints."""
    network: NetworkConfig
    """Its architecture."""
    start: Start
    """Its first weights: the teacher's, or as an untrained network has them."""
    lr: float
    """Adam's learning rate before the first step; each step says its own."""
    beta1: float
    """Adam's first decay; 0 needs no first moment."""
    rectified: bool = False
    """Rectified Adam [Liu et al. 2020]."""
    averaged: bool = False
    """The optimiser keeps the moving averages of the weights that the settings name."""
    followed: bool = False
    """The optimiser keeps one moving average for the steps themselves, see `Trained.followed`."""
    lora: Lora | None = None
    """What is trained are factors on the teacher's weights, see `low_rank_network`; None: weights of its own."""

    def __post_init__(self) -> None:
        if self.averaged and self.followed:
            raise ValueError(f"the role {self.name} is the result: its averages are those of the settings")
        # What is trained is no guided network, also where its architecture is a guided teacher's.
        object.__setattr__(self, "network", self.network.unguided)

    def seed(self, run: int) -> int:
        """Seed of random first weights, for a run's seed: each role has its own."""
        return (run + sum(self.name.encode())) % 2**63

    def moments(self, averages: int = 1) -> int:
        """fp32 values that the optimiser keeps a parameter; `averages`: how many the settings name."""
        return 1 + (self.beta1 > 0) + averages * self.averaged + self.followed

    def kept(self, averages: Sequence[str]) -> tuple[str, ...]:
        """Names of the averages that its optimiser keeps; `averages`: those that the settings name."""
        return tuple(averages) if self.averaged else (FOLLOWED,) * self.followed


# What `Objective.passes` calls the frozen denoiser.
TEACHER = "teacher"


class Passes(NamedTuple):
    """Forward passes of one network, or as much arithmetic, of one image in an iteration; a backward pass is two."""

    whole: int
    again: int
    """Those that activation checkpointing makes once more on the way back."""
    forward: int = 0
    """Forward passes among them; 0 where an objective says the whole alone."""
    to_input: int = 0
    """Backward passes to the image alone, each as much arithmetic as a forward pass."""
    to_weights: int = 0
    """Backward passes to the weights, each as much as two."""
    encoder: int = 0
    """Beside these, as `whole`, of the encoder alone."""
    encoder_again: int = 0
    """As `again`, likewise."""

    @classmethod
    def of(
        cls, forward: int, *, to_input: int = 0, to_weights: int = 0, encoder: int = 0, encoder_again: int = 0
    ) -> Passes:
        """Passes of these kinds."""
        again = to_input + to_weights
        whole = forward + to_input + 2 * to_weights
        return cls(whole, again, forward, to_input, to_weights, encoder, encoder_again)

    @property
    def in_words(self) -> str:
        """As in "2 forward, 1 back to the image, 1 to the weights"."""
        beside = f", as much as {self.encoder} forward of the encoder alone" if self.encoder else ""
        if not self.forward:
            return f"as much as {self.whole} forward{beside}"
        kinds = (
            (self.forward, "forward"),
            (self.to_input, "back to the image"),
            (self.to_weights, "to the weights"),
        )
        return ", ".join(f"{n} {kind}" for n, kind in kinds if n) + beside


def forwards_of(passes: Mapping[str, Passes], *, checkpointed: bool) -> int:
    """The passes of all networks together, with what activation checkpointing makes once more; see `Objective`."""
    return sum(of.whole + checkpointed * of.again for of in passes.values())


class Trained(Protocol):
    """What the steps need of a network in training: see `TrainedNetwork`."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def loss_scale(self) -> float | Tensor: ...

    @property
    def followed(self) -> nn.Module:
        """Another network with the average of the weights as the last `step` left it: frozen, in eval mode.

        Of a role that is `followed`.
        """
        ...

    def __call__(self, *args: Any, **keywords: Any) -> Tensor: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(
        self, *, lr: float | Tensor, ema_decay: Decay | Tensor = 0.0, grad_scale: Tensor | None = None
    ) -> Tensor: ...

    def frozen(self) -> AbstractContextManager[nn.Module]: ...


@dataclass(frozen=True)
class StepContext:
    """Where the steps of an objective run."""

    trained: Mapping[str, Trained]
    """The networks of its roles, by name."""
    teacher: Precond
    """The frozen denoiser."""
    settings: Resolved[RunConfig]
    """D, precision, micro-batch, form of the step."""
    world: World
    """The run's processes."""
    pieces: Pieces = AS_THEY_ARE
    """What runs the steps' pieces, for an objective whose settings are `capturable`."""
    real: RealImages | None = None
    """Real images, for an objective whose settings are `takes_real_images`."""

    @property
    def micro_batch(self) -> int:
        """Images this process handles at a time; divides its share of the batch."""
        return self.settings.micro_batch


class Steps(Protocol):
    """The training steps of an objective.

    Dropout acts in the network that is being trained, and there alone: what is made as data for another network is made
    in eval mode.
    """

    def iteration(self, step: int) -> StepMetrics:
        """One update of every network; `step` counts from 0. Waits for nothing on the device."""
        ...


class Objective(Protocol):
    """A way to distil a teacher into a generator.

    It is made for a configuration with nothing left open but what memory decides, and for the teacher's architecture;
    for the sake of memory plans the rest may be open as long as nothing is trained.
    """

    @property
    def title(self) -> str:
        """In lines of the log, e.g. "distil D=128 alpha=1 K=1"."""
        ...

    @property
    def summary(self) -> str:
        """What it is besides D, in words, e.g. "at alpha = 1 and 1 step"."""
        ...

    @property
    def roles(self) -> tuple[Role, ...]:
        """The networks it trains."""
        ...

    @property
    def generator(self) -> str:
        """The role whose average is the result."""
        ...

    @property
    def nfe(self) -> int:
        """Network evaluations an image of the result takes."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Plain JSON values that are stored with the result.

        `sample_model` reads in them how the result is drawn from: at "sigmas", or in another way.
        """
        ...

    def steps(self, context: StepContext) -> Steps:
        """The steps, on networks that somebody else made: real ones, or those of a memory plan on the meta device."""
        ...

    def forwards(self, *, phased: bool, checkpointed: bool) -> int:
        """Forward passes, or as much arithmetic, of one image in an iteration.

        An objective may have a method `passes(*, phased) -> Mapping[str, Passes]` besides, by the names of its roles
        and `TEACHER`: networks of several widths are then counted by their own.
        """
        ...

    def sample(self, net: Precond, first: int, count: int, *, seed: int) -> Tensor:
        """Images first..first + count - 1 of `seed` from the result, (count, C, H, W) in [-1, 1]."""
        ...


def check_objective_says(objective: Objective, low_rank: Sequence[str] = ()) -> None:
    """Check that what an objective says of its result can be kept and drawn from, before anything is trained for it.

    Args:
        objective: the objective.
        low_rank: the networks that its settings ask for as factors, see `Distillation.low_rank_roles`.

    Raises:
        ValueError: something is missing, or cannot be; one line.
    """
    whose = type(objective).__name__
    parts = ("title", "summary", "roles", "generator", "nfe", "facts", "steps", "forwards", "sample")
    if missing := [part for part in parts if not hasattr(objective, part)]:
        raise ValueError(f"{whose} has no {', '.join(missing)}")
    averaged = {role.name: role.averaged for role in objective.roles}
    if objective.generator not in averaged:
        raise ValueError(f"generator is {objective.generator!r}, which is none of its roles: {', '.join(averaged)}")
    if not averaged[objective.generator]:
        raise ValueError(f"the role {objective.generator} is the result, and must have averaged=True")
    check_factors(objective, low_rank)
    facts = objective.facts
    try:
        json.dumps(facts)
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts must be plain JSON values: {error}") from None
    if not facts.get("sigmas") and facts.get("parametrisation") != "trajectory":
        raise ValueError('facts must say how the result is drawn from: {"sigmas": [...]}, or the ends of a trajectory')


def check_factors(objective: Objective, low_rank: Sequence[str]) -> None:
    """Check that an objective trains those networks by factors.

    Args:
        objective: the objective.
        low_rank: the networks that its settings ask for as factors, see `Distillation.low_rank_roles`.

    Raises:
        ValueError: it does not; one line.
    """
    factors = {role.name for role in objective.roles if role.lora is not None}
    for name in low_rank:
        if name not in factors:
            raise ValueError(
                f"{name} lora was given, and {type(objective).__name__} trains no such network by factors: leave it "
                f"out, or give the role lora=config.lora_of({name!r})"
            )


_registered: dict[str, type[Distillation]] = {}


def registered() -> Mapping[str, type[Distillation]]:
    """The settings classes imported so far by their kinds, in order; `ipfm.engine.objectives.OBJECTIVES` has all."""
    return dict(sorted(_registered.items()))


@dataclass(frozen=True, kw_only=True)
class Distillation(RunConfig, ABC):
    """What every way to distil a teacher has in common. A way adds its own settings, and says what it trains.

    A subclass that has a `kind` of its own is registered under it: it is an objective of which plans, reports,
    evaluation and export know, by what the class says. What they ask of settings that were read from a folder is asked
    of the class, with the settings as JSON has them, those within another one under their full name in reports
    (noise.p_mean); any of them may be missing or damaged.

    Raises:
        ValueError: when a class is made whose kind another one has.
    """

    kind: ClassVar[str] = ""
    """Name of the objective on command lines and in config.json. A class writes `kind: ClassVar[str] = "name"`, and the
    next two as constants too: `ipfm plan` reads them in the source, without PyTorch."""
    planned: ClassVar[Mapping[str, str]] = {}
    """Settings that `ipfm plan` has as options of this objective, which may be left out -> what their help says. Their
    annotations are made of numbers, str, bool, None and Literal."""
    plan_example: ClassVar[str] = ""
    """A command line for the help of `ipfm plan`."""
    measured: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}}
    """What `ipfm bench --passes` measures: a word for the table -> settings beside its own."""
    method: ClassVar[str] = ""
    """The method's name in the literature, within a sentence. Default: that of the class it is made from, else its
    kind."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Names of settings that all objectives have and this one makes no use of, such as ema_kimg."""

    teacher: Path | None = setting(None, identity=False, place=True, memory=False)
    """The teacher: a checkpoint of EDM, EDM2, PFGM++ or SiD, or a model folder (config.json and model.safetensors)."""
    D: float | None = setting(None, memory=False)
    """Auxiliary dimensions, in (0, inf]; inf is a diffusion model. Default: what the teacher was trained for."""
    guide: Path | None = setting(None, identity=False, place=True, memory=False)
    """A weaker network that guides the teacher: without classes, or trained less."""
    guidance: float | None = setting(None, memory=False)
    """How far from --guide the teacher is driven, such as 1.4; see docs/objectives.md: no theorem stands behind it."""
    class_counts: tuple[int, ...] | None = setting(None, memory=False)
    """Images of each class in the teacher's data, as often as which classes are drawn in training; --labels counts
    them. Default: all alike."""
    init: InitialWeights = setting("auto", memory=False)
    """First weights of the generator: the teacher's, or random ones; auto is the teacher's, but random at another
    width."""
    width: float = 1.0
    """Channels of the generator by those of the teacher, e.g. 0.5."""
    lr_schedule: LrSchedule = setting("constant", memory=False, added=True)
    """How learning rates fall: constant: not; linear: to --lr-end at the end of the run; rsqrt: as 1 / sqrt(updates)
    after --lr-decay-batches."""
    lr_warmup: int = setting(0, memory=False, added=True)
    """Updates of a network over which its learning rate grows linearly."""
    lr_end: float = setting(0.0, memory=False, added=True)
    """With --lr-schedule linear: share of the learning rate that is left at the end; 1 keeps it."""
    lr_decay_batches: float | None = setting(None, memory=False, added=True)
    """With --lr-schedule rsqrt: updates of a network before its learning rate falls; EDM2's own: 35000 at 64 x 64,
    70000 at 512 x 512."""
    generator: Literal["full", "lora"] = setting("full", added=True)
    """full: the generator has weights of its own; lora: it has the teacher's, and low-rank factors of --rank, which are
    all that is trained."""
    rank: int | None = setting(None, added=True)
    """Rank of the factors of a network in training that is lora. Default: 8."""
    lora_alpha: float | None = setting(None, memory=False, added=True)
    """The product of the factors is multiplied by this / --rank. Default: the rank, which multiplies by 1."""
    teacher_storage: TeacherStorageOption = setting("auto", identity=False, place=True)
    """How the frozen teacher is kept: fp32 on every process; half: in the run's own 16 bits wherever its arithmetic has
    no more (the same results); sharded: among the processes, by ZeRO 3. auto: half in bf16 and fp16, else fp32."""
    backward: Literal["auto", "joint", "phased"] = setting("auto", identity=False, place=True)
    """joint: one backward pass over all networks; phased: one network's activations at a time; auto: by memory."""
    heun_steps: int = setting(18, identity=False, memory=False)
    """Steps of the teacher's sampler in the final table; 18 are 35 network evaluations."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        # Options of a recipe are settings of their objective, and no other one.
        if "kind" not in cls.__dict__:
            return
        other = _registered.setdefault(cls.kind, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"two objectives have the kind {cls.kind!r}: {other.__module__}.{other.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}"
            )
        _registered[cls.kind] = cls
        if not cls.method:
            cls.method = cls.kind

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.D is not None:
            check_D(self.D)
        if self.guidance is not None:
            not_negative("guidance", self.guidance)
        elif self.guide is not None:
            raise ValueError(f"guide {self.guide} was given without guidance: give its factor too, such as 1.4")
        if self.class_counts is not None:
            counts = tuple(self.class_counts)  # JSON has lists
            if any(type(n) is not int or n < 0 for n in counts) or not any(counts):
                shown = ", ".join(map(str, counts[:8])) or "none"
                raise ValueError(f"class-counts must be numbers of images, none negative and not all 0, got {shown}")
            object.__setattr__(self, "class_counts", counts)
        self._check_first_weights()
        self._check_training("generator", self.generator, "init", "width")
        self._check_lora()
        at_least("heun-steps", self.heun_steps, 1)
        self._check_schedule()
        if self.teacher_storage not in ("auto", "fp32", "half", "sharded"):
            raise ValueError(f"teacher-storage must be auto, fp32, half or sharded, got {self.teacher_storage!r}")
        if self.teacher_storage == "half" and self.precision == "fp32":
            raise ValueError(
                "teacher-storage half needs precision bf16 or fp16: in fp32 it would round the teacher's weights"
            )
        if self.compile and self.teacher_storage == "sharded":
            raise ValueError("compile does not go with teacher-storage sharded: use fp32 or half")
        if self.backward not in ("auto", "joint", "phased"):
            raise ValueError(f"backward must be auto, joint or phased, got {self.backward!r}")

    def _check_first_weights(self) -> None:
        check_start("init", self.init, "width", self.width)

    def _check_schedule(self) -> None:
        if self.lr_schedule not in SCHEDULES:
            raise ValueError(f"lr-schedule must be constant, linear or rsqrt, got {self.lr_schedule!r}")
        at_least("lr-warmup", self.lr_warmup, 0)
        if not (is_number(self.lr_end) and 0 <= self.lr_end <= 1):
            raise ValueError(f"lr-end must lie in [0, 1], got {self.lr_end}")
        if self.lr_end not in (0, 1) and self.lr_schedule != "linear":
            raise ValueError(f"lr-end is a setting of lr-schedule linear, got lr-schedule {self.lr_schedule}")
        if self.lr_decay_batches is not None:
            positive("lr-decay-batches", self.lr_decay_batches)
        if (self.lr_decay_batches is None) == (self.lr_schedule == "rsqrt"):
            if self.lr_decay_batches is None:
                raise ValueError("lr-schedule rsqrt needs lr-decay-batches, the updates before the rate falls")
            raise ValueError(f"lr-decay-batches is a setting of lr-schedule rsqrt, got lr-schedule {self.lr_schedule}")

    def scheduled(self, lr: float, update: int, *, times: int = 1, first: int = 0) -> float:
        """The learning rate of a network in its 0-based `update`, a function of the settings alone.

        Args:
            lr: its full rate.
            update: counted over the whole run.
            times: its updates in a step of the run.
            first: the step of the run in which it is trained first.
        """
        grown = warmed_up(update + 1, self.lr_warmup)
        if self.lr_schedule == "linear":
            total = max(self.total_steps - first, 1) * times
            return learning_rate(lr, update, "linear", grown=grown, total=total, end=self.lr_end)
        return learning_rate(lr, update, self.lr_schedule, grown=grown, hold=self.lr_decay_batches or 1.0)

    @property
    def lr_changes(self) -> bool:
        """Whether learning rates are others in some updates than in others."""
        return self.lr_warmup > 0 or self.lr_schedule == "rsqrt" or (self.lr_schedule == "linear" and self.lr_end < 1)

    def lr_at(self, step: int) -> float:
        """The generator's learning rate at 0-based `step`; it is trained from `first_whole_step` on."""
        first = self.first_whole_step
        return self.scheduled(self.lr, max(0, step - first), first=first)

    def changing_rates(self, step: int) -> Mapping[str, float]:
        """See `RunConfig.changing_rates`."""
        return {"generator_lr": self.lr_at(step)} if self.lr_changes and step >= self.first_whole_step else {}

    @property
    def decided_storage(self) -> TeacherStorage:
        """How the frozen teacher is kept.

        Raises:
            ValueError: as `decided_precision`.
        """
        return decide_storage(self.teacher_storage, self.decided_precision)

    @property
    def low_rank_roles(self) -> tuple[str, ...]:
        """The networks in training that have the teacher's weights and factors."""
        return ("generator",) if self.generator == "lora" else ()

    def lora_of(self, role: str) -> Lora | None:
        """What decides over the factors of a network in training; None where it has weights of its own."""
        if role not in self.low_rank_roles:
            return None
        rank = self.rank or DEFAULT_RANK
        return Lora(rank, float(self.lora_alpha or rank))

    def _check_training(self, name: str, training: str, init_name: str, width_name: str) -> None:
        """Check how a network is trained, and that it is the teacher at first where it has the teacher's weights."""
        if training not in ("full", "lora"):
            raise ValueError(f"{name} must be full or lora, got {training!r}")
        if training == "full":
            return
        width, init = getattr(self, width_name), getattr(self, init_name)
        if width != 1:
            raise ValueError(
                f"{name} lora has the teacher's weights and so its width: leave {option_name(width_name)} {width:g} out"
            )
        if init == "random":
            raise ValueError(f"{name} lora begins as the teacher: leave {option_name(init_name)} random out")

    def _check_lora(self) -> None:
        if self.rank is not None:
            at_least("rank", self.rank, 1)
        if self.lora_alpha is not None:
            positive("lora-alpha", self.lora_alpha)
        for name in ("rank", "lora_alpha"):
            if getattr(self, name) is not None and not self.low_rank_roles:
                raise ValueError(
                    f"{option_name(name)} {getattr(self, name):g} was given, but no network is lora: "
                    "give generator lora, or student lora"
                )
        if self.low_rank_roles and self.teacher_storage == "sharded":
            raise ValueError(
                f"{self.low_rank_roles[0]} lora computes with the teacher's weights, which teacher-storage sharded "
                "takes away between two uses: give fp32 or half"
            )

    def without_graphs(
        self,
        network: NetworkConfig,
        *,
        ranks: int,
        stage: int | None,
        phased: bool = False,
        checkpointed: bool = False,
    ) -> str:
        """See `RunConfig.without_graphs`."""
        if self.teacher_storage == "sharded" and self.cuda_graphs != "off" and ranks == 1 and not stage:
            return "a sharded teacher is gathered by the host"
        return super().without_graphs(network, ranks=ranks, stage=stage, phased=phased, checkpointed=checkpointed)

    @property
    def takes_real_images(self) -> bool:
        """Whether the steps ask for real images, see `StepContext.real`."""
        return False

    def completed(self, network: NetworkConfig) -> Self:
        """These settings with what they leave open decided by the teacher's architecture alone.

        Raises:
            ValueError: something does not go with this network.
        """
        return self

    @abstractmethod
    def objective(self, network: NetworkConfig) -> Objective:
        """What is trained, and how; for settings with nothing left open but what memory decides.

        Args:
            network: the teacher's architecture, as it is trained.
        """

    def further_flops(self, network: NetworkConfig) -> int:
        """Floating-point operations of one image in an iteration that are no pass of the networks, see `forwards`.

        Args:
            network: the teacher's architecture, as it is trained.
        """
        return 0

    def held_bytes(self, network: NetworkConfig, images: int) -> int:
        """Bytes that the steps keep for so many images of a process all the time, whatever its micro-batch.

        Args:
            network: the teacher's architecture, as it is trained.
            images: the process's share of the batch.
        """
        return 0

    @abstractmethod
    def name(self) -> str:
        """What tells runs of the same teacher apart, for the name of a run folder, e.g. "alpha1-K1"."""

    def published(self, dataset: str) -> Mapping[float, PaperResult]:
        """The published figures for these settings at every D that has one, see `figures`."""
        return self.figures(dataset, self.to_json())

    @classmethod
    def figure(cls, dataset: str, settings: Mapping[str, Any], network: NetworkConfig) -> PaperResult | None:
        """The published figure to print beside a result, with what differs in words; None where there is none.

        Args:
            dataset: see `plain_name`.
            settings: of the distillation, as JSON has them.
            network: the teacher's architecture and D, or the generator's.
        """
        # None is published for a guided teacher.
        found = None if settings.get("guidance") is not None else cls.figures(dataset, settings).get(network.D)
        return None if found is None else found.beside(settings, network)

    def recorded(self) -> Mapping[str, str]:
        """See `RunConfig.recorded`."""
        return {"objective": self.kind}

    def about(self) -> Mapping[str, Any]:
        """See `RunConfig.about`: of an objective from outside this project, what reports ask its class."""
        kind, settings = type(self), self.to_json()
        if kind.__module__.startswith("ipfm."):
            return {}
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        return {
            "file": Path(file).name if file else None,
            "title": kind.report_title(settings, ""),
            "words": kind.report_words(settings),
            "info": kind.info_words(settings),
            "readings": dict(kind.readings),
            "nfe": kind.nfe_of(settings),
            "unused": list(kind.unused),
            "card": kind.card_words(),
            "card_rows": {name: str(value) for name, value in kind.card_rows(settings).items() if value is not None},
        }

    def check_network(self, network: NetworkConfig) -> None:
        """Check that this objective can do with a teacher of this architecture, and its generator with the width.

        Raises:
            ValueError: it cannot.
        """
        generator_network(network, self.width)

    # -- what is asked of the settings of a folder ------------------------------------------------------------------

    @classmethod
    def recognises(cls, settings: Mapping[str, Any]) -> bool:
        """Whether the settings of a folder are this objective's, where it is older than the key that says so."""
        return False

    @classmethod
    def nfe_of(cls, settings: Mapping[str, Any]) -> int | None:
        """Network evaluations an image of the generator; None where the settings do not say."""
        return 1

    @classmethod
    def implied(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Values, as JSON has them, that follow from other settings where nothing is given, by the setting's name."""
        return {}

    @classmethod
    def figures(cls, dataset: str, settings: Mapping[str, Any]) -> Mapping[float, PaperResult]:
        """The published figures that these settings look up, at every D that has one; `dataset`: see `plain_name`.

        What else matters of the settings and the network, a figure says itself, see `PaperResult.beside`.
        """
        return {}

    @classmethod
    def report_title(cls, settings: Mapping[str, Any], at: str) -> str:
        """Title of the report of a run; `at`: ", D = 128", or nothing where D is not known."""
        return f"{cls.method[:1].upper()}{cls.method[1:]}{at}"

    @classmethod
    def report_words(cls, settings: Mapping[str, Any]) -> str:
        """How the generator is distilled, for a sentence of the report: "regression at σ = 2.5"."""
        return cls.method

    @classmethod
    def info_words(cls, settings: Mapping[str, Any]) -> str:
        """The objective and what decides over it, for a line of `ipfm info`."""
        return cls.method

    @classmethod
    def in_words(cls, settings: Mapping[str, Any]) -> str:
        """`info_words`, and what guided the teacher."""
        return cls.info_words(settings) + cls.further_words(settings)

    @classmethod
    def further_words(cls, settings: Mapping[str, Any]) -> str:
        """What follows the words of every objective: what guided the teacher, and which networks have its weights."""
        return cls.guidance_words(settings) + lora_words(settings)

    @staticmethod
    def guidance_words(settings: Mapping[str, Any]) -> str:
        """What follows the words of the objective where the teacher was guided: ", teacher guided by 1.4"."""
        factor = settings.get("guidance")
        return f", teacher guided by {factor:g}" if isinstance(factor, (int, float)) else ""

    @classmethod
    def card_words(cls) -> str:
        """The objective in a model card, in Markdown."""
        return cls.method

    @classmethod
    def card_rows(cls, settings: Mapping[str, Any]) -> Mapping[str, object]:
        """Further rows of a model card's table; None is left out."""
        return {}


def lora_words(settings: Mapping[str, Any]) -> str:
    """Which networks have the teacher's weights: ", student and generator of rank 8"; "" where none has.

    Args:
        settings: as JSON has them.
    """
    names = [name for name in ("student", "generator") if settings.get(name) == "lora"]
    rank, alpha = settings.get("rank") or DEFAULT_RANK, settings.get("lora_alpha")
    if not names or not isinstance(rank, int):
        return ""
    scaled = f", lora-alpha {alpha:g}" if isinstance(alpha, (int, float)) and alpha != rank else ""
    return f", {' and '.join(names)} of rank {rank} on the teacher's weights{scaled}"


def lora_facts(config: RunConfig) -> Mapping[str, Any]:
    """The same for machines, of the settings of a run: {"networks": ["student"], "rank": 8}; empty where none has."""
    if not isinstance(config, Distillation) or not config.low_rank_roles:
        return {}
    return {"networks": list(config.low_rank_roles), "rank": config.rank or DEFAULT_RANK}


def lora_name(config: Distillation) -> str:
    """What tells such runs apart, for the name of a run folder: "-student-lora8"; "" where all have their own."""
    if not config.low_rank_roles:
        return ""
    lora = config.lora_of(config.low_rank_roles[0])
    assert lora is not None
    alpha = "" if lora.alpha == lora.rank else f"a{lora.alpha:g}"
    return f"-{'-'.join(config.low_rank_roles)}-lora{lora.rank}{alpha}"


def lora_title(config: Distillation) -> str:
    """The same for lines of the log: " student lora8"."""
    return lora_name(config).replace("-", " ")
