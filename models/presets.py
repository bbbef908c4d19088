"""The networks of the published image models, and a small one for the bundled digits.

`get` gives a preset by name; change fields of one with `dataclasses.replace`. Sources: Karras et al. (2022), appendix
F.1 and table 7, for the CIFAR-10, FFHQ, AFHQv2 and ImageNet networks of EDM; Karras et al. (2024), for those of EDM2,
of latents of 512 pixels a side and of pixels; Xu et al. (2023) for PFGM++, which uses the same ones at finite D; Zhou
et al. (2024, SiD) keep the teacher's.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ipfm.models.config import NetworkConfig

_CIFAR10_DDPMPP = NetworkConfig(
    img_resolution=32, img_channels=3, augment_dim=9, model_channels=128, channel_mult=(2, 2, 2), dropout=0.13
)


def _ncsnpp(ddpmpp: NetworkConfig) -> NetworkConfig:
    """The NCSN++ network of the same widths."""
    return replace(
        ddpmpp,
        embedding_type="fourier",
        encoder_type="residual",
        channel_mult_noise=2,
        resample_filter=(1, 3, 3, 1),
    )


_CIFAR10_NCSNPP = _ncsnpp(_CIFAR10_DDPMPP)
_FFHQ64_DDPMPP = replace(_CIFAR10_DDPMPP, img_resolution=64, channel_mult=(1, 2, 2, 2), dropout=0.05)
_AFHQV2_64_DDPMPP = replace(_FFHQ64_DDPMPP, dropout=0.25)
_IMAGENET64_ADM = NetworkConfig(
    img_resolution=64,
    img_channels=3,
    label_dim=1000,
    use_fp16=True,
    model_type="DhariwalUNet",
    model_channels=192,
    channel_mult=(1, 2, 3, 4),
    dropout=0.10,
)

# Of EDM2: base width, and dropout in training.
_EDM2_SIZES = {
    "xs": (128, 0.0),
    "s": (192, 0.0),
    "m": (256, 0.10),
    "l": (320, 0.10),
    "xl": (384, 0.10),
    "xxl": (448, 0.10),
}
_EDM2_PIXEL_SIZES = ("xs", "s", "m", "l", "xl")


def _edm2(size: str, img_channels: int, label_dim: int) -> NetworkConfig:
    channels, dropout = _EDM2_SIZES[size]
    return NetworkConfig(
        img_resolution=64,
        img_channels=img_channels,
        label_dim=label_dim,
        use_fp16=True,
        model_type="EDM2UNet",
        model_channels=channels,
        dropout=dropout,
    )


TABLE: Mapping[str, NetworkConfig] = MappingProxyType(
    {
        "cifar10-ddpmpp": _CIFAR10_DDPMPP,
        "cifar10-ddpmpp-cond": replace(_CIFAR10_DDPMPP, label_dim=10),
        "cifar10-ncsnpp": _CIFAR10_NCSNPP,
        "cifar10-ncsnpp-cond": replace(_CIFAR10_NCSNPP, label_dim=10),
        "ffhq64-ddpmpp": _FFHQ64_DDPMPP,
        "ffhq64-ncsnpp": _ncsnpp(_FFHQ64_DDPMPP),
        "afhqv2-64-ddpmpp": _AFHQV2_64_DDPMPP,
        "afhqv2-64-ncsnpp": _ncsnpp(_AFHQV2_64_DDPMPP),
        "imagenet64-adm": _IMAGENET64_ADM,
        "imagenet64-adm-uncond": replace(_IMAGENET64_ADM, label_dim=0),
        **{f"edm2-img512-{size}": _edm2(size, 4, 1000) for size in _EDM2_SIZES},
        **{f"edm2-img512-{size}-uncond": _edm2(size, 4, 0) for size in _EDM2_SIZES},
        **{f"edm2-img64-{size}": _edm2(size, 3, 1000) for size in _EDM2_PIXEL_SIZES},
        **{f"edm2-img64-{size}-uncond": _edm2(size, 3, 0) for size in _EDM2_PIXEL_SIZES},
        # 8×8 digits: small enough to train and distil on a CPU in minutes. 24 channels at both levels were slower
        # and reached the same loss.
        "digits": NetworkConfig(
            img_resolution=8,
            img_channels=1,
            model_channels=16,
            channel_mult=(1, 2),
            channel_mult_emb=4,
            num_blocks=1,
            attn_resolutions=(),
            dropout=0.0,
        ),
    }
)

# Short names of the architectures, at the size of their best-known data set.
FAMILIES: Mapping[str, str] = MappingProxyType(
    {"ncsnpp": "cifar10-ncsnpp", "ddpmpp": "cifar10-ddpmpp", "adm": "imagenet64-adm", "edm2": "edm2-img64-s"}
)


def get(name: str, *, D: float = math.inf) -> NetworkConfig:
    """The preset `name`, which may be a short one, for D auxiliary dimensions (inf: diffusion).

    Raises:
        ValueError: there is none of this name; the message lists the names.
    """
    full = FAMILIES.get(name, name)
    if full not in TABLE:
        older = [name for name in names() if not name.startswith("edm2-")]
        sizes = f"edm2-img512-SIZE ({', '.join(_EDM2_SIZES)}) and edm2-img64-SIZE (to xl), each also SIZE-uncond"
        raise ValueError(f"network preset {name!r} is unknown; possible: {', '.join([sizes, *older, *FAMILIES])}")
    return replace(TABLE[full], D=D)


def names() -> tuple[str, ...]:
    """Every preset's name."""
    return tuple(TABLE)
