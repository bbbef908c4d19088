"""Layers on another network's weights: what they compute, compiled, put together for a GPU, copied and stored."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from kept import ARCHITECTURES, build
from on_a_gpu import put_together_as_on_a_gpu
from random_values import rand
from torch import Tensor

from ipfm.engine.commands.bench.plain_rule import EDM2
from ipfm.models import Precond, blocks, build_network, low_rank, whole_attention
from ipfm.models.edm2_layers import MPConv
from ipfm.models.forced_weight_norm import plain_weight, under_the_rule
from ipfm.models.low_rank import Lora, LowRank, low_rank_network, merge_into

NETWORKS = {name: config for name, config in ARCHITECTURES.items() if name in ("ncsnpp", "adm")}


def made(name: str) -> tuple[Precond, Precond]:
    """A frozen network, and one on its weights with factors that say something."""
    torch.manual_seed(0)
    base = build_network(EDM2) if name == "edm2" else build(**NETWORKS[name])
    for number, p in enumerate(base.parameters()):
        if name != "edm2":
            break
        with torch.no_grad():
            if not p.ndim:
                p.fill_(0.5 + 0.01 * number)
    base.eval().requires_grad_(False)
    net = low_rank_network(base.config, base, Lora(3, 6.0), seed=1).eval()
    with torch.no_grad():
        for number, (parameter, p) in enumerate(net.named_parameters()):
            if parameter.endswith("lora_B"):
                p.copy_(0.05 * rand(*p.shape, seed=number))
    return base, net


def computed(net: Precond) -> list[Tensor]:
    """Denoised images, the gradient by the images and, where there is any, by what is trained."""
    config = net.config
    x = rand(2, config.img_channels, config.img_resolution, config.img_resolution, seed=1).float().requires_grad_()
    labels = torch.eye(config.label_dim)[:2] if config.label_dim else None
    y = net(x, torch.tensor([0.5, 3.0]), labels)
    wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
    found = torch.autograd.grad(y, wanted, rand(*y.shape, seed=9).to(y.dtype), allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if g is None else g for g in found)]


def assert_same(found: list[Tensor], expected: list[Tensor], limit: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=limit * max(float(b.abs().max()), 1e-3))


@pytest.mark.parametrize("name", ["ncsnpp", "adm", "edm2"])
def test_a_merged_network_computes_the_same(name: str) -> None:
    base, net = made(name)
    whole = copy.deepcopy(base)
    merge_into(whole, net, dict(net.named_parameters()))
    assert_same(computed(whole), computed(net)[:2], 1.5e-6)
    apart = computed(base)[0] - computed(net)[0]
    assert float(apart.abs().max()) > 0.01


def test_rows_of_a_network_under_the_rule_keep_their_size() -> None:
    """Those of EDM2: W + s B A by the row, divided by what makes it 1/√K, as the rule has it; at first it is W."""
    base, net = made("edm2")
    assert not under_the_rule(net, logvar=True)
    layers = [module for module in net.modules() if isinstance(module, LowRank)]
    plain = dict(base.named_modules())
    assert len(layers) == sum(isinstance(module, MPConv) for module in base.modules()) > 8
    for name, layer in net.named_modules():
        if not isinstance(layer, LowRank):
            continue
        with torch.no_grad():
            k, w = layer.base[0].numel(), plain[name].weight
            assert layer.base is w
            product = torch.einsum("or,rc->oc", layer.lora_B.flatten(1), layer.lora_A.flatten(1)).view(w.shape)
            torch.testing.assert_close(
                layer.weight, plain_weight(math.sqrt(k) * (w + 2.0 * product)), rtol=1e-5, atol=1e-7
            )
            layer.lora_B.zero_()
            torch.testing.assert_close(layer.weight, w, rtol=2e-4, atol=0)
    with torch.no_grad():
        size = layers[0].weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(size, torch.ones_like(size), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["ncsnpp", "edm2"])
def test_a_compiled_layer_is_one_graph_through_its_factors(name: str) -> None:
    """A convolution of each kind, trained and frozen, equals itself without a compiler."""
    _, net = made(name)
    layer: Any = next(m for m in net.modules() if isinstance(m, LowRank) and m.lora_B.ndim == 4 and m.base.shape[2] > 1)
    x = rand(2, layer.in_channels, 4, 4, seed=1).float().requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        found = []
        for function in (compiled, layer):
            y = function(x)
            wanted = [x] if frozen else [x, layer.lora_A, layer.lora_B]
            found.append([y.detach(), *torch.autograd.grad(y, wanted, rand(*y.shape, seed=9).float())])
        assert_same(*found, 1e-5)


@pytest.mark.parametrize("name", ["ncsnpp", "adm"])
def test_blocks_for_a_gpu_take_layers_with_factors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one function each, as often as a network with its own weights, trained and frozen; the same numbers."""
    base, net = made(name)
    calls: list[str] = []
    for module, function in ((blocks, blocks.whole_block), (whole_attention, whole_attention.whole_attention)):

        def counted(*given: Any, function: Any = function) -> Tensor:
            calls.append(function.__name__)
            return function(*given)

        monkeypatch.setattr(module, function.__name__, counted)
    for frozen in (False, True):
        net.requires_grad_(not frozen)
        expected = computed(net)
        assert not calls
        with put_together_as_on_a_gpu():
            computed(base)
            ordinary = len(calls)
            calls.clear()
            assert_same(computed(net), expected, 1e-4)
            assert len(calls) == ordinary >= 2
            calls.clear()


@pytest.mark.parametrize("name", ["ncsnpp", "edm2"])
def test_it_can_be_copied_and_stored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the network whose weights it uses they stay one set; another process, which has not made one, reads it."""
    base, net = made(name)
    expected = computed(net)
    both, stored = copy.deepcopy((base, net)), pickle.dumps((base, net))
    monkeypatch.setattr(low_rank, "_CLASSES", {})
    for again_base, again in (both, pickle.loads(stored)):
        assert_same(computed(again), expected, 0)
        theirs = dict(again_base.named_modules())
        layers = [(n, m) for n, m in again.named_modules() if isinstance(m, LowRank)]
        assert layers and all(m.base is theirs[n].weight for n, m in layers)
    assert len(low_rank._CLASSES) >= 2
