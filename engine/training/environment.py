"""What a run is made with: a line of environment.jsonl for each start."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipfm.engine.runtime.files import StepLog
from ipfm.engine.runtime.versions import PACKAGES, installed

if TYPE_CHECKING:
    import torch

    from ipfm.engine.config import Attention
    from ipfm.engine.distributed.world import World


ENVIRONMENT_FILE = "environment.jsonl"


def log_start(folder: Path, step: int, world: World, attention: Attention = "auto", *, graphs: bool = False) -> None:
    """Add a line: versions, ranks, device and attention of the part of the run that begins after `step` steps.

    Args:
        folder: the run's.
        step: steps done.
        world: the run's processes.
        attention: what was asked for.
        graphs: its steps are captured in CUDA graphs.

    Raises:
        OSError: the disk refuses.
    """
    import torch

    cuda = world.device.type == "cuda"
    log = StepLog(folder / ENVIRONMENT_FILE, None)
    log.append(
        step,
        {
            **{package: installed(package) for package in PACKAGES},
            "python": platform.python_version(),
            "cuda": torch.version.cuda if cuda else None,
            "processes": world.size,
            "device": torch.cuda.get_device_name(world.device) if cuda else f"CPU ({platform.machine()})",
            "threads": torch.get_num_threads(),
            **dict(zip(("attention", "attention_reason"), attention_taken(attention, world.device), strict=True)),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "cuda_graphs": graphs,
        },
    )
    log.flush()


def attention_taken(asked: Attention, device: torch.device) -> tuple[str, str]:
    """What computes attention on `device`, and why."""
    from ipfm.models.attention import xformers_misfit

    if asked != "auto":
        return asked, "asked for"
    obstacle = xformers_misfit() if device.type == "cuda" else "it needs a GPU"
    return "sdpa", f"xformers cannot serve: {obstacle}" if obstacle else "xformers serves where it is asked for"


def read_starts(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The lines of environment.jsonl, by increasing step.

    Raises:
        OSError: it cannot be read.
    """
    return tuple(StepLog(folder / ENVIRONMENT_FILE, None).read())


def in_words(starts: tuple[Mapping[str, Any], ...]) -> Iterator[tuple[str, str]]:
    """(what, value) of the starts of a run; where they differ, each different one once."""
    starts = tuple(
        s | {"attention": f"{s.get('attention')}: {reason}"} if (reason := s.get("attention_reason")) else s
        for s in map(dict, starts)
    )
    for what, names in (
        ("versions", (*PACKAGES, "python", "cuda")),
        ("processes", ("processes",)),
        ("device of a process", ("device",)),
        ("threads of a process", ("threads",)),
        ("attention", ("attention",)),
        *([("deterministic algorithms", ("deterministic",))] if any(s.get("deterministic") for s in starts) else []),
        *([("CUDA graphs", ("cuda_graphs",))] if any(s.get("cuda_graphs") for s in starts) else []),
    ):
        found = [[(name, start[name]) for name in names if start.get(name) is not None] for start in starts]
        texts = [", ".join(_said(v) if len(names) == 1 else f"{name} {v}" for name, v in one) for one in found]
        if any(texts):
            yield what, "; then ".join(dict.fromkeys(text for text in texts if text))


def _said(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
