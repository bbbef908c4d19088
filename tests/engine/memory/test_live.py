"""Live bytes: against counts by hand, on the CPU and on the meta device."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ipfm.engine.memory.live import LiveBytes, tensor_bytes
from ipfm.models import build_network, presets

KILO = 1000 * 4
both = pytest.mark.parametrize("device", ["cpu", "meta"])


@both
def test_results_count_until_they_are_freed(device):
    with LiveBytes() as live:
        a = torch.empty(1000, device=device)
        b = a + 1
        assert (live.current, live.peak) == (2 * KILO, 2 * KILO)
        c = torch.empty(1000, dtype=torch.float64, device=device)
        del a, c
        assert (live.current, live.peak) == (KILO, 4 * KILO)
        live.reset_peak()
        assert live.peak == KILO
        del b
        assert (live.current, live.peak) == (0, KILO)


@both
def test_views_and_in_place_operations_count_nothing(device):
    before = torch.ones(1000, device=device)
    with LiveBytes() as live:
        seen = [before.view(10, 100), before[:5], before.t(), before.detach(), before.add_(1), before.view(-1).mul_(2)]
        assert live.current == 0
        own = torch.empty(1000, device=device)
        seen += [own.view(10, 100), own[3:4], own.mul_(2)]
        assert live.current == KILO
        del own
        assert live.current == KILO  # a view holds all of it
        torch._foreach_mul_([before, seen[-1]], 2.0)
        assert live.current == KILO
        torch._foreach_mul([before, seen[-1]], 2.0)
        assert (live.current, live.peak) == (KILO, 3 * KILO)


def chain(x: Tensor, depth: int) -> Tensor:
    for _ in range(depth):
        x = x.sin()
    return x


@both
def test_what_autograd_alone_holds_counts(device):
    """`depth` sines keep their inputs; the way back frees them one by one, beside two gradients."""
    x = torch.ones(1000, device=device, requires_grad=True)
    depth = 5
    with LiveBytes() as live:
        y = chain(x, depth)
        assert live.current == depth * KILO  # all results; that of the last is y itself
        del y
        gc.collect()
        assert live.current == 0
        y = chain(x, depth).sum()
        live.reset_peak()
        assert live.current == (depth - 1) * KILO + 4  # the last result is not needed
        y.backward()
        assert x.grad is not None
        del y
        assert live.current == KILO  # the gradient
        # Its first steps need a cosine and a product beside the saved ones and the gradient that arrives.
        assert depth * KILO < live.peak <= (depth + 2) * KILO + 8
        x.grad = None
        assert live.current == 0


@both
def test_a_checkpoint_keeps_its_input_alone(device):
    x = torch.ones(1000, device=device, requires_grad=True)
    with LiveBytes() as live:
        plain = chain(chain(x, 4), 4).sum()
        kept = live.current
        del plain
        middle = checkpoint(chain, x, 4, use_reentrant=False)
        y = checkpoint(chain, middle, 4, use_reentrant=False).sum()
        del middle
        assert live.current == KILO + 4 < kept
        live.reset_peak()
        y.backward()
        assert 4 * KILO < live.peak < kept + 3 * KILO


def test_both_devices_count_alike():
    """What the plan relies on, for a network of the project: forward, backward, and what is left.

    Some operations keep a little more on the meta device.
    """
    config = presets.get("digits")
    counted = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = build_network(config).train()
        x = torch.ones(4, 1, 8, 8, device=device)
        with LiveBytes() as live:
            y = net(x, torch.ones(4, device=device))
            kept = live.current
            (y * x).sum().backward()
            del y
        assert live.current == sum(p.numel() * 4 for p in net.parameters() if p.grad is not None)
        counted.append((kept, live.peak, live.current))
    assert counted[0][1] > counted[0][0] > 0
    assert counted[1] == pytest.approx(counted[0], rel=0.05)


def test_adopted_tensors_count_and_are_seen_to_go():
    old = torch.ones(1000)
    weight = torch.ones(500, requires_grad=True)
    (weight * 2).sum().backward()
    live = LiveBytes()
    live.adopt("cpu")
    everything = live.current
    assert live.peak == everything >= 2 * KILO
    with live:
        view, new = old[:10], torch.empty(1000)
        assert live.current == everything + KILO
        del old
        assert live.current == everything + KILO
        del view
        assert live.current == everything
        weight.grad = None
        assert live.current == everything - 500 * 4
        del new
    assert live.peak == everything + KILO


def test_the_timeline_has_the_peak():
    with LiveBytes(timeline=True) as live:
        kept = [torch.empty(1000) for _ in range(3)]
        del kept[1:]
    times = [time for time, _ in live.timeline.points]
    assert [value for _, value in live.timeline.points] == [KILO, 2 * KILO, 3 * KILO, 2 * KILO, KILO]
    assert times == sorted(times)
    with LiveBytes() as silent:
        _ = torch.empty(1000)
    assert len(silent.timeline) == 0


def test_the_timeline_is_bounded(monkeypatch):
    monkeypatch.setattr("ipfm.engine.memory.series.POINTS", 100)
    with LiveBytes(timeline=True) as live:
        kept = torch.empty(1000)
        for _ in range(500):
            torch.empty(1000)
        del kept
    assert 20 <= len(live.timeline) <= 100
    assert live.timeline.points[-1][1] == 0


def test_tensor_bytes_counts_storages_once_with_gradients():
    gc.collect()
    before = tensor_bytes("cpu"), tensor_bytes("meta")
    x = torch.ones(1000, requires_grad=True)
    views = [x.view(10, 100), x.detach()]
    assert tensor_bytes("cpu") == before[0] + KILO
    (x * 2).sum().backward()  # its gradient has no Python object
    assert tensor_bytes("cpu") == before[0] + 2 * KILO
    away = torch.empty(10**12, device="meta")
    assert tensor_bytes("meta") == before[1] + 4 * 10**12
    assert tensor_bytes("cpu") == before[0] + 2 * KILO
    del x, views, away
    gc.collect()
    assert (tensor_bytes("cpu"), tensor_bytes("meta")) == before
