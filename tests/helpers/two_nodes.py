"""Two machines in one: network, mount, process and host-name namespaces of their own, joined by a cable.

Nothing has to be removed and nothing has a name that could be taken: the namespaces of a node live as long as its first
process, which waits for the end of its stdin. That comes when the test ends, however it ends, and the kernel then kills
whatever runs in the node and takes the network with it.

    with TwoNodes(tmp_path) as nodes:
        nodes[0].start(["torchrun", …], env=…, log=…)
        nodes.silence()
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import launch
import prepared
import soak

_TOOLS = ("ip", "unshare", "nsenter", "mount")


class Node:
    """A machine: `node1` at 10.77.0.1, or `node2` at 10.77.0.2.

    Args:
        number: 1 or 2.
        folder: its current folder, made where it does not exist.
    """

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address, self.folder = f"node{number}", f"10.77.0.{number}", folder
        folder.mkdir(parents=True, exist_ok=True)
        isolated = ("--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._holder = subprocess.Popen(
            ["unshare", *isolated, "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if not self._holder.stdout.readline():
            self._holder.wait()
            raise OSError(self._holder.stderr.read().decode().strip())
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text()
        self.pid = int(children.split()[0])
        self._started: list[prepared.Program | subprocess.Popen] = []

    def call(self, *words: str) -> str:
        """What a command says that runs in the node. OSError: it fails."""
        done = subprocess.run(self._within(words), capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def start(self, words: Sequence[str], *, env: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen:
        """Start a program in the node's folder; its output goes to `log`."""
        started = subprocess.Popen(
            self._within(words), env=dict(env), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        self._started.append(started)
        return started

    def fork(self, script: Path | str, *arguments: object, env: Mapping[str, str], log: IO[bytes]) -> prepared.Program:
        """Fork a program that need not import anything (prepared.py); it knows the machines by their addresses only."""
        within = launch.WORKERS / "in_node.py"
        started = prepared.start(within, self.pid, script, *arguments, env=env, stdout=log, stderr=log, cwd=self.folder)
        self._started.append(started)
        return started

    def kill(self) -> None:
        """End every process of the node at once, and its network with them."""
        self._holder.kill()
        self._holder.wait()
        for started in self._started:
            with contextlib.suppress(OSError):
                started.kill()
        for started in self._started:
            started.wait(30)

    def _within(self, words: Sequence[str]) -> list[str]:
        enter = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--pid"]
        # The folder as it is mounted in the node; that of the outside would count as another disk.
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(self.folder), *words]


class TwoNodes:
    """Two nodes, a cable between them, and no other network.

    Args:
        folder: holds a folder for each of them.
        resolving: how a machine knows its own name: by its "address", or as "loopback", which is the habit of Debian.
    """

    def __init__(self, folder: Path, *, resolving: str = "loopback") -> None:
        self.folder, self._resolving = folder, resolving
        self._nodes: list[Node] = []

    def __enter__(self) -> TwoNodes:
        try:
            self._nodes = [Node(number, self.folder / f"node{number}") for number in (1, 2)]
            one, two = self._nodes
            ends = ("netns", str(one.pid), "type", "veth", "peer", "name", "cable", "netns", str(two.pid))
            subprocess.run(["ip", "link", "add", "cable", *ends], check=True, capture_output=True)
            for node in self._nodes:
                own = node.address if self._resolving == "address" else "127.0.1.1"
                known = {other.name: other.address if other is not node else own for other in self._nodes}
                hosts = node.folder / ".hosts"
                hosts.write_text("".join(f"{at} {name}\n" for name, at in {"localhost": "127.0.0.1", **known}.items()))
                node.call(
                    "sh", "-ec", f"hostname {node.name}; mount --bind .hosts /etc/hosts; ip link set lo up;"
                    f"ip addr add {node.address}/24 dev cable; ip link set cable up",
                )  # fmt: skip
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:
            node.kill()

    def __getitem__(self, index: int) -> Node:
        return self._nodes[index]

    def unplug(self) -> None:
        """Take the link down: the machines know it, their sockets stay open."""
        self._nodes[0].call("ip", "link", "set", "cable", "down")

    def plug(self) -> None:
        """Bring the link up again."""
        self._nodes[0].call("ip", "link", "set", "cable", "up")

    def silence(self) -> None:
        """Drop every packet between the machines, of which neither hears: they are sent to a card that nobody has."""
        for node, other in zip(self._nodes, reversed(self._nodes), strict=True):
            node.call("ip", "neigh", "replace", other.address, "lladdr", "02:00:00:00:00:99", "dev", "cable")


@functools.cache
def missing() -> str:
    """Why there can be no two nodes here; "" where there can."""
    if lacking := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"two nodes need {', '.join(lacking)}"
    if os.geteuid() != 0:
        return "two nodes need root, for namespaces and a network between them"
    import tempfile

    try:
        with tempfile.TemporaryDirectory() as folder, TwoNodes(Path(folder)):
            return ""
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        return f"no namespaces may be made here ({' '.join(said.decode(errors='replace').split())})"


# A launcher's name here, its program, and an option that the command has.
_COMMANDS = {
    "deepspeed": ("deepspeed", "--no_ssh"),
    "torchrun": ("torchrun", "--node_rank"),
    "c10d": ("torchrun", "c10d"),
}


def documented(launcher: str) -> list[str]:
    """The words before the recipe of a command of docs/multi-node.md."""
    program, has = _COMMANDS[launcher]
    lines = (launch.ROOT / "docs" / "multi-node.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line.strip() for line in lines if line.startswith(f"    {program} ") and has in line]
    return shlex.split(line.partition(" recipes/")[0])


class Start:
    """One start of a recipe on both nodes, by a launcher of their own each.

    Args:
        nodes: the two.
        launcher: "deepspeed", "torchrun", "c10d" (torchrun that finds the ranks by itself) or "slurm"; "forked" for
            the tasks of srun that need not import anything.
        arguments: of the recipe, on each node.
        folder: takes the outputs, log1 and log2, which are begun anew.
        environment: further variables.
        ranks: processes on each node.
        script: the recipe, or what stands for it.
    """

    def __init__(
        self,
        nodes: TwoNodes,
        launcher: str,
        *arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        ranks: int = 1,
        script: Path | str = soak.RECIPE,
        only: Sequence[int] = (0, 1),
    ) -> None:
        self.nodes, self.launcher, self.folder, self.ranks, self.script = nodes, launcher, folder, ranks, script
        self.environment = {"IPFM_TIMEOUT": "60", **(environment or {})}
        self.arguments = arguments if len(arguments) == 2 else (arguments[0], arguments[0])
        self.started: dict[int, list[prepared.Program | subprocess.Popen]] = {}
        for index in only:
            self.start(index)

    def start(self, index: int) -> None:
        """Start the recipe on a node."""
        env = launch.environment(**self.environment)
        node, words = self.nodes[index], [str(self.script), *self.arguments[index]]
        with open(self.folder / f"log{index + 1}", "wb") as log:
            if self.launcher in ("slurm", "forked"):
                self.started[index] = []
                for local in range(self.ranks):
                    task = {**env, **self.task(index, local)}
                    if self.launcher == "forked":
                        self.started[index].append(node.fork(words[0], *words[1:], env=task, log=log))
                    else:
                        self.started[index].append(node.start([sys.executable, *words], env=task, log=log))
                return
            # As the page has it, but for the recipe, the number of processes and the machine's own number.
            (self.folder / "hosts").write_text("".join(f"node{number} slots={self.ranks}\n" for number in (1, 2)))
            command = documented(self.launcher)
            for option, value in (
                ("--nproc_per_node", f"{self.ranks}"),
                ("--node_rank", f"{index}"),
                ("--hostfile", f"{self.folder / 'hosts'}"),
            ):
                if option in command:
                    command[command.index(option) + 1] = value
            program = node.start([str(launch.BIN / command[0]), *command[1:], *words], env=env, log=log)
            self.started[index] = [program]

    def task(self, index: int, local: int) -> dict[str, str]:
        """What srun would say to a task."""
        # A forked one knows no names.
        place = {"MASTER_ADDR": self.nodes[0].address} if self.launcher == "forked" else {}
        return place | {
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": str(2 * self.ranks), "SLURM_NODEID": str(index),
            "SLURM_PROCID": str(index * self.ranks + local), "SLURM_LOCALID": str(local),
            "SLURM_STEP_TASKS_PER_NODE": f"{self.ranks}(x2)",
        }  # fmt: skip

    def wait(self, timeout: float = 120) -> list[list[int]]:
        """Exit codes of each node's programs. AssertionError, with what they said: they do not end."""
        deadline = time.monotonic() + timeout
        codes = []
        for index, programs in sorted(self.started.items()):
            try:
                codes.append([program.wait(max(0.1, deadline - time.monotonic())) for program in programs])
            except subprocess.TimeoutExpired:
                raise AssertionError(f"node{index + 1} did not end within {timeout} s\n{self.said()}") from None
        return codes

    def output(self, index: int) -> str:
        """What was said on a node so far."""
        log = self.folder / f"log{index + 1}"
        return log.read_text(errors="replace") if log.exists() else ""

    def lines(self, index: int, *beginnings: str) -> list[str]:
        """Lines that the recipe said on a node that begin so."""
        return [line for line in self.output(index).splitlines() if line.startswith(beginnings)]

    def said(self) -> str:
        """The end of both outputs."""
        return "\n".join(f"-- node{index + 1}\n{self.output(index)[-3000:]}" for index in (0, 1))

    def over(self) -> bool:
        """Whether everything that was started has ended."""
        return all(program.poll() is not None for programs in self.started.values() for program in programs)


def alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(holds, timeout: float, said=lambda: "") -> None:
    """Return once `holds()` does. AssertionError, with what `said()` says: it takes too long."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout:g} s in vain: {said()[-4000:]}"
        time.sleep(0.02)
