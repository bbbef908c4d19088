"""Small operations on networks that a run needs before it trains them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from ipfm.engine.config import InitialWeights
from ipfm.models import NetworkConfig, Precond, build_network
from ipfm.models.low_rank import Lora, low_rank_network
from ipfm.models.precond import unguided


def trained_config(network: NetworkConfig, dropout: float) -> NetworkConfig:
    """The network as it is distilled: with this dropout of activations, and none of labels."""
    return replace(network, dropout=dropout, label_dropout=0.0)


def generator_network(network: NetworkConfig, width: float, *, logvar: bool = False) -> NetworkConfig:
    """The architecture with `width` times the channels.

    Args:
        network: the teacher's.
        width: of the network by the teacher's.
        logvar: with the teacher's log-variance, which a generator has no use for.

    Raises:
        ValueError: that is no whole number of channels, or one that the network cannot have.
    """
    if not logvar and network.logvar_channels:
        network = replace(network, logvar_channels=0)
    channels = network.model_channels * width
    if channels != int(channels) or channels < 1:
        raise ValueError(f"width {width:g} makes {channels:g} channels of {network.model_channels}: give a divisor")
    if channels == network.model_channels:
        return network
    try:
        return replace(network, model_channels=int(channels))
    except ValueError as error:
        raise ValueError(
            f"width {width:g} makes {channels:g} channels, which this network cannot have: {error}"
        ) from None


def initial_weights(init: InitialWeights, width: float) -> Literal["teacher", "random"]:
    """Where a network's first weights come from: "auto" is the teacher, but for another width."""
    return ("teacher" if width == 1 else "random") if init == "auto" else init


def starting_network(
    network: NetworkConfig,
    start: Literal["teacher", "random"],
    teacher: Precond,
    seed: int,
    *,
    lora: Lora | None = None,
) -> Precond:
    """A network to train, on the teacher's device: with the teacher's weights, or with random ones of this seed.

    Args:
        network: its architecture; the teacher's, but for dropout and a log-variance, where it starts from the teacher.
        start: its first weights.
        teacher: the denoiser that is distilled.
        seed: of random weights; every process draws the same.
        lora: it has the teacher's weights as they are, in their memory, and factors; None: weights of its own.
    """
    if lora is not None:
        return low_rank_network(network, unguided(teacher), lora, seed)
    if start == "teacher":
        twin = build_network(network)
        names, state = twin.state_dict().keys(), unguided(teacher).state_dict()
        # Without what the teacher alone has: its log-variance.
        twin.load_state_dict({name: tensor for name, tensor in state.items() if name in names})
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            twin = build_network(network)
    return twin.to(next(teacher.parameters()).device).requires_grad_(True)


def trainable_copy(net: Precond, dropout: float) -> Precond:
    """A copy of `net` to distil, see `trained_config`."""
    return starting_network(trained_config(net.config, dropout), "teacher", net, 0)
