"""The typed description of a network: what it takes to build one, checked when it is written down."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, get_args

from ipfm.models.embeddings import check_embedding_width
from ipfm.models.schedules import iddpm_levels, vp_sigma_range
from ipfm.models.unet_layout import (
    DecoderType,
    EmbeddingType,
    EncoderType,
    Layout,
    check_choice,
    dhariwal_unet_layout,
    edm2_unet_layout,
    song_unet_layout,
)

PrecondType = Literal["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"]
ModelType = Literal["SongUNet", "DhariwalUNet", "EDM2UNet"]

# The default of a field that each class has its own of; Any, as every such field holds a value once it is built.
_OF_CLASS: Any = None
# What tells the two families of SongUNet apart.
_FAMILIES = {
    ("positional", "standard", "standard", (1.0, 1.0)): "ddpm++",
    ("fourier", "residual", "standard", (1.0, 3.0, 3.0, 1.0)): "ncsn++",
}


@dataclass(frozen=True)
class Guide:
    """What a network is guided by, see `ipfm.models.guidance`.

    Args:
        network: the weaker one.
        weight: w; 1 would be without.

    Raises:
        ValueError: the weight is no finite number of at least 0.
    """

    network: "NetworkConfig"
    weight: float

    def __post_init__(self) -> None:
        if not isinstance(self.network, NetworkConfig):
            raise ValueError(f"a guide is described by a NetworkConfig, got {type(self.network).__name__}")
        if self.network.guide is not None:
            raise ValueError("a guide cannot be guided itself: give the network without its guide")
        weight = _real("guidance", self.weight)
        _check_range("guidance", weight, 0 <= weight < math.inf, "a finite number of at least 0; 1 is without")
        object.__setattr__(self, "weight", weight)


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that determines a preconditioned network, except its weights.

    Left out or None, these take the default of the class: sigma_min and sigma_max that of `precond`; model_channels,
    channel_mult, channel_mult_emb, num_blocks, attn_resolutions and logvar_channels that of `model_type`. Fields of
    other classes must be left at their defaults. `dataclasses.replace` hands on every value there is: where it
    exchanges a class, or an option that decides the noise levels, give None for what is to follow.

    Values are normalised (sequences to tuples, whole numbers of any integer type to int, real ones to float).

    Args:
        img_resolution: side of the images in pixels.
        img_channels: channels of the images.
        label_dim: width of class labels, 0 for an unconditional network.
        use_fp16: compute in float16 on CUDA unless told otherwise.
        sigma_min: smallest noise level that the network supports, in pixel units of [-1, 1]; it follows from the other
            options of VPPrecond and iDDPMPrecond.
        sigma_max: largest noise level, likewise.
        sigma_data: EDMPrecond: standard deviation of the data, in pixel units of [-1, 1].
        model_type: class of the inner U-Net; the fields from augment_dim to resample_filter and from channels_per_head
            to clip_act are that class's keywords, described in `SongUNet` and `EDM2UNet`.
        D: auxiliary dimensions that the network was trained for (PFGM++), inf for diffusion.
        precond: class of the network (Karras et al. 2022, table 1); the fields after it are its keywords.
        beta_d: VPPrecond.
        beta_min: VPPrecond.
        epsilon_t: VPPrecond: smallest time.
        M: VPPrecond and iDDPMPrecond: time steps.
        C_1: iDDPMPrecond.
        C_2: iDDPMPrecond.
        channels_per_head: EDM2UNet.
        label_balance: EDM2UNet.
        concat_balance: EDM2UNet.
        res_balance: EDM2UNet.
        attn_balance: EDM2UNet.
        clip_act: EDM2UNet; inf clamps nothing.
        logvar_channels: EDM2UNet: width of the embedding of the log-variance, 0 for a network without one.
        guide: the weaker network that this one is guided by; None for a network that is itself.

    Raises:
        ValueError: a value out of its range, in one line that says what was given and what is possible.
    """

    img_resolution: int
    img_channels: int
    label_dim: int = 0
    use_fp16: bool = False
    sigma_min: float = _OF_CLASS
    sigma_max: float = _OF_CLASS
    sigma_data: float = 0.5
    model_type: ModelType = "SongUNet"
    augment_dim: int = 0
    model_channels: int = _OF_CLASS
    channel_mult: Sequence[int] = _OF_CLASS
    channel_mult_emb: int = _OF_CLASS
    num_blocks: int = _OF_CLASS
    attn_resolutions: Sequence[int] = _OF_CLASS
    dropout: float = 0.10
    label_dropout: float = 0.0
    embedding_type: EmbeddingType = "positional"
    channel_mult_noise: int = 1
    encoder_type: EncoderType = "standard"
    decoder_type: DecoderType = "standard"
    resample_filter: Sequence[float] = (1.0, 1.0)
    D: float = math.inf
    precond: PrecondType = "EDMPrecond"
    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5
    M: int = 1000
    C_1: float = 0.001
    C_2: float = 0.008
    channels_per_head: int = 64
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float = 256.0
    logvar_channels: int = _OF_CLASS
    guide: Guide | None = None

    def __post_init__(self) -> None:
        check_choice("precond", self.precond, get_args(PrecondType))
        check_choice("model_type", self.model_type, get_args(ModelType))
        check_choice("embedding_type", self.embedding_type, get_args(EmbeddingType))
        for name, default in {**_DEFAULTS[self.precond], **_DEFAULTS[self.model_type]}.items():
            if getattr(self, name) is None:
                self._normalise(name, default)
        if self.channel_mult_emb is None:
            # The widest level's.
            self._normalise("channel_mult_emb", max(_sequence("channel_mult", self.channel_mult), default=1))
        for name, least in _INTEGERS.items():
            self._normalise(name, _integer(name, getattr(self, name), least))
        for name in _REALS:
            self._normalise(name, _real(name, getattr(self, name)))
        for name in ("channel_mult", "attn_resolutions"):
            values = _sequence(name, getattr(self, name))
            self._normalise(name, tuple(_integer(f"{name}[{i}]", value, 1) for i, value in enumerate(values)))
        taps = _sequence("resample_filter", self.resample_filter)
        self._normalise("resample_filter", tuple(_real(f"resample_filter[{i}]", tap) for i, tap in enumerate(taps)))
        if not isinstance(self.use_fp16, bool):
            raise ValueError(f"use_fp16 must be True or False, got {self.use_fp16!r}")
        self._check_ranges()
        self._check_noise_levels()
        self._check_other_classes()
        if not self.is_edm2:
            endpoint = self.model_type == "SongUNet" and self.embedding_type == "positional"
            check_embedding_width(self.model_channels * self.channel_mult_noise, endpoint=endpoint)
        elif self.precond != "EDMPrecond":
            raise ValueError(f"an EDM2UNet has EDM's preconditioning, EDMPrecond, got precond {self.precond}")
        self.layout()
        if self.guide is not None:
            self._check_guide(self.guide)

    def layout(self) -> Layout:
        """The entries of the inner U-Net."""
        make: Callable[..., Layout] = dhariwal_unet_layout
        if self.model_type == "SongUNet":
            make = partial(
                song_unet_layout,
                out_channels=self.out_channels,
                encoder_type=self.encoder_type,
                decoder_type=self.decoder_type,
                resample_filter=self.resample_filter,
            )
        elif self.is_edm2:
            make = partial(
                edm2_unet_layout,
                channels_per_head=self.channels_per_head,
                resample_filter=self.resample_filter,
            )
        return make(
            img_resolution=self.img_resolution,
            in_channels=self.img_channels,
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            num_blocks=self.num_blocks,
            attn_resolutions=self.attn_resolutions,
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.img_channels, self.img_resolution, self.img_resolution

    @property
    def is_edm2(self) -> bool:
        """Whether the inner U-Net is EDM2's, under forced weight normalisation and perhaps with a log-variance."""
        return self.model_type == "EDM2UNet"

    @property
    def family(self) -> str:
        """The architecture's name in the literature: ddpm++, ncsn++, ADM or EDM2; of a mixture its parts."""
        if self.is_edm2:
            return "EDM2"
        if self.model_type == "DhariwalUNet":
            return "ADM"
        parts = self.embedding_type, self.encoder_type, self.decoder_type
        named = _FAMILIES.get((*parts, tuple(self.resample_filter)))
        return named or f"SongUNet ({', '.join(parts)})"

    @property
    def out_channels(self) -> int:
        """Channels that the inner U-Net returns: twice the image's under iDDPMPrecond, which uses the first half."""
        return self.img_channels * (2 if self.precond == "iDDPMPrecond" else 1)

    def at(self, D: float) -> "NetworkConfig":
        """The same for another D, a guide included."""
        guide = None if self.guide is None else replace(self.guide, network=replace(self.guide.network, D=D))
        return replace(self, D=D, guide=guide)

    @property
    def unguided(self) -> "NetworkConfig":
        """The network itself, without its guide."""
        return self if self.guide is None else replace(self, guide=None)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values: the fields of the network's own classes.

        An infinite number becomes the string "inf", which JSON lacks.

        Raises:
            ValueError: the network is guided: two networks are stored by themselves.
        """
        if self.guide is not None:
            raise ValueError("a guided network is not stored: store the network and its guide by themselves")
        foreign = {
            "guide",
            *self._foreign_fields(),
            *(() if self.precond in _FREE_RANGE else ("sigma_min", "sigma_max")),
        }
        return {field.name: _to_plain(getattr(self, field.name)) for field in fields(self) if field.name not in foreign}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "NetworkConfig":
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: a key that is unknown or missing, by its name, or a value out of its range.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a network configuration must be a JSON object, got {type(data).__name__}")
        known = [field.name for field in fields(cls) if field.name != "guide"]
        for key in data:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in a network configuration; possible: {', '.join(known)}")
        for key in ("img_resolution", "img_channels"):
            if key not in data:
                raise ValueError(f"a network configuration lacks the key {key!r}")
        keywords: dict[str, Any] = {
            key: math.inf if key in _UNBOUNDED and value == "inf" else value for key, value in data.items()
        }
        return cls(**keywords)

    def _normalise(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_guide(self, guide: Guide) -> None:
        other = guide.network
        for name, what in _IN_COMMON.items():
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"the guide must have the network's {what}, {_to_plain(ours)}, got {_to_plain(theirs)}"
                )
        if other.label_dim not in (0, self.label_dim):
            raise ValueError(
                f"the guide must know the network's {self.label_dim} classes or none, got {other.label_dim}"
            )

    def _check_ranges(self) -> None:
        _check_range("D", self.D, self.D > 0, "a number above 0, or inf for diffusion")
        _check_range("sigma_data", self.sigma_data, 0 < self.sigma_data < math.inf, "a finite number above 0")
        for name in ("dropout", "label_dropout"):
            _check_range(name, getattr(self, name), 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("beta_d", "beta_min"):
            _check_range(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a finite number above 0")
        for name in ("epsilon_t", "C_1"):
            _check_range(name, getattr(self, name), 0 < getattr(self, name) < 1, "above 0 and below 1")
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            _check_range(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "at least 0 and at most 1")
        _check_range("clip_act", self.clip_act, self.clip_act > 0, "a number above 0, or inf")
        _check_range("C_2", self.C_2, 0 <= self.C_2 < math.inf, "a finite number of at least 0")
        _check_range("M", self.M, self.M <= _MOST_STEPS, f"at most {_MOST_STEPS}")

    def _check_noise_levels(self) -> None:
        """Fill in the range of noise levels where it follows from other fields, and check it."""
        if self.precond not in _FREE_RANGE:
            for name, value in zip(("sigma_min", "sigma_max"), self._derived_range(), strict=True):
                if getattr(self, name) not in (None, value):
                    raise ValueError(
                        f"{name} of {self.precond} follows from its other options and is {value:g} here, got "
                        f"{getattr(self, name)!r}: leave it out (None)"
                    )
                self._normalise(name, value)
        for name in ("sigma_min", "sigma_max"):
            self._normalise(name, _real(name, getattr(self, name)))
        _check_range("sigma_min", self.sigma_min, 0 <= self.sigma_min < math.inf, "a finite number of at least 0")
        _check_range("sigma_max", self.sigma_max, self.sigma_max > self.sigma_min, f"above sigma_min {self.sigma_min}")

    def _derived_range(self) -> tuple[float, float]:
        if self.precond == "VPPrecond":
            return vp_sigma_range(self.beta_d, self.beta_min, self.epsilon_t)
        u = iddpm_levels(self.M, self.C_1, self.C_2)
        return float(u[-2]), float(u[0])

    def _foreign_fields(self) -> list[str]:
        return [name for name, owners in _OWNERS.items() if not owners & {self.precond, self.model_type}]

    def _check_other_classes(self) -> None:
        defaults = {field.name: field.default for field in fields(self)} | _DEFAULTS[self.model_type]
        for name in self._foreign_fields():
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name} is no option of {self.precond} with {self.model_type}, got {getattr(self, name)!r}: "
                    f"leave it out; it belongs to {' and '.join(sorted(_OWNERS[name]))}"
                )


# What a field takes where it is left out.
_DEFAULTS: dict[str, dict[str, object]] = {
    "EDMPrecond": {"sigma_min": 0.0, "sigma_max": math.inf},
    "VPPrecond": {},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100.0},
    "iDDPMPrecond": {},
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "channel_mult_emb": 4,
        "num_blocks": 4,
        "attn_resolutions": (16,),
        "logvar_channels": 0,
    },
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "channel_mult_emb": 4,
        "num_blocks": 3,
        "attn_resolutions": (32, 16, 8),
        "logvar_channels": 0,
    },
    "EDM2UNet": {
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "num_blocks": 3,
        "attn_resolutions": (16, 8),
        "logvar_channels": 128,
    },
}
# Classes whose range of noise levels is an option.
_FREE_RANGE = ("EDMPrecond", "VEPrecond")
# The classes that a field belongs to; every other field is common to all.
_OWNERS: dict[str, set[str]] = {
    "sigma_data": {"EDMPrecond"},
    "beta_d": {"VPPrecond"},
    "beta_min": {"VPPrecond"},
    "epsilon_t": {"VPPrecond"},
    "M": {"VPPrecond", "iDDPMPrecond"},
    "C_1": {"iDDPMPrecond"},
    "C_2": {"iDDPMPrecond"},
    "augment_dim": {"SongUNet", "DhariwalUNet"},
    "label_dropout": {"SongUNet", "DhariwalUNet"},
    "embedding_type": {"SongUNet"},
    "channel_mult_noise": {"SongUNet", "EDM2UNet"},
    "encoder_type": {"SongUNet"},
    "decoder_type": {"SongUNet"},
    "resample_filter": {"SongUNet", "EDM2UNet"},
    "channels_per_head": {"EDM2UNet"},
    "label_balance": {"EDM2UNet"},
    "concat_balance": {"EDM2UNet"},
    "res_balance": {"EDM2UNet"},
    "attn_balance": {"EDM2UNet"},
    "clip_act": {"EDM2UNet"},
    "logvar_channels": {"EDM2UNet"},
}
# What a network has in common with its guide: images, D, and all that its scalings depend on.
_IN_COMMON = {
    "img_resolution": "pixels a side",
    "img_channels": "channels",
    "D": "D",
    "precond": "preconditioning",
    **{name: name for name in ("sigma_data", "beta_d", "beta_min", "M", "C_1", "C_2")},
}
# Smallest value of each whole number.
_INTEGERS = {
    "img_resolution": 1,
    "img_channels": 1,
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 1,
    "channel_mult_emb": 1,
    "num_blocks": 0,
    "channel_mult_noise": 1,
    "M": 2,
    "channels_per_head": 1,
    "logvar_channels": 0,
}
_MOST_STEPS = 100_000
_REALS = (
    *("sigma_data", "dropout", "label_dropout", "D", "beta_d", "beta_min", "epsilon_t", "C_1", "C_2"),
    *("label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act"),
)
# Numbers that may be infinite.
_UNBOUNDED = ("sigma_max", "D", "clip_act")


def _integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _sequence(name: str, value: object) -> Sequence[object]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a sequence of numbers, got {value!r}")
    return value


def _check_range(name: str, value: float, good: bool, possible: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {possible}, got {value}")


def _to_plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return "inf" if value == math.inf else value
