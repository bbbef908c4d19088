"""Small operations on networks that a run needs before it trains them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ipfm.models import NetworkConfig, Precond, build_network


def trained_config(network: NetworkConfig, dropout: float) -> NetworkConfig:
    """The network as it is distilled: with this dropout of activations, and none of labels."""
    return replace(network, dropout=dropout, label_dropout=0.0)


def trainable_copy(net: Precond, dropout: float) -> Precond:
    """A copy of `net` to distil, see `trained_config`."""
    twin = build_network(trained_config(net.config, dropout))
    twin.load_state_dict(net.state_dict())
    return twin.to(next(net.parameters()).device).requires_grad_(True)


def teacher_facts(teacher: Precond | None) -> dict[str, str]:
    """What identifies a run by its teacher, wherever its files lie; nothing while there is none yet."""
    return {} if teacher is None else {"teacher": fingerprint(teacher.state_dict())}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights and buffers by name: tells two networks apart wherever their files lie."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
