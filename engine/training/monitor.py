"""What a person and a machine see of a run while it goes on: progress, metrics.jsonl, TensorBoard, sample grids."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ipfm.engine.data.image_grid import image_grid, save_grid
from ipfm.engine.evaluation.metrics import Metric
from ipfm.engine.runtime.files import StepLog
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.engine.runtime.wording import significant
from ipfm.engine.training.board import SAMPLES, Board, board_folder
from ipfm.models.atomic_files import sync, why

# In the run folder: teacher, generator and data side by side, at the end.
COMPARISON_FILE = "comparison.png"


class Monitor:
    """What a run writes into its folder: metrics.jsonl, samples/step-XXXXXXX.png, a `Board`; and progress to stderr.

    Once it is open, nothing here ends a run: what the disk refuses, or a library cannot do, is one warning a kind, and
    what stderr refuses (its terminal or reader is gone) is not said. Lines of metrics.jsonl then wait in memory, and
    are written as soon as the disk takes them.

    Step numbers: `record` and `advance` take the index of the step just made, 0…total_steps-1; `scalar` and `image`,
    which tell of the state between two steps, take the number of steps done, as a checkpoint does, and so does
    TensorBoard's axis. On resume, everything about steps from `first_step` on is dropped, for it comes again: lines of
    metrics.jsonl with step ≥ first_step, TensorBoard events with more than `first_step` steps done. Values are Python
    floats; nothing here waits for a GPU except `image`, which copies its images.

    Args:
        folder: of the run.
        title: names the run in front of the progress.
        total_steps: where the run ends.
        first_step: where this process starts.
        batch_size: of all ranks together, for images per second.
        enabled: on rank 0; a monitor without it does nothing at all.
        tensorboard: whether to write for TensorBoard.
        readings: as `Board` takes them.
        settings: as `Board` takes them.
        metrics: as `Board` takes them.

    Raises:
        ValueError: numbers that do not go together.
        OSError: metrics.jsonl cannot be opened.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        title: str,
        total_steps: int,
        first_step: int = 0,
        batch_size: int,
        enabled: bool = True,
        tensorboard: bool = True,
        readings: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        metrics: Sequence[Metric] = (),
    ) -> None:
        if not 0 <= first_step <= total_steps or batch_size < 1:
            raise ValueError(
                "needs 0 <= first_step <= total_steps and a positive batch_size, "
                f"got {first_step}, {total_steps} and {batch_size}"
            )
        self.folder = Path(folder)
        self.enabled = enabled
        self.batch_size = batch_size
        self.images_per_second = math.nan  # over the steps between the last two calls of `advance`
        self._done, self._since = first_step, time.perf_counter()
        self._board: Board | None = None
        self._refused: set[str] = set()
        self._said: set[str] = set()
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = StepLog(self.folder / "metrics.jsonl", keep_below=first_step)
        self._progress = ProgressBar(title, total_steps, first=first_step, unit=" step", pause=0.0, leave=True)
        if tensorboard:
            with self._tolerant_of_the_board():
                self._board = Board(self.folder, first_step, readings=readings, settings=settings, metrics=metrics)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, {"step": …} and then the names in alphabetical order, and TensorBoard scalars.

        The line is written by the next `flush`. NaN and infinities become null, counted as "non_finite".
        """
        if not self.enabled:
            return
        self._log.append(step, {name: float(values[name]) for name in sorted(values)})
        self.scalars(step + 1, values)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars for TensorBoard alone, after `step` steps."""
        if self._board is not None:
            with self._tolerant_of_the_board():
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)

    def scalar(self, step: int, name: str, value: float) -> None:
        """A scalar for TensorBoard alone, after `step` steps."""
        self.scalars(step, {name: value})

    def advance(self, step: int, values: Mapping[str, float]) -> None:
        """Moves the progress to step + 1 and shows images per second, time left, `values` and memory.

        Call it when `values` have been read from the GPU anyway; steps in between need no call.
        """
        if not self.enabled:
            return
        now = time.perf_counter()
        if step + 1 > self._done:
            self.images_per_second = (step + 1 - self._done) * self.batch_size / max(now - self._since, 1e-9)
            self.scalar(step + 1, "images_per_second", self.images_per_second)
        self._done, self._since = step + 1, now
        with contextlib.suppress(Exception):
            self._progress.move(step + 1, _postfix(f"{significant(self.images_per_second)} img/s", values))

    def image(self, step: int, images: Tensor) -> None:
        """Saves images (B, C, H, W) in [-1, 1], drawn after `step` steps: samples/step-XXXXXXX.png, TensorBoard."""
        if not self.enabled:
            return
        with self.paused():
            with self.tolerant("samples"):
                save_grid(images, picture_path(self.folder, step))
            if self._board is not None:
                with self._tolerant_of_the_board():
                    self._board.add_image(SAMPLES, image_grid(images), step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block, such as an evaluation or a checkpoint, out of images per second; may nest."""
        since, started = self._since, time.perf_counter()
        try:
            yield
        finally:
            # From the values at the start, so that a pause within this one is not subtracted twice.
            self._since = since + time.perf_counter() - started

    def message(self, text: str) -> None:
        """A line for the person who watches, above the bar."""
        if self.enabled:
            with contextlib.suppress(OSError, ValueError):
                tqdm.write(text, file=sys.stderr)

    def message_once(self, text: str) -> None:
        """As `message`, unless it was said before."""
        if text not in self._said:
            self._said.add(text)
            self.message(text)

    @contextlib.contextmanager
    def tolerant(self, name: str) -> Iterator[None]:
        """The block writes `name` in the run folder: what fails there is a warning, once for each name."""
        try:
            yield
        except Exception as error:
            if name not in self._refused:
                self._refused.add(name)
                self.message(f"warning: {self.folder / name} cannot be written: {why(error)}")

    def flush(self) -> None:
        """Writes all lines recorded so far to metrics.jsonl; from here on they survive a kill."""
        if self.enabled:
            with self.tolerant("metrics.jsonl"):
                self._log.flush()

    def sync(self) -> None:
        """Lines flushed so far survive the end of the machine as well."""
        if self.enabled and self._log.path.exists():
            with self.tolerant("metrics.jsonl"):
                sync(self._log.path)

    def close(self) -> None:
        """Flushes and closes everything. May be called twice."""
        if not self.enabled:
            return
        self.flush()
        if self._log.waiting:
            self.message(f"warning: {self._log.waiting} lines of {self._log.path} are lost")
        with contextlib.suppress(OSError):
            self._progress.close()
        if self._board is not None:
            with self._tolerant_of_the_board():
                self._board.close()
        self._board = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _tolerant_of_the_board(self) -> Iterator[None]:
        """The block writes for TensorBoard: what fails there is one warning, and nothing is written any more."""
        try:
            yield
        # A full disk, raised by its writer thread; a path that is not UTF-8; a package that does not go with another.
        except Exception as error:
            self._board = None
            self.message(f"warning: no TensorBoard in {board_folder(self.folder)}: {why(error)}")


def picture_path(folder: Path, step: int) -> Path:
    """Where the run `folder` keeps the images drawn after `step` steps."""
    return folder / "samples" / f"step-{step:07d}.png"


def pictures_in(folder: Path) -> tuple[tuple[int, Path], ...]:
    """(steps done, path) of the pictures of the run `folder`, in order."""
    found = []
    samples = folder / "samples"
    for path in samples.iterdir() if samples.is_dir() else ():
        if named := re.fullmatch(r"step-(\d+)\.png", path.name):
            found.append((int(named[1]), path))
    return tuple(sorted(found))


def _postfix(speed: str, values: Mapping[str, float]) -> str:
    return ", ".join([speed, *(f"{name}={value:.4g}" for name, value in values.items()), *_memory()])


def _memory() -> list[str]:
    """Resident memory of this process, and allocated now and at most on its GPU; host counters, no synchronisation."""
    shown = []
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        shown.append(f"ram {pages * os.sysconf('SC_PAGE_SIZE') / 2**30:.2f} GiB")
    except (OSError, ValueError):  # no /proc here
        pass
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        now, most = torch.cuda.memory_allocated() / 2**30, torch.cuda.max_memory_allocated() / 2**30
        shown.append(f"gpu {now:.2f} GiB (peak {most:.2f})")
    return shown
