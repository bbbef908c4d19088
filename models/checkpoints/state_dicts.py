"""State dicts from files of torch.save, of any age, or safetensors; nothing in a file is run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ipfm.models.checkpoints.containers import map_file, read_container, shown_path
from ipfm.models.checkpoints.pickle_values import DEFAULT_LIMITS, Inert, Table, shown
from ipfm.models.checkpoints.pickled_objects import GLOBALS, ordered_dict
from ipfm.models.checkpoints.stored_tensors import StoredTensor, finite_float32, stored_tensor


@dataclass(frozen=True)
class StateDict:
    """The named tensors of a file, none of which has been read yet. Made by `open_state_dict`.

    Attributes:
        where: the file, for messages.
        shapes: by name, in the order of the file.
        read: the tensor of a name as it is stored, on the CPU.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    def load(self, name: str) -> Tensor:
        """Tensor `name`: contiguous float32 on the CPU, every value finite; float16 and bfloat16 are widened.

        Raises:
            ValueError: one line that names the file: damage, another dtype, a value that is not finite.
        """
        try:
            values = self.read(name)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{self.where}: {name}: {' '.join(str(error).split())}") from None
        return finite_float32(f"{self.where}: {name}", values)


def open_state_dict(path: Path) -> StateDict:
    """The state dict in the file `path`, which holds nothing else: of torch.save (.pth, .pt) or of safetensors.

    The kinds are told apart by content.

    Raises:
        ValueError: anything else; one line that names the file.
    """
    where, data = shown_path(path), map_file(path)
    # A safetensors file: eight bytes of length, then JSON.
    if bytes(data[8:9]) == b"{":
        return _open_safetensors(path, where)
    root = read_container(data, _GLOBALS, where=where, limits=DEFAULT_LIMITS, path=path).root
    if not isinstance(root, dict):
        raise ValueError(f"{where} holds {shown(root)} instead of named tensors")
    tensors: dict[str, StoredTensor] = {}
    for name, value in root.items():
        tensor = value.data if isinstance(value, _Parameter) else value
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise ValueError(f"{where}: {shown(name)} is {shown(tensor)} instead of a tensor")
        tensors[name] = tensor
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return StateDict(where, shapes, lambda name: tensors[name].load())


def _open_safetensors(path: Path, where: str) -> StateDict:
    try:
        file = safe_open(str(path), framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{where} is no safetensors file: {' '.join(str(error).split())}") from None
    return StateDict(where, shapes, file.get_tensor)


class _Parameter(Inert):
    """A parameter as torch before 0.4 wrote it; its state is requires_grad, volatile and hooks."""

    def __init__(self, data: StoredTensor) -> None:
        self.data = data

    def set_state(self, state: object) -> None:
        if type(state) is not tuple or len(state) != 3:
            raise ValueError("the state of a parameter is damaged")


def _parameter(data: object) -> _Parameter:
    if not isinstance(data, StoredTensor):
        raise ValueError(f"a parameter consists of {shown(data)}")
    return _Parameter(data)


def _rebuild_tensor(storage: object, offset: object, shape: object, stride: object) -> StoredTensor:
    return stored_tensor(storage, offset, shape, stride)


_SHARED = (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"))
_GLOBALS: Table = {
    **{name: GLOBALS[name] for name in _SHARED},
    ("collections", "OrderedDict"): ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch.nn.parameter", "Parameter"): _parameter,
}
"""All that a state dict may ask for, besides torch's storage classes."""
