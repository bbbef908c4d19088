"""Whether a run's steps are captured in CUDA graphs, and what runs their pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ipfm.engine.config import Resolved, RunConfig
from ipfm.engine.distributed.pieces import AS_THEY_ARE, CAPTURES, CapturedPieces, Pieces
from ipfm.engine.distributed.single_process import keep_gradients
from ipfm.engine.distributed.world import World
from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.models import NetworkConfig


def pieces_of(
    settings: Resolved[RunConfig],
    network: NetworkConfig,
    trained: Mapping[str, TrainedNetwork],
    world: World,
    *,
    tell: Callable[[str], None],
    ready: Callable[[], bool] = lambda: True,
) -> Pieces:
    """What runs the pieces of a run's steps: by themselves, or captured where that goes and is wanted.

    Captured, the networks' gradients get a place of their own, which they share.

    Args:
        settings: with nothing left open.
        network: the teacher's architecture, as it is trained; in a teacher's training what is trained.
        trained: the networks in training.
        world: the run's processes.
        tell: takes a line where nothing is captured on a GPU, or a piece cannot be.
        ready: nothing is captured before it says so.
    """
    config, kind = settings.config, world.device.type
    if kind not in CAPTURES:
        return AS_THEY_ARE
    reason = config.without_graphs(
        network,
        ranks=world.size,
        stage=settings.stage,
        phased=settings.phased,
        checkpointed=settings.checkpointed,
    )
    if reason:
        if config.cuda_graphs != "off":
            tell(f"no CUDA graphs: {reason}")
        return AS_THEY_ARE
    keep_gradients([net.engine for net in trained.values()])
    return CapturedPieces(
        CAPTURES[kind](world.device),
        world.device,
        required=config.cuda_graphs == "on",
        tell=tell,
        ready=ready,
    )


def check_graphs(
    config: RunConfig,
    network: NetworkConfig,
    *,
    ranks: int,
    stage: int | None,
    phased: bool = False,
    checkpointed: bool = False,
) -> None:
    """Check that the steps can be captured, where that was asked for. Arguments as of `RunConfig.without_graphs`.

    Raises:
        ValueError: they cannot.
    """
    if config.cuda_graphs != "on":
        return
    if reason := config.without_graphs(network, ranks=ranks, stage=stage, phased=phased, checkpointed=checkpointed):
        raise ValueError(f"cuda-graphs on is not possible here, as {reason}: give auto or off")
