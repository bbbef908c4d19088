"""Training states of EDM, EDM2 and PFGM++: everything that continuing a teacher's training needs.

The optimiser is Adam (Kingma and Ba 2015). Its state is stored by number; number i is the i-th parameter of the network
in the same file. States of distillations are in `distillation_state`.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipfm.models.checkpoints.containers import shown_path
from ipfm.models.checkpoints.pickle_values import shown
from ipfm.models.checkpoints.reader import Checkpoint, DSource, ImportedNetwork, check_bounds, open_checkpoint
from ipfm.models.checkpoints.stored_tensors import StoredTensor
from ipfm.models.config import NetworkConfig

_EDM_STATE = re.compile(r"training-state-(\d{1,12})\.pt")
# What a distillation does not reach: labels of augmentation without it, a log-variance that its losses leave out. Adam
# has no moments of them.
_UNREACHED = ("map_augment.", "logvar_linear.")
# Adam's state, as EDM and PFGM++ call it, and as EDM2 does.
_OPTIMIZERS = ("optimizer_state", "optimizer")
_MOMENTS = ("exp_avg", "exp_avg_sq")
STUDENTS = ("fake_score", "fake_score_state", "student")
"""What files with several networks call the student."""
# Settings of torch's Adam that change its steps, and the only value of each that is continued here.
_PLAIN_ADAM = {"weight_decay": 0, "amsgrad": False, "maximize": False, "decoupled_weight_decay": False}


@dataclass(frozen=True)
class AdamState:
    """What Adam knows of a network. All tensors are float32, contiguous and on the CPU.

    Attributes:
        exp_avg: first moments by the parameters' names, of the parameters' shapes.
        exp_avg_sq: second moments, likewise.
        steps: steps of the optimiser.
        betas: its decays.
        lr: its learning rate.
        eps: its epsilon.
    """

    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    steps: int
    betas: tuple[float, float]
    lr: float
    eps: float


@dataclass(frozen=True)
class TrainingState:
    """A teacher's training, stopped. All tensors are float32, contiguous and on the CPU.

    Attributes:
        config: of the network, D included.
        D_source: as of `ImportedNetwork`.
        weights: state dict of the network being trained, buffers included.
        ema: state dict of its EMA, None where there is none to be found.
        ema_from: name of the file that the EMA is from, or that was looked for in vain.
        exp_avg: Adam's first moments by the parameters' names, of the parameters' shapes.
        exp_avg_sq: Adam's second moments, likewise.
        adam_steps: steps of the optimiser.
        images_seen: training images so far, None where neither file nor file name says.
        betas: of Adam.
        lr: of Adam.
        eps: of Adam.
        averages: power-function averages by their relative width, `ema` among them: state dicts.
        source: name of the file, for people; "" where it is from none.
        said: what else a run that goes on from it says of it.
        continues: what identifies it there; None is a digest of its weights.
    """

    config: NetworkConfig
    D_source: DSource
    weights: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    ema_from: str | None
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    adam_steps: int
    images_seen: int | None
    betas: tuple[float, float]
    lr: float
    eps: float
    averages: Mapping[float, Mapping[str, Tensor]] = field(default_factory=dict)
    source: str = ""
    said: Mapping[str, Any] = field(default_factory=dict)
    continues: str | None = None

    def average(self, std: float | None) -> Mapping[str, Tensor] | None:
        """The average that one of a relative width goes on from: that of this width, else `ema`.

        Args:
            std: the width; None of an average by half-life.
        """
        same = (average for width, average in self.averages.items() if std is not None and abs(width - std) < 1e-6)
        return next(same, self.ema)


def read_training_state(path: str | os.PathLike[str], *, D: float | None = None) -> TrainingState:
    """The training state in the file `path` of EDM or EDM2 (`training-state-*.pt`) or PFGM++ (.pt, .pkl).

    EDM keeps the EMA of the weights in `network-snapshot-*.pkl` of the same number, which is looked for beside
    `path`, and the number of training images (in thousands) only in the name. EDM2 keeps several averages in the file,
    of which `ema` is the widest.

    Args:
        path: the file.
        D: as of `load_teacher`.

    Raises:
        ValueError: any other file, damage, or parts that do not fit; one line that names the file.
    """
    place = Path(path)
    return training_state_of(open_checkpoint(place), place, D=D)


def is_training_state(checkpoint: Checkpoint) -> bool:
    """Whether it holds what `training_state_of` needs."""
    return "net" in checkpoint.networks and _optimizer(checkpoint) is not None


def _optimizer(checkpoint: Checkpoint) -> str | None:
    return next((name for name in _OPTIMIZERS if name in checkpoint.entries), None)


def training_state_of(checkpoint: Checkpoint, place: Path, *, D: float | None = None) -> TrainingState:
    """The training state in an opened checkpoint; as `read_training_state`.

    Args:
        checkpoint: from `open_checkpoint`.
        place: its file.
        D: as of `load_teacher`.

    Raises:
        ValueError: another kind of file, damage, or parts that do not fit; one line that names the file.
    """
    optimizer = _optimizer(checkpoint)
    if "net" not in checkpoint.networks or optimizer is None:
        raise ValueError(
            f"{checkpoint.where} is no training state of a teacher ({checkpoint.origin}); what can be continued: "
            "training states of EDM, EDM2 and PFGM++, which hold net and optimizer_state or optimizer"
            + ("; recipes that distil continue this one" if checkpoint.networks.keys() & STUDENTS else "")
        )
    net = checkpoint.read("net", D=D)
    try:
        adam = adam_of(checkpoint, optimizer, net)
        step = images_seen(_counted(checkpoint), place)
    except ValueError as error:
        raise ValueError(f"{checkpoint.where}: {error}") from None
    averages = {std: _comparable(checkpoint, name, net, D) for name, std in checkpoint.averages.items()}
    ema, ema_from = _average(checkpoint, place, net, D)
    if averages:
        ema, ema_from = averages[max(averages)], f"{place.name}, of width {max(averages):g}"
    return TrainingState(
        config=net.config,
        D_source=net.D_source,
        weights=net.weights,
        ema=ema,
        ema_from=ema_from,
        images_seen=step,
        exp_avg=adam.exp_avg,
        exp_avg_sq=adam.exp_avg_sq,
        adam_steps=adam.steps,
        betas=adam.betas,
        lr=adam.lr,
        eps=adam.eps,
        averages=averages,
        source=place.name,
    )


def adam_of(checkpoint: Checkpoint, entry: str, net: ImportedNetwork, *, partial: bool = False) -> AdamState:
    """The state of Adam that a checkpoint has of a network.

    Args:
        checkpoint: from `open_checkpoint`.
        entry: name of the optimiser's state at its top.
        net: the network, which was read from it.
        partial: parameters of the augmentation labels and of the log-variance may have no moments: nothing reaches
            them where images are not augmented, or a loss leaves it out. Their moments are then 0.

    Raises:
        ValueError: it is none, or not of this network; one line that does not name the file.
    """
    state = checkpoint.entries.get(entry)
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("state"), dict)
        or type(state.get("param_groups")) is not list
    ):
        raise ValueError(f"{entry} is not that of Adam")
    groups, moments = state["param_groups"], state["state"]
    count = len(net.parameters)
    if len(groups) != 1 or not isinstance(groups[0], dict):
        raise ValueError(f"{entry} has {len(groups)} groups of parameters instead of one")
    group = groups[0]
    if group.get("params") != list(range(count)):
        raise ValueError(f"{entry} is not that of the network's {count} parameters")
    for name, plain in _PLAIN_ADAM.items():
        if group.get(name, plain) != plain:
            raise ValueError(f"its optimiser has {name} = {shown(group[name])}; what can be continued: {plain}")
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas of its optimiser are {shown(betas)}")
    unreached = (i for i, name in enumerate(net.parameters) if any(part in name for part in _UNREACHED))
    absent = (i for i in unreached if i not in moments)
    exp_avg, exp_avg_sq, steps = _moments(entry, moments, net, checkpoint.size, set(absent) if partial else set())
    return AdamState(
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        steps=steps,
        betas=(_number("beta1", betas[0], 0, 1), _number("beta2", betas[1], 0, 1)),
        lr=_number("lr", group.get("lr"), 0, math.inf),
        eps=_number("eps", group.get("eps"), 0, math.inf),
    )


def _moments(
    what: str, stored: Mapping[object, object], net: ImportedNetwork, size: int, unreached: set[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """The two moments by parameter, and the number of steps; zeros where the optimiser has not stepped yet."""
    names = net.parameters
    if not stored:
        first, second = ({name: torch.zeros_like(net.weights[name]) for name in names} for _ in _MOMENTS)
        return first, second, 0
    if set(stored) != set(range(len(names))) - unreached:
        raise ValueError(f"{what} has moments of {len(stored)} of the {len(names)} parameters")
    tensors: dict[str, dict[str, StoredTensor]] = {kind: {} for kind in _MOMENTS}
    steps: set[int] = set()
    for index, name in enumerate(names):
        if index in unreached:
            continue
        entry = stored[index]
        if not isinstance(entry, dict):
            raise ValueError(f"the moments of {name} are {shown(entry)}")
        for kind in _MOMENTS:
            moment = entry.get(kind)
            if not isinstance(moment, StoredTensor) or moment.shape != tuple(net.weights[name].shape):
                raise ValueError(f"{kind} of {name} is not of its shape {tuple(net.weights[name].shape)}")
            tensors[kind][name] = moment
        steps.add(_step(entry.get("step")))
    if len(steps) > 1:
        raise ValueError(f"the parameters have made different numbers of steps: {min(steps)} to {max(steps)}")
    loaded: list[dict[str, Tensor]] = []
    for kind, found in tensors.items():
        check_bounds(found, size)
        read = {name: _moment(f"{kind} of {name}", tensor) for name, tensor in found.items()}
        loaded.append({name: read[name] if name in read else torch.zeros_like(net.weights[name]) for name in names})
    return loaded[0], loaded[1], steps.pop()


def _moment(name: str, stored: StoredTensor) -> Tensor:
    values = stored.load()
    if values.dtype != torch.float32:
        raise ValueError(f"{name} is {values.dtype}; possible: float32")
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} holds values that are not finite")
    if name.startswith("exp_avg_sq") and bool((values < 0).any()):
        raise ValueError(f"{name} is negative")
    return values


def _step(stored: object) -> int:
    value: object = stored
    if isinstance(stored, StoredTensor):
        if stored.numel != 1:
            raise ValueError(f"the number of the optimiser's steps has shape {stored.shape}")
        value = stored.load().item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1 << 53 or value % 1:
        raise ValueError(f"the number of the optimiser's steps is {shown(value)}")
    return int(value)


def _counted(checkpoint: Checkpoint) -> object:
    """How many images the state says that it has seen: PFGM++'s number, or EDM2's among what it says of itself."""
    state = checkpoint.entries.get("state")
    return state.get("cur_nimg") if isinstance(state, dict) else checkpoint.entries.get("step")


def images_seen(step: object, place: Path) -> int | None:
    """How many training images a state has seen: what it says itself, else what the name of its file says.

    Args:
        step: what it says, None where it says nothing.
        place: its file.

    Raises:
        ValueError: what it says is no number of images.
    """
    if step is not None:
        if type(step) is not int or not 0 <= step < 1 << 53:
            raise ValueError(f"step, the number of images seen, is {shown(step)}")
        return step
    found = _EDM_STATE.fullmatch(place.name)
    return 1000 * int(found[1]) if found else None


def _average(
    checkpoint: Checkpoint, place: Path, net: ImportedNetwork, D: float | None
) -> tuple[dict[str, Tensor] | None, str | None]:
    """(the average, the name of its file)."""
    if "ema" in checkpoint.networks:
        ema, source = checkpoint.read("ema", D=D), place
    elif checkpoint.averages:
        return None, None
    else:
        found = _EDM_STATE.fullmatch(place.name)
        if not found:
            return None, None
        source = place.with_name(f"network-snapshot-{found[1]}.pkl")
        if not source.is_file():
            return None, source.name
        ema = open_checkpoint(source).read("ema", D=D)
    # The two may differ in how much they drop while training, and in nothing else.
    if comparable(ema.config) != comparable(net.config):
        raise ValueError(f"{shown_path(source)}: ema is not the average of net in {checkpoint.where}: they differ")
    return ema.weights, source.name


def _comparable(checkpoint: Checkpoint, name: str, net: ImportedNetwork, D: float | None) -> dict[str, Tensor]:
    """The average `name` of the same file. ValueError: it is not one of `net`."""
    average = checkpoint.read(name, D=D)
    if comparable(average.config) != comparable(net.config):
        raise ValueError(f"{checkpoint.where}: {name} is not the average of net: they differ")
    return average.weights


def comparable(config: NetworkConfig) -> NetworkConfig:
    """The architecture without what may differ between a network and its average: how much it drops while training."""
    return dataclasses.replace(config, dropout=0.0, use_fp16=False)


def _number(name: str, value: object, least: float, below: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < below:
        raise ValueError(f"{name} of its optimiser is {shown(value)}")
    return float(value)
