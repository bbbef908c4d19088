"""Defaults for images of one's own: one rule, from their size and number, classes, network and whether there is a GPU.

    side       row           whose settings they are
    8 to 28    to-28         this project's
    29 to 47   cifar         CIFAR-10's, 32x32
    48 to 95   ffhq          FFHQ's, 64x64
               afhqv2        AFHQv2's, 64x64: where there are fewer than 20 000 images
               imagenet      ImageNet's, 64x64: where the network is ADM or EDM2 and takes classes
    96 on      from-96       this project's, after FFHQ's
    any        small         this project's, for a CPU: a run that shows how it goes, not what the papers did

Published settings stand in the recipes of those data sets, which hand them over; the others stand here. A teacher of
EDM2's architecture has EDM2's learning rates, Adam and noise levels in place of the row's, and no augmentation. What
else follows (levels of a network, passes over a small set, the growth of the learning rate) is in the functions below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from ipfm.engine.experiments.network_options import Arch, check_side, embedding_width, fitted
from ipfm.engine.experiments.origins import Origin, origins
from ipfm.engine.runtime.wording import counted
from ipfm.models import NetworkConfig
from ipfm.models.autoencoder import is_latent

RowName = Literal["small", "to-28", "cifar", "ffhq", "afhqv2", "imagenet", "from-96"]
Scale = Literal["auto", "full", "small"]

# Images below which a set is small: AFHQv2 has 15 803.
FEW_IMAGES = 20_000
# Passes over the data of EDM's longest training by that count, 200 million images of AFHQv2's 15 803.
MOST_PASSES = 200_000_000 / 15_803
# The learning rate grows over this share of a training: 10 of EDM's 200 million images.
RAMP_SHARE, EDM_RAMP = 0.05, 10_000.0
SMALLEST_SIDE, LARGEST_SIDE = 8, 1024
# The innermost level: halved down to at least this side where that goes, and to at most that one.
INNERMOST, WIDEST_INNERMOST = 7, 32
# The larger of these sides has attention, where no level has one that the architecture names.
ATTENTION = {"ddpm++": 16, "ncsn++": 16, "ADM": 32, "EDM2": 16}
# EDM2's learning rate falls from this share of a training on: 35 000 of 524 288 batches.
EDM2_DECAY_SHARE, EDM2_DECAY = 35_000 / 524_288, 35_000.0
# Its noise levels, of pixels.
EDM2_NOISE: Mapping[str, float] = {"p_mean": -0.8, "p_std": 1.6}


def check_scale(scale: str) -> None:
    """Check the option.

    Raises:
        ValueError: it is none of the possible ones.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be auto, full or small, got {scale!r}")


@dataclass(frozen=True)
class Row:
    """A row of the rule."""

    name: RowName
    when: str
    """Which images, or machine, it is for, in words."""
    whose: str
    """Whose settings a teacher is trained with, in words."""
    side: int | None = None
    """The side for which they are published."""


ROWS: Mapping[RowName, Row] = MappingProxyType(
    {
        row.name: row
        for row in (
            Row("small", "any, without a GPU", "this project's for a machine without a GPU"),
            Row("to-28", "8 to 28", "this project's for images up to 28x28"),
            Row("cifar", "29 to 47", "CIFAR-10's", 32),
            Row("ffhq", "48 to 95", "FFHQ's", 64),
            Row("afhqv2", f"48 to 95, fewer than {FEW_IMAGES:,} images", "AFHQv2's, a small set", 64),
            Row("imagenet", "48 to 95, ADM or EDM2 with classes", "ImageNet's, with classes", 64),
            Row("from-96", "96 to 1024", "this project's for images from 96x96 on, after FFHQ's"),
        )
    }
)


@dataclass(frozen=True)
class Facts:
    """What the rule looks at."""

    shape: tuple[int, int, int]
    """(C, H, W) of an image."""
    images: int | None
    """Their number; None where it is not known."""
    classes: int
    """Width of the labels that the network takes, 0 without."""
    family: str
    """The network's architecture, see `NetworkConfig.family`."""
    gpu: bool
    scale: Scale = "auto"

    @property
    def side(self) -> int:
        """In pixels."""
        return self.shape[2]

    @property
    def latent(self) -> bool:
        """Images are latents of an autoencoder."""
        return is_latent(self.shape)

    @property
    def small(self) -> bool:
        """The run is to be one for a CPU."""
        return self.scale == "small" or (self.scale == "auto" and not self.gpu)

    @property
    def few(self) -> bool:
        """The set is known to be small."""
        return self.images is not None and self.images < FEW_IMAGES

    def __str__(self) -> str:
        known = "" if self.images is None else f", {counted(f'{self.images:,}', 'image')}"
        labels = f", {self.classes} classes" if self.classes else ""
        return f"{'x'.join(map(str, self.shape))}{known}{labels}, {self.family}, {'GPU' if self.gpu else 'no GPU'}"


def row_of(facts: Facts) -> Row:
    """The row whose settings these images take."""
    name: RowName
    if facts.small:
        name = "small"
    elif facts.side <= 28:
        name = "to-28"
    elif facts.side < 48:
        name = "cifar"
    elif facts.side >= 96:
        name = "from-96"
    elif facts.family in ("ADM", "EDM2") and facts.classes:
        name = "imagenet"
    else:
        name = "afhqv2" if facts.few else "ffhq"
    return ROWS[name]


def said(row: Row, facts: Facts, whose: str = "", side: int | None = None) -> tuple[str, ...]:
    """What a run prints of the row that it takes, a line each.

    Args:
        row: the row.
        facts: of the images.
        whose: whose settings they are, in words; the row says it without.
        side: for which these are published; likewise.
    """
    side = side if whose else row.side
    carried = "" if side in (None, facts.side) else f", carried over from {side}x{side}"
    lines = [f"settings by the rule of sizes for {facts}: {whose or row.whose}{carried}"]
    if row.name == "small":
        why = "there is no GPU" if facts.scale == "auto" else "--scale small was given"
        lines.append(
            f"{why}: a small run by which one sees how it goes, how long it takes here says --dry-run; --scale full "
            "takes the settings for a GPU, which are far longer and are not shortened"
        )
    return tuple(lines)


# -- settings that no paper has ----------------------------------------------------------------------------------------

# As recipes/shapes_ipfm.py, 32x32, which two CPU cores train in some ten minutes.
TEACHER_BY_SIZE: Mapping[RowName, Mapping[str, Any]] = MappingProxyType(
    {
        "small": {
            "batch": 32, "kimg": 80.0, "lr": 2e-3, "ema_kimg": 10.0, "dropout": 0.0, "augment": 0.0,
            "checkpoint_every": 500, "eval_images": 1000,
        },
        "to-28": {"batch": 256, "kimg": 20_000.0, "lr": 1e-3, "dropout": 0.1, "augment": 0.0, "log_every": 50},
        # EDM's, which no recipe of this project has.
        "imagenet": {
            "batch": 4096, "kimg": 2_500_000.0, "lr": 1e-4, "ema_kimg": 50_000.0, "dropout": 0.1, "augment": 0.0,
            "heun_steps": 40, "log_every": 50,
        },
        "from-96": {
            "batch": 256, "kimg": 200_000.0, "lr": 1e-4, "dropout": 0.1, "augment": 0.15, "heun_steps": 40,
            "log_every": 50,
        },
    }
)  # fmt: skip
STUDENT_BY_SIZE: Mapping[RowName, Mapping[str, Any]] = MappingProxyType(
    {
        "small": {
            "batch": 64, "kimg": 19.2, "lr": 3e-4, "ema_kimg": 10.0, "ema_rampup": 0.2, "alpha": 1.0,
            "eval_every": 50, "checkpoint_every": 100, "eval_images": 1000, "heun_steps": 9,
        },
        "to-28": {"batch": 256, "kimg": 5_000.0, "lr": 1e-4, "alpha": 1.0, "ema_kimg": 100.0, "log_every": 50},
    }
)  # fmt: skip
TRAJECTORY_BY_SIZE: Mapping[RowName, Mapping[str, Any]] = MappingProxyType(
    {
        "small": {
            "batch": 64, "kimg": 38.4, "lr": 1e-3, "points": 35, "ema_kimg": 5.0, "ema_rampup": 0.2,
            "eval_every": 100, "checkpoint_every": 200, "eval_images": 1000, "heun_steps": 9,
        },
        "to-28": {
            "batch": 512, "kimg": 40_000.0, "lr": 2e-4, "ema_kimg": 500.0, "log_every": 50,
        },
    }
)  # fmt: skip


def settings_in(options: Any, kind: type, named: Collection[str]) -> dict[str, Any]:
    """The settings of a row, by name: numbers and words that differ from their defaults, or have a named origin.

    Args:
        options: whose class has at least the fields of `kind`.
        kind: a class of settings.
        named: settings whose origin is named.
    """
    plain = kind()
    found = {f.name: getattr(options, f.name) for f in dataclasses.fields(kind)}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, (bool, int, float, str)) and (name in named or value != getattr(plain, name))
    }


# Of EDM2, arXiv 2312.02696, size S on ImageNet-64.
EDM2: Mapping[str, Any] = {
    "lr": 0.01, "beta1": 0.9, "beta2": 0.99, "lr_rampup_kimg": EDM_RAMP, "lr_decay_batches": EDM2_DECAY,
    "dropout": 0.0, "augment": 0.0,
}  # fmt: skip
_EDM2_LENGTH: Mapping[str, Any] = {"batch": 2048, "kimg": 1_073_741.824, "heun_steps": 32}


def in_edm2(settings: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """The settings of a row for a teacher of EDM2's architecture; of the ImageNet row those of EDM2 itself.

    Args:
        settings: of the row.
        row: the row.
    """
    return {**settings, **EDM2, **(_EDM2_LENGTH if row.name == "imagenet" else {})}


def in_small(settings: Mapping[str, Any], side: int) -> dict[str, Any]:
    """The settings of a small run for images of this side: of large ones fewer at a time, in as many steps.

    Args:
        settings: of the row, for images up to 64x64.
        side: of the images.
    """
    share = min(1.0, (64 / side) ** 2)
    batch = max(4, round(settings["batch"] * share))
    kimg = float(f"{settings['kimg'] * batch / settings['batch']:.3g}")
    return {**settings, "batch": batch, "kimg": kimg, "eval_images": max(100, round(settings["eval_images"] * share))}


def teacher_settings(
    settings: Mapping[str, Any], row: Row, facts: Facts, *, length: float | None = None
) -> tuple[dict[str, Any], dict[str, Origin]]:
    """The settings of a teacher's training by the rule, and where those come from that are not the row's.

    Args:
        settings: of the row.
        row: the row.
        facts: of the images.
        length: of the run in thousands of images, where it was given.
    """
    found = dict(settings)
    sources: dict[str, Origin] = {}
    if facts.few and row.side == 32:
        found["dropout"] = 0.25
        sources |= origins("EDM", dropout=f"AFHQv2's, as there are fewer than {FEW_IMAGES:,} images")
    if facts.images is not None and row.name != "small" and found["kimg"] * 1000 > MOST_PASSES * facts.images:
        found["kimg"] = float(f"{MOST_PASSES * facts.images / 1000:.3g}")
        sources |= origins("ours", kimg=f"{MOST_PASSES:,.0f} passes over the images, as EDM's of AFHQv2")
    if facts.latent and found.get("augment", 0) > 0:
        found["augment"] = 0.0
        sources |= origins("ours", augment="none, as the images are latents")
    length = found["kimg"] if length is None else length
    if length * RAMP_SHARE < found.get("lr_rampup_kimg", EDM_RAMP):
        found["lr_rampup_kimg"] = float(f"{length * RAMP_SHARE:.3g}")
        sources |= origins("ours", lr_rampup_kimg=f"{RAMP_SHARE:.0%} of the length, as EDM's of 200 000 kimg")
    if "lr_decay_batches" in found:
        edm2 = [name for name in EDM2 if name not in sources]
        sources |= origins("EDM2", *edm2)
        batches = float(f"{length * 1000 / found['batch'] * EDM2_DECAY_SHARE:.3g}")
        if batches < found["lr_decay_batches"]:
            found["lr_decay_batches"] = batches
            share = f"{EDM2_DECAY_SHARE:.1%} of the length, as EDM2's of ImageNet"
            sources |= origins("ours", lr_decay_batches=share)
    return found, sources


# -- the network of a teacher ------------------------------------------------------------------------------------------


def default_arch(side: int) -> Arch:
    """The architecture for images of this side: that of PFGM++'s published teachers, NCSN++ at 32x32, else DDPM++."""
    return "ncsnpp" if 28 < side < 48 else "ddpmpp"


def levels(side: int) -> int:
    """How many levels a network for images of this side has: halved as long as INNERMOST allows, at least once.

    Raises:
        ValueError: no network by this rule takes such images; one line that says which sides are possible.
    """
    if possible(side):
        count = 1
        while side % 2 == 0 and (side // 2 >= INNERMOST or count == 1):
            side, count = side // 2, count + 1
        return count
    near = [
        next((s for s in range(side, stop, step) if possible(s)), None)
        for step, stop in ((-1, SMALLEST_SIDE - 1), (1, LARGEST_SIDE + 1))
    ]
    sides = [str(s) for s in near if s is not None] or [str(SMALLEST_SIDE if side < SMALLEST_SIDE else LARGEST_SIDE)]
    raise ValueError(
        f"no network by the rule of sizes takes images of side {side}: possible are {SMALLEST_SIDE} to {LARGEST_SIDE} "
        f"pixels that can be halved to at most {WIDEST_INNERMOST}, here {' or '.join(sides)}, which "
        f"ipfm dataset DATA NEW.zip --resolution {sides[0]} makes; or give your own --channel-mult"
    )


def possible(side: int) -> bool:
    """Whether the rule has a network for images of this side."""
    if not SMALLEST_SIDE <= side <= LARGEST_SIDE or side % 2:
        return False
    while side % 2 == 0:
        side //= 2
        if side <= WIDEST_INNERMOST:
            return True
    return False


def by_size(base: NetworkConfig, facts: Facts, mults: Sequence[int] = ()) -> NetworkConfig:
    """The network of an architecture for images of this size: its levels, widths, blocks and attention.

    Published ones are as published: CIFAR-10's at 32x32, FFHQ's and ImageNet's at 64x64.

    Args:
        base: a preset of the architecture.
        facts: of the images.
        mults: widths of the levels, where they were given.

    Raises:
        ValueError: see `levels`, or the levels given do not go with the size.
    """
    side = facts.side
    count = len(mults) if mults else levels(side)
    check_side(side, count, tuple(mults))
    if not mults and base.family in ("ADM", "EDM2"):
        mults = (1, 2, 3, *[4] * count)[:count]
    elif not mults:
        wide = 28 < side < 48 and not facts.small
        mults = (2,) * count if wide else (1, *[2] * count)[:count]
    width, blocks = base.model_channels, base.num_blocks
    if facts.small:
        width, blocks = 16, 1
    elif side <= 28:
        width, blocks = 64, 2
    return dataclasses.replace(with_levels(base, facts, mults), model_channels=width, num_blocks=blocks)


def with_levels(base: NetworkConfig, facts: Facts, mults: Sequence[int] = ()) -> NetworkConfig:
    """A preset for these images, with attention at a level that it has, where it has none of its own there.

    Args:
        base: the preset.
        facts: of the images.
        mults: widths of its levels; the preset's without.

    Raises:
        ValueError: the size cannot be halved so often.
    """
    mults = tuple(mults or base.channel_mult)
    check_side(facts.side, len(mults))
    sides = [facts.side >> level for level in range(len(mults))]
    attention: Sequence[int] = base.attn_resolutions
    if attention and not set(attention) & set(sides):
        attention = [side for side in sides if side <= ATTENTION.get(base.family, 16)][:1]
    sized = dataclasses.replace(
        base,
        img_resolution=facts.side,
        channel_mult=mults,
        channel_mult_emb=embedding_width(base),
        attn_resolutions=attention,
    )
    return fitted(sized, facts.shape)
