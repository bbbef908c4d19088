"""Networks on disk, in a format of our own: a folder with config.json and model.safetensors.

config.json:
    format, version   what this is
    class             of the network
    network           its NetworkConfig
    dtype             of its parameters
    sha256            of model.safetensors, so that damage and mixed-up files are noticed
    extra             what the writer says of the weights (noise levels, training), see `ipfm.models.facts`

No code is stored and none is run. A folder is written beside its final place and renamed, so that a reader finds
either the old network or the new one, whole, whatever interrupts the writer.
"""

import hashlib
import json
import mmap
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ipfm.models.atomic_files import atomic_folder, previous_of, sync, write_durably
from ipfm.models.checkpoints.recognise import cut_short, is_checkpoint, missing, user_path, what_folder, what_pointer
from ipfm.models.checkpoints.run_models import locate
from ipfm.models.config import NetworkConfig, PrecondType
from ipfm.models.facts import GeneratorFacts, TeacherFacts, read_facts
from ipfm.models.json_values import from_json, to_json
from ipfm.models.precond import Precond, build_network

CONFIG_FILE = "config.json"
# In a checkpoint of a run: what config.json of a model folder would say of the average in it.
AVERAGED_FILE = "averaged.json"
TENSOR_FILE = "model.safetensors"
_FORMAT = "ipfm-network"
_VERSION = 1
_CLASSES: tuple[PrecondType, ...] = get_args(PrecondType)
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StoredConfig:
    """What config.json of a stored network says.

    Attributes:
        class_name: of the network.
        network: its configuration.
        dtype: of its parameters.
        sha256: of model.safetensors.
        folder: where both files lie.
        extra: what the writer said of the weights, JSON values with infinite numbers as numbers.
        tensor_file: name of the file with the weights, whose checksum is `sha256`.
        buffers: of the average in an older checkpoint: the file that has its buffers, and that file's SHA-256.
        averages: of a checkpoint that has several averages, by name what their tensors' names begin with.
        average: what those of the average that is taken begin with.
    """

    class_name: str
    network: NetworkConfig
    dtype: torch.dtype
    sha256: str
    folder: Path
    extra: dict[str, Any] = field(default_factory=dict)
    tensor_file: str = TENSOR_FILE
    buffers: tuple[Path, str] | None = None
    averages: Mapping[str, str] = field(default_factory=dict)
    average: str = "ema"

    @property
    def facts(self) -> TeacherFacts | GeneratorFacts:
        """`extra`, by name."""
        return read_facts(self.extra)


def save_model(
    net: Precond,
    folder: str | os.PathLike[str],
    *,
    extra: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a network to a folder, replacing one stored there before, all or nothing. A symbolic link stays one.

    One process at a time may write to a folder.

    Args:
        net: the network.
        folder: the folder.
        extra: facts to keep beside the weights: JSON values, infinite numbers included; see `ModelFacts.to_json`.
        state: values to store instead of the network's own (an average of the weights, weights gathered from other
            processes), by the names of its state dict.

    Raises:
        ValueError: `folder` is a file or holds other files, which replacing would delete, `state` does not fit, or
            `extra` is no JSON.
        OSError: the disk refuses.
    """
    target = user_path(folder).resolve()
    if reason := in_the_way(target):
        raise ValueError(f"{reason}: name another folder")
    tensors = _tensors_to_store(net, state)
    about = _description(net.config, _dtype_name(_parameter_dtype(net, tensors)))
    facts = to_json(dict(extra or {}), "extra")
    json.dumps(facts, allow_nan=False)

    with atomic_folder(target) as partial:
        sha256 = write_tensors(partial / TENSOR_FILE, tensors)
        text = json.dumps({**about, "sha256": sha256, "extra": facts}, indent=2, allow_nan=False) + "\n"
        write_durably(partial / CONFIG_FILE, text.encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file and sync it; for a folder that is renamed as a whole afterwards. Nothing is copied.

    Args:
        path: the file.
        tensors: on the CPU, contiguous, none of them in the memory of another.

    Returns:
        Its SHA-256.

    Raises:
        OSError: the disk refuses.
    """
    try:
        safetensors.torch.save_file(dict(tensors), path)
    except SafetensorError as error:
        # How safetensors tells that the disk refuses.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise OSError(str(error)) from error
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    sync(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_average(
    network: NetworkConfig, name: str, extra: Mapping[str, Any], averages: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a checkpoint says in `AVERAGED_FILE` of the average in it.

    Args:
        network: its architecture.
        name: of the network whose average it is: its file is NAME.safetensors.
        extra: as in `save_model`.
        averages: where there are several, by name what their tensors' names begin with in that file; the first is
            the one that is taken.

    Raises:
        ValueError: `extra` is no JSON.
    """
    several = {"averages": dict(averages)} if averages else {}
    return {**_description(network, "float32"), "tensors": name, **several, "extra": to_json(dict(extra), "extra")}


def read_config(folder: str | os.PathLike[str]) -> StoredConfig:
    """What is stored in a folder, without reading the weights.

    Args:
        folder: a model folder, or a checkpoint of a run, of which it is the average.

    Raises:
        ValueError: one line that names the file that is missing or damaged.
    """
    return _read_config(_existing(user_path(folder)))


def load_model(
    folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", which: str | int | None = None
) -> Precond:
    """The network stored in a folder, in the dtype it was stored in and in eval mode.

    Args:
        folder: a model folder, or a checkpoint of a run, of which the average is taken; or a run folder, of which a
            warning says what was taken.
        device: where the network is to be.
        which: of a run: "best", "last" or a step; see `locate`.

    Raises:
        ValueError: one line that names the file, where anything is missing, damaged or does not fit together.
    """
    return load_stored(read_config(located(folder, which)), device=device)


def located(path: str | os.PathLike[str], which: str | int | None = None, *, teacher: bool = False) -> Path:
    """Where the network is that `path` means; of a run folder a warning says what was taken. As `locate`.

    Args:
        path: a file or folder.
        which: of a run.
        teacher: a teacher is wanted.

    Raises:
        ValueError: the run has no such network.
    """
    found = locate(path, which, teacher=teacher)
    if said := found.said("which={!r}"):
        warnings.warn(said, stacklevel=3)
    return found.path


def load_stored(stored: StoredConfig, *, device: torch.device | str = "cpu") -> Precond:
    """The network whose config.json has been read; as `load_model`.

    Args:
        stored: from `read_config`.
        device: where the network is to be.

    Raises:
        ValueError: one line that names the file: the weights are missing, damaged or do not fit.
    """
    try:
        tensors = _tensors_of(stored)
    except ValueError:
        # A run that goes on may have replaced the folder since its config.json was read.
        newer = _replaced(stored)
        if newer is None:
            raise
        stored, tensors = newer, _tensors_of(newer)
    path = stored.folder / stored.tensor_file
    with torch.device("meta"):
        net = build_network(stored.network)
    net.to(stored.dtype)
    _check_fit(tensors, net.state_dict(), str(path))
    net.to_empty(device=device)
    net.facts = stored.facts
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {CONFIG_FILE}: {' '.join(str(error).split())}") from None
    return net.eval()


def _existing(folder: Path) -> Path:
    """`folder`, or what a writer that was stopped between its two renames left in its stead."""
    try:
        if not folder.exists() and previous_of(folder).is_dir():
            return previous_of(folder)
    except RuntimeError:
        raise ValueError(f"{folder} is a link that leads back to itself") from None
    readable = f"what can be read: a folder with {CONFIG_FILE} and {TENSOR_FILE}"
    if not folder.exists():
        raise ValueError(f"{missing(folder)}; {readable}, a run folder, or a published checkpoint")
    if not folder.is_dir():
        kind, more = "neither file nor folder", ""
        if folder.is_file():
            kind, more = "a file", "; load_teacher and load_network read checkpoints"
        raise ValueError(f"{folder} is {kind}; {readable}{more}")
    if is_checkpoint(folder):
        return folder
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            what = what_folder(folder)
            raise ValueError(f"{folder} is no model: {what}" if what else f"{folder} has no {name}; {readable}")
    return folder


def in_the_way(target: Path) -> str:
    """What keeps a network from being stored in `target`: a file, or what replacing it would delete; "" if nothing."""
    if not target.exists():
        return ""
    if not target.is_dir():
        return f"{target} is a file; a network is stored as a folder"
    foreign = sorted(entry.name for entry in target.iterdir() if entry.name not in (CONFIG_FILE, TENSOR_FILE))
    return f"{target} holds {foreign[0]!r}, which storing a network there would delete" if foreign else ""


def _tensors_to_store(net: Precond, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    own = net.state_dict()
    given = own if state is None else state
    if state is not None:
        _check_names_and_shapes(given, own, "the state to store")
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in given.items():
        tensor = tensor.detach().to("cpu")
        memory = tensor.untyped_storage()
        # Those that share memory, as views of one flat buffer do, cannot be stored as they are.
        if not tensor.is_contiguous() or memory.nbytes() != tensor.nbytes or memory.data_ptr() in taken:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _parameter_dtype(net: Precond, tensors: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {tensors[name].dtype for name, _ in net.named_parameters()}
    if len(dtypes) != 1:
        raise ValueError(f"the parameters must be of one dtype to be stored, got {', '.join(sorted(map(str, dtypes)))}")
    return dtypes.pop()


def _dtype_name(dtype: torch.dtype) -> str:
    for name, known in _DTYPES.items():
        if dtype == known:
            return name
    raise ValueError(f"parameters of {dtype} cannot be stored; possible: {', '.join(_DTYPES)}")


def _replaced(stored: StoredConfig) -> StoredConfig | None:
    """What the folder says by now, if that is another network of the same architecture."""
    try:
        found = _read_config(_existing(stored.folder))
    except ValueError:
        return None
    return found if found.sha256 != stored.sha256 and found.network == stored.network else None


def _tensors_of(stored: StoredConfig) -> dict[str, Tensor]:
    """The state dict. Of a checkpoint the average, with its buffers."""
    path = stored.folder / stored.tensor_file
    if stored.tensor_file == TENSOR_FILE:
        return _read_tensors(path, stored.sha256)
    found = _read_average(path, stored)
    if any(name.endswith(".lora_A") for name in found):
        raise ValueError(
            f"{stored.folder} holds low-rank factors, which are no network without their teacher's weights; its run "
            "exports whole ones, as generator, generator-best and snapshots"
        )
    if stored.buffers is not None:
        path, sha256 = stored.buffers
        with torch.device("meta"):
            parameters = dict(build_network(stored.network).named_parameters())
        found |= {name: value for name, value in _read_tensors(path, sha256).items() if name not in parameters}
    return found


def _read_checkpoint(folder: Path) -> StoredConfig:
    """What a checkpoint of a run says of the average in it; one of an older version is told by its run's networks."""
    path, manifest = folder / AVERAGED_FILE, _object(folder / "manifest.json")
    if path.name not in manifest:
        return _read_older_checkpoint(folder, manifest)
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {_one_line(error)}") from None
    if hashlib.sha256(payload).hexdigest() != manifest[path.name]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not that of manifest.json")
    data = _object(path)
    stored = _parsed(path, data, {"tensors": str})
    name = f"{data['tensors']}.safetensors"
    if name not in manifest or Path(name).name != name:
        raise ValueError(f"{path} names the network {data['tensors']!r}, which the checkpoint does not hold")
    averages = data.get("averages")
    averages = averages if isinstance(averages, dict) and all(isinstance(v, str) for v in averages.values()) else {}
    return replace(stored, folder=folder, tensor_file=name, sha256=str(manifest[name]), averages=averages)


def _read_older_checkpoint(folder: Path, manifest: Mapping[str, Any]) -> StoredConfig:
    """The same where the checkpoint says nothing of its network, but its run has exported one like it."""
    run = folder.resolve().parent.parent
    kept = [run / name for name in ("generator", "generator-best", "model", "model-best")]
    like = next((place for place in kept if (place / CONFIG_FILE).is_file() and (place / TENSOR_FILE).is_file()), None)
    name = next((name for name in ("generator.safetensors", "teacher.safetensors") if name in manifest), None)
    if like is None or name is None:
        raise ValueError(
            f"{folder} does not say which network it is of, as checkpoints of version 0.1 do not, and its run has "
            "exported none: the recipe that made it continues it, and exports one at its end"
        )
    stored = _read_config(like)
    step = _object(folder / "progress.json").get("step")
    extra = {key: value for key, value in stored.extra.items() if key not in ("measured", "optimizer_steps")}
    buffers = (like / TENSOR_FILE, stored.sha256)
    return replace(
        stored,
        folder=folder,
        dtype=torch.float32,
        tensor_file=name,
        sha256=str(manifest[name]),
        extra={**extra, "optimizer_steps": step},
        buffers=buffers,
    )


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError: there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {_one_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} cannot be read as JSON: it holds no object")
    return found


def _read_config(folder: Path) -> StoredConfig:
    if is_checkpoint(folder):
        return _read_checkpoint(folder)
    path = folder / CONFIG_FILE
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        what = None if isinstance(error, OSError) else what_pointer(path.read_bytes())
        raise ValueError(f"{path} cannot be read as JSON: {what or _one_line(error)}") from None
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        if what := what_folder(folder):
            raise ValueError(f"{folder} is no model: {what}")
        raise ValueError(f'{path} does not describe a stored network (no "format": "{_FORMAT}")')
    return _parsed(path, data, {"sha256": str})


def _description(network: NetworkConfig, dtype: str) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "class": network.precond,
        "network": network.to_json(),
        "dtype": dtype,
    }


def _parsed(path: Path, data: Mapping[str, Any], more: Mapping[str, type]) -> StoredConfig:
    """What the file `path` says, whose object `data` is; `more`: further entries that it must have."""
    if data.get("version") != _VERSION:
        raise ValueError(f"{path} is of version {data.get('version')!r}; what can be read: version {_VERSION}")
    expected: dict[str, type] = {"class": str, "network": dict, "dtype": str, **more, "extra": dict}
    for key, kind in expected.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(f"{path}: {key!r} must be a {kind.__name__}, got {data.get(key)!r}")
    for key, possible in (("class", _CLASSES), ("dtype", _DTYPES)):
        if data[key] not in possible:
            raise ValueError(f"{path}: {key} {data[key]!r} is unknown; possible: {', '.join(possible)}")
    try:
        network = NetworkConfig.from_json(data["network"])
        if network.precond != data["class"]:
            raise ValueError(f"class is {data['class']}, but the network describes {network.precond}")
        return StoredConfig(
            class_name=data["class"],
            network=network,
            dtype=_DTYPES[data["dtype"]],
            sha256=data.get("sha256", ""),
            folder=path.parent,
            extra=from_json(data["extra"]),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@contextmanager
def opened(stored: StoredConfig) -> Iterator[tuple[tuple[str, ...], Callable[[str], Tensor]]]:
    """The names of a stored network's tensors, and what reads one of them, in the dtype of the file.

    Args:
        stored: from `read_config`.

    Raises:
        ValueError: one line that names the file: it is missing or damaged.
    """
    path = stored.folder / stored.tensor_file
    in_checkpoint = stored.tensor_file != TENSOR_FILE
    try:
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256
        if not whole:
            raise _not_these(path, "manifest.json" if in_checkpoint else CONFIG_FILE)
        with safetensors.safe_open(path, "pt") as tensors:
            kept = (f"{stored.average}/", "buffer/") if in_checkpoint else ("",)
            found = [name for name in tensors.keys() if name.startswith(kept)]  # noqa: SIM118
            places = {name.partition("/")[2] if in_checkpoint else name: name for name in found}
            yield tuple(places), lambda name: tensors.get_tensor(places[name])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {_one_line(error)}") from None


def _read_average(path: Path, stored: StoredConfig) -> dict[str, Tensor]:
    """The average and the buffers in a checkpoint's file, which holds several times as much."""
    found = _read_tensors(path, stored.sha256, (f"{stored.average}/", "buffer/"), listed="manifest.json")
    return {name.partition("/")[2]: tensor for name, tensor in found.items()}


def _read_tensors(
    path: Path, sha256: str, kept: tuple[str, ...] = ("",), *, listed: str = CONFIG_FILE
) -> dict[str, Tensor]:
    """The tensors whose names begin with one of `kept`: of the file itself, read as they are used.

    Raises:
        ValueError: it cannot be read, or is not the file whose checksum `listed` has.
    """
    try:
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {_one_line(error)}") from None
    if not whole:
        raise _not_these(path, listed)
    try:
        with safetensors.safe_open(path, "pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith(kept)]  # noqa: SIM118
            return {name: tensors.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no safetensors file: {_one_line(error)}") from None


def _not_these(path: Path, listed: str) -> ValueError:
    """What the file is whose checksum is not the one that the file `listed` has."""
    sum_differs = f"its SHA-256 is not that of {listed}"
    with path.open("rb") as file:
        payload = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
        return _not_the_bytes(path, memoryview(payload), sum_differs)


def _not_the_bytes(path: Path, payload: memoryview, sum_differs: str) -> ValueError:
    if what := what_pointer(payload):
        return ValueError(f"{path} holds no weights: {what} ({sum_differs})")
    if cut_short(payload):
        return ValueError(f"{path} is cut short, as after a copy that was interrupted ({sum_differs})")
    return ValueError(f"{path} is damaged or belongs to another network: {sum_differs}")


def _check_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    _check_names_and_shapes(tensors, expected, where)
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name].dtype:
            raise ValueError(f"{where}: {name} is {tensor.dtype}, expected {expected[name].dtype}")


def _check_names_and_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    for names, what in ((missing, "lacks"), (unknown, "has the unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{where} {what} tensor {names[0]}{more}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
