"""What the programs of EDM, PFGM++ and SiD do with a pickle: stand-ins of our own for their modules and their samplers.

Their modules, in the place where a program of theirs runs, are `torch_utils.persistence`, `dnnlib.util` and one of
networks. Loading makes objects from records without calling a constructor, so that whatever the classes compute
comes from the attributes in the file: a missing one is an error. Nothing is imported from this project.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RECORD = ["type", "version", "module_src", "class_name", "state"]


def reconstruct(meta: dict[str, Any]) -> Any:
    """An object of a record: its module's text is run in a fresh module, which has the class."""
    assert list(meta) == RECORD and (meta["type"], meta["version"]) == ("class", 6)
    fresh = types.ModuleType("fresh")
    exec(meta["module_src"], vars(fresh))
    kind = vars(fresh)[meta["class_name"]]
    thing = kind.__new__(kind)
    thing.__setstate__(meta["state"])
    return thing


class Persistent(nn.Module):
    """Pickled, and so copied, as a record."""

    def __reduce__(self) -> Any:
        source, name = "from their_networks import *", type(self).__name__
        assert self._init_args == () and all(isinstance(key, str) for key in self._init_kwargs)
        values = ("class", 6, source, name, dict(vars(self)))
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (
            dict(zip(RECORD, values, strict=True)),
        )


class Linear(Persistent):
    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.shape == (self.out_features, self.in_features)
        x = x @ self.weight.to(x.dtype).t()
        return x if self.bias is None else x + self.bias.to(x.dtype)


class Conv2d(Persistent):
    def forward(self, x: Tensor) -> Tensor:
        w, f = self.weight, self.resample_filter
        w_pad = 0 if w is None else w.shape[-1] // 2
        f_pad = 0 if f is None else (f.shape[-1] - 1) // 2
        if self.fused_resample and self.down and w is not None:
            x = F.conv2d(x, w.to(x.dtype), padding=w_pad + f_pad)
            x = F.conv2d(x, f.to(x.dtype).repeat(self.out_channels, 1, 1, 1), stride=2, groups=self.out_channels)
        else:
            each = {"stride": 2, "padding": f_pad, "groups": self.in_channels}
            if self.up:
                x = F.conv_transpose2d(x, 4 * f.to(x.dtype).repeat(self.in_channels, 1, 1, 1), **each)
            if self.down:
                x = F.conv2d(x, f.to(x.dtype).repeat(self.in_channels, 1, 1, 1), **each)
            if w is not None:
                x = F.conv2d(x, w.to(x.dtype), padding=w_pad)
        return x if self.bias is None else x + self.bias.to(x.dtype).reshape(1, -1, 1, 1)


class GroupNorm(Persistent):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class UNetBlock(Persistent):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        assert x.shape[1] == self.in_channels and emb.shape[1] == self.emb_channels
        h, p = self.conv0(F.silu(self.norm0(x))), self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = p.chunk(2, 1)
            h = F.silu(shift + self.norm1(h) * (scale + 1))
        else:
            h = F.silu(self.norm1(h + p))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            width = self.out_channels // self.num_heads
            q, k, v = self.qkv(self.norm2(x)).reshape(-1, width, 3, x.shape[2] * x.shape[3]).unbind(2)
            w = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(width)).softmax(2)
            x = (self.proj(torch.einsum("nqk,nck->ncq", w, v).reshape(x.shape)) + x) * self.skip_scale
        return x


class PositionalEmbedding(Persistent):
    def forward(self, t: Tensor) -> Tensor:
        half = self.num_channels // 2
        powers = torch.arange(half, dtype=torch.float32) / (half - (1 if self.endpoint else 0))
        phase = t[:, None] * (1 / self.max_positions) ** powers
        return torch.cat([phase.cos(), phase.sin()], 1)


class FourierEmbedding(Persistent):
    def forward(self, t: Tensor) -> Tensor:
        phase = t[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([phase.cos(), phase.sin()], 1)


class SongUNet(Persistent):
    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Any, augment_labels: Any = None) -> Tensor:
        assert self.label_dropout == 0 or not self.training
        emb = self.map_noise(noise_labels)
        emb = torch.cat(emb.chunk(2, 1)[::-1], 1)
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        skips, aux = [], x
        for name, block in self.enc.items():
            if "aux_down" in name:
                aux = block(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + block(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + block(aux)) / math.sqrt(2)
            else:
                x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
                skips.append(x)
        image, normed = None, x
        for name, block in self.dec.items():
            if "aux_up" in name:
                image = block(image)
            elif "aux_norm" in name:
                normed = block(x)
            elif "aux_conv" in name:
                image = block(F.silu(normed)) + (0 if image is None else image)
            else:
                x = block(x if x.shape[1] == block.in_channels else torch.cat([x, skips.pop()], 1), emb)
        assert image is not None and not skips
        return image


class DhariwalUNet(Persistent):
    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Any, augment_labels: Any = None) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels)
        emb, skips = F.silu(emb), []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for block in self.dec.values():
            x = block(x if x.shape[1] == block.in_channels else torch.cat([x, skips.pop()], 1), emb)
        assert not skips
        return self.out_conv(F.silu(self.out_norm(x)))


class Precond(Persistent):
    def forward(self, x: Tensor, sigma: Tensor, class_labels: Any = None, **more: Any) -> Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        if not self.label_dim:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros(1, self.label_dim)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        assert not self.use_fp16 or not x.is_cuda
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        raw = self.model(c_in * x, c_noise.flatten(), class_labels=class_labels, **more)
        return c_skip * x + c_out * raw[:, : self.img_channels]

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)


class EDMPrecond(Precond):
    def scalings(self, s: Tensor) -> Any:
        d = self.sigma_data
        both = s**2 + d**2
        return d**2 / both, s * d / both.sqrt(), 1 / both.sqrt(), s.log() / 4


class VPPrecond(Precond):
    def scalings(self, s: Tensor) -> Any:
        assert self.sigma_min < self.sigma_max and self.epsilon_t > 0
        t = ((self.beta_min**2 + 2 * self.beta_d * (1 + s**2).log()).sqrt() - self.beta_min) / self.beta_d
        return 1, -s, 1 / (s**2 + 1).sqrt(), (self.M - 1) * t


class VEPrecond(Precond):
    def scalings(self, s: Tensor) -> Any:
        return 1, s, torch.ones_like(s), (s / 2).log()


class iDDPMPrecond(Precond):
    def scalings(self, s: Tensor) -> Any:
        assert self.C_1 and self.C_2
        return 1, -s, 1 / (s**2 + 1).sqrt(), (self.M - 1 - self.index(s)).to(s.dtype)

    def index(self, s: Tensor) -> Tensor:
        return (s.reshape(-1, 1) - self.u).abs().argmin(1).reshape(s.shape)

    def round_sigma(self, sigma: Any) -> Tensor:
        sigma = torch.as_tensor(sigma)
        return self.u[self.index(sigma.to(self.u))].to(sigma)


CLASSES = (
    *(Linear, Conv2d, GroupNorm, UNetBlock, PositionalEmbedding, FourierEmbedding, SongUNet, DhariwalUNet),
    *(EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond),
)


@contextlib.contextmanager
def their_modules() -> Iterator[None]:
    """The modules that can be imported where their programs run; whatever had these names comes back."""
    contents: dict[str, dict[str, Any]] = {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": reconstruct},
        "their_networks": {kind.__name__: kind for kind in CLASSES},
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": dict},
    }
    before = {name: sys.modules.get(name) for name in contents}
    qualnames = reconstruct.__module__, reconstruct.__qualname__
    for name, members in contents.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    try:
        yield
    finally:
        reconstruct.__module__, reconstruct.__qualname__ = qualnames
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def load(path: Path) -> Any:
    """`ema` of a pickle, as the programs take it."""
    with path.open("rb") as file:
        return pickle.load(file)["ema"]


@torch.no_grad()
def heun(net: Any, x: Tensor, steps: int, class_labels: Any = None, sigma_max: float = 80) -> Tensor:
    """Algorithm 1 of Karras et al. (2022) from x at the highest level, in float64, as they call the network."""
    low, high = max(0.002, net.sigma_min), min(sigma_max, net.sigma_max)
    index = torch.arange(steps, dtype=torch.float64)
    t = (high ** (1 / 7) + index / (steps - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    t = torch.cat([net.round_sigma(t), torch.zeros(1, dtype=torch.float64)])
    for now, then in itertools.pairwise(t):
        slope = (x - net(x, now, class_labels).to(torch.float64)) / now
        ahead = x + (then - now) * slope
        if then > 0:
            slope = (slope + (ahead - net(ahead, then, class_labels).to(torch.float64)) / then) / 2
        x = x + (then - now) * slope
    return x


def edm_generate(path: Path, latents: Tensor, steps: int, class_labels: Any = None) -> Tensor:
    """EDM's generate.py, from latents of unit variance."""
    net = load(path)
    assert latents.shape[1:] == (net.img_channels, net.img_resolution, net.img_resolution)
    high = float(net.round_sigma(torch.tensor(min(80, net.sigma_max), dtype=torch.float64)))
    return heun(net, latents.to(torch.float64) * high, steps, class_labels)


def pfgmpp_generate(run: Path, aug_dim: float, x: Tensor, steps: int, class_labels: Any = None) -> dict[int, Tensor]:
    """PFGM++'s generate.py --use_pickle=1, from its own prior at 80, of every checkpoint of a run by its number.

    It checks D of a .pt alone; here it is checked too, with what the class of PFGM++ has besides.
    """
    found = {}
    for path in sorted(run.glob("training-state-*.pkl")):
        net = load(path).eval()
        assert aug_dim == net.D and net.pfgmpp is True and x[0].numel() == net.N
        number = re.fullmatch(r".*(\d{6})\.pkl", path.name)
        assert number is not None
        found[int(number[1])] = heun(net, x.to(torch.float64), steps, class_labels)
    return found


@torch.no_grad()
def sid_generate(path: Path, latents: Tensor, init_sigma: float, class_labels: Any = None) -> Tensor:
    """sid_generate.py: one step from latents of unit variance."""
    net = load(path).eval()
    return net(init_sigma * latents, init_sigma * torch.ones(len(latents), 1, 1, 1), class_labels)
