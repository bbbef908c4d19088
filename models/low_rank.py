"""Low-rank adaptation (LoRA; Hu et al. 2021, arXiv 2106.09685): several networks on one network's frozen weights.

A layer computes with W + s B A, where W is the weight of the same layer of another network, in that one's memory, and
s = alpha / rank. A and B are all that it trains; B starts at 0, and the networks as the same function. What has no
factors, biases and normalisations, is the other network's too.

The sum is made at each use, as an ordinary weight, and goes when autograd needs it no more: the layer computes what it
computes anyway, resampling and rearranged rows among it, and what is exported merged is what was trained. The other
form, W x + s B (A x), spares the gradient with respect to W, and pays for it with two convolutions and a sum over the
whole activation. Measured on two busy CPU cores, a 3x3 convolution forward and backward at rank 8, 64 images: of 128
channels at 16 x 16 pixels 780 ms, the other form 1240; of 256 at 8 x 8 1160 and 2220. With 8 images the other form is
the faster one, 490 and 350, 410 and 300. A sum that is kept, made once per step of the optimiser, would be a second
copy of all weights.

EDM2's layers preserve magnitudes: their W has rows of size 1/√K, K the elements of a row, and is made of a master by a
rule (`forced_weight_norm`) that a sum W + s B A breaks. Here the rule is applied to the sum, as EDM2 applies it to its
master at each use: each row of W + s B A is divided by what makes it 1/√K again. So B = 0 is the teacher, and what a
file holds, a master that the rule is applied to, is what was trained. That is DoRA (Liu et al. 2024, arXiv 2402.09353)
with magnitudes that stay. The other half of EDM2's rule, which writes the normalised master back before each step, is
left out: W stays as it is, so that no change of A and B makes a row of the sum longer or shorter and nothing else. It
keeps the learning rate's effect from fading as rows grow; here they begin at size 1/√K, and grow by what B A adds.

`peft` takes none of this: its layers are of torch's own classes, its other way, `target_parameters`, knows no weights
of four dimensions, and each layer that it wraps holds its W as a parameter, which ZeRO then shards and casts. The
factors have its names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ipfm.kernels.weight_rows import EPS
from ipfm.models.config import NetworkConfig
from ipfm.models.forced_weight_norm import PlainWeight
from ipfm.models.layers import Conv2d, Linear
from ipfm.models.precond import Precond, build_network


@dataclass(frozen=True)
class Lora:
    """What decides over the factors of a network."""

    rank: int
    """Of each product B A; less where a weight has fewer rows or columns."""
    alpha: float
    """The product is multiplied by alpha / rank."""

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank


class LowRank(nn.Module):
    """In front of a layer's class: its weight is `base` + s `lora_B` `lora_A`, of which the last two are parameters.

    `lora_A` (rank, ...) has the shape of `base` (rows, ...) but for the first dimension, `lora_B` is (rows, rank), with
    two further dimensions of 1 for a convolution.
    """

    base: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float
    computes_as: ClassVar[type[nn.Module]]
    """The class of the layer without factors."""

    @property
    def weight(self) -> Tensor:
        """W + s B A, made anew at each use, in the dtype of W; differentiable with respect to A and B."""
        return merged(self.base, self.lora_A, self.lora_B, self.lora_scale)

    def stored(self, a: Tensor, b: Tensor) -> Tensor:
        """What a file has as the weight of a layer without factors, of these ones; float64.

        Args:
            a: in place of `lora_A`.
            b: in place of `lora_B`.
        """
        # In float64: what is exported does not depend on how the device multiplies.
        return merged(self.base.double(), a, b, self.lora_scale)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is none of its module's names.
        return _layer_of, (self.computes_as,), self.__dict__

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.lora_A)}"


class NormalisedLowRank(LowRank):
    """The same in front of a layer under forced weight normalisation: the rule is applied to the sum, by row.

    It has no master: `base` is the plain weight, and a state dict has the factors.
    """

    @property
    def weight(self) -> Tensor:
        """W + s B A with rows of the size of those of W, as `LowRank.weight`."""
        return merged(self.base, self.lora_A, self.lora_B, self.lora_scale, normalised=True)

    def stored(self, a: Tensor, b: Tensor) -> Tensor:
        """The master whose rows the rule makes the weight of, see `LowRank.stored`."""
        return super().stored(a, b) * math.sqrt(self.base[0].numel())

    _apply = nn.Module._apply
    _save_to_state_dict = nn.Module._save_to_state_dict
    _load_from_state_dict = nn.Module._load_from_state_dict


_CLASSES: dict[type[nn.Module], type[LowRank]] = {}


def _low_rank_class(layer: type[nn.Module]) -> type[LowRank]:
    """The class of such a layer with factors."""
    if layer not in _CLASSES:
        kind = NormalisedLowRank if issubclass(layer, PlainWeight) else LowRank
        said = {"__module__": __name__, "__doc__": f"{layer.__name__} on another one's weight.", "computes_as": layer}
        _CLASSES[layer] = type(f"LowRank{layer.__name__}", (kind, layer), said)
    return _CLASSES[layer]


def _layer_of(layer: type[nn.Module]) -> LowRank:
    """A layer with factors that has no attributes yet."""
    kind = _low_rank_class(layer)
    return kind.__new__(kind)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, *, normalised: bool = False) -> Tensor:
    """weight + scale B A, in the dtype and memory format of the weight.

    Args:
        weight: (rows, ...).
        a: (rank, ...), of any floating dtype.
        b: (rows, rank, ...), likewise.
        scale: s.
        normalised: each row of the sum is divided by 1e-4 + its Euclidean norm, which that of a plain weight of forced
            weight normalisation is, W = n(M)/√K of M of size 1, where 1e-4 + the norm is 1.
    """
    # In channels_last a row's elements lie in another order: nothing but A, which is small, is copied.
    last = weight.ndim == 4 and not weight.is_contiguous()

    def rows(tensor: Tensor) -> Tensor:
        return (tensor.permute(0, 2, 3, 1) if last else tensor).flatten(1)

    sums = torch.addmm(rows(weight), b.to(weight.dtype).flatten(1), rows(a.to(weight.dtype)), alpha=scale)
    if normalised:
        wide = torch.promote_types(weight.dtype, torch.float32)
        sums = (sums / (EPS + torch.linalg.vector_norm(sums, dim=1, keepdim=True, dtype=wide))).to(weight.dtype)
    if not last:
        return sums.view(weight.shape)
    return sums.view(weight.shape[0], *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)


def low_rank_network(network: NetworkConfig, base: Precond, lora: Lora, seed: int = 0) -> Precond:
    """A network on the weights of `base`, which it has as they are: its parameters are its factors alone.

    Whoever casts, shards, averages or saves its parameters meets no weight of `base`. Both have to stay on one device.

    Args:
        network: its architecture; that of `base`, but for dropout.
        base: the network whose weights it uses, frozen, none of them sharded; values may change, tensors not.
        lora: rank and alpha.
        seed: of the first A, uniform within ±1/√columns, as a layer's weight starts in PyTorch.

    Raises:
        ValueError: `base` has other weights.
    """
    with torch.device("meta"):
        net = build_network(network)
    generator = torch.Generator().manual_seed(seed % 2**63)
    theirs = dict(base.named_modules())
    for name, module in net.named_modules():
        other = theirs.get(name)
        if other is None or {n: _shape(p) for n, p in other._parameters.items()} != {
            n: _shape(p) for n, p in module._parameters.items()
        }:
            raise ValueError(
                f"{name or 'the network'} has other weights than in the network that it is to share them of"
            )
        _share(module, other, lora, generator)
    # (Nothing but factors and buffers is left on the meta device.)
    return net.requires_grad_(True)


def _shape(parameter: Tensor | None) -> torch.Size | None:
    return None if parameter is None else parameter.shape


def _share(module: nn.Module, other: nn.Module, lora: Lora, generator: torch.Generator) -> None:
    """Let a layer use the parameters of another one, which stay out of its own, and have factors."""
    for name, buffer in other._buffers.items():
        module._buffers[name] = None if buffer is None else buffer.detach().clone()
    for name in [name for name, p in module._parameters.items() if p is not None]:
        shared = cast(Tensor, other._parameters[name])
        del module._parameters[name]
        if name != "weight" or not isinstance(module, Conv2d | Linear | PlainWeight):
            module.__dict__[name] = shared
            continue
        object.__setattr__(module, "__class__", _low_rank_class(type(module)))
        # The scales of a master's rows, which a layer with factors does not have.
        module.__dict__.pop("row_scale", None)
        module.__dict__["base"] = shared
        module.__dict__["lora_scale"] = lora.scale
        for factor, start in _first_factors(shared, lora.rank, generator).items():
            module.register_parameter(factor, nn.Parameter(start))


def _first_factors(weight: Tensor, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    rows, columns = weight.shape[0], weight[0].numel()
    rank = min(rank, rows, columns)
    # Masters are float32 whatever the other network is stored in.
    wide, device = torch.promote_types(weight.dtype, torch.float32), weight.device
    b = torch.zeros(rows, rank, *[1] * (weight.ndim - 2), dtype=wide, device=device)
    if weight.is_meta:
        return {"lora_A": torch.empty(rank, *weight.shape[1:], dtype=wide, device=device), "lora_B": b}
    drawn = torch.rand(rank, *weight.shape[1:], generator=generator).mul_(2).sub_(1).div_(math.sqrt(columns))
    return {"lora_A": drawn.to(device, wide), "lora_B": b}


def is_low_rank(net: nn.Module) -> bool:
    """Whether it was made by `low_rank_network`."""
    return next(_layers(net), None) is not None


def _layers(net: nn.Module) -> Iterator[tuple[str, LowRank]]:
    return ((name, module) for name, module in net.named_modules() if isinstance(module, LowRank))


@torch.no_grad()
def merge_into(net: nn.Module, low_rank: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Write the merged weights of a network with factors into a plain one of its architecture.

    Args:
        net: the plain one.
        low_rank: the network with factors.
        factors: to take in place of its own, by the names of its parameters, whole.
    """
    theirs: dict[str, Any] = dict(low_rank.named_modules())
    for name, module in net.named_modules():
        other = theirs[name]
        for own, p in module._parameters.items():
            if p is None:
                continue
            if own == "weight" and isinstance(other, LowRank):
                set_weight = getattr(module, "set_master", p.copy_)
                set_weight(other.stored(factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]))
            else:
                p.copy_(getattr(other, own))
