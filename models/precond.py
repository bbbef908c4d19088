"""Preconditioned networks: a denoiser D(x; σ) around a U-Net (Karras et al. 2022, eq. 7 and table 1)."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ipfm.models.attention import AttentionBackend
from ipfm.models.config import Guide, NetworkConfig, PrecondType
from ipfm.models.dhariwal_unet import DhariwalUNet
from ipfm.models.edm2_layers import MPConv, MPFourier
from ipfm.models.edm2_unet import EDM2UNet
from ipfm.models.facts import GeneratorFacts, TeacherFacts
from ipfm.models.guidance import GuidedUNet
from ipfm.models.layers import Float32Buffers
from ipfm.models.schedules import iddpm_levels
from ipfm.models.song_unet import SongUNet
from ipfm.models.unet import Backbone, Logits

_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Precond(nn.Module, ABC):
    """D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise) with the scalings (`coefficients`) of a subclass.

    PFGM++ networks of any D have this form too: they are conditioned on σ, not on r = σ√D.

    `build_network` chooses the class by the configuration. The attributes img_channels, img_resolution, label_dim,
    sigma_min, sigma_max and D repeat those of `config`. The inner U-Net is `model`.

    `facts` is what the file that the network was read from says of it: what it is for, a generator's noise levels, its
    training. None for any other network. Samplers go by it.

    `compute_dtype` is the dtype of the convolutional path and may be set at any time; None is float64 for a float64
    network, float16 with use_fp16 on CUDA, else float32. The scalings, the mapping network and the result are
    float64 for a float64 network and float32 for every other.

    Args:
        config: a configuration of the class.
        **keywords: its fields, instead: `EDMPrecond(img_resolution=8, img_channels=1)`.

    Raises:
        ValueError: a configuration of another class, or one given together with keywords.
    """

    PRECOND: ClassVar[PrecondType]
    """The class's name in a NetworkConfig."""
    INNER: ClassVar[str] = "model"
    """What state dicts call the inner U-Net."""

    def __init__(self, config: NetworkConfig | None = None, **keywords: Any) -> None:
        super().__init__()
        if config is None:
            config = NetworkConfig(**{"precond": self.PRECOND, **keywords})
        elif not isinstance(config, NetworkConfig):
            raise ValueError(f"a network is built from a NetworkConfig or its keywords, got {type(config).__name__}")
        elif keywords:
            raise ValueError(f"give either a NetworkConfig or keywords, got both (keywords {', '.join(keywords)})")
        if config.precond != self.PRECOND:
            raise ValueError(f"the configuration is one of {config.precond}, it cannot build {self.PRECOND}")
        self.config = config
        self.img_resolution = config.img_resolution
        self.img_channels = config.img_channels
        self.label_dim = config.label_dim
        self.sigma_min = config.sigma_min
        self.sigma_max = config.sigma_max
        self.D = config.D
        self.facts: TeacherFacts | GeneratorFacts | None = None
        self._compute_dtype: torch.dtype | None = None
        setattr(self, self.INNER, self._build_inner(config))

    def _build_inner(self, config: NetworkConfig) -> Backbone:
        if config.is_edm2:
            raise ValueError(f"an EDM2UNet is built into an EDM2Precond, not into {type(self).__name__}")
        return _build_unet(config)

    @property
    def model(self) -> Backbone:
        """The inner U-Net."""
        inner = self._modules[self.INNER]
        assert isinstance(inner, Backbone)
        return inner

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """dtype of the convolutional path; None leaves the choice to the network."""
        return self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype is not None and dtype not in _COMPUTE_DTYPES:
            raise ValueError(f"compute_dtype must be None, {', '.join(str(d) for d in _COMPUTE_DTYPES)}, got {dtype!r}")
        self._compute_dtype = dtype

    @property
    def attention_backend(self) -> AttentionBackend:
        """How the attention layers compute (see `attention`); may be set at any time."""
        return self.model.attention_backend

    @attention_backend.setter
    def attention_backend(self, backend: AttentionBackend) -> None:
        self.model.attention_backend = backend

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the backward pass runs each block once more instead of keeping its activations; may be set any time.

        Not part of the configuration, and not saved.
        """
        return self.model.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.model.activation_checkpointing = on

    @property
    def channels_last(self) -> bool:
        """Whether the activations have the channels of a pixel side by side in memory; may be set at any time.

        Not part of the configuration, and not saved.
        """
        return self.model.channels_last

    @channels_last.setter
    def channels_last(self, on: bool) -> None:
        self.model.channels_last = on

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        raw: bool = False,
        logits: Logits = "none",
    ) -> Tensor | tuple[Tensor, ...]:
        """The denoised x, (B, C, R, R), float32 (float64 for a float64 network).

        Args:
            x: (B, C, R, R), of any dtype. One image may go with B levels.
            sigma: noise levels > 0 in the units of x: a number, or a tensor of one element or of B, of any dtype and
                shape: (), (1,), (B,), (B, 1, 1, 1), …
            class_labels: (B or 1, label_dim), of any dtype, or one row (label_dim,); None is all zeros. An
                unconditional network ignores them.
            augment_labels: (B or 1, augment_dim), likewise; None is "not augmented".
            raw: x is c_in·x already, in `input_dtype`, and the result F in that dtype, for callers that do the scaling
                in passes over the data that they make anyway.
            logits: "too": (the result, the logits (B, H, W) of the encoder, see `ipfm.models.unet.encoder_logits`);
                "alone": the logits, for which no decoder is run.

        Raises:
            ValueError: other shapes, or logits of a guided network.
        """
        if logits != "none" and self.config.guide is not None:
            raise ValueError("a guided network has two encoders: ask one of its two networks for logits")
        wide = self.wide_dtype
        self._check_image(x)
        x = x.to(self.input_dtype if raw else wide)
        sigma = self._sigma_column(sigma, x, wide, one_image=not raw)
        batch = sigma.shape[0] if x.shape[0] == 1 else x.shape[0]
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        asked = {} if logits == "none" else {"logits": logits}
        found = self.model(
            x if raw else (c_in * x).to(self.input_dtype),
            c_noise.flatten(),
            self._class_labels(class_labels, sigma, batch),
            self._augment_labels(augment_labels, sigma, batch),
            **asked,
        )
        if logits == "alone":
            seen: Tensor = found
            return seen
        inner: Tensor = (found[0] if asked else found)[:, : self.img_channels]
        out = inner if raw else torch.addcmul(c_skip * x, c_out, inner.to(wide))
        return (out, found[1]) if asked else out

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in, c_noise), each of the shape and dtype of `sigma`."""

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that the network supports: `sigma` itself, as a tensor."""
        return torch.as_tensor(sigma)

    @property
    def wide_dtype(self) -> torch.dtype:
        """dtype of the scalings, of the mapping network and of the result: float64 for a float64 network."""
        is_double = self.model.first_weight.dtype == torch.float64
        return torch.float64 if is_double else torch.float32

    @property
    def input_dtype(self) -> torch.dtype:
        """dtype in which the U-Net takes its images: `compute_dtype`, or what the network chooses."""
        if self._compute_dtype is not None:
            return self._compute_dtype
        if self.config.use_fp16 and self.model.first_weight.is_cuda and self.wide_dtype != torch.float64:
            return torch.float16
        return self.wide_dtype

    def _check_image(self, x: Tensor) -> None:
        expected = self.config.image_shape
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")

    def _sigma_column(self, sigma: Tensor | float, x: Tensor, dtype: torch.dtype, *, one_image: bool) -> Tensor:
        """The levels (B or 1, 1, 1, 1); with `one_image` an image alone goes with any number of them."""
        if not isinstance(sigma, Tensor):
            if not isinstance(sigma, (Real, torch.SymFloat, torch.SymInt)):
                raise ValueError(f"sigma must be a number or a tensor, got {type(sigma).__name__}")
            if not sigma > 0:
                raise ValueError(f"sigma must be above 0, got {sigma}")
            # Filled on the device: a tensor made from the number would be a copy from the host.
            return torch.full((1, 1, 1, 1), float(sigma), dtype=dtype, device=x.device)
        count, batch = sigma.numel(), x.shape[0]
        if count not in (batch, 1) and not (one_image and batch == 1 and count):
            raise ValueError(f"sigma must have one element or {batch}, one an image, in any shape, got {_shape(sigma)}")
        return sigma.to(device=x.device, dtype=dtype).reshape(-1, 1, 1, 1)

    def _class_labels(self, labels: Tensor | None, sigma: Tensor, batch: int) -> Tensor | None:
        if not self.label_dim:
            return None
        if labels is None:
            return sigma.new_zeros(1, self.label_dim)
        return _label_rows("class_labels", labels, self.label_dim, sigma, batch)

    def _augment_labels(self, labels: Tensor | None, sigma: Tensor, batch: int) -> Tensor | None:
        if labels is None or not self.config.augment_dim:
            return None
        return _label_rows("augment_labels", labels, self.config.augment_dim, sigma, batch)


def _label_rows(name: str, labels: Tensor, width: int, sigma: Tensor, batch: int) -> Tensor:
    """The labels (B or 1, width) on the device and in the dtype of `sigma`."""
    # A line of whole numbers beside several images are the images' classes.
    numbers = labels.ndim < 2 and not labels.is_floating_point() and batch != 1
    rows = math.prod(labels.shape[:-1])
    if numbers or labels.ndim == 0 or labels.shape[-1] != width or rows not in (batch, 1):
        one_hot = "; numbers of classes become rows by one_hot" if numbers and name == "class_labels" else ""
        raise ValueError(f"{name} must have shape ({batch}, {width}), got {_shape(labels)}{one_hot}")
    return labels.to(device=sigma.device, dtype=sigma.dtype).reshape(rows, width)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


class EDMPrecond(Precond):
    """Scalings of Karras et al. (2022), also those of PFGM++ (Xu et al. 2023).

    c_skip = σ_d²/(σ²+σ_d²), c_out = σ·σ_d/√(σ²+σ_d²), c_in = 1/√(σ²+σ_d²), c_noise = ln(σ)/4, with σ_d = sigma_data.

    The attribute `sigma_data` repeats that of `config`; the rest is `Precond`'s.
    """

    PRECOND = "EDMPrecond"

    def __init__(self, config: NetworkConfig | None = None, **keywords: Any) -> None:
        super().__init__(config, **keywords)
        self.sigma_data = self.config.sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        variance = sigma.square() + self.sigma_data**2
        c_in = variance.rsqrt()
        return self.sigma_data**2 / variance, sigma * self.sigma_data * c_in, c_in, sigma.log() / 4


class EDM2Precond(EDMPrecond):
    """EDM's scalings around EDM2's U-Net, `unet`, with the log-variance of the loss (Karras et al. 2024, eq. 22).

    Without logvar_channels there is no log-variance, as in a generator. Names and order of the state dict are those of
    EDM2 checkpoints.
    """

    INNER = "unet"

    def __init__(self, config: NetworkConfig | None = None, **keywords: Any) -> None:
        super().__init__(config, **({"model_type": "EDM2UNet", **keywords} if config is None else keywords))
        channels = self.config.logvar_channels
        self.logvar_fourier = MPFourier(channels) if channels else None
        self.logvar_linear = MPConv(channels, 1, 0) if channels else None

    def _build_inner(self, config: NetworkConfig) -> Backbone:
        if not config.is_edm2:
            raise ValueError(f"an EDM2Precond has an EDM2UNet, the configuration is one of {config.model_type}")
        return _build_edm2_unet(config)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        raw: bool = False,
        logits: Logits = "none",
        return_logvar: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """The denoised x as `Precond.forward`, or with `return_logvar` (it, u(sigma) as `logvar` has it).

        Args:
            x: as there.
            sigma: as there; with `return_logvar` a tensor.
            class_labels: as there.
            augment_labels: not used.
            raw: as there.
            logits: as there; those of "too" come last.
            return_logvar: give the log-variance too, in the same call.

        Raises:
            ValueError: other shapes, or there is no log-variance.
        """
        out = super().forward(x, sigma, class_labels, augment_labels, raw=raw, logits=logits)
        if not return_logvar:
            return out
        u = self.logvar(torch.as_tensor(sigma, device=x.device))
        return (out[0], u, *out[1:]) if isinstance(out, tuple) else (out, u)

    def logvar(self, sigma: Tensor) -> Tensor:
        """The log-variance u(σ) of the loss at these noise levels, of the shape of `sigma`, in `wide_dtype`.

        Args:
            sigma: noise levels > 0, of any dtype and shape.

        Raises:
            ValueError: the network has none.
        """
        if self.logvar_fourier is None or self.logvar_linear is None:
            raise ValueError("this network has no log-variance: its logvar_channels are 0")
        c_noise = self.coefficients(sigma.to(self.wide_dtype).flatten())[3]
        return self.logvar_linear(self.logvar_fourier(c_noise)).reshape(sigma.shape)


def _build_edm2_unet(config: NetworkConfig) -> EDM2UNet:
    return EDM2UNet(
        img_resolution=config.img_resolution,
        in_channels=config.img_channels,
        out_channels=config.out_channels,
        label_dim=config.label_dim,
        model_channels=config.model_channels,
        channel_mult=config.channel_mult,
        channel_mult_noise=config.channel_mult_noise,
        channel_mult_emb=config.channel_mult_emb,
        num_blocks=config.num_blocks,
        attn_resolutions=config.attn_resolutions,
        channels_per_head=config.channels_per_head,
        dropout=config.dropout,
        label_balance=config.label_balance,
        concat_balance=config.concat_balance,
        res_balance=config.res_balance,
        attn_balance=config.attn_balance,
        clip_act=config.clip_act,
        resample_filter=config.resample_filter,
    )


def _build_unet(config: NetworkConfig) -> Backbone:
    unet: Callable[..., Backbone] = DhariwalUNet
    if config.model_type == "SongUNet":
        unet = partial(
            SongUNet,
            embedding_type=config.embedding_type,
            channel_mult_noise=config.channel_mult_noise,
            encoder_type=config.encoder_type,
            decoder_type=config.decoder_type,
            resample_filter=config.resample_filter,
        )
    return unet(
        img_resolution=config.img_resolution,
        in_channels=config.img_channels,
        out_channels=config.out_channels,
        label_dim=config.label_dim,
        augment_dim=config.augment_dim,
        model_channels=config.model_channels,
        channel_mult=config.channel_mult,
        channel_mult_emb=config.channel_mult_emb,
        num_blocks=config.num_blocks,
        attn_resolutions=config.attn_resolutions,
        dropout=config.dropout,
        label_dropout=config.label_dropout,
    )


class VPPrecond(Precond):
    """c_skip = 1, c_out = -σ, c_in = 1/√(σ²+1), c_noise = (M-1)·t(σ).

    t inverts σ(t) = √(exp(beta_d·t²/2 + beta_min·t) - 1): t(σ) = (√(beta_min² + 2·beta_d·ln(1+σ²)) - beta_min)/beta_d.

    sigma_min and sigma_max are σ(epsilon_t) and σ(1), as float32 has them.
    """

    PRECOND = "VPPrecond"

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        beta_d, beta_min = self.config.beta_d, self.config.beta_min
        log = torch.log1p(sigma.square())
        # The difference in the numerator of t(σ), multiplied out: it would cancel at small σ.
        t = 2 * log / ((beta_min**2 + 2 * beta_d * log).sqrt() + beta_min)
        return torch.ones_like(sigma), -sigma, (sigma.square() + 1).rsqrt(), (self.config.M - 1) * t


class VEPrecond(Precond):
    """c_skip = 1, c_out = σ, c_in = 1, c_noise = ln(σ/2)."""

    PRECOND = "VEPrecond"

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(sigma)
        return one, sigma, one, (sigma / 2).log()


class iDDPMPrecond(Precond, Float32Buffers):
    """c_skip = 1, c_out = -σ, c_in = 1/√(σ²+1), c_noise = M-1-j with u_j the level nearest to σ.

    The network knows the M + 1 noise levels of the buffer `u` (M + 1), float32, falling to u_M = 0; see `iddpm_levels`.
    sigma_min and sigma_max are u_{M-1} and u_0. The inner U-Net returns 2·img_channels channels, of which the second
    half, the variances, is not used.
    """

    PRECOND = "iDDPMPrecond"
    u: Tensor

    def __init__(self, config: NetworkConfig | None = None, **keywords: Any) -> None:
        super().__init__(config, **keywords)
        self.register_buffer("u", torch.tensor(self._levels(), dtype=torch.float32))

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c_noise = self.config.M - 1 - self._nearest(sigma).to(sigma.dtype)
        return torch.ones_like(sigma), -sigma, (sigma.square() + 1).rsqrt(), c_noise

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The noise level of `u` nearest to `sigma`, of its shape and dtype (float32 for a number), on its device."""
        given = torch.as_tensor(sigma)
        if not given.is_floating_point():
            given = given.float()
        return self.u.to(given.device)[self._nearest(given)].to(given.dtype)

    def _nearest(self, sigma: Tensor) -> Tensor:
        """The index into `u`, of the shape of `sigma`."""
        return (sigma.unsqueeze(-1) - self.u.to(sigma)).abs().argmin(dim=-1)

    def _levels(self) -> list[float]:
        return iddpm_levels(self.config.M, self.config.C_1, self.config.C_2).tolist()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The levels belong to the options; others in a file would mean that the two do not fit.
        given = state_dict.get(prefix + "u")
        if given is not None and given.shape == self.u.shape:
            expected = torch.tensor(self._levels(), dtype=torch.float32, device="cpu")
            if not torch.allclose(given.detach().float().cpu(), expected, rtol=1e-3):
                args[-1].append(f"{prefix}u holds other noise levels than M, C_1 and C_2 of the configuration make")
        super()._load_from_state_dict(state_dict, prefix, *args)


_CLASSES: dict[str, type[Precond]] = {cls.PRECOND: cls for cls in (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)}


def build_network(config: NetworkConfig) -> Precond:
    """The network that `config` describes, with fresh weights from torch's global generator, in training mode."""
    if config.guide is not None:
        return guided(build_network(config.unguided), build_network(config.guide.network), config.guide.weight)
    return EDM2Precond(config) if config.is_edm2 else _CLASSES[config.precond](config)


def guided(net: Precond, guide: Precond, weight: float) -> Precond:
    """`net`, guided by a weaker network: guide(x; σ) + weight·(net(x; σ) - guide(x; σ)); see `ipfm.models.guidance`.

    It shares the weights of both, which are called with the same labels; a guide that knows no classes is told none.

    Args:
        net: a teacher.
        guide: the weaker one: of the same images, D and preconditioning, and of the same classes or none.
        weight: how far from the guide, finite and >= 0; 1 returns `net`.

    Raises:
        ValueError: the two do not go together, or the weight is out of its range.

    Example:
        >>> import torch
        >>> from ipfm.models import build_network, guided, presets
        >>> net, weak = (build_network(presets.get("digits", D=128)).eval() for _ in range(2))
        >>> x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
        >>> with torch.no_grad():
        ...     expected = weak(x, sigma) + 1.4 * (net(x, sigma) - weak(x, sigma))
        ...     torch.allclose(guided(net, weak, 1.4)(x, sigma), expected, atol=1e-5)
        True
    """
    config = replace(net.config, guide=Guide(guide.config, weight))
    if config.guide is None or config.guide.weight == 1:
        return net
    inner = GuidedUNet(
        net.model,
        guide.model,
        config.guide.weight,
        classes=guide.label_dim > 0,
        augmentation=guide.config.augment_dim > 0,
    )
    return _around(inner.train(net.training), net, config)


def unguided(net: Precond) -> Precond:
    """The network that a guide is added to, which shares its weights; `net` itself where there is no guide."""
    return _around(net.model.strong, net, net.config.unguided) if isinstance(net.model, GuidedUNet) else net


def _around(inner: Backbone, net: Precond, config: NetworkConfig) -> Precond:
    """The preconditioning of `net` around another U-Net."""
    other = copy.copy(net)
    other._modules = {**net._modules, net.INNER: inner}
    other.config = config
    return other
