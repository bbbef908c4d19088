"""The objects in checkpoints of the EDM family: what stands for them here, and the networks among them.

Networks are pickled as whole objects: a call of a function of the training code with a dictionary that also holds the
source text of their classes. The text is dropped unread; class name and attributes are kept as a `Record`.

Layers of SiDA's generators have a hook, a method of the layer itself, so that a layer contains itself. What stands for
the hook is empty, and nothing behind it is looked at.
"""

import math
import struct
from collections.abc import Iterator

from ipfm.models.checkpoints.pickle_values import Inert, Table, shown
from ipfm.models.checkpoints.stored_tensors import Blob, StoredTensor, stored_tensor

_META = {"type", "version", "module_src", "class_name", "state"}
_MAX_MODULE_DEPTH = 16
MAX_TENSORS = 20_000


class Record(Inert):
    """An object of a foreign class: its class name and its attributes."""

    def __init__(self, class_name: str, state: dict[str, object]) -> None:
        self.class_name = class_name
        self.state = state

    def children(self) -> tuple[object, ...]:
        return (self.state,)

    def mapping(self, name: str) -> dict[str, object]:
        """Attribute `name`, a dictionary with names as keys.

        Raises:
            ValueError: it is something else.
        """
        found = self.state.get(name)
        if not isinstance(found, dict) or not all(type(key) is str for key in found):
            raise ValueError(f"an object of class {shown(self.class_name)} has no usable {name}")
        return found

    @property
    def is_module(self) -> bool:
        """Whether this is a network or a part of one."""
        return all(name in self.state for name in ("_parameters", "_buffers", "_modules"))


class _ModuleDict(Record):
    def __init__(self) -> None:
        super().__init__("ModuleDict", {})

    def set_state(self, state: object) -> None:
        if not isinstance(state, dict) or self.state:
            raise ValueError("the state of a ModuleDict is damaged")
        self.state = state


class OrderedDict(Inert, dict[str, object]):
    """The dictionary of a state dict; torch sets its attribute _metadata, the versions of the layers."""

    def set_state(self, state: object) -> None:
        """See `Inert.set_state`."""
        if type(state) is not dict or set(state) != {"_metadata"}:
            raise ValueError(f"an OrderedDict has the state {shown(state)} instead of _metadata")


class _EasyDict(Inert, dict[object, object]):
    """A dictionary; its items are set like those of any other."""


class _NumpyType(Inert):
    """A plain number type of NumPy."""

    def __init__(self, code: str) -> None:
        self.code = code

    def set_state(self, state: object) -> None:
        # The last numbers are size and alignment, -1 for what the type says itself, and flags.
        if type(state) is not tuple or len(state) < 8 or state[1] not in ("<", "|") or any(state[2:5]):
            raise ValueError("a NumPy type other than a plain number")


_NUMPY = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "u1": "<B", "b1": "<?"}


class Array(Inert):
    """An array of NumPy, of which nothing is kept: EDM2's encoders hold two of four numbers."""

    def set_state(self, state: object) -> None:
        if type(state) is not tuple or len(state) != 5 or state[0] != 1 or type(state[3]) is not bool:
            raise ValueError("the state of a NumPy array is damaged")
        _check_array(state[1], state[2], state[4])


class Hook(Inert):
    """A method of a layer that would be called before its forward pass."""


# The one method that a file may name.
_HOOK_NAME = "_apply_forced_weight_normalization"


def _reconstruct_persistent_obj(meta: object) -> Record:
    if type(meta) is not dict or set(meta) != _META:
        raise ValueError("the record of an object is damaged")
    if meta["type"] != "class" or meta["version"] != 6:
        raise ValueError(
            f"the record of an object is of type {shown(meta['type'])}, version {shown(meta['version'])}; "
            "what can be read: type class, version 6"
        )
    name, state = meta["class_name"], meta["state"]
    if type(name) is not str or not isinstance(state, dict) or not all(type(key) is str for key in state):
        raise ValueError("the record of an object is damaged")
    return Record(name, state)


def _rebuild_parameter(data: object, requires_grad: object, hooks: object) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise ValueError(f"a parameter consists of {shown(data)}")
    return data


def _rebuild_parameter_with_state(data: object, requires_grad: object, hooks: object, state: object) -> StoredTensor:
    return _rebuild_parameter(data, requires_grad, hooks)


def _rebuild_tensor_v2(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object,
    hooks: object,
    metadata: object = None,
) -> StoredTensor:
    return stored_tensor(storage, offset, shape, stride)


def _load_from_bytes(data: object) -> Blob:
    if not isinstance(data, memoryview):
        raise ValueError(f"a stored tensor consists of {shown(data)}")
    return Blob(data)


def ordered_dict(items: object = None) -> OrderedDict:
    """Python 3 makes it empty and sets items, Python 2 hands over pairs."""
    result = OrderedDict()
    for item in items if isinstance(items, list) else []:
        if not isinstance(item, (list, tuple)) or len(item) != 2 or type(item[0]) is not str or item[0] in result:
            raise ValueError("the items of an OrderedDict are damaged")
        result[item[0]] = item[1]
    return result


def _set(items: object) -> set[str]:
    if type(items) is not list or not all(type(item) is str for item in items):
        raise ValueError(f"a set of {shown(items)}")
    return set(items)


def _encode(text: object, encoding: object) -> memoryview:
    if type(text) is not str or encoding != "latin1":
        raise ValueError(f"bytes are written as {shown(text)} in {shown(encoding)}")
    try:
        return memoryview(text.encode("latin1"))
    except UnicodeEncodeError:
        raise ValueError(f"{shown(text)} is not latin1") from None


def _dtype(code: object, align: object, copy: object) -> _NumpyType:
    if type(code) is not str or code not in _NUMPY:
        raise ValueError(f"the NumPy type {shown(code)} is not admitted; possible: {', '.join(_NUMPY)}")
    return _NumpyType(code)


def _scalar(kind: object, content: object) -> int | float | bool:
    if not isinstance(kind, _NumpyType) or not isinstance(content, memoryview):
        raise ValueError("a NumPy number is damaged")
    form = struct.Struct(_NUMPY[kind.code])
    if len(content) != form.size:
        raise ValueError(f"a NumPy number of {len(content)} bytes")
    (value,) = form.unpack(content)
    assert isinstance(value, (int, float))
    return value


def _check_array(shape: object, kind: object, content: object) -> None:
    if (
        type(shape) is not tuple
        or len(shape) > 8
        or not all(type(size) is int and size >= 0 for size in shape)
        or not isinstance(kind, _NumpyType)
        or not isinstance(content, memoryview)
        or math.prod(shape) * struct.calcsize(_NUMPY[kind.code]) != len(content)
    ):
        raise ValueError("a NumPy array is damaged, or is none of plain numbers")


def _array(kind: object, shape: object, code: object) -> Array:
    """An array that gets its shape and elements later."""
    if kind is not Array or shape != (0,) or not isinstance(code, memoryview) or bytes(code) != b"b":
        raise ValueError("a NumPy array is damaged")
    return Array()


def _array_of(content: object, kind: object, shape: object, order: object) -> Array:
    """As protocol 5 has it."""
    if order not in ("C", "F"):
        raise ValueError("a NumPy array is damaged")
    _check_array(shape, kind, content)
    return Array()


def _method(owner: object, name: object) -> Hook:
    """What stands for the method `name` of a layer. Nothing is looked up."""
    if not isinstance(owner, Record) or name != _HOOK_NAME:
        raise ValueError(f"the file asks for the attribute {shown(name)} of {shown(owner)}; nothing of it was run")
    return Hook()


GLOBALS: Table = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _reconstruct_persistent_obj,
    ("torch.nn.modules.container", "ModuleDict"): _ModuleDict,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter_with_state,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("collections", "OrderedDict"): ordered_dict,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): Array,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy.core.numeric", "_frombuffer"): _array_of,
    ("numpy._core.numeric", "_frombuffer"): _array_of,
    ("dnnlib.util", "EasyDict"): _EasyDict,
    ("__builtin__", "set"): _set,
    ("builtins", "set"): _set,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "getattr"): _method,
    ("builtins", "getattr"): _method,
}
"""The complete list of what a checkpoint may ask for, besides torch's storage classes."""


def modules(record: Record) -> Iterator[tuple[str, Record]]:
    """(path, record) of a network and all its parts in the order of its state dict; the path of the network is "".

    Raises:
        ValueError: a part stands in two places, contains itself or is no part.
    """
    yield from _walk("", record, set(), 0)


def _walk(path: str, record: Record, seen: set[int], depth: int) -> Iterator[tuple[str, Record]]:
    if id(record) in seen or depth > _MAX_MODULE_DEPTH:
        raise ValueError(f"the part {shown(path)} of a network stands in two places or too deep")
    seen.add(id(record))
    yield path, record
    for name, child in record.mapping("_modules").items():
        if child is None:
            continue
        if not isinstance(child, Record) or not child.is_module or "." in name:
            raise ValueError(f"{shown(f'{path}.{name}')} is {shown(child)} instead of a part of a network")
        yield from _walk(f"{path}.{name}" if path else name, child, seen, depth + 1)


def own_tensors(record: Record) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """(parameters, buffers) of one part by name, those of its state dict.

    Raises:
        ValueError: the part holds something else.
    """
    hidden = record.state.get("_non_persistent_buffers_set", set())
    if not isinstance(hidden, set):
        raise ValueError(f"an object of class {shown(record.class_name)} has no usable _non_persistent_buffers_set")
    found: list[dict[str, StoredTensor]] = []
    for kind in ("_parameters", "_buffers"):
        tensors: dict[str, StoredTensor] = {}
        for name, tensor in record.mapping(kind).items():
            if tensor is None or (kind == "_buffers" and name in hidden):
                continue
            if not isinstance(tensor, StoredTensor) or "." in name:
                raise ValueError(f"{shown(name)} is {shown(tensor)} instead of a tensor")
            tensors[name] = tensor
        found.append(tensors)
    return found[0], found[1]
