"""A recipe that distils teachers of any size: shape, classes, D and levels are theirs, and settings by rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ipfm.engine.data.augmentation import SMALLEST_SIZE
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.open_dataset import open_dataset
from ipfm.engine.distributed.device import run_device
from ipfm.engine.evaluation.reference_data import is_npz, open_images
from ipfm.engine.experiments.defaults_by_size import (
    ROWS,
    Facts,
    Row,
    RowName,
    Scale,
    check_scale,
    in_small,
    row_of,
    said,
    settings_in,
)
from ipfm.engine.experiments.distil import DistilRecipe, SettledDistillation
from ipfm.engine.experiments.options import DistillationOptions, options_for, run_name
from ipfm.engine.experiments.origins import Origin, origins
from ipfm.engine.experiments.own_images import as_begun, begun_with, compared, slug, values_of, where_from
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.runtime.commandline import Given
from ipfm.models import NetworkConfig, Precond
from ipfm.models.autoencoder import is_latent
from ipfm.models.checkpoints.recognise import user_path
from ipfm.models.facts import TeacherFacts

# (facts of the teacher, settings that were given) -> what is set otherwise, with where that comes from.
Adaptation = Callable[[Facts, Mapping[str, Any]], Mapping[str, tuple[Any, Origin]]]


def as_in_the_row(facts: Facts, given: Mapping[str, Any]) -> Mapping[str, tuple[Any, Origin]]:
    """A recipe with nothing to set otherwise."""
    return {}


@dataclass(frozen=True, kw_only=True)
class OwnDistillationOptions(DistillationOptions):
    """Options of a recipe that distils teachers of any size, beside those of its objective."""

    data: Path | None = None
    """Images that samples are compared with, and stand beside in comparison.png: a folder, a zip, CIFAR-10's archive,
    an .npz. The training needs none."""
    scale: Scale = "auto"
    """Which settings follow from the teacher: full, those for a GPU; small, a run that a CPU can do; auto: full with a
    GPU, small without."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.scale)

    @property
    def compared_with(self) -> Path | None:
        """See `EvaluationOptions.compared_with`: the data without --reference."""
        return self.data if self.reference is None else self.reference


@dataclass(frozen=True, kw_only=True)
class OwnDistilRecipe(DistilRecipe):
    """Distillation of teachers of any size."""

    rows: Mapping[RowName, DistilRecipe]
    """Rows of the rule whose settings those of recipes are."""
    table: Mapping[RowName, Mapping[str, Any]]
    """The settings of the other rows."""
    edm2: Mapping[Literal["pixels", "latents"], DistilRecipe] = field(default_factory=dict)
    """Whose settings the row of ImageNet has for networks of EDM2, by what they make."""
    adapted: Adaptation = as_in_the_row
    """What is set otherwise for some teachers, where it is not given."""
    left: frozenset[str] = frozenset()
    """Settings that the rule leaves as they are by default."""

    def by(self, settings: type[Distillation], file: str, about: str | None) -> OwnDistilRecipe:
        """The recipe of an objective, or of a weighting, in a file of one's own: of any teacher, by the rule of sizes.

        The rule says what the objective has in common with this recipe's, such as batch, length and learning rate; not
        a setting that the class in the file declares, anew or with another default.

        Args:
            settings: the class of its settings.
            file: ``__file__`` of the recipe.
            about: what --help says first; ``__doc__`` of the file.

        Raises:
            ValueError: the class is no dataclass with a kind of its own, or a setting is called like an option of
                recipes.
        """
        if "__dataclass_fields__" not in vars(settings):
            raise ValueError(f"{settings.__name__} needs @dataclass(frozen=True, kw_only=True) above it")
        if "kind" not in vars(settings):
            raise ValueError(f'{settings.__name__} has no kind of its own: a line kind: ClassVar[str] = "mine"')
        outside = [kind for kind in settings.__mro__ if not kind.__module__.startswith(("ipfm.", "builtins"))]
        declared = {name for kind in outside for name in vars(kind).get("__annotations__", {})}
        # One length, in steps or in images.
        declared |= {"max_steps", "kimg"} if declared & {"max_steps", "kimg"} else set()
        options = {f.name for f in fields(OwnDistillationOptions)} - {f.name for f in fields(Distillation)}
        if taken := sorted(declared & options):
            raise ValueError(f"{settings.__name__}: recipes have an option {taken[0]}: call the setting otherwise")
        plain = settings()
        values = {f.name: getattr(plain, f.name) for f in fields(plain)}
        ours = {f.name for kind in (self.base, *(row.base for row in self.rows.values())) for f in fields(kind)}
        return replace(
            self,
            file=Path(file).name,
            about=about or settings.__doc__ or "",
            base=options_for(settings, OwnDistillationOptions)(**values, features="auto"),
            left=frozenset(declared | (ours - {f.name for f in fields(settings)})),
        )

    def settle(
        self, given: Given[DistillationOptions], network: NetworkConfig, teacher: Precond | None
    ) -> SettledDistillation:
        """See `DistilRecipe.settle`: the settings are those of the teacher's row."""
        options = given.options
        assert isinstance(options, OwnDistillationOptions)
        data, remarks = _open(options, network)
        facts = facts_of(network, data, options.scale)
        row = row_of(facts)
        settings, sources = self.settings_by_rule(row, facts, vars(options), given.names, network)
        noise = levels_of(network, self._recipe(row, facts))
        chosen = given.over(replace(self.base, noise=noise, **settings))
        name = slug(options.teacher, "teacher").removesuffix(f"-D{network.D:g}") + "-small" * facts.small
        stem = self.file.removesuffix(".py")
        path = options.out or run_name(f"{stem}-{name}", chosen.distillation(), network.D)
        others = [
            self.settings_by_rule(other, facts, vars(options), given.names, network)[0] for other in ROWS.values()
        ]
        kept = begun_with(path, chosen, self.base, given.names, others)
        lines = (
            *self._row_in_words(row, facts),
            values_of({n: getattr(chosen, n) for n in ("max_steps", *settings)} | kept),
            *where_from(self._origins(row, facts), settings, sources, given.names | kept.keys()),
            *([f"without --teacher: it is taken to be of the network {self.preset}"] if teacher is None else []),
            *_levels_in_words(chosen.noise),
            *remarks,
            *compared(chosen, "--data or --reference says what samples are compared with"),
            *as_begun(path, kept),
        )
        return SettledDistillation(
            replace(chosen, **kept), path, _dataset(options.data, teacher), said=lines, data=data
        )

    def settings_by_rule(
        self,
        row: Row,
        facts: Facts,
        settings: Mapping[str, Any],
        given: Collection[str],
        network: NetworkConfig,
    ) -> tuple[dict[str, Any], dict[str, Origin]]:
        """The settings of a row for a teacher, and where those come from that are not the row's.

        Args:
            row: the row.
            facts: of the teacher.
            settings: by name, as they are given or by default.
            given: names of those that are given.
            network: the teacher's.
        """
        others = self.adapted(facts, {name: settings.get(name) for name in given})
        now = {**settings, **{name: value for name, (value, _) in others.items()}}
        recipe = self._recipe(row, facts)
        found = dict(self.table[row.name]) if recipe is None else _published(recipe, now, network)
        found = in_small(found, facts.side) if row.name == "small" else found
        found = {name: value for name, value in found.items() if name not in self.left}
        found |= {name: value for name, (value, _) in others.items()}
        sources = {name: origin for name, (_, origin) in others.items()}
        if found.get("logvar") and not network.logvar_channels:
            found["logvar"] = False
            sources |= origins("ours", logvar="off, as the teacher's file has no log-variance")
        if found.get("augment", 0) and (not network.augment_dim or facts.side < SMALLEST_SIZE):
            found["augment"] = 0.0
            sources |= origins("ours", augment="none, as the teacher takes no augmentation labels")
        return found, sources

    def full(self, network: NetworkConfig, settings: Mapping[str, Any]) -> DistillationOptions:
        """The settings of `--scale full` without --data beside those of a run.

        Args:
            network: the teacher's.
            settings: of the run, by name, as JSON has them.
        """
        facts = Facts(network.image_shape, None, network.label_dim, network.family, gpu=True, scale="full")
        row = row_of(facts)
        found, _ = self.settings_by_rule(row, facts, settings, (), network)
        return replace(self.base, noise=levels_of(network, self._recipe(row, facts)), **found)

    def _recipe(self, row: Row, facts: Facts) -> DistilRecipe | None:
        """Whose settings the row has; None where they are its own."""
        if row.name == "imagenet" and facts.family == "EDM2" and self.edm2:
            return self.edm2["latents" if facts.latent else "pixels"]
        return self.rows.get(row.name)

    def _row_in_words(self, row: Row, facts: Facts) -> tuple[str, ...]:
        recipe = self._recipe(row, facts)
        if recipe is None:
            return said(row, facts)
        return said(row, facts, f"those of {recipe.file} ({recipe.title})", recipe.shape[2])

    def _origins(self, row: Row, facts: Facts) -> Mapping[str, Origin]:
        recipe = self._recipe(row, facts)
        return {} if recipe is None else {n: origin for n, origin in recipe.origins.items() if n not in self.left}

    def notes(self, network: NetworkConfig, config: Distillation) -> tuple[str, ...]:
        """See `DistilRecipe.notes`: no figures are published for one's own images."""
        return ()

    def help_with_teachers(self) -> str:
        """See `DistilRecipe.help_with_teachers`: any teacher fits."""
        return self.teachers

    def check_network(self, network: NetworkConfig, size: str | None = None) -> None:
        """See `DistilRecipe.check_network`: any teacher fits."""


def facts_of(network: NetworkConfig, data: ImageDataset | None, scale: Scale) -> Facts:
    """What the rule looks at."""
    images = None if data is None else len(data)
    gpu = run_device().type == "cuda"
    return Facts(network.image_shape, images, network.label_dim, network.family, gpu, scale)


def _published(recipe: DistilRecipe, settings: Mapping[str, Any], network: NetworkConfig) -> dict[str, Any]:
    """The settings of a recipe beside these ones, by name."""
    options = recipe.varied(settings, network)
    return settings_in(options, type(options).settings_class(), recipe.origins)


def levels_of(network: NetworkConfig, recipe: DistilRecipe | None = None) -> NoiseLevels:
    """The noise levels of a recipe, without one EDM's, as far as they are the teacher's."""
    plain = NoiseLevels() if recipe is None else recipe.base.noise
    return replace(
        plain,
        sigma_min=max(plain.sigma_min, network.sigma_min),
        sigma_max=min(plain.sigma_max, network.sigma_max),
        sigma_data=network.sigma_data,
    )


def _levels_in_words(noise: NoiseLevels) -> list[str]:
    plain = NoiseLevels()
    names = [f.name for f in fields(noise) if getattr(noise, f.name) != getattr(plain, f.name)]
    said = ", ".join(f"noise.{name} {getattr(noise, name):g}" for name in names)
    return [f"noise levels of this teacher: {said}"] if said else []


def _of_its_kind(path: str, data: ImageDataset, network: NetworkConfig) -> str:
    """How to have data of a teacher's kind, where those given are of another."""
    C, _, side = network.image_shape
    if not is_latent(network.image_shape):
        if data.latents:
            return "give the pictures that they were made of"
        channels = f" --channels {C}" if data.shape[0] != C and C in (1, 3) else ""
        return f"ipfm dataset {path} NEW.zip --resolution {side}{channels} makes some of its kind"
    if data.latents:
        return f"make latents of {side}x{side} of the pictures, by ipfm dataset PICTURES NEW.zip --latents VAE_FOLDER"
    return f"ipfm dataset {path} NEW.zip --latents VAE_FOLDER makes latents of them; or give --vae VAE_FOLDER"


def _open(options: OwnDistillationOptions, network: NetworkConfig) -> tuple[ImageDataset | None, list[str]]:
    """The data, with the labels that the teacher takes, and what to know of them."""
    if options.data is None:
        return None, []
    skip, strict = options.skip_unreadable, options.strict
    if is_npz(user_path(options.data)):
        data = open_images(options.data, skip_unreadable=skip, strict=strict)
    else:
        data = open_dataset(options.data, labels=network.label_dim > 0, skip_unreadable=skip, strict=strict)
    of_pictures = options.vae is not None and is_latent(network.image_shape) and not data.latents
    if data.shape != network.image_shape and not of_pictures:
        kinds = ["latents" if latent else "images" for latent in (data.latents, is_latent(network.image_shape))]
        raise ValueError(
            f"{options.data} has {kinds[0]} {'x'.join(map(str, data.shape))}, the teacher makes "
            f"{'' if kinds[0] == kinds[1] else f'{kinds[1]} '}{'x'.join(map(str, network.image_shape))}: "
            f"{_of_its_kind(str(options.data), data, network)}"
        )
    remarks = []
    if network.label_dim and data.classes != network.label_dim:
        has = f"have {data.classes} classes" if data.classes else "have no labels"
        remarks.append(
            f"{options.data}: the images {has}, the teacher takes {network.label_dim}: compared without classes"
        )
        data = replace(data, labels=None, classes=None)
    return data, remarks


def _dataset(data: Path | None, teacher: Precond | None) -> str:
    """The name of the teacher's data, as far as it is known."""
    if data is not None:
        return user_path(data).absolute().name
    facts = None if teacher is None else teacher.facts
    return (facts.dataset or "") if isinstance(facts, TeacherFacts) else ""
