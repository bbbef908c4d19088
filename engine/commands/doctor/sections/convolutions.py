"""Every distinct convolution layer of the networks, in both memory formats, as here and as PyTorch's operations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ipfm.engine.commands.bench.plain_step import PlainConv2d
from ipfm.engine.commands.doctor.place import Place, Row, judged, tried, within
from ipfm.kernels.bench.measurement import ALLOWED_UNITS, error_units, quantiles
from ipfm.models import NetworkConfig, build_network, presets
from ipfm.models.layers import Conv2d

# Network, images: CIFAR-10's both, ImageNet's.
NETWORKS = (("ncsnpp", 256), ("ddpmpp", 256), ("adm", 32))
# Beside what is allowed of a kernel: a sum over thousands of products in another order.
TIMES_ALLOWED = 4.0


@dataclass(frozen=True)
class Layer:
    """A convolution layer, on the meta device, and the shape of what it is given."""

    network: str
    module: Conv2d
    shape: tuple[int, ...]
    count: int
    """Layers of the network that are like it."""

    @property
    def words(self) -> str:
        """As in "3x3 256->256 down at 32x32"."""
        module, (_, _, height, width) = self.module, self.shape
        way = " up" if module.up else " down" if module.down else ""
        kernel = f"{module.kernel}x{module.kernel} " if module.kernel else "filter alone "
        return f"{kernel}{module.in_channels}->{module.out_channels}{way} at {height}x{width}"


def rows(place: Place) -> Iterator[Row]:
    """A row a layer, memory format and what is trained: its weights too, or what it is given alone."""
    device = torch.device(place.device)
    if place.cuda:
        given = [(name, presets.get(name), images) for name, images in NETWORKS]
        dtype = torch.bfloat16
    else:
        given, dtype = [("digits", presets.get("digits"), 4)], torch.float32
    layers = [layer for name, network, images in given for layer in distinct_layers(name, network, images)]
    cases = [
        (layer, last, frozen)
        for layer in (layers[:2] if place.quick else layers)
        for last in (True, False)
        for frozen in (False, True)
    ]
    # The layers that take the most time stand first in each network; what is left out is little.
    for layer, last, frozen in within(place, cases, "layers"):
        row: Row = {
            "network": layer.network,
            "layer": layer.words,
            "images": layer.shape[0],
            "layers alike": layer.count,
            "memory format": "channels_last" if last else "contiguous",
            "gradients": "input" if frozen else "all",
        }
        yield tried(row, lambda one=layer, la=last, fr=frozen: _measured(one, la, fr, dtype, device))  # type: ignore[misc]


def distinct_layers(name: str, network: NetworkConfig, images: int) -> list[Layer]:
    """The convolution layers of a network that differ in themselves or in what they are given, the most work first."""
    seen: dict[tuple[object, ...], list[tuple[Conv2d, tuple[int, ...]]]] = {}

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Conv2d)
        shape = tuple(given[0].shape)
        seen.setdefault((module.extra_repr(), type(module), shape), []).append((module, shape))

    with torch.device("meta"):
        net = build_network(network).eval()
        for module in net.modules():
            # Those that make q, k and v are matrix products.
            if type(module) is Conv2d:
                module.register_forward_pre_hook(hook)
        x, sigma = torch.empty(images, *network.image_shape), torch.empty(images)
        labels = torch.empty(images, network.label_dim) if network.label_dim else None
        with torch.no_grad():
            net(x, sigma, labels)
    found = [Layer(name, alike[0][0], alike[0][1], len(alike)) for alike in seen.values()]
    return sorted(found, key=lambda layer: -_work(layer))


def _work(layer: Layer) -> int:
    weight = layer.module.weight
    _, channels, height, width = layer.shape
    return layer.count * height * width * (channels if weight is None else weight.numel())


def _measured(layer: Layer, last: bool, frozen: bool, dtype: torch.dtype, device: torch.device) -> Row:
    torch.manual_seed(0)
    order = torch.channels_last if last else torch.contiguous_format
    # Weights lie as activations do, as on a GPU.
    ours = _on_device(layer.module, device, trained=not frozen).to(memory_format=order)  # type: ignore[call-overload]
    theirs = copy.deepcopy(ours)
    theirs.__class__ = PlainConv2d
    x = torch.randn(layer.shape, device=device).to(dtype).contiguous(memory_format=order).requires_grad_()
    results, times = [], []
    for module in (ours, theirs):
        both = _both(module, x)
        results.append(both())
        with torch.no_grad():
            _, forward, _ = quantiles(lambda m=module: m(x), device, quick=True)  # type: ignore[misc]
        _, whole, _ = quantiles(both, device, quick=True)
        times.append((forward, whole))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs(x)
    # A gradient is as much work as the forward pass.
    work = counter.get_total_flops() * (2 if frozen else 3)
    (ours_forward, ours_whole), (their_forward, their_whole) = times
    worst = max(
        units / (TIMES_ALLOWED * ALLOWED_UNITS[kind]) for kind, units in error_units(results[0], results[1]).items()
    )
    return {
        "forward µs": round(ours_forward, 1),
        "PyTorch's": round(their_forward, 1),
        "with backward µs": round(ours_whole, 1),
        "PyTorch's too": round(their_whole, 1),
        "TFLOP/s": f"{1e-6 * work / ours_whole:.3g}",
        "difference over allowed": round(worst, 3),
        "verdict": judged(worst <= 1, f"differs from PyTorch's by {worst:.2g} times what is allowed"),
    }


def _on_device(module: Conv2d, device: torch.device, *, trained: bool) -> Conv2d:
    """The layer with random weights; a filter as it is."""
    filters = module.resample_filter
    made = copy.deepcopy(module).to_empty(device=device)
    made._forward_pre_hooks.clear()
    for p in made.parameters():
        nn.init.normal_(p, std=0.05)
    if filters is not None:
        one = torch.ones(2) if made._box else torch.tensor(made._taps)
        made.resample_filter = (torch.outer(one, one) / one.sum() ** 2)[None, None].to(device)
    return made.requires_grad_(trained)


def _both(module: nn.Module, x: Tensor) -> Callable[[], list[Tensor]]:
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]

    def both() -> list[Tensor]:
        out = module(x)
        # The arithmetic of all gradients is that of x.
        return [out.detach(), *(g.to(x.dtype) for g in torch.autograd.grad(out, wanted, torch.ones_like(out)))]

    return both
