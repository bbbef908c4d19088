"""The network of a teacher that is trained: the options that name it, and how a preset is fitted to images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ipfm.engine.checks import option_name
from ipfm.engine.data.augmentation import AUGMENT_DIM
from ipfm.engine.noise_levels import check_trainable
from ipfm.models import NetworkConfig, presets
from ipfm.models.config import PrecondType

Arch = Literal["ddpmpp", "ncsnpp", "adm", "edm2"]
ARCHITECTURES = ("ddpmpp", "ncsnpp", "adm", "edm2")
PRECONDS: Mapping[str, PrecondType] = {
    "edm": "EDMPrecond",
    "vp": "VPPrecond",
    "ve": "VEPrecond",
    "iddpm": "iDDPMPrecond",
}
# A value that follows from others.
_FOLLOWS: Any = None
# The range of noise levels, which follows from the preconditioning.
_OF_CLASS: dict[str, Any] = {"sigma_min": None, "sigma_max": None}
# The least value of each option.
_LEAST = {"model_channels": 1, "num_blocks": 0, "channel_mult": 1, "attention": 0, "channels_per_head": 1}


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Options that name a network.

    Raises:
        ValueError: a value out of its range.
    """

    arch: Arch = "ncsnpp"
    """Architecture: DDPM++, NCSN++, ADM or EDM2."""
    preset: str | None = None
    """Network to start from instead of --arch, such as ffhq64-ddpmpp; size, channels and classes are the data's."""
    model_channels: int | None = None
    """Base width of the network. Default: the architecture's, 128 (adm, edm2: 192)."""
    channel_mult: tuple[int, ...] = ()
    """Width of each level by the base width, from the images' size down: 1 2 2 2 has four. Default: the
    architecture's."""
    num_blocks: int | None = None
    """Residual blocks of each resolution. Default: the architecture's, 4 (adm, edm2: 3)."""
    precond: str = "edm"
    """Preconditioning, with its own loss and noise levels: edm, vp or ve. vp and ve are diffusion models (D = inf)
    unless --D is given."""
    attention: tuple[int, ...] = ()
    """Sides of the levels that have attention, such as 16 8; 0 for none. Default: the architecture's, 16 (adm: 32 16
    8; edm2: 16 8)."""
    channels_per_head: int | None = None
    """Of edm2: channels of an attention head; a level narrower than that has no attention. Default: 64."""

    def check_network(self) -> None:
        """Check the values, as far as that goes without images; called when the options are made.

        Raises:
            ValueError: one is out of its range.
        """
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch must be {', '.join(ARCHITECTURES[:-1])} or {ARCHITECTURES[-1]}, got {self.arch!r}")
        for name, least in _LEAST.items():
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and value < least:
                    raise ValueError(f"{option_name(name)} must be at least {least}, got {value}")
        if self.precond == "iddpm":
            check_trainable(NetworkConfig(img_resolution=8, img_channels=1, precond=PRECONDS[self.precond]))
        if self.precond not in ("edm", "vp", "ve"):
            raise ValueError(f"precond must be edm, vp or ve, got {self.precond!r}")
        if 0 in self.attention and len(self.attention) > 1:
            raise ValueError(f"attention 0 means none, got it beside others: {' '.join(map(str, self.attention))}")
        if self.preset is not None:
            presets.get(self.preset)

    @property
    def names_network(self) -> tuple[str, ...]:
        """The options given that say what the network is, other than its architecture."""
        given = [name for name in ("preset", *_LEAST) if getattr(self, name) not in (None, ())]
        return (*given, "precond") if self.precond != "edm" else tuple(given)

    def default_D(self, otherwise: float) -> float:
        """D where none is given: `otherwise` with EDM's preconditioning, inf with VP's and VE's."""
        return otherwise if self.precond == "edm" else math.inf

    def network(
        self, base: NetworkConfig, shape: tuple[int, int, int], *, D: float, classes: int, augmented: bool
    ) -> NetworkConfig:
        """The network that these options name.

        Args:
            base: a preset.
            shape: (C, H, W) of the images.
            D: auxiliary dimensions.
            classes: width of the labels, 0 for none.
            augmented: it is told of augmentations.

        Raises:
            ValueError: it cannot take such images, or the options do not go together; one line.
        """
        side = shape[2]
        mults = self.channel_mult or tuple(base.channel_mult)
        check_side(side, len(mults), self.channel_mult)
        sides = [side >> level for level in range(len(mults))]
        foreign = [value for value in self.attention if value and value not in sides]
        if foreign:
            raise ValueError(
                f"attention {foreign[0]} is no level of this network: it has the sides {', '.join(map(str, sides))}"
            )
        if base.is_edm2 and augmented:
            raise ValueError("an EDM2 network is not told of augmentations, and is trained without: give --augment 0")
        if self.channels_per_head is not None and not base.is_edm2:
            raise ValueError("channels-per-head is for --arch edm2: the others have heads of their own")
        attention = tuple(value for value in self.attention if value) if self.attention else base.attn_resolutions
        return replace(
            fitted(base, shape),
            model_channels=self.model_channels or base.model_channels,
            channel_mult=mults,
            channel_mult_emb=embedding_width(base),
            num_blocks=base.num_blocks if self.num_blocks is None else self.num_blocks,
            attn_resolutions=attention,
            channels_per_head=self.channels_per_head or base.channels_per_head,
            label_dim=classes,
            augment_dim=AUGMENT_DIM if augmented else 0,
            D=D,
            precond=PRECONDS[self.precond],
            **_OF_CLASS,
        )


def embedding_width(base: NetworkConfig) -> Any:
    """channel_mult_emb of a preset with other levels: EDM2's follows from them (None)."""
    return _FOLLOWS if base.is_edm2 else base.channel_mult_emb


def fitted(base: NetworkConfig, shape: tuple[int, int, int]) -> NetworkConfig:
    """A preset for images (C, H, W) = `shape`, unconditional, in the precision that it is trained in here.

    Raises:
        ValueError: its levels do not divide the side.
    """
    return replace(base, img_channels=shape[0], img_resolution=shape[2], label_dim=0, use_fp16=False)


def network_differences(network: NetworkConfig, base: NetworkConfig) -> list[str] | None:
    """What a command line gives so that it names `network` where `base` is the architecture's; None if none can.

    Args:
        network: of a training.
        base: a preset, fitted to the images.
    """
    base = replace(base, precond=network.precond, **_OF_CLASS)
    preconds = {name: option for option, name in PRECONDS.items()}
    named = {
        "precond": (preconds[network.precond],) * (network.precond != "EDMPrecond"),
        "model-channels": (network.model_channels,) * (network.model_channels != base.model_channels),
        "channel-mult": network.channel_mult if network.channel_mult != base.channel_mult else (),
        "num-blocks": (network.num_blocks,) * (network.num_blocks != base.num_blocks),
        "attention": (network.attn_resolutions or (0,)) if network.attn_resolutions != base.attn_resolutions else (),
        "channels-per-head": (network.channels_per_head,) * (network.channels_per_head != base.channels_per_head),
    }
    # Dropout, classes and augmentation are settings of the training.
    levels = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "channels_per_head")
    own = (*levels, "dropout", "label_dim", "augment_dim")
    try:
        base = replace(base, channel_mult_emb=embedding_width(base), channel_mult=network.channel_mult)
        same = replace(base, **{name: getattr(network, name) for name in own}) == network
    except ValueError:
        return None
    if not same:
        return None
    return [word for name, values in named.items() if values for word in (f"--{name}", *map(str, values))]


def check_side(side: int, levels: int, given: tuple[int, ...] = ()) -> None:
    """Check that images of this side can be halved for the levels of a network.

    Args:
        side: of the images, in pixels.
        levels: how many there are.
        given: the channel-mult that the user gave, if any.

    Raises:
        ValueError: they cannot; one line that says which sides are possible and how such images are made.
    """
    step = 2 ** (levels - 1)
    if side % step == 0:
        return
    near = [s for s in (side // step * step, (side // step + 1) * step) if s]
    raise ValueError(
        f"images of side {side} cannot be halved {levels - 1} times for the {levels} levels of "
        f"{'channel-mult ' + ' '.join(map(str, given)) if given else 'this network'}: give another --channel-mult, or "
        f"images whose side is a multiple of {step}, which ipfm dataset --resolution {near[-1]} makes"
    )
