"""Activation checkpointing inside the U-Nets: the same numbers, bit for bit, from far less memory."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from kept import ARCHITECTURES, build, kept_bytes
from random_values import rand
from torch import Tensor

from ipfm.models import EDMPrecond, presets, save_model
from ipfm.models.precond import build_network

SIGMA = torch.tensor([0.3, 4.0])


def images() -> Tensor:
    return rand(2, 2, 8, 8, seed=1).float()


def gradients(net: EDMPrecond, again: bool, wanted: list[Tensor], x: Tensor, labels: Tensor) -> list[Tensor]:
    """The value and the gradients with respect to `wanted`, by the seed of the dropout; how far the generator got."""
    net.activation_checkpointing = again
    torch.manual_seed(5)
    y = net(x, SIGMA, labels, torch.ones(2, 4))
    found = torch.autograd.grad(y, wanted, rand(*y.shape, seed=2).float())
    return [y.detach(), *found, torch.get_rng_state()]


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["trained", "trained-with-dropout", "frozen", "frozen-with-dropout", "labels"])
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_the_same_numbers(changes, mode, dtype):
    """Weights trained; or x alone, or the labels alone, differentiated through frozen weights."""
    net = build(**changes, dropout=0.3).train(mode.endswith("dropout")).requires_grad_(mode.startswith("trained"))
    net.compute_dtype = dtype
    x, labels = images().requires_grad_(mode != "labels"), torch.eye(3)[:2].requires_grad_(mode == "labels")
    wanted = [tensor for tensor in (x, labels, *net.parameters()) if tensor.requires_grad]
    assert (len(wanted) == 1) != mode.startswith("trained")
    plain, again = (gradients(net, on, wanted, x, labels) for on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(g.abs().max() > 0 for g in plain[1:])


def test_dropout_is_drawn_anew_but_for_the_backward_pass():
    """Two masks of one gradient: the one of the first pass must be the one of the second."""
    net, x = build(dropout=0.3).train().requires_grad_(False), images().requires_grad_()
    values = [gradients(net, True, [x], x, torch.eye(3)[:2])[0], net(x, SIGMA, torch.eye(3)[:2], torch.ones(2, 4))]
    assert not torch.equal(values[0], values[1].detach())


def test_backward_accumulates_the_same():
    grads = []
    for again in (False, True):
        net = build()
        net.activation_checkpointing = again
        for scale in (1.0, 2.0):
            net(scale * images(), SIGMA).square().sum().backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    assert len(grads[0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def saved(net: EDMPrecond, device: str, *, frozen: bool) -> tuple[int, int]:
    """Bytes that autograd keeps without and with checkpointing."""
    net = net.to(device).train(not frozen).requires_grad_(not frozen)
    found = []
    for again in (False, True):
        net.activation_checkpointing = again
        x = torch.zeros(4, *(net.img_channels, *2 * (net.img_resolution,)), device=device).requires_grad_(frozen)
        labels = torch.zeros(4, net.label_dim, device=device) if net.label_dim else None
        run = partial(net, x, torch.ones(4, device=device), labels)
        found.append(kept_bytes(run, *net.parameters(), *net.buffers()))
    return found[0], found[1]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_what_is_kept_on_the_meta_device_is_what_is_kept(changes, frozen):
    net = build(**changes, dropout=0.3)
    net.attention_backend = "math"  # the other one keeps other things on the meta device
    real = saved(net, "cpu", frozen=frozen)
    assert saved(net, "meta", frozen=frozen) == real
    assert real[1] < 0.6 * real[0]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["cifar10-ncsnpp", "ffhq64-ddpmpp", "imagenet64-adm"])
def test_what_the_published_networks_keep(name, frozen):
    """Of each block its input alone; the largest block's activations come on top while it is differentiated."""
    config = dataclasses.replace(presets.get(name), attn_resolutions=())
    with torch.device("meta"):
        net = build_network(config)
    plain, again = saved(net, "meta", frozen=frozen)
    assert again < (0.45 if frozen else 0.25) * plain


def test_blocks_run_again_only_where_a_gradient_is_wanted():
    net, counts = build(), {"block": 0}
    net.activation_checkpointing = True
    for block in net.model.blocks:
        block.register_forward_pre_hook(lambda *_: counts.update(block=counts["block"] + 1))
    blocks = len(list(net.model.blocks))

    def runs(x: Tensor, backward: bool) -> int:
        counts["block"] = 0
        y = net(x, SIGMA)
        if backward:
            y.sum().backward()
        return counts["block"]

    assert runs(images(), backward=True) == 2 * blocks
    net.requires_grad_(False)
    assert runs(images().requires_grad_(), backward=True) == 2 * blocks
    assert runs(images(), backward=False) == blocks
    with torch.no_grad():
        assert runs(images().requires_grad_(), backward=False) == blocks
    assert kept_bytes(lambda: net(images(), SIGMA)) == 0


def test_it_is_a_setting_and_no_part_of_the_network(tmp_path):
    net = build()
    assert net.activation_checkpointing is False and net.model.activation_checkpointing is False
    before = list(net.state_dict())
    net.activation_checkpointing = True
    assert net.model.activation_checkpointing is True
    assert copy.deepcopy(net).activation_checkpointing is True
    assert build().activation_checkpointing is False
    assert list(net.state_dict()) == before
    save_model(net, tmp_path / "model")
    assert "checkpointing" not in (tmp_path / "model" / "config.json").read_text()
