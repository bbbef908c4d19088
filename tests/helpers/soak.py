"""`make soak`: kill a distillation again and again, start the same command again, and compare the end.

It is compared with a run that nobody disturbed.

    python tests/helpers/soak.py [--kills 50] [--seed 0] [--zero 2]

Two processes on the CPU, through the `deepspeed` launcher or started by hand; SIGKILL to a process, to all of them, or
to the launcher alone; at any moment from the start of the interpreter on, a third of them aimed at the writing of a
checkpoint. In the end weights, optimiser state, averages and the exported generator have to be equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import launch
import prepared
import psutil
import torch
from safetensors.torch import load_file

from ipfm.engine.runtime.launcher import free_port, launch_variables
from ipfm.models import EDMPrecond, NetworkConfig, save_model

RECIPE = str(launch.ROOT / "recipes" / "digits_ipfm.py")
RANKS = 2
STEPS_PER_KILL = 10
# Seconds that processes wait for each other.
PATIENCE = 30
# What a recipe would choose by simulating every layout.
LAYOUT = {"backward": "joint", "activation-checkpointing": "off"}


def make_teacher(folder: Path) -> Path:
    """A small untrained network for the images of the digits recipe."""
    torch.manual_seed(1)
    config = NetworkConfig(
        img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
        dropout=0.0, D=128.0,
    )  # fmt: skip
    save_model(EDMPrecond(config), folder)
    return folder


def settings(teacher: Path, out: Path, steps: int, **options: object) -> list[str]:
    """Arguments of a distillation that is short but complete, with a checkpoint every second step."""
    chosen = {
        "teacher": teacher, "out": out, "max-steps": steps, "batch": 4, "zero": 2, "eval-every": 0, "eval-images": 16,
        "heun-steps": 1, "checkpoint-every": 2, "log-every": 1, "eps": 1e-3, **LAYOUT,
    } | {name.replace("_", "-"): value for name, value in options.items()}  # fmt: skip
    return [text for name, value in chosen.items() for text in (f"--{name}", str(value))]


class Group:
    """The processes of one start of the recipe, in their own sessions.

    Args:
        arguments: of the recipe.
        launcher: "deepspeed", which need not import anything itself (see prepared.py), "torchrun", or "hand" for
            processes with nothing above them; "forked" for such ones that need not import anything either.
        log: file that takes their output.
        file_size: bytes beyond which the forked ones cannot write to a file.
        script: what the forked ones run.
        environment: further variables.
    """

    def __init__(
        self,
        arguments: list[str],
        launcher: str,
        log: Path,
        *,
        file_size: int | None = None,
        script: Path | str = RECIPE,
        **environment: str,
    ) -> None:
        self.log, self.launcher = log, launcher
        self.started: list[prepared.Program | subprocess.Popen[bytes]]
        port = free_port()
        # Nothing above tells those started by hand of one that ends before they have met: they wait for it.
        patience = {"IPFM_TIMEOUT": str(PATIENCE), **environment}
        env = launch.environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **patience)
        places = [launch_variables(rank, RANKS, port) for rank in range(RANKS)]
        with open(log, "ab") as file:
            if launcher == "forked":
                self.started = [
                    prepared.start(
                        script, *arguments, env={**env, **place}, stdout=file, stderr=file, file_size=file_size
                    )
                    for place in places
                ]
                return
            ranks = str(RANKS)
            if launcher == "deepspeed":
                words = ["--num_accelerators", ranks, "--master_port", port, script, *arguments]
                self.started = [prepared.start(launch.BIN / launcher, *words, env=env, stdout=file, stderr=file)]
                return
            starts = [([sys.executable], {**env, **place}) for place in places]
            if launcher == "torchrun":
                starts = [([str(launch.BIN / launcher), "--nproc-per-node", ranks, "--master-port", str(port)], env)]
            self.started = [
                subprocess.Popen(
                    [*program, RECIPE, *arguments], env=environ, stdout=file, stderr=file, start_new_session=True
                )
                for program, environ in starts
            ]

    def everyone(self) -> list[psutil.Process]:
        """All processes that are alive, launchers first."""
        found: list[psutil.Process] = []
        for process in self.started:
            try:
                top = psutil.Process(process.pid)
                found += [top, *top.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return [process for process in found if _alive(process)]

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank; fewer where they are not there yet."""
        if self.launcher == "forked":
            return self.everyone()
        found = {}
        for process in self.everyone():
            try:
                environ = process.environ()
                if RECIPE in process.cmdline()[:3] and "RANK" in environ:
                    found[int(environ["RANK"])] = process
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return [found[rank] for rank in sorted(found)]

    def over(self) -> bool:
        """Whether everything that was started here itself has ended."""
        return all(process.poll() is not None for process in self.started)

    def wait(self, timeout: float) -> list[int]:
        """Exit codes once all have ended. TimeoutExpired: they have not."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.started]

    def output(self) -> str:
        """What they have said so far, and those before them that share the log."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """End all of them, whatever they do."""
        for process in self.everyone():
            _signal(process, signal.SIGKILL)
        for process in self.started:
            process.wait()


def wait_until(holds, group: Group, timeout: float = 120, pause: float = 0.01) -> None:
    """Return when `holds()` does. AssertionError: the group ended before, or it takes too long."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert not group.over(), f"the processes ended too early:\n{group.output()[-3000:]}"
        assert time.monotonic() < deadline, f"waited {timeout} s in vain:\n{group.output()[-3000:]}"
        time.sleep(pause)


def ended(processes: list[psutil.Process], timeout: float) -> bool:
    """Whether all of them end within the time. Their exit codes stay for whoever started them."""
    deadline = time.monotonic() + timeout
    while any(_alive(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def newest(out: Path) -> int:
    """Steps of the newest checkpoint by name; -1 where there is none."""
    steps = [int(p.name.removeprefix("step-")) for p in (out / "checkpoints").glob("step-*")]
    return max(steps, default=-1)


def final_state(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint and of the exported generator."""
    last = out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()
    files = [out / "generator" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def differences(first: Path, second: Path) -> list[str]:
    """Names of what two finished runs do not share bit for bit: tensors, and lines of metrics.jsonl."""
    one, two = final_state(first), final_state(second)
    differing = sorted(one.keys() ^ two.keys())
    differing += [name for name in one.keys() & two.keys() if not torch.equal(one[name], two[name])]
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (first, second)]
    return differing + (["metrics.jsonl"] if lines[0] != lines[1] else [])


@dataclass
class Soak:
    """Kills the run in `out` at seeded moments.

    Args:
        arguments: of the recipe; with the output folder `out`.
        out: the run folder.
        seed: of the kills.
        log: file that takes the output of all starts.
    """

    arguments: list[str]
    out: Path
    seed: int
    log: Path
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def kill_once(self, launcher: str, victim: str, moment: str) -> bool:
        """Start the command and kill; whether it was there to be killed.

        Args:
            launcher: see `Group`.
            victim: "rank", "all" or "launcher".
            moment: "start": while the interpreter, the networks and the checkpoint are loaded; "step": at some time
                after a new checkpoint; "writing": as soon as a checkpoint is being written.
        """
        before = newest(self.out)
        # What an earlier kill left must not be taken for this one's.
        for leftover in self.out.glob("checkpoints/.partial-*"):
            shutil.rmtree(leftover)
        group = Group(self.arguments, launcher, self.log)
        self.counts["starts"] += 1
        try:
            victims = self._await(group, victim, moment, before)
            if group.over():
                return False
            # At once: none is to see that another has gone.
            for process in victims:
                _signal(process, signal.SIGSTOP)
            for process in victims:
                _signal(process, signal.SIGKILL)
            ended(victims, 10)
            self.counts["kills"] += 1
            self.counts[f"of {victim}"] += 1
            self.counts[f"under {launcher}"] += 1
            self.counts["aimed at writing"] += moment == "writing"
            # What was not finished lies there under its own name.
            self.counts["during writing"] += any(self.out.glob("checkpoints/.partial-*"))
            if victim != "all":
                self._let_go(group)
            self.counts["steps repeated"] += max(0, _lines(self.out) - max(newest(self.out), 0))
        finally:
            group.kill()
        return True

    def _await(self, group: Group, victim: str, moment: str, before: int) -> list[psutil.Process]:
        """Whom to kill, when it is time."""
        if moment == "start":
            until = time.monotonic() + self.random.uniform(0.0, 8.0)
            while time.monotonic() < until and not group.over():
                time.sleep(0.01)
            return self._victims(group, victim, moment)
        goal = before + self.random.randrange(1, 5)
        while not group.over() and newest(self.out) < goal:
            time.sleep(0.002)
        victims = self._victims(group, victim, moment)
        if moment == "step":
            time.sleep(self.random.uniform(0.0, 0.5))
            return victims
        # The writing takes some milliseconds: no pause in looking.
        while not group.over():
            if any(entry.name.startswith(".partial-") for entry in os.scandir(self.out / "checkpoints")):
                time.sleep(self.random.uniform(0.0, 0.004))
                break
        return victims

    def _victims(self, group: Group, victim: str, moment: str) -> list[psutil.Process]:
        ranks = group.ranks()
        if victim == "rank" and ranks:
            return [ranks[0] if moment == "writing" else self.random.choice(ranks)]
        if victim == "launcher":
            return [psutil.Process(group.started[0].pid)]
        # The one that writes comes first.
        return [*ranks, *(p for p in group.everyone() if p not in ranks)]

    def _let_go(self, group: Group) -> None:
        """The others have to go by themselves."""
        # After a launcher's end they are no longer found below it.
        gone = ended([*group.ranks(), *_trainers(self.out)], 3 * PATIENCE)
        assert gone, f"processes live on long after a kill:\n{group.output()[-3000:]}"


def _trainers(out: Path) -> list[psutil.Process]:
    """Every process that trains in the run folder `out`, also after its launcher has gone."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if RECIPE in command and str(out) in command:
            found.append(process)
    return found


def _lines(out: Path) -> int:
    try:
        return len((out / "metrics.jsonl").read_bytes().splitlines())
    except OSError:
        return 0


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, signum: int) -> None:
    try:
        process.send_signal(signum)
    except psutil.NoSuchProcess:
        return


def complete(arguments: list[str], log: Path, timeout: float = 1800, launcher: str = "hand") -> None:
    """Start the command and let it come to its end."""
    group = Group(arguments, launcher, log)
    try:
        codes = group.wait(timeout)
    finally:
        group.kill()
    assert codes == [0] * RANKS, f"ended with {codes}:\n{group.output()[-3000:]}"


def plan(kills: int, seed: int) -> list[tuple[str, str, str]]:
    """(launcher, victim, moment) of each kill, in a random order: all victims, and a third during the writing."""
    ways = [
        ("hand", "all", "writing"), ("hand", "rank", "step"), ("deepspeed", "all", "writing"),
        ("hand", "all", "start"), ("hand", "rank", "writing"), ("deepspeed", "launcher", "step"),
        ("hand", "all", "step"), ("deepspeed", "rank", "step"), ("hand", "all", "writing"), ("hand", "rank", "start"),
    ]  # fmt: skip
    chosen = [ways[i % len(ways)] for i in range(kills)]
    random.Random(seed).shuffle(chosen)
    return chosen


def main() -> int:
    """The whole soak; 0 when the two runs are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="of their moments and victims")
    parser.add_argument("--zero", type=int, default=2, help="ZeRO stage")
    options = parser.parse_args()
    started = time.monotonic()
    # More than the run can get on between the kills.
    steps = STEPS_PER_KILL * options.kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = make_teacher(folder / "teacher")
        undisturbed, out = folder / "undisturbed", folder / "killed"

        soak = Soak(settings(teacher, out, steps, zero=options.zero), out, options.seed, folder / "killed.log")
        for number, (launcher, victim, moment) in enumerate(plan(options.kills, options.seed), 1):
            if not soak.kill_once(launcher, victim, moment):
                print(f"{number}: the run had ended before")
            facts = f"{victim} ({launcher}, {moment}), newest checkpoint {newest(out)}"
            print(f"{time.monotonic() - started:5.0f} s  kill {number}: {facts}", flush=True)
        killed_at = time.monotonic() - started
        rest = steps - newest(out)
        complete(soak.arguments, soak.log)
        complete(settings(teacher, undisturbed, steps, zero=options.zero, checkpoint_every=1000), folder / "whole.log")
        differing = differences(undisturbed, out)
        log = (folder / "killed.log").read_text(errors="replace")
        counts = soak.counts
        counts["damaged checkpoints skipped"] = len(re.findall("skipping a damaged checkpoint", log))
        counts["continued from a checkpoint"] = len(re.findall("continuing at step", log))
        counts["starts"] += 1
        counts["steps after the kills"] = rest
        print(json.dumps(dict(counts), indent=1))
        print(f"{steps} steps; the kills took {killed_at:.0f} s, all {time.monotonic() - started:.0f} s")
        print("result: " + (f"DIFFERENT: {', '.join(differing[:5])}" if differing else "equal bit for bit"))
        return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
