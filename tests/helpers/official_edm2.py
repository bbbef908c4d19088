"""Writes networks of EDM2, DDO, SiD and SiDA as their training programs pickle them, from the facts of their layout.

The networks are made of names and shapes alone, by nothing of the package's own code.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import official_files as of
import torch
from official_files import Call, EasyDict, Official, Style
from torch import Tensor, nn

HOOK = "_apply_forced_weight_normalization"


@dataclass(frozen=True)
class Edm2:
    """The constructor's arguments of a network; None is left out, as where the default is taken."""

    img_resolution: int = 8
    img_channels: int = 4
    label_dim: int = 0
    model_channels: int = 4
    channel_mult: tuple[int, ...] = (1, 2)
    num_blocks: int = 1
    attn_resolutions: tuple[int, ...] = (4,)
    channels_per_head: int = 4
    dropout: float = 0.0
    use_fp16: bool = True
    channel_mult_noise: int | None = None
    channel_mult_emb: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> list[int]:
        return [self.model_channels * factor for factor in self.channel_mult]

    def keywords(self) -> dict[str, Any]:
        """What the training program gives the constructor, but for what has the default's value."""
        usual = {
            "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [16, 8], "channels_per_head": 64,
            "channel_mult_noise": None, "channel_mult_emb": None,
        }  # fmt: skip
        found = {name: getattr(self, name) for name in ("model_channels", "dropout", *usual, "use_fp16")}
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        found = {name: value for name, value in found.items() if name not in usual or value != usual[name]}
        sizes = {name: getattr(self, name) for name in ("img_resolution", "img_channels", "label_dim")}
        return {**found, **sizes, **self.more}


class _Part:
    """A module to be: class, attributes, tensors and children."""

    def __init__(
        self, kind: str, args: tuple[Any, ...] = (), given: Mapping[str, Any] | None = None, **attributes: Any
    ):
        self.kind, self.args, self.given, self.attributes = kind, args, dict(given or {}), attributes
        self.tensors: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.children: dict[str, _Part] = {}


class _Maker:
    def __init__(self, arch: Edm2, seed: int) -> None:
        self.arch = arch
        self.random = torch.Generator().manual_seed(seed)

    def conv(self, fan_in: int, out: int, kernel: int = 0) -> _Part:
        sides = [kernel, kernel] if kernel else []
        part = _Part("MPConv", (fan_in, out), {"kernel": sides}, out_channels=out)
        rows = torch.exp(0.4 * torch.randn(out, *[1] * (1 + len(sides)), generator=self.random))
        part.tensors["weight"] = rows * torch.randn(out, fan_in, *sides, generator=self.random)
        return part

    def fourier(self, channels: int) -> _Part:
        part = _Part("MPFourier", (channels,))
        part.buffers["freqs"] = 2 * np.pi * torch.randn(channels, generator=self.random)
        part.buffers["phases"] = 2 * np.pi * torch.rand(channels, generator=self.random)
        return part

    def gain(self) -> Tensor:
        return 0.5 + torch.rand((), generator=self.random)

    def block(self, fan_in: int, out: int, emb: int, flavor: str, mode: str = "keep", attention: bool = False) -> _Part:
        arch = self.arch
        heads = out // arch.channels_per_head if attention else 0
        part = _Part(
            "Block", (fan_in, out, emb),
            {"flavor": flavor, "resample_mode": mode, "attention": attention, "dropout": arch.dropout},
            out_channels=out, flavor=flavor, resample_filter=[1, 1], resample_mode=mode, num_heads=heads,
            dropout=arch.dropout, res_balance=0.3, attn_balance=0.3, clip_act=256,
        )  # fmt: skip
        part.tensors["emb_gain"] = self.gain()
        part.children["conv_res0"] = self.conv(out if flavor == "enc" else fan_in, out, 3)
        part.children["emb_linear"] = self.conv(emb, out)
        part.children["conv_res1"] = self.conv(out, out, 3)
        for name, there, shape in (
            ("conv_skip", fan_in != out, (fan_in, out, 1)),
            ("attn_qkv", heads > 0, (out, 3 * out, 1)),
            ("attn_proj", heads > 0, (out, out, 1)),
        ):
            if there:
                part.children[name] = self.conv(*shape)
            else:
                part.attributes[name] = None
        return part

    def unet(self, kind: str) -> _Part:
        arch, widths = self.arch, self.arch.widths
        noise = arch.model_channels * (arch.channel_mult_noise or arch.channel_mult[0])
        emb = arch.model_channels * arch.channel_mult_emb if arch.channel_mult_emb else max(widths)
        given = {k: v for k, v in arch.keywords().items() if k not in ("use_fp16", "sigma_data", "logvar_channels")}
        unet = _Part(kind, (), given, label_balance=0.5, concat_balance=0.5)
        unet.tensors["out_gain"] = self.gain()
        unet.children["emb_fourier"] = self.fourier(noise)
        unet.children["emb_noise"] = self.conv(noise, emb)
        if arch.label_dim:
            unet.children["emb_label"] = self.conv(arch.label_dim, emb)
        else:
            unet.attributes["emb_label"] = None
        enc, dec = _Part("ModuleDict"), _Part("ModuleDict")
        width, skips = arch.img_channels + 1, []
        for level, out in enumerate(widths):
            side = arch.img_resolution >> level
            attends = side in arch.attn_resolutions
            if level == 0:
                enc.children[f"{side}x{side}_conv"] = self.conv(width, out, 3)
                width = out
            else:
                enc.children[f"{side}x{side}_down"] = self.block(width, width, emb, "enc", "down")
            skips.append(width)
            for index in range(arch.num_blocks):
                enc.children[f"{side}x{side}_block{index}"] = self.block(width, out, emb, "enc", attention=attends)
                width = out
                skips.append(width)
        for level, out in reversed(list(enumerate(widths))):
            side = arch.img_resolution >> level
            if level == len(widths) - 1:
                dec.children[f"{side}x{side}_in0"] = self.block(width, width, emb, "dec", attention=True)
                dec.children[f"{side}x{side}_in1"] = self.block(width, width, emb, "dec")
            else:
                dec.children[f"{side}x{side}_up"] = self.block(width, width, emb, "dec", "up")
            for index in range(arch.num_blocks + 1):
                attends = side in arch.attn_resolutions
                dec.children[f"{side}x{side}_block{index}"] = self.block(
                    width + skips.pop(), out, emb, "dec", attention=attends
                )
                width = out
        unet.children |= {"enc": enc, "dec": dec, "out_conv": self.conv(width, arch.img_channels, 3)}
        return unet

    def precond(self, kind: str, logvar: bool, flags: Mapping[str, Any]) -> _Part:
        arch = self.arch
        own = {name: getattr(arch, name) for name in ("img_resolution", "img_channels", "label_dim", "use_fp16")}
        given = arch.keywords() | flags
        sizes = {"sigma_data": 0.5}
        net = _Part(kind, (), given, **own, **sizes, **flags)
        net.children["unet"] = self.unet("UNet_EncoderDecoder" if "EncoderDecoder" in kind else "UNet")
        if logvar:
            net.children["logvar_fourier"] = self.fourier(128)
            net.children["logvar_linear"] = self.conv(128, 1)
        return net


def network(
    arch: Edm2 = Edm2(),
    *,
    kind: str = "Precond",
    logvar: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    style: Style = of.NEW,
    training: bool = False,
    hooks: str = "",
    flags: Mapping[str, Any] | None = None,
    with_keywords: bool = True,
    source: str = of.SOURCE,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Official:
    """A network with random weights as the official object.

    `hooks`: "same" and "copy" give every MPConv the hook of SiDA's networks, whose layer is the layer itself, or a copy
    of it as it was before its own hooks. Attributes of parts are replaced as `changes` says, by path.
    """
    logvar = kind != "EDM_2_Precond_Generator" if logvar is None else logvar
    root = _Maker(arch, seed).precond(kind, logvar, flags or {})

    def convert(part: _Part, path: str) -> Any:
        state = of._bookkeeping(style, training=training)
        state["_parameters"].update({k: nn.Parameter(v.to(dtype), False) for k, v in part.tensors.items()})
        state["_buffers"].update({k: v.to(dtype) for k, v in part.buffers.items()})
        for name, child in part.children.items():
            state["_modules"][name] = convert(child, f"{path}.{name}" if path else name)
        if part.kind == "ModuleDict":
            container = nn.ModuleDict()
            vars(container).clear()
            vars(container).update(state | dict((changes or {}).get(path, {})))
            return container
        given = part.given if with_keywords else None
        state |= part.attributes | {"_init_args": part.args, "_init_kwargs": given}
        state |= dict((changes or {}).get(path, {}))
        layer = Official(part.kind, state, source)
        if hooks and part.kind == "MPConv":
            held = layer
            if hooks == "copy":
                kept = {key: value for key, value in state.items() if key != "_forward_pre_hooks"}
                held = Official("MPConv", kept | {"_forward_pre_hooks": collections.OrderedDict()}, source)
            elif hooks == "twin":
                held = Official("MPConv", state, source)
            state["_forward_pre_hooks"] = collections.OrderedDict({0: Call(getattr, held, HOOK)})
        return layer

    return convert(root, "")


def tensors(net: Official, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict of an official object, by the official names and in their order."""

    def walk(part: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
        state = part.meta["state"] if isinstance(part, Official) else vars(part)
        for kind in ("_parameters", "_buffers"):
            yield from ((prefix + name, t.detach().to(dtype)) for name, t in state[kind].items() if t is not None)
        for name, child in state["_modules"].items():
            yield from walk(child, f"{prefix}{name}.")

    return dict(walk(net, ""))


def state_dict(net: Official, dtype: torch.dtype = torch.float32) -> Any:
    """The state dict of a module: an OrderedDict with the versions of its layers."""
    found: Any = collections.OrderedDict(tensors(net, dtype))
    found._metadata = collections.OrderedDict({"": {"version": 1}, "unet": {"version": 1}})
    return found


def parameters(net: Official) -> list[str]:
    """Names of the parameters, in their order."""
    return [name for name in tensors(net) if not name.endswith(("freqs", "phases"))]


# -- files ------------------------------------------------------------------------------------------------------------


def encoder(latent: bool) -> Official:
    """The encoder of latents, with its two arrays, or of pixels."""
    if not latent:
        return Official("StandardRGBEncoder", {"_init_args": (), "_init_kwargs": {}})
    scale, bias = np.array([0.1, 0.2, 0.3, 0.4], np.float32), np.zeros(4, np.float32)
    own = {"vae_name": "stabilityai/sd-vae-ft-mse", "scale": scale, "bias": bias, "batch_size": 8, "_vae": None}
    return Official("StabilityVAEEncoder", {"_init_args": (), "_init_kwargs": {}, **own})


def snapshot(net: Official, *, latent: bool | None = True) -> Any:
    """A network snapshot, or a post-hoc file: the same layout; `latent` None: no encoder is in it."""
    noise = {"P_mean": -0.4, "P_std": 1.0}
    loss = {**noise, "sigma_data": 0.5, "_init_args": (), "_init_kwargs": noise}
    data = EasyDict(class_name="training.dataset.ImageFolderDataset", path="img512-sd.zip", use_labels=True)
    held = {} if latent is None else {"encoder": encoder(latent)}
    return EasyDict(**held, dataset_kwargs=data, loss_fn=Official("EDM2Loss", loss), ema=net)


def adam(net: Official, *, steps: int = 3, seed: int = 0, lr: Any = None) -> dict[str, Any]:
    """What torch's Adam holds after some steps on random gradients."""
    values = tensors(net)
    own = [nn.Parameter(values[name].clone()) for name in parameters(net)]
    optimizer = torch.optim.Adam(own, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in own:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = np.float64(0.002) if lr is None else lr
    return state


def training_state(net: Official, *, images: int = 2048, stds: tuple[float, ...] = (0.05, 0.1)) -> dict[str, Any]:
    """EDM2's training state; average i is the network with i + 1 hundredths added."""
    averages = []
    for index in range(len(stds)):
        moved = state_dict(net)
        for name, tensor in moved.items():
            if not name.endswith(("freqs", "phases")):
                moved[name] = tensor + 0.01 * (index + 1)
        averages.append(moved)
    return {
        "state": EasyDict(cur_nimg=images, total_elapsed_time=12.5),
        "net": state_dict(net),
        "loss_fn": {"P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5},
        "optimizer": adam(net),
        "ema": {"stds": list(stds), "emas": averages},
    }


def generator(arch: Edm2 = Edm2(), **options: Any) -> dict[str, Any]:
    """SiD's and SiDA's network snapshot."""
    flags = {"force_normalization": True, "use_gan": bool(options.get("hooks"))}
    made = {"flags": flags, "dtype": torch.float32, **options}
    return {"ema": network(replace(arch, use_fp16=True), kind="EDM_2_Precond_Generator", **made)}


def sida_state(arch: Edm2 = Edm2(), *, logvar: bool = True) -> dict[str, Any]:
    """SiDA's training state: three state dicts in fp16, plain, and two optimisers in float32."""
    student = network(arch, kind="EDM_2_Precond_EncoderDecoder" if logvar else "EDM_2_Precond_Generator", seed=1)
    made = network(arch, kind="EDM_2_Precond_Generator", seed=2)
    average = network(arch, kind="EDM_2_Precond_Generator", seed=3)
    half = {
        name: dict(tensors(net, torch.float16))
        for name, net in (("fake_score_state", student), ("G_state", made), ("G_ema_state", average))
    }
    states = {"fake_score_optimizer_state": adam(student), "g_optimizer_state": adam(made, seed=1)}
    for state in states.values():
        state["param_groups"][0].update(lr=5e-5, betas=(0.0, 0.999), eps=1e-6)
    return {**half, **copy.deepcopy(states)}
