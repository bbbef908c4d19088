"""`ipfm plan`: the memory of a distillation or of a teacher's training, predicted; and what to rent for it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import tyro

from ipfm.engine.checks import option_name
from ipfm.engine.objectives import DEFAULT, OBJECTIVES, Declared, Offered, declared
from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.json_output import Write, output, plain

if TYPE_CHECKING:
    from ipfm.engine.commands.plan.settings import Planned
    from ipfm.engine.config import TeacherConfig
    from ipfm.engine.experiments.recipe import Recipe
    from ipfm.engine.memory import Layout, MemoryPlan
    from ipfm.engine.memory.autoencoder import AutoencoderBytes
    from ipfm.engine.objectives.base import Distillation
    from ipfm.models import NetworkConfig

K = TypeVar("K", bound=type)

# What each objective offers, and the options that a distillation alone has; others would not change the plan of a
# teacher's training.
DECLARED: dict[str, Declared] = {}
# What is wrong with a file of one's own, which `ipfm` says before anything else.
TROUBLE: list[str] = []
OF_NETWORKS = ("teacher_storage", "backward", "generator", "rank")
OF_EVERY_DISTILLATION = ("objective", *OF_NETWORKS, "guide")
# Options of the table of what to rent.
OF_THE_TABLE = ("gpus", "recipe", "kimg", "max_steps", "share", "price")


def _with_objectives(plan: K) -> K:
    """The class with the options and examples of the objectives, after the settings that all of them have."""
    own = dict(plan.__annotations__)
    try:
        offered = _offered(declared(), own)
    except ValueError as error:
        # This class is made when the command is loaded.
        TROUBLE.append(str(error))
        offered = _offered(declared(own=False), own)
    options = {name: _option(o) for name, o in offered.items()}
    for name in options:
        setattr(plan, name, None)
    plan.__annotations__ = {}
    for name, annotation in own.items():
        plan.__annotations__ |= options if name == "teacher_training" else {}
        plan.__annotations__[name] = annotation
    named = f"By what: {', '.join(DECLARED)}. Default: ipfm, which SiD shares."
    plan.__annotations__["objective"] = _option(Offered(Literal[tuple(DECLARED)], named), "NAME")
    examples = [said.example for said in DECLARED.values() if said.example]
    plan.__doc__ = "\n\n    ".join([(plan.__doc__ or "").strip(), *(f"Example: {example}" for example in examples)])
    return plan


def _option(offered: Offered, metavar: str = "KIND") -> Any:
    """The annotation of an option that may be left out; words that its help names need not stand beside its name."""
    if get_origin(offered.type) is Literal and all(str(word) in offered.help for word in get_args(offered.type)):
        return Annotated[offered.type | None, tyro.conf.arg(help=offered.help, metavar=metavar)]
    return Annotated[offered.type | None, tyro.conf.arg(help=offered.help)]


def _offered(said: Mapping[str, Declared], own: Collection[str]) -> dict[str, Offered]:
    """The options of the objectives that `said` tells of, which `DECLARED` has from then on.

    Raises:
        ValueError: two of them mean different things by one option, or an option is the plan's own.
    """
    offered: dict[str, Offered] = {}
    for kind, its in said.items():
        for name, option in its.offered.items():
            before = offered.get(name, Offered(option.type, ""))
            if name in own or before.type != option.type:
                raise ValueError(f"the objective {kind} offers {name} to ipfm plan, which has another such option")
            # A variant of an objective has its options and their help.
            more = "" if option.help in before.help else option.help
            offered[name] = Offered(option.type, f"{before.help} {more}".strip())
    DECLARED.update(said)
    return offered


@dataclass(frozen=True, kw_only=True)
@_with_objectives
class Plan:
    """Predict the memory of a run, by part and phase of a step, and what to rent for it."""

    ELSEWHERE: ClassVar[Mapping[str, str]] = {
        "vae": "what it adds is said wherever the images are latents",
        "guidance": "it changes no size; --guide is the network that guides the teacher",
    }

    model: str
    """Preset, model folder, published checkpoint, or recipe."""
    size: Annotated[Literal["xs", "s", "m", "l", "xl", "xxl"] | None, tyro.conf.arg(metavar="SIZE")] = None
    """Of recipes for EDM2's networks: xs, s, m, l, xl, xxl. Default: the smallest."""
    guide: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Network that guides the teacher, as a run's --guide; named as --model is."""
    objective: str | None = None
    """Its annotation and help are made in `_with_objectives`."""
    batch: int | None = None
    """Global batch. Default: the recipe's, else 256."""
    ranks: int | None = None
    """Number of processes. Default: 1."""
    micro_batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Images a process handles at a time. Default: by memory, else all."""
    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage. Default: the lowest that fits; at least 1 in bf16 and fp16."""
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, tyro.conf.arg(metavar="KIND")] = None
    """fp32, bf16, fp16. Default: for GPUs bf16, as in a run; else fp32."""
    offload: Annotated[Literal["none", "optimizer", "all"], tyro.conf.arg(metavar="WHAT")] = "none"
    """What lives in the host's memory: none, optimizer, all."""
    teacher_storage: Literal["auto", "fp32", "half", "sharded"] | None = None
    """How the frozen teacher is kept. Default: auto."""
    backward: Annotated[Literal["auto", "joint", "phased"] | None, tyro.conf.arg(metavar="FORM")] = None
    """Form of the generator's step: auto, joint, phased. Default: auto."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute activations again on the way back."""
    generator: Annotated[Literal["full", "lora"] | None, tyro.conf.arg(metavar="KIND")] = None
    """full; lora: as factors on the teacher's weights. Default: full."""
    rank: int | None = None
    """Of networks that are lora: of their factors. Default: 8."""
    teacher_training: bool = False
    """Plan the training of a teacher instead."""
    gpu_memory: Annotated[float | None, tyro.conf.arg(metavar="GB")] = None
    """Memory of one GPU in GB: largest micro-batch, cheapest form that fits."""
    fits: tuple[float, ...] = ()
    """Memory of several GPUs in GB: a table of what fits on each."""
    gpus: tuple[int, ...] = ()
    """What to rent: a table for these numbers of GPUs. Default: 1 2 4 8."""
    recipe: Annotated[str | None, tyro.conf.arg(metavar="RECIPE")] = None
    """Of it: whose settings. Default: the recipe's for such networks."""
    kimg: float | None = None
    """Of it: length in thousands of images. Default: the recipe's."""
    max_steps: int | None = None
    """Of it: length in steps, instead of --kimg."""
    share: float | None = None
    """Of it: share of a GPU's peak that is reached. Default: 0.3, an assumption."""
    price: tuple[str, ...] = ()
    """Of it: price of a GPU hour, as in 2.5, or A100=1.5 H100=2.5."""
    json: bool = False
    """Print JSON, in bytes and seconds."""

    def run(self) -> None:
        """Print the plan, or a table."""
        with output(as_json=self.json) as write:
            with user_input():
                self._check()
                recipe = self._recipe()
                table = self._is_table(recipe)
                planned = self._guided(self._planned(recipe, table=table))
                self._check_factors(planned)
                if not table:
                    planned.config.split(self._ranks)
            if table:
                self._rent(planned, write)
            else:
                (self._fits if self.fits else self._plan)(planned.config, planned.network, write)

    def _rent(self, planned: Planned, write: Write) -> None:
        from ipfm.engine.commands.plan.rent import COUNTS, RentTable, parse_prices
        from ipfm.engine.memory.arithmetic import SHARE

        with user_input():
            prices = parse_prices(self.price)
            counts = sorted(set(self.gpus)) or COUNTS
            table = RentTable(self.model, planned, counts, SHARE if self.share is None else self.share, prices)
        guided = {} if self.guide is None else {"guide": self.guide}
        write(table.facts() | guided, table.text())

    def _plan(self, config: Distillation | TeacherConfig, network: NetworkConfig, write: Write) -> None:
        from ipfm.engine.memory import gpu_budget, layout_of
        from ipfm.engine.memory.arithmetic import SHARE, flops_in_words
        from ipfm.engine.memory.autoencoder import autoencoder_bytes
        from ipfm.engine.memory.state import parameter_count
        from ipfm.engine.objectives.base import lora_words

        budget = None if self.gpu_memory is None else gpu_budget(self.gpu_memory * 1e9)
        with user_input():
            layout = layout_of(config, network, ranks=self._ranks, budget=budget)
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
        outside = config.about()
        if network.guide is not None:
            count = parameter_count(network.guide.network)
            lines.insert(0, f"teacher guided by {self.guide}, {count:,} parameters, which the teacher's bytes include")
        beside = autoencoder_bytes(network)
        if beside is not None:
            lines.append(self._beside(beside, plan))
        if words := lora_words(config.to_json()):
            lines.insert(0, words.removeprefix(", "))
        if outside:
            lines.insert(0, f"objective {getattr(config, 'kind', None)}: {outside['info']}")
        write(self._kind(config) | _facts(layout) | _autoencoder(beside, plan) | arithmetic, "\n".join(lines))

    @staticmethod
    def _beside(beside: AutoencoderBytes, plan: MemoryPlan) -> str:
        """What the autoencoder of latents adds, where there is one, and whether it still fits."""
        from ipfm.engine.runtime.wording import size

        peak = beside.peak(plan.state, plan.peak)
        small = "" if plan.budget is None or peak <= plan.budget else ", TOO SMALL"
        return (
            f"with --vae (sd-vae-ft-mse): {size(beside.weights)} more; {size(beside.decoding)} beside the state while "
            f"{beside.pictures} pictures of {beside.side}x{beside.side} are decoded; peak {size(peak)}{small}"
        )

    def _arithmetic(
        self, config: Distillation | TeacherConfig, network: NetworkConfig, layout: Layout
    ) -> tuple[float, dict[str, float]]:
        """Floating-point operations of a step of all processes, and the seconds that one GPU of each kind needs."""
        from ipfm.engine.experiments.gpu_costs import Run
        from ipfm.engine.memory.arithmetic import gpu_seconds

        flops = Run(config, network).step_flops(layout.relative_cost)
        return flops, gpu_seconds(flops, config.decided_precision)

    def _fits(self, config: Distillation | TeacherConfig, network: NetworkConfig, write: Write) -> None:
        from ipfm.engine.memory import fits
        from ipfm.engine.memory.autoencoder import autoencoder_bytes
        from ipfm.engine.memory.fits import fit_table, with_autoencoder
        from ipfm.engine.objectives.base import lora_words

        beside = autoencoder_bytes(network)
        found = list(fits(config, network, ranks=(self._ranks,), gpus=self.fits))
        facts = [
            {
                "gpu_memory": fit.gpu,
                "fits": fit.layout is not None,
                "reason": fit.reason or None,
                **({} if fit.layout is None else _facts(fit.layout) | _autoencoder(beside, fit.layout.plan)),
            }
            for fit in found
        ]
        more = [] if beside is None else with_autoencoder(beside, found)
        if words := lora_words(config.to_json()):
            more.insert(0, words.removeprefix(", "))
        write(self._kind(config) | {"gpus": facts}, "\n".join([*fit_table(config, found), *more]))

    def _kind(self, config: Distillation | TeacherConfig) -> dict[str, Any]:
        from ipfm.engine.objectives.base import lora_facts

        return {
            "model": self.model,
            **({} if self.guide is None else {"guide": self.guide}),
            "objective": getattr(config, "kind", None),
            **({"about": dict(about)} if (about := config.about()) else {}),
            **({"low_rank": lora} if (lora := lora_facts(config)) else {}),
            "batch": config.batch,
            "ranks": self._ranks,
            "precision": config.decided_precision,
        }

    def _check(self) -> None:
        """Check the options together.

        Raises:
            ValueError: some cannot be, or do not change this plan.
        """
        if self._ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}")
        for name, sizes in (("gpu-memory", () if self.gpu_memory is None else (self.gpu_memory,)), ("fits", self.fits)):
            for size in sizes:
                if not 0 < size < math.inf:
                    raise ValueError(f"{name} must be a finite number > 0, got {size}")
        if self.gpu_memory is not None and self.fits:
            raise ValueError("gpu-memory and fits exclude each other: give one of them")
        for count in self.gpus:
            if count < 1:
                raise ValueError(f"gpus must be at least 1, got {count}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], a share of a GPU's peak, got {self.share:g}")
        table = [name for name in OF_THE_TABLE if getattr(self, name) not in (None, ())]
        other = [name for name in ("gpu_memory", "fits", "ranks") if getattr(self, name) not in (None, ())]
        if table and other:
            raise ValueError(
                f"{option_name(other[0])} was given, but {option_name(table[0])} is of the table of what to rent, for "
                "which --gpus says how many: leave one of them out"
            )
        if self.teacher_training:
            every = (name for said in DECLARED.values() for name in said.offered)
            self._refuse("the training of a teacher has no", (*OF_EVERY_DISTILLATION, *every))

    def _check_objective(self, chosen: str) -> None:
        """Check that no options were given that only other objectives than this one have.

        Raises:
            ValueError: some were.
        """
        for kind, said in DECLARED.items():
            if kind != chosen:
                # Where none is named, or the usual one, it is the name of the other that is missing.
                named = f"only the objective {kind} has" if chosen == DEFAULT else f"the objective {chosen} has no"
                own = DECLARED[chosen].offered if chosen in DECLARED else {}
                self._refuse(named, [name for name in said.offered if name not in own])

    @staticmethod
    def _check_factors(planned: Planned) -> None:
        from ipfm.engine.objectives.base import Distillation, check_factors
        from ipfm.engine.objectives.initial_networks import trained_config

        config = planned.config
        if isinstance(config, Distillation) and config.low_rank_roles:
            objective = config.objective(trained_config(planned.network, config.dropout))
            check_factors(objective, config.low_rank_roles)

    def _refuse(self, named: str, names: Iterable[str]) -> None:
        # Several objectives may have the same one.
        given = [option_name(name) for name in dict.fromkeys(names) if getattr(self, name) is not None]
        if given:
            raise ValueError(f"{named} {' and '.join(given)}: leave it out")

    @property
    def _ranks(self) -> int:
        return 1 if self.ranks is None else self.ranks

    def _recipe(self) -> Recipe[Any] | None:
        """The recipe that is named, by --recipe or in place of the network.

        Raises:
            ValueError: there is none of this name, or two are named.
        """
        from ipfm.engine.commands.recipes import find_recipe, is_recipe

        by_model = is_recipe(self.model) and (self.model.endswith(".py") or not Path(self.model).exists())
        if by_model and self.recipe is not None:
            raise ValueError(f"model is a recipe, {self.model}, and recipe was given too: leave one of them out")
        named = self.model if by_model else self.recipe
        return None if named is None else find_recipe(named)

    def _is_table(self, recipe: Recipe[Any] | None) -> bool:
        """Whether it is asked what to rent."""
        of_one = self.ranks is not None or self.gpu_memory is not None or bool(self.fits)
        return any(getattr(self, name) not in (None, ()) for name in OF_THE_TABLE) or (
            recipe is not None and not of_one
        )

    def _planned(self, recipe: Recipe[Any] | None, *, table: bool) -> Planned:
        """Settings and network.

        Raises:
            ValueError: they cannot be read, or do not go together.
        """
        from ipfm.engine.commands.plan.rent import as_trained
        from ipfm.engine.commands.plan.settings import Planned, fitting_recipe, fitting_training, of_recipe
        from ipfm.engine.commands.recipes import is_recipe

        of_model = recipe is not None and self.recipe is None and is_recipe(self.model)
        network = None if of_model else read_network(self.model)
        if recipe is None and table:
            recipe = fitting_training(self.model) if self.teacher_training else fitting_recipe(self.model, self._chosen)
        if recipe is None:
            assert network is not None
            if self.size is not None:
                raise ValueError("size was given without a recipe that has sizes, such as imagenet512_edm2_ipfm")
            config: Any = self._training() if self.teacher_training else self._distillation(network)
            return Planned(config, network)
        kind = getattr(recipe.defaults, "kind", None)
        if self.objective is not None and kind != self.objective:
            does = "trains a teacher" if kind is None else f"distils by {kind}"
            raise ValueError(f"objective {self.objective} was given, but {recipe.file} {does}: leave it out")
        if kind is not None and not self.teacher_training:
            self._check_objective(kind)
        planned = of_recipe(recipe, self._own(), network=network, training=self.teacher_training, size=self.size)
        if table:
            return planned
        usual = self._common()["precision"]
        config = planned.config
        config = replace(config, precision=usual if config.precision == "auto" else config.precision)
        return replace(planned, config=config, network=as_trained(config, planned.network))

    def _guided(self, planned: Planned) -> Planned:
        """The same with the network that guides the teacher.

        Raises:
            ValueError: there is none of this name, it does not go with the teacher, or there is no teacher.
        """
        from ipfm.engine.objectives.base import Distillation
        from ipfm.models.config import Guide

        if self.guide is None:
            return planned
        if not isinstance(planned.config, Distillation):
            raise ValueError("the training of a teacher has no guide: leave it out")
        # Neither D nor the factor changes a size; of 1 there would be no guide.
        guide = read_network(self.guide).at(planned.network.D)
        network = replace(planned.network, guide=Guide(guide, 2.0))
        return replace(planned, network=network)

    @property
    def _chosen(self) -> str:
        return self.objective or DEFAULT

    def _training(self) -> TeacherConfig:
        from ipfm.engine.config import TeacherConfig

        return TeacherConfig(**self._common())

    def _distillation(self, network: NetworkConfig) -> Distillation:
        kind = self._chosen
        self._check_objective(kind)
        declared = DECLARED[kind].offered if kind in DECLARED else ()
        config = OBJECTIVES[kind](**self._common(), **self._given((*OF_NETWORKS, *declared)))
        config.check_network(network)
        return config

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _common(self) -> dict[str, Any]:
        on_gpu = self.gpu_memory is not None or self.fits
        usual = "bf16" if on_gpu and self.zero != 0 else "fp32"
        if self._is_table(None):
            usual = "auto"
        names = ("micro_batch", "zero", "offload", "activation_checkpointing", "kimg", "max_steps")
        own = {"batch": 256 if self.batch is None else self.batch, "precision": self.precision or usual}
        return {name: getattr(self, name) for name in names} | own

    def _own(self) -> dict[str, Any]:
        """Settings that were given, and stand instead of a recipe's."""
        every = {name for said in DECLARED.values() for name in said.offered}
        plain = ("batch", "micro_batch", "zero", "precision", "kimg", "max_steps", *OF_NETWORKS)
        # Those with a default of the command's own are what was given, where they differ from that.
        more = {"offload": "none", "activation_checkpointing": "auto"}
        changed = {name: getattr(self, name) for name, usual in more.items() if getattr(self, name) != usual}
        return self._given((*plain, *sorted(every))) | changed


def _facts(layout: Layout) -> dict[str, Any]:
    plan = layout.plan
    more = {"accumulation": layout.accumulation, "relative_cost": layout.relative_cost}
    return plain(plan) | more | {"stage": plan.parts.stage, "state": plan.state, "peak": plan.peak}


def _autoencoder(beside: AutoencoderBytes | None, plan: MemoryPlan) -> dict[str, Any]:
    """For JSON: what --vae adds to a plan, where the images are latents."""
    if beside is None:
        return {}
    return {"autoencoder": plain(beside) | {"peak": beside.peak(plan.state, plan.peak)}}


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
    if path.is_dir() or "/" in model:
        return read_config(locate(path).path).network
    try:
        return presets.get(model)
    except ValueError as error:
        raise ValueError(f"{error}; or a recipe, such as cifar_ipfm") from None
