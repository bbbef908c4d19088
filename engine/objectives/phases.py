"""Names for the parts of a training step, so that what is measured and what is predicted speak of the same part.

The step announces each part where it begins; whoever listens (a profiler in a run, the simulation of a plan) takes the
memory's peak until the next announcement as that part's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Who trains gives his own names. "backward" in one says that gradients arise there, "optimiser" that they are used up:
#
#   student: samples                 y = G(z) without a graph, and its perturbation
#   student: forward and backward
#   student: forward and backward, real   of real images, where it learns from them too
#   student: optimiser
#   generator: samples               y = G(z); joint: with its graph
#   generator: student               S forward and backward to x; joint: T forward too
#   generator: teacher               phased: T forward and backward to x; joint: T's backward
#   generator: backward              phased: G forward again; G's backward
#   generator: optimiser
#   teacher: forward and backward    of a teacher's training
#   teacher: optimiser
#   between steps
Phase = str

_listeners: list[Callable[[Phase], None]] = []


def mark(phase: Phase) -> None:
    """The part `phase` of the step begins here. Costs nothing while nobody listens."""
    for listener in _listeners:
        listener(phase)


@contextmanager
def listening(listener: Callable[[Phase], None]) -> Iterator[None]:
    """Call `listener` at every `mark` meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
