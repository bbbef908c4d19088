"""Checkpoints of EDM, PFGM++, SiD and their descendants: which networks a file holds, and reading one of them.

What can be read: EDM's and SiD's network snapshots (.pkl), EDM's, PFGM++'s and SiD's training states (.pt), PFGM++
teachers pickled again (.pkl), and the snapshots and states of both distillation projects built on SiD. They are told
apart by content, not by name. Nothing in a file is run: see `unpickler`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from ipfm.models.checkpoints.containers import ContainerKind, map_file, read_container, shown_path
from ipfm.models.checkpoints.edm_layout import FACTS_ENTRY, facts_in
from ipfm.models.checkpoints.infer_config import network_config, trained_for
from ipfm.models.checkpoints.pickle_values import DEFAULT_LIMITS, Limits, shown
from ipfm.models.checkpoints.pickled_objects import GLOBALS, MAX_TENSORS, Record, modules, own_tensors
from ipfm.models.checkpoints.recognise import generator_by_place, teacher_by_name
from ipfm.models.checkpoints.stored_tensors import StoredTensor, finite_float32
from ipfm.models.checkpoints.validate import blueprint, check_constants, check_parts, check_shapes
from ipfm.models.config import NetworkConfig
from ipfm.models.facts import GeneratorFacts, TeacherFacts

DSource = Literal["file", "caller", "assumed"]
CAN_BE_READ = "a checkpoint of EDM, PFGM++ or SiD (.pkl, .pt)"
_READABLE = f"what can be read: {CAN_BE_READ}"
_FIRST_CHOICES = ("ema", "G_ema")
_LAST_CHOICES = ("net", "G", "generator")
_DISTILLATION_EMA = re.compile(r"ema_(\d)_(\d{1,9})")
_GENERATOR = re.compile(r"G(_ema\d*)?|generator|ema_\d_\d{1,9}")


@dataclass(frozen=True)
class ImportedNetwork:
    """A network of a checkpoint.

    Attributes:
        key: its name in the file.
        class_name: its class there.
        config: what it takes to build it, D included.
        weights: state dict by name, in order: float32, on the CPU, every value finite.
        parameters: names of those that are parameters and no buffers, in the order of optimiser states.
        D_source: where config.D comes from: the file, the caller, or assumed to be inf as neither said anything.
    """

    key: str
    class_name: str
    config: NetworkConfig
    weights: dict[str, Tensor]
    parameters: tuple[str, ...]
    D_source: DSource


@dataclass(frozen=True)
class StreamedNetwork:
    """A network of a file, none of whose tensors is in memory.

    Attributes:
        config: what it takes to build it.
        names: of its tensors, in order.
        parameters: names of those that are parameters and no buffers.
        load: reads the tensor of a name: float32, on the CPU, every value finite.
    """

    config: NetworkConfig
    names: tuple[str, ...]
    parameters: tuple[str, ...]
    load: Callable[[str], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. No tensor has been read yet.

    Attributes:
        where: the file, for messages.
        container: how it is stored.
        origin: which program's file it is, in words.
        networks: by name, in the order of the file.
        entries: everything at the top of the file, networks included.
        size: of the file in bytes.
        file: where it lies, if it is on disk.
        facts: what the file says of its network, if this package wrote it.
    """

    where: str
    container: ContainerKind
    origin: str
    networks: Mapping[str, Record]
    entries: Mapping[str, object]
    size: int
    file: Path | None = None
    facts: TeacherFacts | GeneratorFacts | None = None

    def choose(self, name: str | None = None) -> str:
        """The name of the network to take.

        `name` where it is given. Else the EMA of the weights: `ema`, `G_ema`, or of the EMAs of the older distillation
        project (`ema_0_9990`) the slowest; where there is none `net`, `G` or `generator`.

        Raises:
            ValueError: there is no such one; the message lists the networks in the file.
        """
        if name is None:
            averages = sorted(filter(_DISTILLATION_EMA.fullmatch, self.networks), key=_decay, reverse=True)
            name = next((n for n in (*_FIRST_CHOICES, *averages, *_LAST_CHOICES) if n in self.networks), None)
            if name is None:
                raise ValueError(f"{self.where} has several networks; choose one: {self._names()}")
        if name not in self.networks:
            raise ValueError(f"{self.where} has no network {shown(name)}; possible: {self._names()}")
        return name

    def is_generator(self, name: str) -> bool:
        """Whether the file says that the network is a generator and no denoiser of a teacher; see `why_generator`."""
        return self.why_generator(name) is not None

    def why_generator(self, name: str) -> str | None:
        """By what the network is a generator and no denoiser of a teacher; None where nothing says so.

        By what this package wrote into the file, or by the network's name in it; where that is `ema` and nothing else
        is there, as in EDM's and SiD's snapshots, by the file's name or place (`recognise.generator_by_place`).
        """
        if self.facts is not None:
            return "by what stands in the file" if isinstance(self.facts, GeneratorFacts) else None
        if _GENERATOR.fullmatch(name) is not None:
            return "by its name in the file"
        if list(self.entries) != ["ema"]:
            return None
        return generator_by_place(self.file or Path(self.where))

    def may_be_generator(self, name: str) -> bool:
        """Whether nothing says what the network is: an average alone, in a file whose name and place are nobody's."""
        place = self.file or Path(self.where)
        return list(self.entries) == ["ema"] and self.why_generator(name) is None and not teacher_by_name(place)

    def read(self, name: str | None = None, *, D: float | None = None) -> ImportedNetwork:
        """The network `name`, or the one that `choose` takes.

        Args:
            name: of the network in the file, or None.
            D: auxiliary dimensions it was trained for, for files that do not say; inf where neither says anything.

        Raises:
            ValueError: one line that names file and network: damage, an architecture that is none of the family or
                contradicts the tensors, weights that are not finite, another D than the file's.
        """
        key = self.choose(name)
        check_D(D)
        record = self.networks[key]
        try:
            self._check_length()
            stated = trained_for(record)
            config, tensors, parameters = self._plan(record, stated or D or math.inf)
        except ValueError as error:
            raise ValueError(f"{self.where}: network {shown(key)}: {error}") from None
        if D is not None and stated is not None and stated != D:
            raise ValueError(f"{self.where} was trained for D = {stated:g}, but D = {D:g} was asked for")
        try:
            weights = {name: self._loaded(name, tensor) for name, tensor in tensors.items()}
            check_constants(config, weights)
        except ValueError as error:
            raise ValueError(f"{self.where}: network {shown(key)}: {error}") from None
        source: DSource = "file" if stated is not None else "caller" if D is not None else "assumed"
        return ImportedNetwork(key, record.class_name, config, weights, parameters, source)

    def stream(self, name: str | None = None, *, D: float | None = None) -> StreamedNetwork:
        """As `read`, but that each tensor is read when it is asked for, and again at the next time.

        Args:
            name: as of `read`.
            D: as of `read`.

        Raises:
            ValueError: as of `read`, here or when a tensor is asked for.
        """
        key = self.choose(name)
        check_D(D)
        record = self.networks[key]
        where = f"{self.where}: network {shown(key)}"
        try:
            self._check_length()
            config, tensors, parameters = self._plan(record, trained_for(record) or D or math.inf)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

        def load(tensor: str) -> Tensor:
            try:
                return self._loaded(tensor, tensors[tensor])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None

        return StreamedNetwork(config, tuple(tensors), parameters, load)

    def _loaded(self, name: str, tensor: StoredTensor) -> Tensor:
        self._check_length()
        return _load(name, tensor)

    def _check_length(self) -> None:
        # Reading behind the end of a mapped file ends the process, so that a file that shrinks is looked for.
        if self.file is not None and self.file.exists() and self.file.stat().st_size < self.size:
            raise ValueError("the file was cut short while it was read")

    def _plan(self, record: Record, D: float) -> tuple[NetworkConfig, dict[str, StoredTensor], tuple[str, ...]]:
        """Configuration, tensors by name and parameters' names, everything checked but the elements."""
        parts: dict[str, Record] = {}
        tensors: dict[str, StoredTensor] = {}
        parameters: list[str] = []
        for path, part in modules(record):
            parts[path] = part
            prefix = f"{path}." if path else ""
            own, buffers = own_tensors(part)
            parameters += [prefix + name for name in own]
            for name, tensor in (*own.items(), *buffers.items()):
                if prefix + name in tensors or len(tensors) >= MAX_TENSORS:
                    raise ValueError(f"{shown(prefix + name)} stands there twice, or there are too many tensors")
                tensors[prefix + name] = tensor
        check_bounds(tensors, self.size)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        config = network_config(record, shapes, D=D)
        plan = blueprint(config)
        check_shapes(plan, shapes)
        check_parts(plan, parts)
        return config, tensors, tuple(parameters)

    def _names(self) -> str:
        return ", ".join(shown(name, 30) for name in self.networks)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint file.

    Raises:
        ValueError: anything else; one line that names it and what was found.
    """
    return parse_checkpoint(map_file(path), where=shown_path(path), path=path)


def parse_checkpoint(
    data: bytes | memoryview, *, where: str, limits: Limits = DEFAULT_LIMITS, path: Path | None = None
) -> Checkpoint:
    """The checkpoint in `data`, the content of the whole file at `path`; as `open_checkpoint`."""
    view = memoryview(data)
    container = read_container(view, GLOBALS, where=where, limits=limits, path=path)
    root = container.root
    if not isinstance(root, dict) or not all(type(key) is str for key in root):
        raise ValueError(f"{where} holds {_kind(root)} instead of named networks; {_READABLE}")
    # Names that are no identifiers are none of a training program's, and unfit to be printed.
    networks = {
        name: item
        for name, item in root.items()
        if isinstance(item, Record) and item.is_module and name.isidentifier() and name.isprintable()
    }
    if not networks:
        found = ", ".join(shown(key, 30) for key in list(root)[:8]) or "nothing"
        raise ValueError(f"{where} holds {_state_dict(root) or f'no network, only {found}'}; {_READABLE}")
    try:
        facts = facts_in(root)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Checkpoint(where, container.kind, _origin(container.kind, root), networks, root, len(view), path, facts)


def check_D(D: float | None) -> None:
    """Check that D is None or a number above 0.

    Raises:
        ValueError: it is not.
    """
    if D is not None and not D > 0:
        raise ValueError(f"D must be a number above 0, or inf for diffusion, got {D}")


def check_bounds(tensors: Mapping[str, StoredTensor], size: int) -> None:
    """Check that tensors stay within what is stored, and together are not larger than the file of `size` bytes.

    Raises:
        ValueError: they reach outside, or are larger.
    """
    total = 0
    for name, tensor in tensors.items():
        try:
            total += tensor.numel * tensor.check().itemsize
        except ValueError as error:
            raise ValueError(f"tensor {shown(name)}: {error}") from None
        if total > size:
            raise ValueError(f"its tensors need more than the {size} bytes of the file")


def _load(name: str, tensor: StoredTensor) -> Tensor:
    return finite_float32(name, tensor.load())


def _decay(name: str) -> float:
    found = _DISTILLATION_EMA.fullmatch(name)
    assert found is not None
    return float(f"{found[1]}.{found[2]}")


def _origin(container: ContainerKind, root: Mapping[str, object]) -> str:
    pickled = container == "pickle"
    if FACTS_ENTRY in root:
        return "export of ipfm in EDM's layout"
    if "generator" in root and "student" in root:
        return "snapshot of pfgmpp-distillation"
    if "fake_score" in root and "G_ema990" in root:
        return "training state of pfgmpp-idmd"
    if "fake_score" in root and "G" in root:
        return "training state of SiD"
    if "net" in root and "ema" in root:
        return "PFGM++ training state, pickled again" if pickled else "PFGM++ training state"
    if "net" in root:
        return "EDM training state"
    if "ema" in root and len(root) > 1:
        return "EDM network snapshot"
    if "ema" in root:
        return "network snapshot of EDM or SiD"
    return "checkpoint of an unknown program"


def _state_dict(root: Mapping[str, object]) -> str | None:
    """Says so where a file holds the weights of a network and not the network."""
    for name, entry in (("", root), *root.items()):
        if isinstance(entry, dict) and entry and all(isinstance(value, StoredTensor) for value in entry.values()):
            place = f" under {shown(name)}" if name else ""
            return (
                f"weights alone{place} (a state dict: {shown(next(iter(entry)))} …) and not the network that they fit"
            )
    return None


def _kind(root: object) -> str:
    if isinstance(root, Record):
        return f"an object of class {shown(root.class_name)}"
    return shown(root)
