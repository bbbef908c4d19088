"""The operations of blocks at the shapes of the published networks, forward and backward.

group_norm_silu in both memory formats: on a GPU every normalisation of every preset, in bfloat16 and float32; in the
interpreter the innermost ones, whose groups are as wide as those of the outer ones. EDM2's operations at every level of
every size.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ipfm.kernels import group_norm_silu, reference
from ipfm.kernels.bench.cases import edm2_cases
from ipfm.kernels.bench.measurement import error_over_allowed
from ipfm.kernels.bench.providers import TRITON
from ipfm.models import build_network, presets
from ipfm.models.layers import GroupNorm

# One of each architecture and data set; the others have the same shapes.
PRESETS = ("cifar10-ncsnpp", "cifar10-ddpmpp", "ffhq64-ncsnpp", "ffhq64-ddpmpp", "imagenet64-adm")
INNERMOST = 8
INTERPRETED = {("imagenet64-adm", True), ("cifar10-ncsnpp", False)}


class Shape(NamedTuple):
    """Of one image, and what the layer does."""

    channels: int
    side: int
    groups: int
    silu: bool
    scaled: bool
    added: bool


@cache
def shapes(preset: str) -> frozenset[Shape]:
    """What a preset normalises, by a forward pass on the meta device."""
    network = presets.get(preset)
    with torch.device("meta"):
        net = build_network(network).eval()
    found: set[Shape] = set()

    def note(module: GroupNorm, args: tuple[Tensor, ...], keywords: dict[str, Tensor | None]) -> None:
        _, channels, side, _ = args[0].shape
        scaled, added = (keywords.get(name) is not None for name in ("scale", "addend"))
        found.add(Shape(channels, side, module.num_groups, bool(keywords.get("silu")), scaled, added))

    for module in net.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(note, with_kwargs=True)
    labels = torch.zeros(1, network.label_dim, device="meta") if network.label_dim else None
    net(torch.empty(1, *network.image_shape, device="meta"), torch.empty(1, device="meta"), labels)
    # On a GPU a block's first bias and its embedding are added by the normalisation.
    return frozenset(found | {shape._replace(added=True) for shape in found if shape.silu and not shape.scaled})


def error(shape: Shape, images: int, dtype: torch.dtype, last: bool, device: torch.device) -> float:
    """The largest error of the result and of every gradient, over what is allowed."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    x, dy = draw(images, shape.channels, shape.side, shape.side), draw(images, shape.channels, shape.side, shape.side)
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    given = {"weight": 1 + 0.1 * draw(shape.channels), "bias": 0.1 * draw(shape.channels)}
    if shape.scaled:
        given |= {name: 0.1 * draw(images, shape.channels, 1, 1) for name in ("scale", "shift")}
    if shape.added:
        given["addend"] = draw(images, shape.channels)
    results = []
    for function, kind, more in (
        (group_norm_silu, dtype, {"backend": "triton"}), (reference.group_norm_silu, torch.float64, {}),
    ):  # fmt: skip
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, *given.values())]
        named = dict(zip(given, leaves[1:], strict=True))
        y = function(leaves[0], shape.groups, **named, eps=1e-5, activation=shape.silu, **more)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(kind))])
    if last:
        assert results[0][0].is_contiguous(memory_format=torch.channels_last)
    return error_over_allowed(*results)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("preset", PRESETS)
def test_normalisations_of_the_presets(preset: str, last: bool, device: torch.device) -> None:
    known = shapes(preset)
    assert len(known) >= 8
    if device.type == "cuda":
        cases = [(shape, 4, dtype) for shape in sorted(known) for dtype in (torch.bfloat16, torch.float32)]
    else:
        # The interpreter takes a millisecond and more a program: one of the innermost, one image.
        inner = [shape for shape in known if shape.side == INNERMOST]
        cases = [(min(inner), 1, torch.bfloat16 if last else torch.float32)] if (preset, last) in INTERPRETED else []
    for shape, images, dtype in cases:
        assert error(shape, images, dtype, last, device) <= 1, (shape, dtype)


# Sizes of EDM2 differ in the channels of their first level alone.
EDM2 = [name for name in presets.names() if name.startswith("edm2-img512-") and not name.endswith("-uncond")]


@pytest.mark.parametrize("preset", EDM2)
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_operations_of_edm2_at_its_levels(preset: str, device: torch.device) -> None:
    """In channels_last; in the interpreter as wide as the innermost level of the smallest size, of one pixel."""
    network = presets.get(preset)
    widths = [network.model_channels * times for times in network.channel_mult]
    levels = [(width, network.img_resolution >> i) for i, width in enumerate(widths)]
    assert levels[-1] == (4 * levels[0][0], INNERMOST)
    if device.type == "cuda":
        cases = [(2, level, dtype) for level in levels for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    else:
        cases = [(1, (widths[-1], 1), torch.float32)] if preset == EDM2[0] else []
    for images, (channels, side), dtype in cases:
        for case in edm2_cases(device, (images, channels, side, side), dtype):
            run = case.workload.prepare(TRITON)["both"]
            assert error_over_allowed(run.result(), case.workload.truth("both")) <= 1, (case.op, channels, side, dtype)
