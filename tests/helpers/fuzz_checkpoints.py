"""Damages checkpoints, a byte at a time and by cutting them short, and reads them: they load correctly or fail cleanly.

Correctly: the same configuration and weights as undamaged, except for the one element in which the damage lies, which
must be finite, or for a plain setting that changes neither architecture nor function. Cleanly: a ValueError of one
bounded line that names the file.

As a program: every byte and every length of the files given, on two processes; exit code 1 if any case is neither.
    python tests/helpers/fuzz_checkpoints.py tests/fixtures/*.pkl [--stride N]
"""

import argparse
import collections
import dataclasses
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from ipfm.models.checkpoints.named_networks import contents
from ipfm.models.checkpoints.reader import ImportedNetwork, parse_checkpoint

# Settings of a network that decide how it trains and in which precision, not what it is; a file may state any value.
FREE = ("dropout", "use_fp16")
SLOWEST = 5.0  # seconds of the processor that a case may take
MEMORY = 512 << 20  # bytes that reading may take beyond what the interpreter has
WHERE = "damaged.pkl"


class Wrong(AssertionError):
    """A case that neither loads correctly nor fails cleanly."""


class Target:
    """A checkpoint to damage."""

    def __init__(self, path: Path) -> None:
        self.data = bytearray(path.read_bytes())
        self.reference = parse_checkpoint(self.data, where=WHERE).read()
        self.is_element = self._elements()

    def flip(self, position: int) -> str:
        """The outcome with one byte changed: "refused", "same", "element" or "setting"; `Wrong` for any other."""
        mask = (position * 2654435761 >> 7) % 255 + 1
        self.data[position] ^= mask
        try:
            return self._outcome(memoryview(self.data), bool(self.is_element[position]), f"byte {position} ^ {mask}")
        finally:
            self.data[position] ^= mask

    def truncate(self, length: int) -> str:
        """The outcome with only the first `length` bytes, which must be "refused"."""
        outcome = self._outcome(memoryview(self.data)[:length], False, f"first {length} bytes")
        if outcome != "refused":
            raise Wrong(f"first {length} bytes: {outcome}")
        return outcome

    def _outcome(self, data: memoryview, in_element: bool, what: str) -> str:
        begun = time.process_time()
        try:
            loaded = parse_checkpoint(data, where=WHERE).read()
        except ValueError as error:
            check_message(str(error), WHERE)
            outcome = "refused"
        except Exception as error:
            raise Wrong(f"{what}: {type(error).__name__}: {error}") from error
        else:
            outcome = self._compare(loaded, in_element, what)
        if time.process_time() - begun > SLOWEST:
            raise Wrong(f"{what}: took {time.process_time() - begun:.1f} s")
        return outcome

    def _compare(self, loaded: ImportedNetwork, in_element: bool, what: str) -> str:
        expected = self.reference
        if list(loaded.weights) != list(expected.weights) or loaded.parameters != expected.parameters:
            raise Wrong(f"{what}: other tensors")
        different = 0
        for name, tensor in loaded.weights.items():
            if tensor.shape != expected.weights[name].shape:
                raise Wrong(f"{what}: another shape of {name}")
            if not torch.equal(tensor, expected.weights[name]):
                different += int((tensor != expected.weights[name]).sum())
                if not torch.isfinite(tensor).all():
                    raise Wrong(f"{what}: {name} is not finite")
        if different > in_element:
            raise Wrong(f"{what}: {different} elements differ")
        if loaded.config != expected.config:
            kept = {name: getattr(expected.config, name) for name in FREE}
            if dataclasses.replace(loaded.config, **kept) != expected.config:
                raise Wrong(f"{what}: another configuration {loaded.config}")
            return "setting"
        return "element" if different else "same"

    def _elements(self) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Which bytes of the file are elements of the network's tensors."""
        base = np.frombuffer(self.data, np.uint8).__array_interface__["data"][0]
        mask = np.zeros(len(self.data), dtype=bool)
        network = parse_checkpoint(self.data, where=WHERE).networks[self.reference.key]
        for tensor in contents(network).tensors.values():
            raw = np.frombuffer(tensor.storage.open().read(), np.uint8)
            start = raw.__array_interface__["data"][0] - base
            mask[start : start + raw.size] = True
        return mask


def check_message(message: str, where: str) -> None:
    """`Wrong` unless `message` is one bounded line of printable text that names the file."""
    if where not in message or not message.isprintable() or len(message) > 400 + len(where):
        raise Wrong(f"not a clean message: {message[:600]!r}")


def limit_memory() -> None:
    """Let this process allocate no more than `MEMORY` beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_cases(path: Path, flips: Iterable[int], lengths: Iterable[int]) -> tuple[collections.Counter[str], list[str]]:
    """(how many cases ended how, what went wrong)."""
    target = Target(path)
    count: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    for case, numbers in ((target.flip, flips), (target.truncate, lengths)):
        for number in numbers:
            try:
                count[f"{case.__name__} {case(number)}"] += 1
            except Wrong as error:
                wrong.append(f"{path.name}: {error}")
    return count, wrong


def _work(job: tuple[Path, int, int, int]) -> tuple[collections.Counter[str], list[str]]:
    path, first, last, stride = job
    return run_cases(path, range(first, last, stride), range(first, last, stride))


def _start() -> None:
    torch.set_num_threads(1)
    limit_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--stride", type=int, default=1, help="every how many bytes")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    piece = 2000 * options.stride
    jobs = [
        (path, first, min(first + piece, path.stat().st_size), options.stride)
        for path in options.files
        for first in range(0, path.stat().st_size, piece)
    ]
    total: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    begun = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.processes, _start) as pool:
        for done, (count, failures) in enumerate(pool.imap_unordered(_work, jobs), 1):
            total += count
            wrong += failures
            seconds = time.perf_counter() - begun
            print(f"{done}/{len(jobs)} pieces, {total.total()} cases, {len(wrong)} wrong, {seconds:.0f} s", flush=True)
    for line in wrong[:50]:
        print(line)
    print(f"{total.total()} damaged checkpoints: {', '.join(f'{n} {what}' for what, n in sorted(total.items()))}")
    print(f"{len(wrong)} neither loaded correctly nor failed cleanly")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
