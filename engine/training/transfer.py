"""Weights of another network in a new one: those that fit by name and shape.

Names hold the side of their level. Between sizes that share few sides, level is taken for level: of a network for
28x28 the 14x14 blocks for the 24x24 ones of a network for 48x48, whose weights have the same shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.run_folder import fingerprint
from ipfm.models import NetworkConfig, Precond, build_network
from ipfm.models.facts import GeneratorFacts

# Of the buffers those alone are learnt, or drawn, with the weights; the others follow from the architecture.
_FREQUENCIES = ("freqs", "phases")
# Names that a line lists.
_LISTED = 4


@dataclass(frozen=True)
class Transfer:
    """What a new network takes over.

    Attributes:
        source: the other network's file, for messages.
        weights: tensors by name that fit, on the CPU.
        fresh: names of the new network's that nothing fits.
        shapes: of those, (name, shape there, shape here) where the other network has one of another shape.
        unused: names of the other network's that the new one has not.
        unlike: what else differs, a line each.
        parameters: (how many numbers are taken over, how many the new network has).
        recorded: its facts as the run folder has them, where the training has a checkpoint of its own by now and needs
            nothing else of it.
    """

    source: str
    weights: Mapping[str, Tensor]
    fresh: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unused: tuple[str, ...]
    parameters: tuple[int, int]
    unlike: tuple[str, ...] = ()
    recorded: Mapping[str, Any] | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """Lines on what fits and what does not."""
        if self.recorded is not None:
            return (f"{self.source} is gone: the training goes on from its checkpoint, and needs it no more",)
        taken, whole = self.parameters
        total = len(self.weights) + len(self.fresh)
        lines = [
            f"transfer from {self.source}: {len(self.weights)} of {counted(total, 'tensor')} fit by name and shape, "
            f"{taken:,} of {whole:,} numbers{' (little of the network)' if taken < whole / 2 else ''}"
        ]
        others = {name: f"{name} ({_times(there)} there, {_times(here)} here)" for name, there, here in self.shapes}
        if self.fresh:
            lines.append(f"  start fresh: {_listed([others.get(name, name) for name in self.fresh])}")
        if self.unused:
            lines.append(f"  not used of {self.source}: {_listed(self.unused)}")
        lines += [f"  {line}" for line in self.unlike]
        return tuple(lines)

    def facts(self) -> dict[str, Any]:
        """What identifies a training by it ("transfers"), and what is said of it ("start")."""
        if self.recorded is not None:
            return dict(self.recorded)
        total = len(self.weights) + len(self.fresh)
        said = {"source": self.source, "tensors": len(self.weights), "of": total}
        return {"transfers": fingerprint(self.weights), "start": said}

    def put_into(self, net: Precond) -> None:
        """Give `net` what fits."""
        net.load_state_dict({**net.state_dict(), **self.weights})


def transfer_from(source: str, net: Precond, network: NetworkConfig) -> Transfer:
    """What of `net` a new network of another architecture, size, D or number of classes takes over.

    Args:
        source: where `net` is from, for messages.
        net: any network.
        network: the new network's architecture.

    Raises:
        ValueError: nothing fits.
    """
    with torch.device("meta"):
        new = build_network(network)
    wanted = _learnt(new)
    learnt = {name: tensor.detach().float().cpu() for name, tensor in _learnt(net).items()}
    unlike = list(_unlike(net, network))
    there, here = _sides(net.config), _sides(network)
    # Names of the other network -> names here.
    names = {name: name for name in learnt}
    by_level = {name: _at_the_level(name, dict(zip(there, here, strict=False))) for name in learnt}
    if _numbers(_fitting(learnt, by_level, wanted)) > _numbers(_fitting(learnt, names, wanted)):
        names = by_level
        unlike.append(f"level by level: its sides {_words(there)} are taken for {_words(here)} here")
    found = {new: learnt[name] for name, new in names.items()}
    fits = _fitting(learnt, names, wanted)
    if not fits:
        raise ValueError(
            f"nothing of {source} fits by name and shape ({net.config.family}, {net.config.model_channels} channels, "
            f"sides {_words(there)}; here {network.family}, {network.model_channels} channels, sides "
            f"{_words(here)}): leave transfer out"
        )
    fresh = tuple(name for name in wanted if name not in fits)
    return Transfer(
        source=source,
        weights=fits,
        fresh=fresh,
        shapes=tuple((n, tuple(found[n].shape), tuple(wanted[n].shape)) for n in fresh if n in found),
        unused=tuple(name for name, new in names.items() if new not in wanted),
        parameters=(_numbers(fits), _numbers(wanted)),
        unlike=tuple(unlike),
    )


def _unlike(net: Precond, network: NetworkConfig) -> Iterator[str]:
    """What the tensors' shapes do not show."""
    if net.config.D != network.D:
        yield f"it was trained at D = {net.config.D:g}, this one is at D = {network.D:g}"
    if net.config.precond != network.precond:
        yield f"it has {net.config.precond}, this one {network.precond}: noise levels reach the network in another form"
    if isinstance(net.facts, GeneratorFacts):
        yield "it is a generator, which knows its own few noise levels alone"


def _learnt(net: Precond) -> dict[str, Tensor]:
    """Parameters and Fourier frequencies by name, as state dicts have them: what a network computes with may differ."""
    state = net.state_dict()
    buffers = [name for name, _ in net.named_buffers() if name.endswith(_FREQUENCIES)]
    return {name: state[name] for name in (*(name for name, _ in net.named_parameters()), *buffers)}


def _fitting(learnt: Mapping[str, Tensor], names: Mapping[str, str], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `learnt` that fit under their new `names`, in the order of `wanted`."""
    found = {new: learnt[name] for name, new in names.items()}
    return {name: found[name] for name, tensor in wanted.items() if name in found and found[name].shape == tensor.shape}


def _at_the_level(name: str, sides: Mapping[int, int]) -> str:
    """A name with the side of the same level in the new network; a level that it has not gets the side 0."""
    return re.sub(r"\b(\d+)x\1_", lambda at: "{0}x{0}_".format(sides.get(int(at[1]), 0)), name)


def _numbers(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _sides(network: NetworkConfig) -> list[int]:
    return [network.img_resolution >> level for level in range(len(network.channel_mult))]


def _words(sides: list[int]) -> str:
    return ", ".join(map(str, sides))


def _listed(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
