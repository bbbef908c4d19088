"""Small operations on networks that a run needs before it trains them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from ipfm.models import EDMPrecond, NetworkConfig


def trained_config(network: NetworkConfig, dropout: float) -> NetworkConfig:
    """The network as it is distilled: with this dropout of activations, and none of labels."""
    return replace(network, dropout=dropout, label_dropout=0.0)


def trainable_copy(net: EDMPrecond, dropout: float) -> EDMPrecond:
    """A copy of `net` to distil, see `trained_config`."""
    twin = EDMPrecond(trained_config(net.config, dropout))
    twin.load_state_dict(net.state_dict())
    return twin.to(next(net.parameters()).device).requires_grad_(True)


def teacher_facts(teacher: EDMPrecond | None) -> dict[str, str]:
    """What identifies a run by its teacher, wherever its files lie; nothing while there is none yet."""
    return {} if teacher is None else {"teacher": fingerprint(teacher)}


def fingerprint(net: EDMPrecond) -> str:
    """SHA-256 of the weights and buffers: tells two teachers apart wherever their files lie."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
