"""What a checkpoint of EDM2's family is beside its architecture: its size, encoder, average and published name.

Sizes and names of the published files are those of Karras et al. (2024); Zhou et al. (2025) distilled the same sizes.
Nothing is refused here: a name may say anything, and what contradicts the network is said.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ipfm.models.checkpoints.pickled_objects import Record
from ipfm.models.config import NetworkConfig

Encoder = Literal["latent", "pixel"]
SIZES: Mapping[int, str] = {64: "XXS", 128: "XS", 192: "S", 256: "M", 320: "L", 384: "XL", 448: "XXL"}
"""Names of the sizes by `model_channels`."""
_ENCODERS: Mapping[str, Encoder] = {"StabilityVAEEncoder": "latent", "StandardRGBEncoder": "pixel"}
_POST_HOC = re.compile(r"edm2-(img512|img64)-([a-z]{1,3})(-uncond)?-(\d{7})-(\d\.\d{3})")
_SNAPSHOT = re.compile(r"network-snapshot-(\d{6,8})-(\d\.\d{3})(?!\d)")
_DDO = re.compile(r"edm2-(img512|img64)-([a-z]{1,3})-ddo")
_SID = re.compile(r"edm2_(img512)_([a-z]{1,3})_(sid2a|sida|sid)(?:_alpha[\d.]+)?-(\d{6})")
_SID_SNAPSHOT = re.compile(r"network-snapshot-\d+\.\d{6}-(\d{6,8})")
_METHODS = {"sid": "SiD", "sida": "SiDA", "sid2a": "SiD2A"}


@dataclass(frozen=True)
class Published:
    """What is known of such a network, as far as its file, its place and its shapes say it.

    Attributes:
        size: XXS to XXL; None for any other architecture than theirs.
        encoder: whether its images are latents or pixels.
        encoder_from: what says so: "file" or "channels".
        std: relative width of its power-function average.
        kimg: thousands of training images.
        method: what a generator was distilled by: SiD, SiDA or SiD2A; DDO of the teachers that it improved.
        name: the published file that it is, or may be: `*` stands for what is not known.
        contradiction: what its name says and its network does not, in words; "" for nothing.
    """

    size: str | None
    encoder: Encoder
    encoder_from: Literal["file", "channels"]
    std: float | None = None
    kimg: int | None = None
    method: str | None = None
    name: str | None = None
    contradiction: str = ""

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "size": self.size,
            "encoder": self.encoder,
            "encoder_from": self.encoder_from,
            "ema_std": self.std,
            "kimg": self.kimg,
            "method": self.method,
            "published": self.name,
            "contradiction": self.contradiction or None,
        }


def published(
    config: NetworkConfig,
    entries: Mapping[str, object],
    place: Path,
    *,
    std: float | None = None,
    images: int | None = None,
    generator: bool = False,
) -> Published:
    """What is known of a network of EDM2's family beside its architecture.

    Args:
        config: of the network.
        entries: everything at the top of its file.
        place: the file, for its name.
        std: relative width of the average that it is, where the file says it.
        images: training images, where the file says them.
        generator: it is a generator.
    """
    named = _by_name(place.name)
    encoder, source = _encoder(config, entries)
    size = SIZES.get(config.model_channels) if _has_their_shape(config) else None
    said = Published(size, encoder, source, std or named.std, named.kimg, named.method)
    if images is not None:
        said = replace(said, kimg=images // 1000)
    dataset = _dataset(config, encoder)
    if dataset is None or size is None:
        other = "its name is a published network's, which it is not by its shape" if named.dataset else ""
        return replace(said, contradiction=other)
    name = _name(said, config, dataset, generator)
    return replace(said, name=name, contradiction=_contradiction(named, config, size))


@dataclass(frozen=True)
class _Named:
    """What the name of a file says."""

    dataset: str | None = None
    size: str | None = None
    std: float | None = None
    kimg: int | None = None
    method: str | None = None
    unconditional: bool | None = None


def _by_name(name: str) -> _Named:
    if found := _POST_HOC.match(name):
        dataset, size, unconditional, kimg, std = found.groups()
        return _Named(dataset, size.upper(), float(std), int(kimg), None, bool(unconditional))
    if found := _SNAPSHOT.match(name):
        return _Named(std=float(found[2]), kimg=int(found[1]))
    if found := _DDO.match(name):
        return _Named(found[1], found[2].upper(), method="DDO")
    if found := _SID.match(name):
        return _Named(found[1], found[2].upper(), kimg=int(found[4]), method=_METHODS[found[3]])
    if found := _SID_SNAPSHOT.match(name):
        return _Named(kimg=int(found[1]))
    return _Named()


def _encoder(config: NetworkConfig, entries: Mapping[str, object]) -> tuple[Encoder, Literal["file", "channels"]]:
    record = entries.get("encoder")
    if isinstance(record, Record) and record.class_name in _ENCODERS:
        return _ENCODERS[record.class_name], "file"
    return ("latent" if config.img_channels == 4 else "pixel"), "channels"


def _has_their_shape(config: NetworkConfig) -> bool:
    return tuple(config.channel_mult) == (1, 2, 3, 4) and config.num_blocks == 3 and config.channels_per_head == 64


def _dataset(config: NetworkConfig, encoder: Encoder) -> str | None:
    """The data set of published networks of this shape."""
    if config.img_resolution != 64 or config.label_dim not in (0, 1000):
        return None
    return {("latent", 4): "img512", ("pixel", 3): "img64"}.get((encoder, config.img_channels))


def _name(said: Published, config: NetworkConfig, dataset: str, generator: bool) -> str | None:
    assert said.size is not None
    size, uncond = said.size.lower(), "" if config.label_dim else "-uncond"
    if generator:
        word = {name: word for word, name in _METHODS.items()}.get(said.method or "", "*")
        kimg = "*" if said.kimg is None else f"{said.kimg:06d}"
        return f"edm2_{dataset}_{size}_{word}_alpha1-{kimg}.pkl" if dataset == "img512" and not uncond else None
    if said.method == "DDO":
        return f"edm2-{dataset}-{size}-ddo.pkl"
    kimg = "*" if said.kimg is None else f"{said.kimg:07d}"
    std = "*" if said.std is None else f"{said.std:.3f}"
    return f"edm2-{dataset}-{size}{uncond}-{kimg}-{std}.pkl"


def _contradiction(named: _Named, config: NetworkConfig, size: str) -> str:
    if named.size not in (None, size):
        return f"its name says size {named.size}, its widths are those of {size}"
    if named.unconditional is not None and named.unconditional != (config.label_dim == 0):
        kind = "unconditional" if config.label_dim == 0 else "conditional"
        return f"its name says {'un' * bool(named.unconditional)}conditional, and it is {kind}"
    channels = {"img512": 4, "img64": 3}.get(named.dataset or "", config.img_channels)
    if channels != config.img_channels:
        return f"its name says {named.dataset}, and its images have {config.img_channels} channels"
    return ""
