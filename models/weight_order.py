"""Weights of convolutions in the order in which channels_last activations lie in memory.

A convolution of such activations takes its weight in their order, (out, height, width, in), and copies one that lies
otherwise at each use, forward and backward, and its gradient back. A parameter of its own can lie in that order and
keep its shape. A part of a flat buffer cannot: ZeRO reads parameters and gradients there one element after the other,
as their shape says. It may lie there all the same if nobody but the layer and whoever saves it knows: its memory has
the other order and is read as its shape, (out, in, height, width), which says nothing then but how many there are in
each row. What goes by elements or rows, such as optimisers, averages and forced weight normalisation, need not know.
"""

import torch
from torch import Tensor, nn


def orderly(layer: nn.Module) -> nn.Parameter | None:
    """The weight of a layer that has `by_pixel`, where it is of more than one pixel: others have no order."""
    weight = layer._parameters.get("weight") if hasattr(type(layer), "by_pixel") else None
    return weight if weight is not None and weight.ndim == 4 and weight.shape[2] > 1 else None


@torch.no_grad()
def keep_by_pixel(net: nn.Module) -> frozenset[nn.Parameter]:
    """Let the memory of convolutions' weights have the order of channels_last from now on, and not say so.

    The layers read it so. State dicts have what lies in memory: see `by_channel`.

    Args:
        net: a network none of whose parameters are sharded.

    Returns:
        The parameters that are stored so.
    """
    kept = []
    for module in net.modules():
        weight = orderly(module)
        if weight is not None and not module.by_pixel:
            weight.copy_(by_pixel(weight).clone())
            module.by_pixel = True  # type: ignore[assignment]
            kept.append(weight)
    return frozenset(kept)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer that has `by_pixel` as it is meant, (out, in, height, width): itself, or a view of it."""
    if "weight" not in layer._parameters:
        # Another network's, with factors of its own.
        made = layer.weight
        assert isinstance(made, Tensor)
        return made
    weight = layer._parameters["weight"]
    assert weight is not None
    return _meant(weight) if layer.by_pixel else weight


def by_pixel(weight: Tensor) -> Tensor:
    """What is meant -> what is stored; both of one shape."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape)


def by_channel(stored: Tensor) -> Tensor:
    """What is stored -> what is meant, contiguous."""
    return _meant(stored).contiguous()


def _meant(stored: Tensor) -> Tensor:
    rows, columns, height, width = stored.shape
    return stored.view(rows, height, width, columns).permute(0, 3, 1, 2)
