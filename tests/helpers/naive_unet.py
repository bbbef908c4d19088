"""The networks of the EDM family written out from their description, in float64, from a state dict alone.

Shares no code with ipfm.models: entries are found by their names in the state dict, layers by the tensors they have,
and every operation is spelled in sums and loops. What the description leaves to the constructor is an argument.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Song:
    """Constructor arguments of a SongUNet that its tensors do not show."""

    noise_channels: int
    taps: Sequence[float] = (1, 1)
    fourier: bool = False


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def part(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, in float64, by the rest of their names."""
    return {
        name.removeprefix(f"{prefix}."): value.double()
        for name, value in state.items()
        if name.startswith(f"{prefix}.")
    }


def linear(p: State, x: Tensor) -> Tensor:
    y = (x[:, None, :] * p["weight"][None]).sum(2)
    return y + p["bias"] if "bias" in p else y


def norm(p: State, x: Tensor, eps: float) -> Tensor:
    channels = x.shape[1]
    groups = min(32, channels // 4)
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(2, keepdim=True)
    deviation = ((grouped - mean) ** 2).mean(2, keepdim=True).add(eps).sqrt()
    y = ((grouped - mean) / deviation).reshape(x.shape)
    return y * p["weight"].reshape(1, -1, 1, 1) + p["bias"].reshape(1, -1, 1, 1)


def padded(x: Tensor, by: int) -> Tensor:
    rows = x.new_zeros(*x.shape[:2], by, x.shape[3])
    x = torch.cat([rows, x, rows], 2)
    columns = x.new_zeros(*x.shape[:3], by)
    return torch.cat([columns, x, columns], 3)


def convolved(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    x, k = padded(x, padding), weight.shape[-1]
    height, width = x.shape[2] - k + 1, x.shape[3] - k + 1
    y = 0.0
    for a in range(k):
        for b in range(k):
            window = x[:, :, a : a + height, b : b + width].movedim(1, -1)
            y = y + (window @ weight[:, :, a, b].T).movedim(-1, 1)
    return y


def halved(x: Tensor, taps: Sequence[float], padding: int) -> Tensor:
    """out[i, j] = Σ_ab f_a·f_b/(Σf)² · x[2i + a - padding, 2j + b - padding]."""
    x, total = padded(x, padding), sum(taps) ** 2
    side = (x.shape[2] - len(taps)) // 2 + 1
    y = 0.0
    for a, fa in enumerate(taps):
        for b, fb in enumerate(taps):
            y = y + fa * fb / total * x[:, :, a : a + 2 * side - 1 : 2, b : b + 2 * side - 1 : 2]
    return y


def doubled(x: Tensor, taps: Sequence[float], padding: int) -> Tensor:
    """Pixel (i, j) adds 4·f_a·f_b/(Σf)² of itself to (2i + a, 2j + b); `padding` is then cut off every side."""
    total, side = sum(taps) ** 2, 2 * (x.shape[2] - 1) + len(taps)
    spread = 0.0
    for a, fa in enumerate(taps):
        for b, fb in enumerate(taps):
            up = x.new_zeros(*x.shape[:2], side, side)
            up[:, :, a : a + 2 * x.shape[2] - 1 : 2, b : b + 2 * x.shape[3] - 1 : 2] = x
            spread = spread + 4 * fa * fb / total * up
    return spread[:, :, padding : side - padding, padding : side - padding]


def conv(p: State, x: Tensor, *, way: str = "", taps: Sequence[float] = (1, 1), fused: bool = False) -> Tensor:
    """A convolution layer; `way` is "up", "down" or empty. Without a weight it only resamples."""
    weight = p.get("weight")
    pad = 0 if weight is None else weight.shape[-1] // 2
    filter_pad = (len(taps) - 1) // 2
    if fused:
        assert way == "down" and weight is not None
        y = halved(convolved(x, weight, pad + filter_pad), taps, 0)
    else:
        y = halved(x, taps, filter_pad) if way == "down" else doubled(x, taps, filter_pad) if way == "up" else x
        if weight is not None:
            y = convolved(y, weight, pad)
    return y + p["bias"].reshape(1, -1, 1, 1) if "bias" in p else y


def attended(p: State, x: Tensor, heads: int, eps: float) -> Tensor:
    n, c, height, width = x.shape
    y = conv(part(p, "qkv"), norm(part(p, "norm2"), x, eps)).reshape(n, heads, c // heads, 3, height * width)
    out = []
    for h in range(heads):
        q, k, v = y[:, h, :, 0], y[:, h, :, 1], y[:, h, :, 2]
        logits = torch.einsum("nci,ncj->nij", q, k / math.sqrt(c // heads))
        powers = torch.exp(logits - logits.amax(2, keepdim=True).detach())
        weights = powers / powers.sum(2, keepdim=True)
        out.append(torch.einsum("nij,ncj->nci", weights, v))
    return conv(part(p, "proj"), torch.cat(out, 1).reshape(n, c, height, width))


def block(p: State, x: Tensor, emb: Tensor, *, way: str, song: bool, taps: Sequence[float]) -> Tensor:
    """A residual block; `song` chooses between the two networks' variants."""
    eps, scale = (1e-6, math.sqrt(0.5)) if song else (1e-5, 1.0)
    h = conv(part(p, "conv0"), silu(norm(part(p, "norm0"), x, eps)), way=way, taps=taps)
    shift = linear(part(p, "affine"), emb)[:, :, None, None]
    if song:
        h = silu(norm(part(p, "norm1"), h + shift, eps))
    else:
        half = shift.shape[1] // 2
        h = silu(shift[:, half:] + norm(part(p, "norm1"), h, eps) * (shift[:, :half] + 1))
    h = conv(part(p, "conv1"), h)
    skip = part(p, "skip")
    x = (h + (conv(skip, x, way=way, taps=taps) if skip else x)) * scale
    if "qkv.weight" in p:
        x = (attended(p, x, 1 if song else x.shape[1] // 64, eps) + x) * scale
    return x


def entries(state: State, group: str) -> list[str]:
    """Names of the encoder's or decoder's entries in the order of the state dict."""
    return list(dict.fromkeys(name.split(".")[1] for name in state if name.startswith(f"{group}.")))


def way_of(name: str) -> str:
    return found.group(1) if (found := re.search(r"_(up|down)$", name)) else ""


def encoded(state: State, x: Tensor, emb: Tensor, *, song: bool, taps: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    skips: list[Tensor] = []
    aux = x
    for name in entries(state, "enc"):
        p = part(state, f"enc.{name}")
        if name.endswith("aux_down"):
            aux = conv(p, aux, way="down", taps=taps)
        elif name.endswith("aux_skip"):
            skips[-1] = x = x + conv(p, aux)
        elif name.endswith("aux_residual"):
            skips[-1] = x = aux = (x + conv(p, aux, way="down", taps=taps, fused=True)) / math.sqrt(2)
        else:
            x = conv(p, x) if name.endswith("conv") else block(p, x, emb, way=way_of(name), song=song, taps=taps)
            skips.append(x)
    return x, skips


def song_unet(
    state: State,
    config: Song,
    x: Tensor,
    noise_labels: Tensor,
    class_labels: Tensor | None = None,
    augment_labels: Tensor | None = None,
) -> Tensor:
    """F of a SongUNet with this state dict; all inputs float64."""
    half = config.noise_channels // 2
    if config.fourier:
        frequencies = (2 * math.pi * state["map_noise.freqs"].float()).double()
    else:
        frequencies = torch.tensor([1e-4 ** (i / (half - 1)) for i in range(half)], dtype=torch.float64)
    angles = noise_labels[:, None] * frequencies[None]
    emb = torch.cat([angles.sin(), angles.cos()], 1)
    if class_labels is not None:
        emb = emb + linear(part(state, "map_label"), class_labels * math.sqrt(class_labels.shape[1]))
    if augment_labels is not None:
        emb = emb + linear(part(state, "map_augment"), augment_labels)
    emb = silu(linear(part(state, "map_layer0"), emb))
    emb = silu(linear(part(state, "map_layer1"), emb))
    x, skips = encoded(state, x, emb, song=True, taps=config.taps)
    image: Tensor | None = None
    normed = x
    for name in entries(state, "dec"):
        p = part(state, f"dec.{name}")
        if name.endswith("aux_up"):
            assert image is not None
            image = conv(p, image, way="up", taps=config.taps)
        elif name.endswith("aux_norm"):
            normed = norm(p, x, 1e-6)
        elif name.endswith("aux_conv"):
            drawn = conv(p, silu(normed))
            image = drawn if image is None else image + drawn
        else:
            if p["norm0.weight"].shape[0] != x.shape[1]:
                x = torch.cat([x, skips.pop()], 1)
            x = block(p, x, emb, way=way_of(name), song=True, taps=config.taps)
    assert image is not None and not skips
    return image


def dhariwal_unet(
    state: State,
    x: Tensor,
    noise_labels: Tensor,
    class_labels: Tensor | None = None,
    augment_labels: Tensor | None = None,
) -> Tensor:
    """F of a DhariwalUNet with this state dict; all inputs float64."""
    half = state["map_layer0.weight"].shape[1] // 2
    frequencies = torch.tensor([1e-4 ** (i / half) for i in range(half)], dtype=torch.float64)
    angles = noise_labels[:, None] * frequencies[None]
    emb = torch.cat([angles.cos(), angles.sin()], 1)
    if augment_labels is not None:
        emb = emb + linear(part(state, "map_augment"), augment_labels)
    emb = linear(part(state, "map_layer1"), silu(linear(part(state, "map_layer0"), emb)))
    if class_labels is not None:
        emb = emb + linear(part(state, "map_label"), class_labels)
    emb = silu(emb)
    x, skips = encoded(state, x, emb, song=False, taps=(1, 1))
    for name in entries(state, "dec"):
        p = part(state, f"dec.{name}")
        if p["norm0.weight"].shape[0] != x.shape[1]:
            x = torch.cat([x, skips.pop()], 1)
        x = block(p, x, emb, way=way_of(name), song=False, taps=(1, 1))
    assert not skips
    return conv(part(state, "out_conv"), silu(norm(part(state, "out_norm"), x, 1e-5)))
