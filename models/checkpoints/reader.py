"""Checkpoints of EDM, EDM2, PFGM++, SiD and their descendants: which networks a file holds, and reading one of them.

What can be read: EDM's, EDM2's and SiD's network snapshots (.pkl), training states of EDM, EDM2, PFGM++, SiD and SiDA
(.pt), PFGM++ teachers pickled again (.pkl), and the snapshots and states of both distillation projects built on SiD.
They are told apart by content, not by name. Nothing in a file is run: see `unpickler`.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor

from ipfm.models.checkpoints.containers import ContainerKind, map_file, read_container, shown_path
from ipfm.models.checkpoints.edm2_config import GENERATOR, edm2_config, is_edm2, narrow_heads
from ipfm.models.checkpoints.edm_layout import FACTS_ENTRY, facts_in
from ipfm.models.checkpoints.infer_config import network_config, trained_for
from ipfm.models.checkpoints.named_networks import NamedNetwork, Weights, contents, networks_in, stated_dtypes
from ipfm.models.checkpoints.pickle_values import DEFAULT_LIMITS, Limits, shown
from ipfm.models.checkpoints.pickled_objects import GLOBALS, Array, Record
from ipfm.models.checkpoints.published import Published, published
from ipfm.models.checkpoints.recognise import generator_by_place, teacher_by_name
from ipfm.models.checkpoints.stored_tensors import StoredTensor, finite_float32
from ipfm.models.checkpoints.validate import blueprint, check_constants, check_parts, check_shapes
from ipfm.models.config import NetworkConfig
from ipfm.models.facts import GeneratorFacts, TeacherFacts

DSource = Literal["file", "caller", "assumed"]
CAN_BE_READ = "a checkpoint of EDM, EDM2, PFGM++ or SiD (.pkl, .pt)"
_READABLE = f"what can be read: {CAN_BE_READ}"
_FIRST_CHOICES = ("ema", "G_ema", "G_ema_state")
_LAST_CHOICES = ("net", "G", "G_state", "generator")
_DISTILLATION_EMA = re.compile(r"ema_(\d)_(\d{1,9})")
_STATE = re.compile(r"training-state-(\d{1,12})\.pt")
_GENERATOR = re.compile(r"G(_ema\d*)?(_state)?|generator|ema_\d_\d{1,9}")


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
        dtypes: what the tensors are stored in, e.g. "float16".
    """

    key: str
    class_name: str
    config: NetworkConfig
    weights: dict[str, Tensor]
    parameters: tuple[str, ...]
    D_source: DSource
    dtypes: str = "float32"


@dataclass(frozen=True)
class StreamedNetwork:
    """A network of a file, none of whose tensors is in memory.

    Attributes:
        key: its name in the file.
        config: what it takes to build it.
        names: of its tensors, in order.
        parameters: names of those that are parameters and no buffers.
        load: reads the tensor of a name: float32, on the CPU, every value finite.
    """

    key: str
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
    networks: Mapping[str, NamedNetwork]
    entries: Mapping[str, object]
    size: int
    file: Path | None = None
    facts: TeacherFacts | GeneratorFacts | None = None

    def choose(self, name: str | None = None) -> str:
        """The name of the network to take.

        `name` where it is given. Else the EMA of the weights: `ema`, `G_ema`, or of the EMAs of the older distillation
        project (`ema_0_9990`) and of EDM2's training states (`ema_0.100`) the slowest; where there is none `net`, `G`
        or `generator`.

        Raises:
            ValueError: there is no such one; the message lists the networks in the file.
        """
        if name is None:
            averages = sorted(filter(_DISTILLATION_EMA.fullmatch, self.networks), key=_decay, reverse=True)
            averages += [name for name, _ in sorted(self.averages.items(), key=lambda found: -found[1])]
            name = next((n for n in (*_FIRST_CHOICES, *averages, *_LAST_CHOICES) if n in self.networks), None)
            if name is None:
                raise ValueError(f"{self.where} has several networks; choose one: {self._names()}")
        if name not in self.networks:
            raise ValueError(f"{self.where} has no network {shown(name)}; possible: {self._names()}")
        return name

    @property
    def averages(self) -> dict[str, float]:
        """The power-function averages of EDM2's training states by name, and their relative widths."""
        widths = {name: net.std for name, net in self.networks.items() if isinstance(net, Weights)}
        return {name: std for name, std in widths.items() if std is not None}

    def is_generator(self, name: str) -> bool:
        """Whether the file says that the network is a generator and no denoiser of a teacher; see `why_generator`."""
        return self.why_generator(name) is not None

    def why_generator(self, name: str) -> str | None:
        """By what the network is a generator and no denoiser of a teacher; None where nothing says so.

        By what this package wrote into the file, or by the network's name in it or its class; where that is `ema` and
        nothing else is there, as in EDM's and SiD's snapshots, by the file's name or place
        (`recognise.generator_by_place`).
        """
        if self.facts is not None:
            return "by what stands in the file" if isinstance(self.facts, GeneratorFacts) else None
        if _GENERATOR.fullmatch(name) is not None:
            return "by its name in the file"
        if self.networks[name].class_name == GENERATOR:
            return f"by its class {GENERATOR}"
        if list(self.entries) != ["ema"]:
            return None
        return generator_by_place(self.file or Path(self.where))

    def may_be_generator(self, name: str) -> bool:
        """Whether nothing says what the network is: an average alone, in a file whose name and place are nobody's."""
        place = self.file or Path(self.where)
        return list(self.entries) == ["ema"] and self.why_generator(name) is None and not teacher_by_name(place)

    def published(self, network: "ImportedNetwork | StreamedNetwork") -> Published | None:
        """What is known of a network of EDM2's family beside its architecture; None of any other.

        Args:
            network: from `read` or `stream`.
        """
        if not network.config.is_edm2:
            return None
        state = self.entries.get("state")
        images = state.get("cur_nimg") if isinstance(state, dict) else None
        return published(
            network.config,
            self.entries,
            self.file or Path(self.where),
            std=self.averages.get(network.key),
            images=images if type(images) is int and images >= 0 else None,
            generator=self.is_generator(network.key),
        )

    def source_facts(self, network: "ImportedNetwork | StreamedNetwork") -> dict[str, str]:
        """What facts say of the file that a network of EDM2's family is from, beside its name; of others nothing.

        Args:
            network: from `read` or `stream`.
        """
        known = self.published(network)
        if known is None:
            return {}
        said = {"encoder": known.encoder, "ema_std": known.std, "kimg": known.kimg}
        return {name: f"{value}" for name, value in said.items() if value is not None}

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
        network = self.networks[key]
        try:
            self._check_length()
            stated = self._stated(key)
            plan = self._plan(network, stated or D or math.inf)
        except ValueError as error:
            raise ValueError(f"{self.where}: network {shown(key)}: {error}") from None
        if D is not None and stated is not None and stated != D:
            raise ValueError(f"{self.where} was trained for D = {stated:g}, but D = {D:g} was asked for")
        try:
            weights = {name: self._loaded(name, tensor) for name, tensor in plan.tensors.items()}
            check_constants(plan.config, weights)
        except ValueError as error:
            raise ValueError(f"{self.where}: network {shown(key)}: {error}") from None
        source: DSource = "file" if stated is not None else "caller" if D is not None else "assumed"
        return ImportedNetwork(
            key, network.class_name, plan.config, weights, plan.parameters, source, stated_dtypes(plan.tensors)
        )

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
        where = f"{self.where}: network {shown(key)}"
        try:
            self._check_length()
            plan = self._plan(self.networks[key], self._stated(key) or D or math.inf)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

        def load(tensor: str) -> Tensor:
            try:
                return self._loaded(tensor, plan.tensors[tensor])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None

        return StreamedNetwork(key, plan.config, tuple(plan.tensors), plan.parameters, load)

    def _stated(self, key: str) -> float | None:
        """The D that the file states for a network; a state dict states none. ValueError: it contradicts itself."""
        network = self.networks[key]
        return trained_for(network) if isinstance(network, Record) else None

    def _loaded(self, name: str, tensor: StoredTensor) -> Tensor:
        self._check_length()
        return _load(name, tensor)

    def _check_length(self) -> None:
        # Reading behind the end of a mapped file ends the process, so that a file that shrinks is looked for.
        if self.file is not None and self.file.exists() and self.file.stat().st_size < self.size:
            raise ValueError("the file was cut short while it was read")

    def _plan(self, network: NamedNetwork, D: float) -> "_Plan":
        """What the network is, everything checked but the elements."""
        found = contents(network)
        check_bounds(found.tensors, self.size)
        shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
        if isinstance(network, Record) and not is_edm2(network):
            config = network_config(network, shapes, D=D)
        else:
            like = self._beside if isinstance(network, Weights) else None
            config = edm2_config(network, shapes, D=D, like=like)
            if isinstance(network, Weights) and like is None and narrow_heads(config):
                warnings.warn(
                    f"{self.where} does not say how wide its attention heads are: {config.channels_per_head} channels "
                    "are assumed; a network-snapshot-*.pkl of the same training, beside it, would say it",
                    stacklevel=4,
                )
        plan = blueprint(config)
        check_shapes(plan, shapes)
        check_parts(plan, found.parts)
        return _Plan(config, found.tensors, plan.parameters if found.parameters is None else found.parameters)

    @cached_property
    def _beside(self) -> Record | None:
        """The network of a snapshot beside this training state of EDM2, which says what state dicts do not."""
        state = None if self.file is None else _STATE.fullmatch(self.file.name)
        if self.file is None or state is None:
            return None
        found = sorted(self.file.parent.glob("network-snapshot-*.pkl"))
        # Those of the same number first, then the newest.
        for place in sorted(found, key=lambda place: f"-{state[1]}-" in place.name)[::-1][:4]:
            with contextlib.suppress(ValueError):
                network = open_checkpoint(place).networks.get("ema")
                if isinstance(network, Record) and is_edm2(network):
                    return network
        return None

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
    try:
        networks = networks_in(root)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not networks:
        found = ", ".join(shown(key, 30) for key in list(root)[:8]) or "nothing"
        raise ValueError(f"{where} holds {_state_dict(root) or f'no network, only {found}'}; {_READABLE}")
    try:
        facts = facts_in(root)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    origin = _origin(container.kind, root, networks)
    return Checkpoint(where, container.kind, origin, networks, root, len(view), path, facts)


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
    return finite_float32(name, tensor.load(widened=True))


def _decay(name: str) -> float:
    found = _DISTILLATION_EMA.fullmatch(name)
    assert found is not None
    return float(f"{found[1]}.{found[2]}")


@dataclass(frozen=True)
class _Plan:
    """A network to be read: its configuration, its tensors by name in order, and which of them are parameters."""

    config: NetworkConfig
    tensors: dict[str, StoredTensor]
    parameters: tuple[str, ...]


def _origin(container: ContainerKind, root: Mapping[str, object], networks: Mapping[str, NamedNetwork]) -> str:
    pickled = container == "pickle"
    edm2 = any(is_edm2(network) for network in networks.values())
    if FACTS_ENTRY in root:
        return f"export of ipfm in {'EDM2' if edm2 else 'EDM'}'s layout"
    if edm2:
        return _origin_of_edm2(root, networks)
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


def _origin_of_edm2(root: Mapping[str, object], networks: Mapping[str, NamedNetwork]) -> str:
    if "fake_score_state" in root:
        return "training state of SiD or SiDA for EDM2"
    if "net" in networks and "optimizer" in root:
        return "EDM2 training state"
    if root.keys() == {"ema"}:
        generator = networks["ema"].class_name == GENERATOR
        return "network snapshot of SiD or SiDA for EDM2" if generator else "network of EDM2 alone"
    return "EDM2 network snapshot" if "ema" in root else "weights of EDM2's networks"


def _state_dict(root: Mapping[str, object]) -> str | None:
    """Says so where a file holds the weights of a network and not the network."""
    if any(_has_arrays(entry) for entry in root.values()):
        return "arrays of NumPy, such as a reference's statistics, and no network"
    for name, entry in (("", root), *root.items()):
        if isinstance(entry, dict) and entry and all(isinstance(value, StoredTensor) for value in entry.values()):
            place = f" under {shown(name)}" if name else ""
            return (
                f"weights alone{place} (a state dict: {shown(next(iter(entry)))} …) and not the network that they fit"
            )
    return None


def _has_arrays(entry: object) -> bool:
    inside = entry.values() if isinstance(entry, dict) else (entry,)
    return any(isinstance(value, Array) for value in inside)


def _kind(root: object) -> str:
    if isinstance(root, Record):
        return f"an object of class {shown(root.class_name)}"
    return shown(root)
