"""The sections of `ipfm doctor --full`: a file each, whose `rows` fills a table."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ipfm.engine.commands.doctor.place import Place, Row


@dataclass(frozen=True)
class Section:
    """A section, and how long it may take."""

    name: str
    """Of its file, its table and the option --only."""
    title: str
    seconds: float
    """After which its process is ended; together they are ten minutes."""

    @property
    def rows(self) -> Callable[[Place], Iterator[Row]]:
        """Fills its table. It is loaded when it is asked for, in a process of its own."""
        module = importlib.import_module(f"{__name__}.{self.name}")
        found: Callable[[Place], Iterator[Row]] = module.rows
        return found


SECTIONS = (
    Section("environment", "What this machine is", 20),
    Section("kernels", "The kernels: right, and how fast beside a copy", 135),
    Section("convolutions", "Convolutions in both memory formats, ours beside PyTorch's", 55),
    Section("attention", "Attention by backend", 25),
    Section("engine", "The engine against a plain PyTorch loop", 80),
    Section("waiting", "What the host waits for within a step", 40),
    Section("time", "The time of a step beside plain PyTorch at its best", 110),
    Section("memory", "Memory: planned and measured", 35),
    Section("resume", "Saved, killed and resumed: the same bits?", 55),
    Section("ranks", "Two processes, one of them killed", 45),
)
NAMES = tuple(section.name for section in SECTIONS)
