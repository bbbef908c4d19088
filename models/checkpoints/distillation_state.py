"""Training states of distillations: generator, its average, student, and what their optimisers know.

Those of SiD, SiDA and pfgmpp-idmd (`training-state-*.pt`), and the snapshots of the distillation project before it,
which are states too (`network-snapshot-*.pkl`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ipfm.models.checkpoints.reader import Checkpoint, DSource, ImportedNetwork, open_checkpoint
from ipfm.models.checkpoints.training_state import AdamState, adam_of, comparable, images_seen
from ipfm.models.config import NetworkConfig

# (generator, student, optimiser of the generator, that of the student), by the projects' names.
_LAYOUTS = (
    ("G", "fake_score", "g_optimizer_state", "fake_score_optimizer_state"),
    ("G_state", "fake_score_state", "g_optimizer_state", "fake_score_optimizer_state"),
    ("generator", "student", "generator_optimizer_state", "student_optimizer_state"),
)


@dataclass(frozen=True)
class NetworkState:
    """A network in training.

    Attributes:
        key: its name in the file.
        config: what it takes to build it, D included.
        weights: state dict, float32 and on the CPU, buffers included.
        adam: its optimiser; None where the file has left it out.
    """

    key: str
    config: NetworkConfig
    weights: dict[str, Tensor]
    adam: AdamState | None


@dataclass(frozen=True)
class DistillationState:
    """A distillation, stopped.

    Attributes:
        origin: which program's file it is, in words.
        generator: the generator.
        average: state dict of its average, None where the file has none.
        average_key: the average's name in the file.
        student: the network that learns to denoise the generator's samples.
        D_source: as of `ImportedNetwork`.
        images_seen: images of the generator's training so far, None where neither file nor file name says.
    """

    origin: str
    generator: NetworkState
    average: dict[str, Tensor] | None
    average_key: str | None
    student: NetworkState
    D_source: DSource
    images_seen: int | None


def is_distillation_state(checkpoint: Checkpoint) -> bool:
    """Whether it holds what `distillation_state_of` needs."""
    return _layout(checkpoint) is not None


def read_distillation_state(path: Path, *, D: float | None = None) -> DistillationState:
    """The state of a distillation in the file `path`.

    Args:
        path: the file.
        D: auxiliary dimensions of the networks, for files that do not say.

    Raises:
        ValueError: any other file, damage, or parts that do not fit; one line that names the file.
    """
    return distillation_state_of(open_checkpoint(path), path, D=D)


def distillation_state_of(
    checkpoint: Checkpoint, place: Path, *, D: float | None = None, average: str | None = None
) -> DistillationState:
    """The state of a distillation in an opened checkpoint.

    SiD's files have no counter; the thousands of images seen stand in their names alone. The average is `G_ema`, which
    pfgmpp-idmd keeps by the half-life schedule, or the slowest of the older project, unless another is named.

    Args:
        checkpoint: from `open_checkpoint`.
        place: its file.
        D: auxiliary dimensions of the networks, for files that do not say.
        average: name of the generator's average in the file; None takes that one.

    Raises:
        ValueError: as `read_distillation_state`.
    """
    layout = _layout(checkpoint)
    if layout is None:
        raise ValueError(
            f"{checkpoint.where} is no training state of a distillation ({checkpoint.origin}); what can be continued: "
            "those of SiD, SiDA and pfgmpp-idmd, with G and fake_score"
        )
    generator, student, generator_adam, student_adam = layout
    G, S = checkpoint.read(generator, D=D), checkpoint.read(student, D=D)
    try:
        seen = images_seen(checkpoint.entries.get("cur_nimg"), place)
        trained = [_trained(checkpoint, net, adam) for net, adam in ((G, generator_adam), (S, student_adam))]
    except ValueError as error:
        raise ValueError(f"{checkpoint.where}: {error}") from None
    key = checkpoint.choose(average)
    if average is not None and key in (generator, student):
        raise ValueError(f"{checkpoint.where}: {key} is no average of {generator}")
    found = None if key == generator else checkpoint.read(key, D=D)
    if found is not None and comparable(found.config) != comparable(G.config):
        raise ValueError(f"{checkpoint.where}: {key} is not the average of {generator}: they differ")
    return DistillationState(
        origin=checkpoint.origin,
        generator=trained[0],
        average=None if found is None else found.weights,
        average_key=None if found is None else key,
        student=trained[1],
        D_source=G.D_source,
        images_seen=seen,
    )


def _trained(checkpoint: Checkpoint, net: ImportedNetwork, optimizer: str) -> NetworkState:
    adam = adam_of(checkpoint, optimizer, net, partial=True) if optimizer in checkpoint.entries else None
    return NetworkState(net.key, net.config, net.weights, adam)


def _layout(checkpoint: Checkpoint) -> tuple[str, str, str, str] | None:
    for layout in _LAYOUTS:
        if all(name in checkpoint.networks for name in layout[:2]):
            return layout
    return None
