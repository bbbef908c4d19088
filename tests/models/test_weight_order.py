"""Weights whose memory has the order of channels_last activations and does not say so."""

from __future__ import annotations

import copy
from dataclasses import replace

import edm2_fixtures
import pytest
import torch
from torch import Tensor, nn

from ipfm.models import NetworkConfig, build_network, presets
from ipfm.models.weight_order import by_channel, by_pixel, keep_by_pixel, orderly, weight_of

NETWORKS = {
    # Convolutions that go up and down, and skip.
    "ncsnpp": replace(
        presets.get("ncsnpp", D=128.0),
        img_resolution=8,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
    ),
    "adm": replace(
        presets.get("adm", D=128.0),
        img_resolution=8,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
    ),
    "edm2": replace(edm2_fixtures.SMALL, dropout=0.0),
}


def gradients(config: NetworkConfig, net: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *config.image_shape, generator=generator)
    labels = torch.eye(config.label_dim)[:2] if config.label_dim else None
    y = net(x, torch.tensor([0.5, 2.0]), labels)
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same_with_gradients_in_the_order_of_its_weights(name: str) -> None:
    config = NETWORKS[name]
    torch.manual_seed(0)
    net = build_network(config)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():  # what begins at zero would hide what comes before it
                p.normal_(std=0.1)
    other = copy.deepcopy(net)
    kept = keep_by_pixel(other)
    assert len(kept) > 8
    assert keep_by_pixel(other) == frozenset()  # once
    y, expected = gradients(config, net)
    again, found = gradients(config, other)
    torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-5)
    named = dict(other.named_parameters())
    for key, gradient in expected.items():
        assert named[key].shape == gradient.shape and found[key].is_contiguous()
        meant = by_channel(found[key]) if named[key] in kept else found[key]
        torch.testing.assert_close(meant, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=key)


def test_what_is_stored_is_what_is_meant_in_the_other_order() -> None:
    meant = torch.arange(2 * 3 * 5 * 5.0).view(2, 3, 5, 5)
    stored = by_pixel(meant)
    assert stored.is_contiguous() and stored.shape == meant.shape
    assert torch.equal(
        stored.flatten(), meant.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten()
    )
    assert torch.equal(by_channel(stored), meant)


def test_a_layer_reads_its_weight_without_a_copy() -> None:
    net = build_network(NETWORKS["ncsnpp"])
    keep_by_pixel(net)
    layers = [layer for layer in net.modules() if orderly(layer) is not None]
    assert layers
    for layer in layers:
        weight = weight_of(layer)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert weight.data_ptr() == layer.weight.data_ptr()


def test_other_peoples_convolutions_are_left_alone() -> None:
    assert keep_by_pixel(nn.Sequential(nn.Conv2d(3, 4, 3))) == frozenset()
