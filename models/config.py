"""The typed description of a network: what it takes to build one, checked when it is written down."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .embeddings import check_embedding_width
from .layout import DecoderType, EmbeddingType, EncoderType, Layout, check_choice, song_unet_layout

ModelType = Literal["SongUNet"]


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that determines a preconditioned network, except its weights.

    img_resolution, img_channels: side and channels of the images
    label_dim:             width of class labels, 0 for an unconditional network
    use_fp16:              compute in float16 on CUDA unless told otherwise
    sigma_min, sigma_max:  noise levels the network supports
    sigma_data:            standard deviation of the data, in pixel units of [-1, 1]
    model_type:            class of the inner U-Net; the fields after it are that class's keywords
    D:                     auxiliary dimensions that the network was trained for (PFGM++), inf for diffusion

    Values are normalised (sequences to tuples, whole numbers of any integer type to int, real ones to float). Raises
    ValueError, one line that says what was given and what is possible.
    """

    img_resolution: int
    img_channels: int
    label_dim: int = 0
    use_fp16: bool = False
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    sigma_data: float = 0.5
    model_type: ModelType = "SongUNet"
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    dropout: float = 0.10
    label_dropout: float = 0.0
    embedding_type: EmbeddingType = "positional"
    channel_mult_noise: int = 1
    encoder_type: EncoderType = "standard"
    decoder_type: DecoderType = "standard"
    resample_filter: Sequence[float] = (1.0, 1.0)
    D: float = math.inf

    def __post_init__(self) -> None:
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
        check_choice("model_type", self.model_type, get_args(ModelType))
        check_choice("embedding_type", self.embedding_type, get_args(EmbeddingType))
        _check_range("D", self.D, self.D > 0, "a number above 0, or inf for diffusion")
        _check_range("sigma_min", self.sigma_min, 0 <= self.sigma_min < math.inf, "a finite number of at least 0")
        _check_range("sigma_max", self.sigma_max, self.sigma_max > self.sigma_min, f"above sigma_min {self.sigma_min}")
        _check_range("sigma_data", self.sigma_data, 0 < self.sigma_data < math.inf, "a finite number above 0")
        for name in ("dropout", "label_dropout"):
            _check_range(name, getattr(self, name), 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        check_embedding_width(
            self.model_channels * self.channel_mult_noise, endpoint=self.embedding_type == "positional"
        )
        self.layout()

    def layout(self) -> Layout:
        """The entries of the inner U-Net."""
        return song_unet_layout(
            img_resolution=self.img_resolution,
            in_channels=self.img_channels,
            out_channels=self.img_channels,
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            num_blocks=self.num_blocks,
            attn_resolutions=self.attn_resolutions,
            encoder_type=self.encoder_type,
            decoder_type=self.decoder_type,
            resample_filter=self.resample_filter,
        )

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; an infinite number becomes the string "inf", which JSON lacks."""
        return {name: _to_plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "NetworkConfig":
        """The configuration that `to_json` wrote; ValueError naming a key that is unknown or missing."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a network configuration must be a JSON object, got {type(data).__name__}")
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in a network configuration; possible: {', '.join(known)}")
        for key in ("img_resolution", "img_channels"):
            if key not in data:
                raise ValueError(f"a network configuration lacks the key {key!r}")
        keywords: dict[str, Any] = {
            key: math.inf if key in _REALS and value == "inf" else value for key, value in data.items()
        }
        return cls(**keywords)

    def _normalise(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


# Smallest value of each whole number.
_INTEGERS = {
    "img_resolution": 1,
    "img_channels": 1,
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 1,
    "channel_mult_emb": 1,
    "num_blocks": 1,
    "channel_mult_noise": 1,
}
_REALS = ("sigma_min", "sigma_max", "sigma_data", "dropout", "label_dropout", "D")


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
