"""Export to ONNX, through torch's own exporter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ipfm.engine.commands.export.comparison import ExportFailed, largest_difference
from ipfm.engine.commands.export.network import FORMAT, ExportedNetwork
from ipfm.engine.commands.export.program import quiet
from ipfm.models.atomic_files import atomic_write, why

if TYPE_CHECKING:
    from onnx import ModelProto


PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# What protobuf, and so one ONNX file, holds.
MOST_BYTES = 2**31 - 1


def check_onnx(network: ExportedNetwork | None = None) -> None:
    """Check that ONNX can be written here.

    Raises:
        ValueError: packages are missing, or the weights of `network` do not go into one file.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f"the format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    tensors = [] if network is None else [*network.net.parameters(), *network.net.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    if size > MOST_BYTES:
        raise ValueError(f"an ONNX file holds 2 GiB, the network has {size / 2**30:.1f} GiB: take torch or huggingface")


def export_onnx(network: ExportedNetwork, program: ExportedProgram, path: Path) -> float:
    """Write `program`, made of `network`, as a graph and its facts to the file `path`, replaced whole or not at all.

    The graph has the inputs `network.inputs`, of any batch size from 1 on, and the output `network.output`. Each of
    `network.facts` is an entry of the file's metadata: a text as it is, anything else in JSON.

    Returns:
        The largest difference between what onnxruntime computes on the CPU and the network, see `largest_difference`.

    Raises:
        ExportFailed: there is no such graph, or it computes something else; `path` is what it was.
        OSError: the disk refuses.
    """
    payload = _converted(network, program).SerializeToString()
    with atomic_write(path) as file:
        file.write(payload)
        file.flush()
        return largest_difference(network, _Session(file.name, network))


def is_exported(path: Path) -> bool:
    """Whether the file is one that `export_onnx` wrote."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, OSError):
        return False
    return any(entry.key == "format" and entry.value == FORMAT for entry in model.metadata_props)


class _Session:
    """The graph, run by onnxruntime on the CPU."""

    def __init__(self, path: str, network: ExportedNetwork) -> None:
        import onnxruntime

        self._output = network.output
        try:
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # its classes share no base of their own
            raise ExportFailed(f"onnxruntime cannot run the exported graph: {why(error)}") from error

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        (found,) = self._session.run([self._output], arrays)
        return torch.from_numpy(found)


def _converted(network: ExportedNetwork, program: ExportedProgram) -> ModelProto:
    axes = {name: {0: "batch"} for name in network.inputs}
    try:
        with quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                input_names=network.inputs,
                output_names=[network.output],
                dynamic_shapes=axes,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportFailed(f"torch cannot export the network to ONNX: {why(error)}") from error
    assert converted is not None
    model: ModelProto = converted.model_proto
    # What is said of each node repeats the program's code, with paths of this machine.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for name, value in network.facts.items():
        model.metadata_props.add(key=name, value=_text(value))
    return model


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
