"""Writing a run's checkpoints, while the training goes on or while it waits, and telling every process how it went."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipfm.engine.distributed.world import World
from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.engine.runtime import peers
from ipfm.engine.runtime.errors import Failed
from ipfm.engine.training.checkpoint import BUFFER, Draft, checkpoints_in, is_whole
from ipfm.models.atomic_files import why


class _State(NamedTuple):
    """What is saved of a network."""

    tensors: dict[str, Tensor]
    """On the first process alone."""
    steps_applied: int
    loss_scale: dict[str, float]

    @classmethod
    def of(cls, network: TrainedNetwork, world: World) -> _State:
        """As it is now. Every process takes part."""
        return cls(_gather(network, world), network.steps_applied, network.loss_scale_state)


class CheckpointFailed(Failed):
    """A checkpoint could not be written; the message names its folder, the reason and the last good one."""


class CheckpointWriter:
    """Writes the checkpoints of a run. Every process has one and calls it alike; the first process's writes.

    In the background, the first process copies the gathered state into the host's memory and a thread of its own
    writes it; the next `save`, or `wait`, waits for that. Otherwise `save` writes a network at a time, so that the
    host's memory holds one of them. The files are the same.

    Args:
        folder: the run's checkpoints folder.
        world: the run's processes.
        keep: number of checkpoints that stay, newest first; only whole ones count.
        background: write while the training goes on.
        last: the checkpoint that the run continues from, known to be whole.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, background: bool, last: Path | None = None) -> None:
        self.folder, self.world, self.keep, self.background = folder, world, keep, background
        self.last = last
        """The newest checkpoint that is known to be written, on every process."""
        self._known = {} if last is None else {last: True}
        self._thread = ThreadPoolExecutor(1, "checkpoints") if background and world.is_main else None
        self._pending: Future[None] | None = None
        self._expected: Path | None = None

    def save(
        self,
        step: int,
        networks: Mapping[str, TrainedNetwork],
        *,
        average: Mapping[str, Any] | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Write folder/step-…: `step` optimiser steps are done.

        Args:
            step: number of steps done.
            networks: what is saved: weights, optimiser state, EMA and step count of each.
            average: what is said of the average among them, see `describe_average`; None says nothing.
            after: returns when what belongs to the steps before is written; called before this checkpoint is.

        Raises:
            CheckpointFailed: on every process, because this checkpoint could not be written, or the one before it in
                the background. Those before are untouched, and nothing is left of it.
        """
        self.wait()
        target = self.folder / f"step-{step:07d}"
        if self.background:
            gathered = {name: _State.of(net, self.world) for name, net in networks.items()}
            if self._thread is not None:
                self._pending = self._thread.submit(self._write_unbroken, step, gathered, average, after)
            self._expected = target
            return
        after()
        draft: Draft | None = None
        reason = ""
        for name, network in networks.items():
            state = _State.of(network, self.world)
            if self.world.is_main:
                try:
                    with peers.at_work():
                        draft = draft or Draft(self.folder, step)
                        draft.add(name, *state)
                except OSError as error:
                    reason = why(error)
            # Without it the next network's would come on top.
            del state
            # Every process stops here, or none: the next network is gathered by all of them.
            self._agree(target, reason, draft)
        if draft is not None:
            try:
                with peers.at_work():
                    self._finish(draft, average)
            except OSError as error:
                reason = why(error)
        self._agree(target, reason, draft)
        self.last = target

    def wait(self) -> None:
        """Return when the checkpoint in the making is on the disk. Every process calls it.

        Raises:
            CheckpointFailed: on every process.
        """
        if self._expected is None:
            return
        target, self._expected = self._expected, None
        error = None if self._pending is None else self._pending.exception()
        self._pending = None
        self._agree(target, "" if error is None else _described(error))
        self.last = target

    @property
    def failed(self) -> bool:
        """Whether it is known here that the checkpoint in the making has failed. Waits for nothing."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def settle(self) -> None:
        """Let this process's thread come to its end, well or not, without a word to the other processes."""
        if self._pending is not None and self._pending.exception() is None:
            self.last = self._expected
        self._pending = self._expected = None
        if self._thread is not None:
            self._thread.shutdown()

    def _write_unbroken(self, *what: Any) -> None:
        with peers.at_work():
            self._write(*what)

    def _write(
        self, step: int, gathered: dict[str, _State], average: Mapping[str, Any] | None, after: Callable[[], None]
    ) -> None:
        """In the thread: no communication with other processes here."""
        after()
        try:
            self._write_draft(step, gathered, average)
        except OSError:
            if self.folder.exists():
                raise
            # The run folder was removed in the middle of it; what was gathered is here still.
            self._write_draft(step, gathered, average)
        gathered.clear()

    def _write_draft(self, step: int, gathered: Mapping[str, _State], average: Mapping[str, Any] | None) -> None:
        draft: Draft | None = None
        try:
            draft = Draft(self.folder, step)
            for name, state in gathered.items():
                draft.add(name, *state)
            self._finish(draft, average)
        except BaseException:
            if draft is not None:
                draft.discard()
            raise

    def _finish(self, draft: Draft, average: Mapping[str, Any] | None) -> None:
        if average is not None:
            draft.say_average(average)
        self._known[draft.finish()] = True
        with suppress(OSError):
            self._forget_old(draft.target)

    def _forget_old(self, newest: Path) -> None:
        for replaced in self.folder.glob(".replaced-*"):
            path = self.folder / replaced.name.removeprefix(".replaced-")
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                replaced.rename(path)
        whole = 0
        for path in checkpoints_in(self.folder):
            # What is not known to be whole is read once: damaged ones must not push out good ones.
            if path not in self._known:
                self._known[path] = is_whole(path)
            if whole >= self.keep and path != newest:
                # Under another name first: half of a checkpoint is not to be met under its own.
                removed = self.folder / f".partial-{path.name}"
                shutil.rmtree(removed, ignore_errors=True)
                path.rename(removed)
                del self._known[path]
            else:
                whole += self._known[path]
        for leftover in self.folder.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _agree(self, target: Path, reason: str, draft: Draft | None = None) -> None:
        """Raise on every process what happened on the first."""
        reason = self.world.broadcast_text(reason)
        if not reason:
            return
        if draft is not None:
            draft.discard()
        before = "there is none before it" if self.last is None else f"the last good one is {self.last.name}"
        raise CheckpointFailed(f"the checkpoint {target} cannot be written ({reason}); {before}")


def save_checkpoint(
    folder: Path, step: int, networks: Mapping[str, TrainedNetwork], world: World, *, keep: int = 2
) -> Path:
    """Write `folder`/step-… and return when it is on the disk; see `CheckpointWriter.save`. Its folder."""
    writer = CheckpointWriter(folder, world, keep=keep, background=False)
    writer.save(step, networks)
    assert writer.last is not None
    return writer.last


def _gather(network: TrainedNetwork, world: World) -> dict[str, Tensor]:
    """Copies in the host's memory on the first process, nothing elsewhere; every process takes part."""
    tensors = {}
    for kind in network.state_kinds:
        for name, tensor in network.full(kind):
            if world.is_main:
                # A copy always: the weights go on changing.
                tensors[f"{kind}/{name}"] = tensor.detach().to(
                    "cpu", torch.float32, copy=True, memory_format=torch.contiguous_format
                )
    if world.is_main:
        tensors |= {f"{BUFFER}/{name}": t.detach().float().cpu() for name, t in network.exact_buffers.items()}
    return tensors


def _described(error: BaseException) -> str:
    return why(error) if isinstance(error, OSError) else f"{type(error).__name__}: {why(error)}"
