"""What a distillation begins with where it goes on from another one: weights, averages, optimisers, images seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipfm.engine.checks import option_name
from ipfm.engine.config import RunConfig, first_weights_settings, place_settings
from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.engine.objectives.base import Role
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.run_folder import SET_ASIDE, fingerprint
from ipfm.models import NetworkConfig, Precond, build_network
from ipfm.models.checkpoints.training_state import AdamState
from ipfm.models.low_rank import low_rank_network

# What of an architecture says nothing of its tensors, or is no obstacle: a generator needs no augmentation labels, and
# nobody asks it for a log-variance.
_FREE = ("dropout", "label_dropout", "use_fp16", "augment_dim", "sigma_min", "sigma_max", "logvar_channels")
_SPARE = ("map_augment.", "logvar_fourier.", "logvar_linear.")


@dataclass(frozen=True)
class NetworkStart:
    """What a network of a distillation begins with. Tensors are float32 and on the CPU.

    Attributes:
        source: what it is from, for messages, e.g. "G of training-state-000500.pt".
        weights: state dict, buffers included.
        config: its architecture; None where only the tensors say it.
        ema: its average by the parameters' names; None begins with the weights.
        ema_source: what the average is, for messages.
        adam: what its optimiser knows; None is a fresh one.
        loss_scale: where its fp16 losses' scale stands; empty begins anew.
        averages: of several averages each by its name; one that is not among them begins with `ema`.
    """

    source: str
    weights: Mapping[str, Tensor]
    config: NetworkConfig | None = None
    ema: Mapping[str, Tensor] | None = None
    adam: AdamState | None = None
    ema_source: str = "its average"
    loss_scale: Mapping[str, float] = field(default_factory=dict)
    averages: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def check(self, role: Role) -> None:
        """Check that this can be the network of a role.

        Raises:
            ValueError: another architecture, D or other tensors; one line that names what differs.
        """
        if self.config is not None and (differences := _differences(self.config, role.network)):
            more = f": --{_option(role)} says how wide it is" if {"model_channels"} == set(differences) else ""
            listed = "; ".join(f"{name} is {there} there, {here} here" for name, (there, here) in differences.items())
            raise ValueError(f"{self.source} is another network than the {role.name} of this run ({listed}){more}")
        with torch.device("meta"):
            whole = build_network(role.network)
        own = whole.state_dict()
        factors = any(name.endswith(".lora_A") for name in self.weights)
        if role.lora is not None:
            own = low_rank_network(role.network, whole, role.lora).state_dict()
            if not factors:
                raise ValueError(
                    f"{self.source} has weights of its own, and the {role.name} of this run has the teacher's: leave "
                    f"--{role.name} lora out"
                )
        elif factors:
            raise ValueError(
                f"{self.source} has factors on its teacher's weights, and the {role.name} of this run weights of its "
                f"own: give --{role.name} lora, or the generator that its run has exported"
            )
        for name, tensor in own.items():
            found = self.weights.get(name)
            if found is None and not _is_spare(name):
                raise ValueError(f"{self.source} has no {name}, which the {role.name} of this run has")
            if found is not None and found.shape != tensor.shape:
                raise ValueError(
                    f"{self.source}: {name} has shape {tuple(found.shape)}, {tuple(tensor.shape)} in the {role.name} "
                    "of this run"
                )
        if unknown := [name for name in self.weights if name not in own and not _is_spare(name)]:
            raise ValueError(f"{self.source} has {unknown[0]}, which the {role.name} of this run has not")

    def put_into(self, net: Precond) -> None:
        """Give `net`, which `check` has approved, these weights and buffers."""
        own = net.state_dict()
        net.load_state_dict(own | {name: tensor for name, tensor in self.weights.items() if name in own})

    def take_on(self, trained: TrainedNetwork) -> None:
        """Give the optimiser and the average of `trained`, which has these weights, what they knew."""
        states: dict[str, Mapping[str, Tensor]] = {}
        if self.ema is not None:
            for name, kind in zip(trained.averages, trained.average_kinds, strict=True):
                states[kind] = self.averages.get(name, self.ema)
        if self.adam is not None:
            states["exp_avg_sq"] = self.adam.exp_avg_sq
            if "exp_avg" in trained.state_kinds and self.adam.exp_avg:
                states["exp_avg"] = self.adam.exp_avg
            trained.steps_applied = self.adam.steps
        if self.loss_scale:
            trained.loss_scale_state = dict(self.loss_scale)
        for kind, tensors in states.items():
            whole = all(name in tensors for name, _ in trained.module.named_parameters())
            trained.load(kind, tensors if whole else {**dict(trained.full(kind)), **tensors})

    @property
    def words(self) -> str:
        """What is taken: "G of x.pt, its average G_ema, its optimiser's moments and 500 steps"."""
        average = [] if self.ema is None else [self.ema_source]
        optimiser = "a fresh optimiser"
        if self.adam is not None:
            optimiser = f"its optimiser's moments and {counted(f'{self.adam.steps:,}', 'step')}"
        return ", ".join([self.source, *average, optimiser])


@dataclass(frozen=True)
class Branch:
    """The run, and its checkpoint, that another run goes on from with its settings, but for those that were given.

    Attributes:
        run: its folder, as it was given; its name alone where it was read from config.json.
        step: its step that is gone on from.
        images_seen: by then.
        facts: what tells the run apart from others beside its settings, wherever it lies.
        settings: its settings when the branch began, as JSON has them.
        options: what else it was made with, by the names of options.
        checkpoint: the folder of the checkpoint, which may be gone once the branch has one of its own.
    """

    run: str
    step: int
    images_seen: int
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    checkpoint: Path = Path()

    def to_json(self) -> dict[str, Any]:
        """As config.json has it, without places."""
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "checkpoint"}
        return {**said, "run": short_name(Path(self.run).resolve())}

    @classmethod
    def read(cls, said: object) -> Branch | None:
        """What config.json says; None where it says nothing, or what cannot be read."""
        names = [f.name for f in dataclasses.fields(cls) if f.name != "checkpoint"]
        if not isinstance(said, dict) or not said.keys() >= set(names):
            return None
        found = cls(**{name: said[name] for name in names})
        plain = isinstance(found.step, int) and isinstance(found.images_seen, int) and isinstance(found.run, str)
        held = all(isinstance(one, dict) for one in (found.facts, found.settings, found.options))
        return found if plain and held and found.step > 0 else None

    def changes(self, ours: Mapping[str, Any], kind: type[RunConfig]) -> list[str]:
        """The settings in which a run differs from the one that it branched from: "lr is 1e-05 there, 5e-06 here".

        Args:
            ours: settings of the branch, as JSON has them.
            kind: their class; those that it calls places are left out.
        """
        unsaid = place_settings(kind) | first_weights_settings(kind) | {"rules"}
        found = []
        for name, value in self.settings.items():
            if name not in ours or name in unsaid or ours[name] == value:
                continue
            pairs = {name: (value, ours[name])}
            if isinstance(value, dict) and isinstance(ours[name], dict):
                pairs = {f"{name}.{key}": (there, ours[name].get(key)) for key, there in value.items()}
            shown = {key: (_shown(there), _shown(here)) for key, (there, here) in pairs.items() if there != here}
            found += [f"{option_name(key)} is {there} there, {here} here" for key, (there, here) in shown.items()]
        return found


@dataclass(frozen=True)
class DistillationStart:
    """What a distillation goes on from.

    Attributes:
        source: the file or folder, for messages.
        networks: by role; the others start as their settings say.
        images_seen: of the generator's training so far; the schedules go on from them.
        notes: what else to know of it, a line each.
        recorded: its facts as the run folder has them, where the run has a checkpoint of its own by now and needs
            nothing else of it.
        branch: the run whose settings are its defaults too.
        stage: nothing goes on: a generator's weights begin a second stage.
        student_source: where the student is from, where that is elsewhere.
    """

    source: str
    networks: Mapping[str, NetworkStart]
    images_seen: int = 0
    notes: tuple[str, ...] = ()
    recorded: Mapping[str, Any] | None = None
    branch: Branch | None = None
    stage: bool = False
    student_source: str = ""

    def first_step(self, batch: int) -> int:
        """Steps of this batch that the images seen are."""
        return self.images_seen // batch

    def check(self, roles: Sequence[Role]) -> None:
        """Check that an objective's networks can begin so.

        Raises:
            ValueError: it has no such network, or one of another shape; one line.
        """
        known = {role.name: role for role in roles}
        for name, start in self.networks.items():
            if name not in known:
                raise ValueError(f"{start.source} would be a {name}, and this objective has none")
            start.check(known[name])

    def facts(self) -> dict[str, Any]:
        """What identifies a run by it, wherever its files lie ("continues"), and what is said of it ("start")."""
        tensors = {f"{role}.{name}": t for role, start in self.networks.items() for name, t in start.weights.items()}
        if self.recorded is not None:
            return dict(self.recorded)
        said: dict[str, Any] = {"source": self.source, "images_seen": self.images_seen}
        said |= {"stage": True} if self.stage else {}
        said |= {"student_source": self.student_source} if self.student_source else {}
        said |= {"networks": sorted(self.networks)} | ({} if self.branch is None else {"branch": self.branch.to_json()})
        return {"continues": fingerprint(tensors), "start": said}


def short_name(path: Path) -> str:
    """A file or folder without the folders that it lies in; a run's network with the run: "cifar/generator"."""
    if path.parent.name == SET_ASIDE:
        return f"{path.parent.parent.name}/{SET_ASIDE}/{path.name}"
    own = path.name in ("model", "teacher") or path.name.startswith(("generator", "step-"))
    return f"{path.parent.name}/{path.name}" if own and path.parent.name else path.name


def _is_spare(name: str) -> bool:
    return any(part in name for part in _SPARE)


def start_facts(start: DistillationStart | None) -> dict[str, Any]:
    """See `DistillationStart.facts`; of a run that goes on from nothing else, nothing."""
    return {} if start is None else start.facts()


def _shown(value: Any) -> str:
    return "not given" if value is None else f"{value:g}" if isinstance(value, float) else f"{value}"


def _option(role: Role) -> str:
    return "student-width" if role.name == "student" else "width"


def _differences(there: NetworkConfig, here: NetworkConfig) -> dict[str, tuple[Any, Any]]:
    """Fields of the two architectures that differ, and their values."""
    names = [f.name for f in dataclasses.fields(NetworkConfig) if f.name not in _FREE]
    pairs = {name: (getattr(there, name), getattr(here, name)) for name in names}
    return {name: values for name, values in pairs.items() if values[0] != values[1]}
