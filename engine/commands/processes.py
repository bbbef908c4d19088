"""The processes that share a command's work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipfm.engine.runtime.launcher import is_launched

if TYPE_CHECKING:
    from ipfm.engine.distributed.world import World


def joined() -> World:
    """The processes of a launcher, which wait for each other; or this one alone, which then needs no process group."""
    from ipfm.engine.distributed.device import run_device
    from ipfm.engine.distributed.world import World, start_world

    return start_world() if is_launched() else World(rank=0, size=1, device=run_device())
