"""How fast a run was: its images/s over the steps, from the times in its TensorBoard files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ipfm.engine.training.board import board_files


@dataclass(frozen=True)
class Pace:
    """When steps were logged. A part is what one process wrote between its start and its end."""

    parts: tuple[tuple[tuple[int, float], ...], ...] = ()
    """(steps done, seconds since the epoch) of each part, both rising."""
    started: float | None = None
    """Seconds since the epoch at which the first part began."""

    @property
    def seconds(self) -> float:
        """From the first logged step of each part to its last one; evaluations and checkpoints included."""
        # A clock that was set back meanwhile says nothing.
        return sum(max(0.0, part[-1][1] - part[0][1]) for part in self.parts if part)

    def images_per_second(self, batch: int, *, log_every: int, pauses: tuple[int, ...]) -> list[tuple[int, float]]:
        """(steps done, images/s of the steps before, over all processes).

        Losses are read, and their time taken, every `log_every` steps. An interval that begins at a multiple of one of
        `pauses` has an evaluation or a checkpoint in it and is left out.
        """
        found = []
        for part in self.parts:
            logged = [(step, time) for step, time in part if step % log_every == 0]
            for (before, then), (step, now) in pairwise(logged):
                if now > then and not any(before % every == 0 for every in pauses if every > 0):
                    found.append((step, (step - before) * batch / (now - then)))
        return sorted(found)


def read_pace(run: Path) -> Pace:
    """The times in the TensorBoard files of the run folder `run`; a file's cut end is left out.

    Raises:
        OSError: a file cannot be read.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    parts, starts = [], []
    for path in board_files(run):
        times: dict[int, float] = {}
        for record in _records(path.read_bytes()):
            if b"_loss" not in record and b"brain.Event" not in record:
                continue
            try:
                event = Event.FromString(record)
            except DecodeError:
                break
            if event.HasField("file_version"):
                starts.append(event.wall_time)
            # The losses of some steps are written together: the time is that of the last of them.
            times[event.step] = max(event.wall_time, times.get(event.step, 0.0))
        times.pop(0, None)
        if times:
            parts.append(tuple(sorted(times.items())))
    return Pace(tuple(parts), min(starts, default=None))


def _records(payload: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: each has a length, its checksum, the data, their checksum.

    TensorBoard's own reader compares the checksums in Python, which takes minutes for a long run.
    """
    at = 0
    while at + 12 <= len(payload):
        (length,) = struct.unpack_from("<Q", payload, at)
        if at + 16 + length > len(payload):
            return
        yield payload[at + 12 : at + 12 + length]
        at += 16 + length
