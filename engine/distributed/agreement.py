"""Work that may fail on one process of several: all of them hear of it, for none may wait for one that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from ipfm.engine.distributed.device import run_device
from ipfm.engine.distributed.signals import StopRequested
from ipfm.engine.runtime.errors import Failed, described
from ipfm.engine.runtime.launcher import lost_process

T = TypeVar("T")


def together(work: Callable[[], T], processes: int) -> T:
    """What `work` returns, where it fails on none of the run's `processes`; each of them calls this equally often.

    Raises:
        StopRequested: a signal came, of which all processes know.
        Exception: what `work` raises here; or it failed elsewhere alone: a ValueError where that was one, else a
            `Failed`, which says the same as the first process where it failed.
    """
    try:
        found = work()
    except StopRequested:
        raise
    except Exception as error:
        # Those that are left cannot agree on anything.
        if processes > 1 and not lost_process(error):
            _first_said((described(error), isinstance(error, ValueError)), processes)
        raise
    if processes > 1 and (said := _first_said(None, processes)) is not None:
        reason, of_input = said
        raise (ValueError if of_input else Failed)(reason)
    return found


def attempt(work: Callable[[], T], processes: int) -> tuple[T | None, str]:
    """As `together`, for something that the run is well without, such as an evaluation.

    Returns:
        What `work` returns, and ""; where it fails on a process, None and the reason, on all of them.

    Raises:
        StopRequested: a signal came.
        RuntimeError: another process is lost.
    """
    try:
        return together(work, processes), ""
    except StopRequested:
        raise
    except Exception as error:
        if lost_process(error):
            raise
        # Not the error itself, which holds on to what it met in its frames.
        return None, described(error)


def _first_said(own: tuple[str, bool] | None, processes: int) -> tuple[str, bool] | None:
    """What went wrong on the first process where something did, and whether it was a ValueError; None where none."""
    # Mostly there is none, which one number says.
    any_has = torch.tensor(int(own is not None), device=run_device())
    dist.all_reduce(any_has, op=dist.ReduceOp.MAX)
    if not any_has:
        return None
    said: list[tuple[str, bool] | None] = [None] * processes
    dist.all_gather_object(said, own)
    return next(one for one in said if one is not None)
