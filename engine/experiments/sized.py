"""A recipe for one data set whose teachers are published in several sizes: `--size`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ipfm.engine.experiments.distil import DistilPlan, DistilRecipe
from ipfm.engine.experiments.options import DistillationOptions, any_size, check_images
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.runtime.commandline import BadInput, Given
from ipfm.models import NetworkConfig, presets
from ipfm.models.checkpoints.recognise import user_path

# What makes a size beside the architecture's family.
_SHAPE = ("model_channels", "channel_mult", "num_blocks")


@dataclass(frozen=True, kw_only=True)
class SizedDistillationOptions(DistillationOptions):
    """Options of a recipe for teachers of several sizes, beside those of its objective."""

    size: Literal["xs", "s", "m", "l", "xl", "xxl"] | None = None
    """Of EDM2's networks: that of a --dry-run without --teacher, and what --teacher has to be. Default: the teacher's,
    in a dry run without one the smallest."""


@dataclass(frozen=True)
class Size:
    """A size in which a teacher is published."""

    preset: str
    """Its network."""
    teacher: str
    """The name of its published file."""


@dataclass(frozen=True, kw_only=True)
class SizedDistilRecipe(DistilRecipe):
    """Distillation of the teachers of one data set, which have one architecture in several sizes."""

    sizes: Mapping[str, Size]
    """As --size names them, the smallest first."""
    images: str
    """What the networks make, as in "the latents of ImageNet-512 are"."""

    def plan(self, given: Given[DistillationOptions]) -> DistilPlan:
        """See `Recipe.plan`."""
        self.preset_of(getattr(given.options, "size", None))  # before a file is asked for, or read
        teacher = given.options.teacher
        published = teacher is not None and teacher.name in {size.teacher for size in self.sizes.values()}
        if teacher is not None and published and not user_path(teacher).exists():
            raise BadInput(f"{teacher} is not there: download it first", self.help_with_teachers())
        return super().plan(given)

    @property
    def presets(self) -> tuple[str, ...]:
        """See `DistilRecipe.presets`."""
        return tuple(size.preset for size in self.sizes.values())

    def preset_of(self, size: str | None) -> str:
        """See `DistilRecipe.preset_of`."""
        if size is None:
            return self.preset
        if size not in self.sizes:
            raise ValueError(f"size {size}: {self.title} has no such teacher; possible: {', '.join(self.sizes)}")
        return self.sizes[size].preset

    def size_of(self, network: NetworkConfig) -> str | None:
        """The size of a network; None for a network that is published in none."""
        shape = [getattr(network, name) for name in _SHAPE]
        return next(
            (
                name
                for name, size in self.sizes.items()
                if network.is_edm2 and shape == [getattr(presets.get(size.preset), part) for part in _SHAPE]
            ),
            None,
        )

    def check_network(self, network: NetworkConfig, size: str | None = None) -> None:
        """See `DistilRecipe.check_network`: the architecture is EDM2's, and the size the one that was asked for."""
        check_images(network, self.shape, self.images, any_size(self.file))
        if not network.is_edm2:
            raise ValueError(
                f"the teacher is a network of {network.family}, {self.file} is for EDM2's; {any_size(self.file)} and "
                "architecture"
            )
        found = self.size_of(network)
        if size is not None and size != found:
            channels = presets.get(self.preset_of(size)).model_channels
            its = f"of {network.model_channels} channels, which is " + (
                f"size {found}" if found else "none of the sizes"
            )
            raise ValueError(
                f"the teacher is a network {its}, and size {size} ({channels} channels) was given: leave size out, or "
                f"give {self.sizes[size].teacher} as --teacher"
            )

    def settings_for(self, network: NetworkConfig, settings: Mapping[str, Any]) -> DistillationOptions:
        """See `DistilRecipe.settings_for`: without weights by the log-variance where the teacher has none."""
        options = super().settings_for(network, settings)
        if not self._without_logvar(network):
            return options
        plain: dict[str, Any] = {"logvar": False}
        return replace(options, **plain)

    def _without_logvar(self, network: NetworkConfig) -> bool:
        return getattr(self.base, "logvar", False) and not network.logvar_channels

    def notes(self, network: NetworkConfig, config: Distillation) -> tuple[str, ...]:
        """See `DistilRecipe.notes`."""
        lines = super().notes(network, config)
        if self._without_logvar(network):
            lines += (f"{self.title}: without weights by the log-variance, as the teacher's file has none",)
        return lines

    def wanted(self, options: DistillationOptions) -> str:
        """See `DistilRecipe.wanted`: the name of the published file."""
        size = getattr(options, "size", None)
        if size is None:
            return f"give --teacher, such as {next(iter(self.sizes.values())).teacher}"
        return f"give --teacher, for size {size} the file {self.sizes[size].teacher}"

    def run_stem(self, network: NetworkConfig) -> str:
        """See `DistilRecipe.run_stem`: with the size."""
        return f"{super().run_stem(network)}-{self.size_of(network) or f'{network.model_channels}channels'}"

    def names(self, folder: str) -> bool:
        """See `DistilRecipe.names`."""
        stem = self.file.removesuffix(".py").removesuffix("_ipfm")
        return re.match(rf"{re.escape(stem)}-({'|'.join(self.sizes)}|\d+channels)-D", folder) is not None

    def size_options(self, network: NetworkConfig) -> list[str]:
        """See `DistilRecipe.size_options`."""
        size = self.size_of(network)
        return [] if size is None else ["--size", size]

    def help_with_teachers(self) -> str:
        """See `DistilRecipe.help_with_teachers`: with the published file of each size."""
        rows = "\n".join(f"  --size {name:<4} {size.teacher}" for name, size in self.sizes.items())
        C, H, W = self.shape
        return (
            f"Teachers that fit ({C}x{H}x{W}), published by their authors:\n{rows}\n{self.teachers}\n"
            f"Give such a file as it is:           {self.file} --teacher FILE [--D D where the file does not say it]\n"
            f"or make a model folder of it first:  ipfm convert FILE FOLDER [--D D]"
        )
