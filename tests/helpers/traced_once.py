"""Programs of networks for `ipfm export`, each traced once: tracing takes longer than what is made of it."""

from __future__ import annotations

from collections.abc import Callable

from safetensors.torch import save
from torch.export import ExportedProgram

from ipfm.engine.commands.export.network import ExportedNetwork


def traced_once(make_program: Callable[[ExportedNetwork], ExportedProgram]) -> Callable[..., ExportedProgram]:
    """One program for a network that is exported several times, to whatever format."""
    programs: dict[bytes, ExportedProgram] = {}

    def make(network: ExportedNetwork) -> ExportedProgram:
        tensors = {name: tensor.detach().clone() for name, tensor in network.net.state_dict().items()}
        key = network.facts_json().encode() + save(tensors)
        if key not in programs:
            programs[key] = make_program(network)
        return programs[key]

    return make
