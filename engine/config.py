"""Typed settings of a run, checked at construction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar, get_args

from ipfm.engine.averages import MOST, Average, Decay, check_std, learning_rate, warmed_up
from ipfm.engine.checks import at_least, check_D, is_number, not_negative, option_name, positive, share
from ipfm.engine.noise_levels import NoiseLevels

if TYPE_CHECKING:
    from ipfm.models import NetworkConfig

ZeroStage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "all"]
Precision = Literal["fp32", "bf16", "fp16"]
TeacherStorage = Literal["fp32", "half", "sharded"]
TeacherStorageOption = Literal["auto", "fp32", "half", "sharded"]
Attention = Literal["auto", "sdpa", "xformers"]
MemoryFormat = Literal["auto", "contiguous", "channels_last"]
CudaGraphs = Literal["auto", "on", "off"]
InitialWeights = Literal["auto", "teacher", "random"]
SnapshotPrecision = Literal["fp32", "fp16"]
Rules = Literal[1, 2]
# By which a new run computes, and those of every run whose folder names none.
CURRENT_RULES: Rules = 2
FIRST_RULES: Rules = 1

# Steps count in 32 bits of the random numbers' counters, which updates and levels within a step share.
STEP_LIMIT = 10**8


def setting(
    default: Any,
    *,
    identity: bool = True,
    place: bool = False,
    memory: bool = True,
    planned_as: Any = MISSING,
    added: bool = False,
) -> Any:
    """A field of a class of settings that says of itself what it is; a plain field is the cautious case of each.

    Args:
        default: its default; a class is called for a new one.
        identity: runs that differ in it are different runs, so that a run folder refuses another value. Others may
            change between two parts of one run: they do not change what it computes, or only how long.
        place: it says where and how a run is made, and nothing of its result.
        memory: it may change the size of a tensor in a step.
        planned_as: without `memory`, its value in memory plans; its default where this is missing.
        added: runs of older versions do not say it, and were made with its default.
    """
    said = {"identity": identity, "place": place, "memory": memory, "added": added}
    if planned_as is not MISSING:
        said["planned_as"] = planned_as
    if isinstance(default, type):
        return field(default_factory=default, metadata=said)
    return field(default=default, metadata=said)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What training a teacher and distilling one have in common.

    Raises:
        ValueError: a setting out of its range; the message names it, what was given and what is possible.
    """

    readings: ClassVar[Mapping[str, str]] = {}
    """Name of a loss in the log -> a sentence on how to read it."""

    out: Path | None = setting(None, identity=False, place=True, memory=False)
    """Run folder. Default: runs/ and a name made of the recipe and its settings."""
    batch: int = 256
    """Global batch: images per optimiser step, over all processes and micro-batches."""
    micro_batch: int | None = setting(None, identity=False, place=True)
    """Images one process handles at a time; the rest is accumulated. Default: its whole share of the batch."""
    max_steps: int | None = setting(None, identity=False, memory=False)
    """Optimiser steps of the run. Give this or --kimg."""
    kimg: float | None = setting(None, identity=False, memory=False)
    """Length of the run in thousands of images, instead of --max-steps."""
    lr: float = setting(1e-5, memory=False)
    """Learning rate."""
    eps: float = setting(1e-8, memory=False)
    """Adam's epsilon."""
    dropout: float = 0.0
    """Dropout of the networks while they are trained."""
    augment: float = 0.0
    """Probability of each augmentation of the images that a denoiser is trained on; 0 augments nothing. The network
    must take augmentation labels."""
    ema_kimg: float | tuple[float, ...] = setting(500.0, memory=False)
    """Half-life of the weights' moving average, in thousands of images; of each of several averages, such as 500 2000;
    0 keeps those of --ema alone."""
    ema_rampup: float = setting(0.05, memory=False)
    """The half-life is at most this share of the images seen before."""
    ema: tuple[float, ...] | None = setting(None, memory=False)
    """Relative widths of power-function averages of the weights that are kept too, such as 0.05 0.10, of whose
    snapshots `ipfm ema` makes others. Default: none."""
    export_ema: str = setting("best", identity=False, memory=False)
    """Which of several averages is exported: best is the best of the last evaluation, or the first where nothing is
    measured; or a name, such as ema500k or ema0.05."""
    zero: ZeroStage | None = setting(None, identity=False, place=True)
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards the optimiser's state, 2 the gradients as well, 3 the weights too.
    Default: the lowest that memory allows; at least 1 in bf16 and fp16 on several processes."""
    offload: Offload = setting("none", identity=False, place=True)
    """What lives in the host's memory: the optimiser's state (needs --zero 1 to 3), or the weights too (--zero 3)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the networks; auto is bf16 on GPUs that have it (NVIDIA's from Ampere on), fp32 elsewhere. fp16
    scales its losses."""
    activation_checkpointing: Literal["auto", "on", "off"] = setting("auto", identity=False, place=True)
    """Keep the inputs of a network's blocks alone and compute the rest again on the way back; auto: by memory."""
    clip_grad: float | None = setting(None, memory=False)
    """Largest norm of a network's gradient; default: no limit."""
    tf32: bool = setting(True, identity=False, memory=False)
    """Allow TF32 in fp32 convolutions and matrix products on GPUs."""
    deterministic: bool = setting(False, identity=False, place=True, memory=False)
    """Take algorithms that repeat their results bit for bit on a GPU too: slower there, the same on a CPU."""
    attention_backend: Attention = setting("auto", identity=False, place=True, memory=False)
    """What computes attention: sdpa is PyTorch's, which auto takes; xformers needs a GPU for which its build has
    operators."""
    memory_format: MemoryFormat = setting("auto", identity=False, place=True, memory=False)
    """Order of the activations in memory: channels_last has the channels of a pixel side by side, as convolutions on
    GPUs want them; auto is that on GPUs, contiguous elsewhere."""
    compile: bool = setting(False, identity=False, place=True, memory=False)
    """Compile the networks with torch.compile: the first steps take minutes, the others less. Not with --zero 3."""
    cuda_graphs: CudaGraphs = setting("auto", identity=False, place=True)
    """Capture the steps in CUDA graphs and replay them, so that the host has little to do: on one GPU without ZeRO;
    auto: where that goes."""
    noise: NoiseLevels = setting(NoiseLevels, memory=False)
    """Noise levels."""
    seed: int = setting(0, memory=False)
    """Every random number of the run is a function of this seed and its position."""
    rules: Rules = setting(CURRENT_RULES, memory=False)
    """2: dropout, augmentation and the EMA's ramp-up as in the papers' code; 1: as in version 0.1. A run folder goes on
    by the rules that its run began with."""
    log_every: int = setting(10, identity=False, place=True, memory=False)
    """Steps between two readings of the losses."""
    eval_every: int = setting(0, identity=False, place=True, memory=False)
    """Steps between two evaluations (Frechet distance and a picture); 0 evaluates at the end only."""
    checkpoint_every: int = setting(1000, identity=False, place=True, memory=False)
    """Steps between two checkpoints; one is always written at the end."""
    keep_checkpoints: int = setting(2, identity=False, place=True, memory=False)
    """Number of checkpoints that are kept."""
    snapshot_every: int = setting(0, identity=False, place=True, memory=False)
    """Steps between two snapshots, networks that are kept along the way (snapshots/ in --out); 0 keeps none but the
    best, which every run with an evaluation keeps."""
    keep_snapshots: int = setting(10, identity=False, place=True, memory=False)
    """Number of snapshots that are kept, the newest; 0 keeps all."""
    snapshot_precision: SnapshotPrecision = setting("fp32", identity=False, place=True, memory=False)
    """How snapshots are stored; fp16 takes half the disk."""
    async_checkpoints: bool = setting(True, identity=False, place=True, memory=False)
    """Write checkpoints and snapshots while the training goes on; needs host memory for one of them."""
    profile_memory: int = setting(0, identity=False, place=True, memory=False)
    """Measure the memory of this many steps at the start and compare it with the prediction (memory/ in --out)."""
    max_bad_steps: int = setting(50, identity=False, place=True, memory=False)
    """Stop with an error after this many steps that contained non-finite samples or gradients."""
    resume: bool = setting(True, identity=False, place=True, memory=False)
    """Continue the run folder's last checkpoint; --no-resume refuses a folder that holds a run."""

    from_step: int | None = setting(None, identity=False, place=True, memory=False)
    """Go back to the run folder's checkpoint of this step, 0 for the start; what came after it is put aside, as a run
    in set-aside/. Default: the newest one."""

    ALTERNATIVES: ClassVar[tuple[tuple[str, str], ...]] = (("max_steps", "kimg"),)

    def __post_init__(self) -> None:
        for name in ("batch", "log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps"):
            at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "seed", "profile_memory", "snapshot_every", "keep_snapshots"):
            at_least(name, getattr(self, name), 0)
        if self.micro_batch is not None:
            at_least("micro-batch", self.micro_batch, 1)
        if self.from_step is not None:
            at_least("from-step", self.from_step, 0)
            if not self.resume:
                raise ValueError("from-step continues a run, and --no-resume was given: leave one of them out")
        if self.max_steps is not None and self.kimg is not None:
            raise ValueError(f"max-steps and kimg exclude each other, got {self.max_steps} and {self.kimg}")
        if self.max_steps is not None:
            at_least("max-steps", self.max_steps, 1)
            _within_limit("max-steps", self.max_steps, self.max_steps)
        if self.kimg is not None:
            positive("kimg", self.kimg)
            _within_limit("kimg", self.kimg, self.kimg * 1000 / self.batch)
        for name in ("lr", "ema_rampup"):
            positive(name, getattr(self, name))
        self._check_averages()
        if self.snapshot_precision not in get_args(SnapshotPrecision):
            raise ValueError(f"snapshot-precision must be fp32 or fp16, got {self.snapshot_precision!r}")
        not_negative("eps", self.eps)
        share("dropout", self.dropout)
        if not (is_number(self.augment) and 0 <= self.augment <= 1):
            raise ValueError(f"augment must lie in [0, 1], got {self.augment}")
        for name in ("tf32", "deterministic", "resume", "async_checkpoints", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{option_name(name)} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.noise, NoiseLevels):
            raise ValueError(f"noise must be NoiseLevels, got {self.noise!r}")
        if type(self.rules) is not int or self.rules not in get_args(Rules):
            raise ValueError(f"rules must be 1 or 2, got {self.rules!r}")
        if self.clip_grad is not None:
            positive("clip-grad", self.clip_grad)
        if self.activation_checkpointing not in ("auto", "on", "off"):
            raise ValueError(f"activation-checkpointing must be auto, on or off, got {self.activation_checkpointing!r}")
        if self.memory_format not in ("auto", "contiguous", "channels_last"):
            raise ValueError(f"memory-format must be auto, contiguous or channels_last, got {self.memory_format!r}")
        if self.cuda_graphs not in ("auto", "on", "off"):
            raise ValueError(f"cuda-graphs must be auto, on or off, got {self.cuda_graphs!r}")
        if self.attention_backend not in ("auto", "sdpa", "xformers"):
            raise ValueError(f"attention-backend must be auto, sdpa or xformers, got {self.attention_backend!r}")
        if self.attention_backend == "xformers" and self.compile:
            raise ValueError(
                "attention-backend xformers does not go with compile, which knows PyTorch's own: use auto or sdpa"
            )
        if self.attention_backend == "xformers" and self.deterministic:
            raise ValueError(
                "attention-backend xformers does not go with deterministic, as its gradients do not repeat: use auto"
            )
        check_sharding(self.zero, self.precision, self.offload)
        if self.compile and self.zero == 3:
            raise ValueError("compile does not go with zero 3, which gathers weights module by module: use 0, 1 or 2")
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2^64, got {self.seed}")

    def _check_averages(self) -> None:
        """Check the averages, and write one half-life as the number that it always was."""
        given, several = self.ema_kimg, isinstance(self.ema_kimg, (tuple, list))
        half_lives = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        for option, kept in (("ema-kimg", half_lives), ("ema", self.ema)):
            if kept is not None and not kept:
                raise ValueError(f"{option} needs a value")
        if half_lives != (0,) or not self.ema:
            for half_life in half_lives:
                positive("ema_kimg", half_life)
        if several:
            object.__setattr__(self, "ema_kimg", half_lives[0] if len(half_lives) == 1 else half_lives)
        widths = tuple(self.ema or ())
        object.__setattr__(self, "ema", widths or None)
        for std in widths:
            check_std("ema", std)
        names = self.average_names
        for name, option, kept in (("ema_kimg", "ema-kimg", half_lives), ("ema", "ema", widths)):
            if len(set(kept)) < len(kept):
                raise ValueError(f"{option} must be different averages, got {getattr(self, name)}")
        if len(names) > MOST:
            raise ValueError(f"ema and ema-kimg must be at most {MOST} averages together, got {', '.join(names)}")
        if self.export_ema != "best" and self.export_ema not in names:
            raise ValueError(f"export-ema must be best or one of {', '.join(names)}, got {self.export_ema!r}")

    @property
    def averages(self) -> tuple[Average, ...]:
        """What the result's optimiser keeps: first those by half-life, then those by a power, as they were given."""
        half_lives = self.ema_kimg if isinstance(self.ema_kimg, tuple) else (self.ema_kimg,)
        by_half_life = (Average(half_life=float(half_life)) for half_life in half_lives if half_life)
        return (*by_half_life, *(Average(std=float(std)) for std in self.ema or ()))

    @property
    def average_names(self) -> tuple[str, ...]:
        """Names of `averages`."""
        return tuple(average.name for average in self.averages)

    @property
    def decided_precision(self) -> Precision:
        """The precision of settings that were completed for a device.

        Raises:
            ValueError: it is still "auto".
        """
        if self.precision == "auto":
            raise ValueError("precision is still auto: it must be decided for a device first")
        return self.precision

    @property
    def decided_storage(self) -> TeacherStorage:
        """How the run keeps a frozen teacher; fp32 where it has none.

        Raises:
            ValueError: as `decided_precision`.
        """
        return "fp32"

    def laid_out(
        self, *, D: float, stage: ZeroStage, micro_batch: int, phased: bool, checkpointed: bool
    ) -> Resolved[Self]:
        """These settings with everything else decided.

        Raises:
            ValueError: as `decided_precision`.
        """
        return Resolved(
            config=self,
            D=D,
            precision=self.decided_precision,
            stage=stage,
            micro_batch=micro_batch,
            phased=phased,
            checkpointed=checkpointed,
            teacher_storage=self.decided_storage,
        )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run: max_steps, or as many as reach kimg.

        Raises:
            ValueError: neither is set.
        """
        if self.max_steps is not None:
            return self.max_steps
        if self.kimg is not None:
            return max(1, math.ceil(self.kimg * 1000 / self.batch))
        raise ValueError("the length of the run is not set: give max-steps or kimg")

    def split(self, ranks: int) -> tuple[int, int]:
        """(images a process, images a micro-batch) for this number of processes.

        Raises:
            ValueError: the batch does not divide evenly, or so many processes cannot share it at this ZeRO stage.
        """
        at_least("the number of processes", ranks, 1)
        check_sharding(self.zero, self.precision, self.offload, ranks)
        if self.batch % ranks:
            raise ValueError(f"batch must be divisible by the number of processes, got {self.batch} and {ranks}")
        local = self.batch // ranks
        micro = self.micro_batch or local
        if local % micro:
            raise ValueError(
                f"micro-batch must divide the {local} images of a process (batch {self.batch}, {ranks} processes), "
                f"got {micro}"
            )
        return local, micro

    def ema_decay(self, step: int) -> Decay:
        """Decay of the average at 0-based `step`, or of each of several, see `Average.decay`.

        Half-life and images are counted in images. Seen are those of the steps before this one, so that the first step
        forgets the first weights; by rules 1 those of this step are counted too.
        """
        seen = (step + (self.rules == FIRST_RULES)) * self.batch
        decays = tuple(one.decay(step, self.batch, rampup=self.ema_rampup, seen=seen) for one in self.averages)
        return decays[0] if len(decays) == 1 else decays

    @property
    def first_whole_step(self) -> int:
        """The first step in which every network is trained; 0 but where one begins before the others."""
        return 0

    @property
    def planned_step(self) -> int:
        """The first step in which all is computed that ever is: plans and timings are of it."""
        return self.first_whole_step

    @property
    def decided(self) -> Mapping[str, Any]:
        """What these settings leave to the run's length, decided: a run that is lengthened keeps it. Plain JSON."""
        return {}

    def keeping(self, decided: Mapping[str, Any]) -> Self:
        """These settings with what a run has decided, see `decided`, where they leave it open."""
        return self

    @property
    def images_together(self) -> int:
        """Images of a batch that belong together: of fewer a step takes longer for each."""
        return 1

    def changing_rates(self, step: int) -> Mapping[str, float]:
        """The learning rates of the networks at 0-based `step`, "generator_lr" and so on; empty where they stay."""
        return {}

    @property
    def mirrored_stretch(self) -> bool:
        """Augmentation stretches images against its labels, as by rules 1 alone."""
        return self.rules == FIRST_RULES

    @property
    def samples_have_dropout(self) -> bool:
        """What is made as data for another network is made with dropout, as by rules 1 alone."""
        return self.dropout > 0 and self.rules == FIRST_RULES

    @property
    def capturable(self) -> bool:
        """Whether the steps run in pieces that CUDA graphs can capture, see `ipfm.engine.distributed.pieces`."""
        return False

    def seeds_once(self, *, phased: bool) -> bool:
        """Whether all dropout of such a piece follows from one seed at its beginning, which is what a graph can have.

        Args:
            phased: the form of the step.
        """
        return False

    def without_graphs(
        self,
        network: NetworkConfig,
        *,
        ranks: int,
        stage: int | None,
        phased: bool = False,
        checkpointed: bool = False,
    ) -> str:
        """Why CUDA graphs cannot capture the steps on a GPU, in words; "" where they can and may.

        Args:
            network: the teacher's architecture; in a teacher's training what is trained.
            ranks: number of processes.
            stage: of ZeRO; None: 0.
            phased: one network's activations at a time.
            checkpointed: activations are computed again on the way back.
        """
        if self.cuda_graphs == "off":
            return "off was given"
        if ranks > 1:
            return f"the {ranks} processes talk within a step"
        if stage:
            return f"DeepSpeed's ZeRO {stage} decides on the host"
        if self.drops(network) and not self.seeds_once(phased=phased):
            return "the host seeds dropout several times within a step"
        if self.drops(network) and checkpointed:
            return "what is computed again takes its dropout from the host"
        return "" if self.capturable else "the objective's own functions may decide on the host"

    def drops(self, network: NetworkConfig) -> bool:
        """Whether dropout acts in a step, for a network as in `without_graphs`."""
        return self.dropout > 0

    def recorded(self) -> Mapping[str, str]:
        """What config.json of a run folder says of these settings beside their values."""
        return {}

    def about(self) -> Mapping[str, Any]:
        """What config.json says of the objective for readers that do not know it, under "about"; plain JSON values."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON holds exactly; infinity as the string "inf"."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(RunConfig):
    """Training of a teacher on data: the denoising loss with PFGM++ noise at any D [Xu et al. 2023; EDM]."""

    readings: ClassVar[Mapping[str, str]] = {
        "teacher_loss": "teacher_loss is a denoising loss: it falls, then levels off above zero."
    }

    D: float | None = setting(None, memory=False)
    """Auxiliary dimensions, in (0, inf]; inf is a diffusion model. Default: the network's."""
    beta1: float = 0.9
    """Adam's first decay."""
    beta2: float = setting(0.999, memory=False, added=True)
    """Adam's second decay; EDM2 has 0.99."""
    lr_rampup_kimg: float = setting(10_000.0, memory=False)
    """The learning rate grows linearly over this many thousands of images; 0 starts with the full rate."""
    lr_decay_batches: float = setting(0.0, memory=False, added=True)
    """EDM2's schedule: after this many batches the learning rate falls as 1 / sqrt(images); it and its growth then
    count the images before the step. 0: it does not fall."""
    heun_steps: int = setting(18, identity=False, memory=False)
    """Steps of the sampler in the evaluation; 18 are 35 network evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.D is not None:
            check_D(self.D)
        share("beta1", self.beta1)
        share("beta2", self.beta2)
        at_least("heun-steps", self.heun_steps, 1)
        not_negative("lr-rampup-kimg", self.lr_rampup_kimg)
        not_negative("lr-decay-batches", self.lr_decay_batches)

    @property
    def capturable(self) -> bool:
        """See `RunConfig.capturable`."""
        return True

    def seeds_once(self, *, phased: bool) -> bool:
        """See `RunConfig.seeds_once`: a piece has one forward pass."""
        return True

    def drops(self, network: NetworkConfig) -> bool:
        """See `RunConfig.drops`: of labels too."""
        return self.dropout > 0 or network.label_dropout > 0

    def learning_rate(self, step: int) -> float:
        """Learning rate at 0-based `step`: it grows linearly with the images seen, those of this step included.

        With `lr_decay_batches` EDM2's: lr / sqrt(max(n / (lr_decay_batches batch), 1)) min(n / rampup, 1), n the images
        before this step, so that the first step's is 0 where it grows.
        """
        length = self.lr_rampup_kimg * 1000
        if self.lr_decay_batches:
            grown = warmed_up(step * self.batch, length)
            return learning_rate(self.lr, step, "rsqrt", grown=grown, hold=self.lr_decay_batches)
        return learning_rate(self.lr, step, grown=warmed_up((step + 1) * self.batch, length))

    def changing_rates(self, step: int) -> Mapping[str, float]:
        """See `RunConfig.changing_rates`."""
        return {"teacher_lr": self.learning_rate(step)} if self.lr_rampup_kimg or self.lr_decay_batches else {}


ConfigT_co = TypeVar("ConfigT_co", bound=RunConfig, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Resolved(Generic[ConfigT_co]):
    """The settings of a run on its processes, with nothing left open: what steps, ZeRO and memory plans go by.

    `config` is what a run folder records: of what memory decides it has the ZeRO stage, as it was chosen; micro-batch,
    form of the step and activation checkpointing stay as the user gave them, for another machine may choose others.

    Raises:
        ValueError: stage, precision and offload do not go together, or D is out of its range.
    """

    config: ConfigT_co
    """The settings as completed: D, precision, the teacher's storage and the ZeRO stage are filled in."""
    D: float
    """Auxiliary dimensions, in (0, inf]."""
    precision: Precision
    """Arithmetic of the networks."""
    stage: ZeroStage
    """DeepSpeed ZeRO stage."""
    micro_batch: int
    """Images a process handles at a time; divides its share of the batch."""
    phased: bool
    """One network's activations at a time; never in a teacher's training, whose step has one form."""
    checkpointed: bool
    """The networks' activations are computed again on the way back."""
    teacher_storage: TeacherStorage
    """How a frozen teacher is kept; fp32 where there is none."""

    def __post_init__(self) -> None:
        check_D(self.D)
        check_sharding(self.stage, self.precision, self.config.offload)


def free_settings(kind: type[RunConfig]) -> frozenset[str]:
    """Names of the settings that may change between two parts of one run."""
    return frozenset(f.name for f in dataclasses.fields(kind) if not f.metadata.get("identity", True))


def place_settings(kind: type[RunConfig]) -> frozenset[str]:
    """Names of the settings that say where and how a run is made: its result is the same whatever they are."""
    return frozenset(f.name for f in dataclasses.fields(kind) if f.metadata.get("place", False))


def first_weights_settings(kind: type[RunConfig]) -> frozenset[str]:
    """Names of the settings that say what a network begins with."""
    return frozenset(f.name for f in dataclasses.fields(kind) if f.type in (InitialWeights, "InitialWeights"))


def added_settings(kind: type[RunConfig]) -> dict[str, Any]:
    """The settings that runs of older versions do not say, by name, with what they were made with, as JSON has it."""
    return {f.name: _plain(f.default) for f in dataclasses.fields(kind) if f.metadata.get("added", False)}


def planned_settings(kind: type[RunConfig]) -> dict[str, Any]:
    """The settings that change no tensor's size, by name, with the values that stand for all others in a plan."""
    return {
        f.name: f.metadata.get("planned_as", f.default if f.default_factory is MISSING else f.default_factory())
        for f in dataclasses.fields(kind)
        if not f.metadata.get("memory", True)
    }


def decide_storage(option: TeacherStorageOption, precision: Precision) -> TeacherStorage:
    """How a frozen teacher is kept: as given, else in the 16 bits of the run's arithmetic where it has them."""
    if option != "auto":
        return option
    return "fp32" if precision == "fp32" else "half"


def check_sharding(zero: int | None, precision: str, offload: str, ranks: int = 1) -> None:
    """Check that ZeRO stage (None: still open), precision and offload are possible, alone and together.

    Args:
        zero: the stage.
        precision: of the networks.
        offload: what lives in the host's memory.
        ranks: number of processes; 1 also while it is not known.

    Raises:
        ValueError: they are not.
    """
    if zero not in (None, 0, 1, 2, 3) or isinstance(zero, bool):
        raise ValueError(f"zero must be one of the stages 0, 1, 2, 3, got {zero}")
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise ValueError(f"precision must be auto, fp32, bf16 or fp16, got {precision!r}")
    if offload not in ("none", "optimizer", "all"):
        raise ValueError(f"offload must be none, optimizer or all, got {offload!r}")
    if precision in ("bf16", "fp16") and zero == 0 and ranks > 1:
        raise ValueError(
            f"precision {precision} on {ranks} processes needs zero 1, 2 or 3, which share out the fp32 master "
            "weights, got 0"
        )
    if offload == "optimizer" and zero in (None, 0):
        raise ValueError(f"offload optimizer needs zero 1, 2 or 3, got {'none' if zero is None else zero}")
    if offload == "all" and zero != 3:
        raise ValueError(f"offload all needs zero 3, which shards the weights, got {'none' if zero is None else zero}")


def _within_limit(name: str, value: float, steps: float) -> None:
    if steps > STEP_LIMIT:
        raise ValueError(f"{name} must be at most {STEP_LIMIT:,} optimiser steps, got {value}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value
