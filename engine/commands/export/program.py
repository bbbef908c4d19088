"""Export to plain PyTorch: a `torch.export` program, which runs wherever torch does, without this package."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram

from ipfm.engine.commands.export.comparison import ExportFailed, largest_difference
from ipfm.engine.commands.export.network import ExportedNetwork
from ipfm.models.atomic_files import atomic_write

# Under which the archive keeps the facts.
FACTS_FILE = "facts.json"
_ASSERTION = torch.ops.aten._assert_tensor_metadata.default


def make_program(network: ExportedNetwork) -> ExportedProgram:
    """The program of `network.function`, for every batch size from 1 on, of torch's own operators alone.

    Raises:
        ExportFailed: other operators would be needed.
    """
    inputs = network.fresh(2, seed=0)
    batch = Dim("batch", min=1)
    with torch.no_grad(), quiet():
        program = torch.export.export(
            network.function, tuple(inputs.values()), dynamic_shapes={name: {0: batch} for name in inputs}, strict=False
        )
    foreign = foreign_operators(program)
    if foreign:
        raise ExportFailed(f"the network cannot be exported: plain PyTorch lacks {', '.join(foreign)}")
    _tidy(program)
    return program


def foreign_operators(program: ExportedProgram) -> list[str]:
    """Names of the operators in `program` that torch itself does not bring."""
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    return sorted(
        {str(t) for t in targets if isinstance(t, OpOverload) and t.namespace not in ("aten", "prim", "prims")}
    )


def export_program(network: ExportedNetwork, program: ExportedProgram, path: Path) -> float:
    """Write `program`, made of `network`, and its facts to the file `path`, replaced whole or not at all.

    Returns:
        The largest difference between what the file computes and the network, see `largest_difference`.

    Raises:
        ExportFailed: it computes something else; `path` is what it was.
        OSError: the disk refuses.
    """
    with atomic_write(path) as file:
        return save_program(network, program, file)


def save_program(network: ExportedNetwork, program: ExportedProgram, file: IO[bytes]) -> float:
    """Write the program to an open file that has a name, and compare what can be read there with the network.

    Returns:
        As `export_program`.

    Raises:
        ExportFailed: as `export_program`.
        OSError: the disk refuses.
    """
    with quiet():
        torch.export.save(program, file, extra_files={FACTS_FILE: network.facts_json()})
        file.flush()
        with open(file.name, "rb") as written:
            net = torch.export.load(written).module()

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = net(*inputs.values())
        return out

    return largest_difference(network, run)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the exporters say about themselves, by warnings and logs, to themselves."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def _tidy(program: ExportedProgram) -> None:
    """Take out what the tracing left.

    These are checks of dtype and device, of which the latter would bind it to the CPU, unused nodes, and stack traces,
    which name paths of this machine.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is _ASSERTION:
            graph.erase_node(node)
        node.meta.pop("stack_trace", None)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
