"""A recipe that trains a teacher on images of any size: its settings follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.device import run_device
from ipfm.engine.experiments.defaults_by_size import (
    EDM2_NOISE,
    ROWS,
    TEACHER_BY_SIZE,
    Facts,
    Row,
    RowName,
    Scale,
    by_size,
    check_scale,
    default_arch,
    in_edm2,
    in_small,
    possible,
    row_of,
    said,
    settings_in,
    teacher_settings,
    with_levels,
)
from ipfm.engine.experiments.network_options import Arch
from ipfm.engine.experiments.origins import origins
from ipfm.engine.experiments.own_images import (
    as_begun,
    begun_with,
    compared,
    has_labels,
    slug,
    values_of,
    where_from,
)
from ipfm.engine.experiments.teacher import Settled, TeacherOptions, TeacherRecipe, times
from ipfm.engine.runtime.commandline import Given
from ipfm.models import NetworkConfig, presets
from ipfm.models.checkpoints.training_state import TrainingState

# Side of the images of a dry run that is told of none.
SIDE = 32
FAMILIES: Mapping[str, Arch] = {"ddpm++": "ddpmpp", "ncsn++": "ncsnpp", "ADM": "adm", "EDM2": "edm2"}
# Settings of EDM's that its recipes set.
FROM_EDM = origins(
    "EDM", "batch", "kimg", "lr", "lr_rampup_kimg", "ema_kimg", "ema_rampup", "dropout", "augment", "beta1", "eps"
)


@dataclass(frozen=True, kw_only=True)
class OwnTeacherOptions(TeacherOptions):
    """Options of a recipe that trains a teacher on images of any size."""

    scale: Scale = "auto"
    """Which settings follow from the images: full, those for a GPU; small, a run that a CPU can do; auto: full with a
    GPU, small without."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.scale)

    @property
    def compared_with(self) -> Path | None:
        """See `EvaluationOptions.compared_with`: where something is to be measured, the data without --reference."""
        wanted = self.eval_every or self.metrics != ("fid",) or self.inception or self.features != "auto"
        return self.data if self.reference is None and wanted and not self._needs_no_reference else self.reference


@dataclass(frozen=True, kw_only=True)
class OwnTeacherRecipe(TeacherRecipe):
    """Training of a teacher on images of any size that a network takes."""

    rows: Mapping[RowName, TeacherOptions]
    """Rows of the rule whose settings are published -> those."""
    published: Mapping[RowName, float] = field(default_factory=dict)
    """Row -> D of the teachers that were published."""

    def settle(self, given: Given[TeacherOptions], data: ImageDataset | None, state: TrainingState | None) -> Settled:
        """See `TeacherRecipe.settle`: the settings are those of the images' row."""
        options = given.options
        facts, arch, base = self._facts(given, data, state)
        row = row_of(facts)
        named = self.settings_of(row, facts.side, facts.family)
        settings, sources = teacher_settings(named, row, facts, length=_length(given, named))
        noise = replace(self.base.noise, **(EDM2_NOISE if base.is_edm2 else {}))
        chosen = given.over(replace(self.base, arch=arch, noise=noise, **settings))
        D = self.published.get(row.name, self.D) if state is None else state.config.D
        settled = Settled(chosen, facts.shape, base, D, _name(options, facts))
        path = settled.place(options.default_D(D) if options.D is None else options.D)
        rows = [self.settings_of(other, facts.side, facts.family) for other in ROWS.values()]
        kept = begun_with(path, chosen, self.base, given.names, rows)
        lines = (
            *said(row, facts),
            values_of({name: getattr(chosen, name) for name in ("max_steps", *settings)} | kept),
            _network_in_words(chosen, base, state),
            *([f"  noise levels of EDM2: p_mean {chosen.noise.p_mean:g}, p_std {chosen.noise.p_std:g}"] * base.is_edm2),
            *where_from(FROM_EDM if row.side else {}, settings, sources, given.names | kept.keys()),
            *([f"without --data: images are taken to be {times(facts.shape)}"] if data is None else []),
            *compared(chosen, "--eval-every N compares samples with the data along the way, --reference with others"),
            *_remarks(chosen, data),
            *as_begun(path, kept),
        )
        return replace(settled, options=replace(chosen, **kept), said=lines)

    def full(self, network: NetworkConfig, images: int | None) -> tuple[NetworkConfig, TeacherOptions]:
        """What `--scale full` is for such images: the network that the options change, and the settings.

        Args:
            network: that was trained on them.
            images: their number; None where it is not known.

        Raises:
            ValueError: the rule has no network for them.
        """
        facts = Facts(network.image_shape, images, network.label_dim, network.family, gpu=True, scale="full")
        row = row_of(facts)
        start = presets.get(self.presets[FAMILIES[network.family]])
        mults = () if possible(facts.side) else network.channel_mult
        settings, _ = teacher_settings(self.settings_of(row, facts.side, facts.family), row, facts)
        return by_size(start, facts, mults), replace(self.base, D=self.published.get(row.name, self.D), **settings)

    def settings_of(self, row: Row, side: int, family: str = "") -> dict[str, Any]:
        """The settings of a row for images of this side, by name, and for an architecture that has its own."""
        published = self.rows.get(row.name)
        if published is not None:
            found = settings_in(published, TeacherConfig, FROM_EDM)
        else:
            own = TEACHER_BY_SIZE[row.name]
            found = in_small(own, side) if row.name == "small" else dict(own)
        return in_edm2(found, row) if family == "EDM2" else found

    def check_state(self, state: TrainingState) -> None:
        """See `TeacherRecipe.check_state`: any can be continued."""

    def _facts(
        self, given: Given[TeacherOptions], data: ImageDataset | None, state: TrainingState | None
    ) -> tuple[Facts, Arch, NetworkConfig]:
        """What the rule looks at, the architecture, and the network that the options change."""
        options = given.options
        assert isinstance(options, OwnTeacherOptions)
        gpu, scale = run_device().type == "cuda", options.scale
        images, classes = (None, 0) if data is None else (len(data), data.classes or 0)
        if state is not None:
            found = state.config
            facts = Facts(found.image_shape, images, found.label_dim, found.family, gpu, scale)
            return facts, FAMILIES.get(found.family, options.arch), found
        side = presets.get(options.preset).img_resolution if options.preset is not None else SIDE
        shape = (3, side, side) if data is None else data.shape
        arch: Arch = options.arch if "arch" in given.names else default_arch(shape[2])
        start = presets.get(options.preset or self.presets[arch])
        facts = Facts(shape, images, classes, start.family, gpu, scale)
        if options.preset is None:
            return facts, arch, by_size(start, facts, options.channel_mult)
        return facts, arch, with_levels(start, facts, options.channel_mult)


def _length(given: Given[TeacherOptions], settings: Mapping[str, Any]) -> float | None:
    """The run's length in thousands of images, where it is given; `settings`: of the row."""
    options = given.options
    if "kimg" in given.names:
        return options.kimg
    if "max_steps" not in given.names or options.max_steps is None:
        return None
    batch = options.batch if "batch" in given.names else settings["batch"]
    return options.max_steps * batch / 1000


def _name(options: TeacherOptions, facts: Facts) -> str:
    """How the run folder's name begins: the data's name and what of the rule tells runs apart."""
    name = slug(options.data, "images")
    size = "" if str(facts.side) in name else f"-{facts.side}"
    return f"{name}{size}{'-cond' * bool(facts.classes)}{'-small' * facts.small}"


def _network_in_words(options: TeacherOptions, base: NetworkConfig, state: TrainingState | None) -> str:
    network = base
    if state is None:
        network = options.network(base, base.image_shape, D=base.D, classes=0, augmented=False)
    sides = [network.img_resolution >> level for level in range(len(network.channel_mult))]
    attention = ", ".join(map(str, network.attn_resolutions)) or "no level"
    mults = " ".join(map(str, network.channel_mult))
    return (
        f"  network {network.family}, {network.model_channels} channels by {mults} at the sides "
        f"{' '.join(map(str, sides))}, num_blocks {network.num_blocks}, attention at {attention}"
    )


def _remarks(options: TeacherOptions, data: ImageDataset | None) -> list[str]:
    lines = []
    if data is not None and data.labels is None and options.data is not None and has_labels(options.data):
        lines.append(f"{options.data} has labels, which are not used: --conditional trains with them")
    if data is not None and len(data) < options.batch:
        lines.append(f"{options.data} has {len(data)} images: a batch of {options.batch} holds some more than once")
    return lines
