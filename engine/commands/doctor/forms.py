"""Forms of a step that sections try: without CUDA graphs, and with them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ipfm.engine.objectives.ipfm import DistillConfig

_KNOWN = "cuda_graphs" in {f.name for f in fields(DistillConfig)}
# Settings of a step whose every launch is the host's.
EAGER: dict[str, Any] = {"cuda_graphs": "off"} if _KNOWN else {}
# Of steps that are captured and replayed: one, or none on a CPU.
CAPTURED: tuple[dict[str, Any], ...] = ({"cuda_graphs": "on"},) if _KNOWN else ()
# Steps after which what is captured is replayed.
BEFORE_REPLAY = 4


def captured(device_type: str) -> tuple[dict[str, Any], ...]:
    """Settings with CUDA graphs, where there are any."""
    return CAPTURED if device_type == "cuda" else ()
