"""Programs that start with torch, DeepSpeed and this project imported: forked from a process that has done only that.

A program of this project imports for three seconds before it does anything. Tests of what a run does, and not of how
Python starts it, fork theirs from a server that has imported everything and started no thread; each pytest process has
its own, but for workers, which share their controller's. A forked program sees what a started one would: arguments,
environment, folder, standard streams, session, limits, signals; its exit code comes back. Only its objects are not
freed one by one at its end: that would copy all the memory that it shares with the server. One that may use a GPU,
which no forked process could, is started.

    python tests/helpers/prepared.py SOCKET      (the server; it ends when its stdin is closed)
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

IMPORTS = (
    "scipy.linalg", "scipy.stats", "matplotlib.figure", "matplotlib.backends.backend_agg", "tyro",
    "PIL.Image", "PIL.PngImagePlugin", "PIL.ImageFont", "torch._dynamo", "torch.utils.tensorboard",
    "tensorboard.compat.proto", "tensorboard.plugins.hparams.api_pb2",
    "ipfm.recipes.digits_ipfm", "ipfm.recipes.cifar_ipfm", "ipfm.engine.training.distiller",
    "ipfm.engine.training.teacher", "ipfm.engine.evaluation.metrics", "ipfm.engine.memory.watch",
    "ipfm.engine.data.class_counts",
    *(f"ipfm.engine.objectives.{name}" for name in ("cmt", "dmd", "ect", "lpips", "pid")), "deepspeed",
    # What `deepspeed.initialize` imports: a second's worth, Inductor above all.
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer", "setuptools",
)  # fmt: skip
# What is read as Python starts and these are imported: a program that is to have other values is started. Not what an
# import sets for later, as torch's compiler and DeepSpeed do in a process that tests.
READ_ONCE = ("PYTHON", "LC_", "LANG", "OMP_NUM_THREADS", "TRITON_INTERPRET")
# How often Python looks for garbage of each generation: by its own setting a twentieth of what small runs take.
SELDOM = (10_000, 10, 10)
# The address and the environment of the server that workers share.
SHARED = "IPFM_PREPARED_PROGRAMS"


class Program:
    """A forked program, in the words of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = int(connection.recv(64))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code once it has ended. TimeoutExpired: it has not."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"program {self.pid}", timeout or 0)
            self.returncode = int(self._connection.recv(64))
            self._connection.close()
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    script: str | Path,
    *arguments: object,
    env: Mapping[str, str],
    stdout: IO[Any],
    stderr: IO[Any],
    cwd: str | Path | None = None,
    file_size: int | None = None,
) -> Program | subprocess.Popen:
    """`python SCRIPT ARGUMENTS` in a session of its own, without stdin.

    Args:
        script: the file.
        arguments: as text.
        env: the whole environment.
        stdout: an open file; may be `stderr` too.
        stderr: an open file.
        cwd: where; None: here.
        file_size: bytes beyond which the program cannot write to a file.
    """
    words = [str(script), *map(str, arguments)]
    if not _can_fork(env):
        limited = f'ulimit -f {(file_size or 0) // 1024} && PYTHONDONTWRITEBYTECODE=1 exec "$0" "$@"'
        limit = ["bash", "-c", limited] if file_size else []
        return subprocess.Popen(
            [*limit, sys.executable, *words], env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
    address, first = _server()
    for name in {*env, *first}:
        if name.startswith(READ_ONCE) and env.get(name) != first.get(name):
            raise ValueError(f"{name} is {env.get(name)!r}, but was {first.get(name)!r} at the imports: start it anew")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    about = {"words": words, "env": dict(env), "cwd": str(cwd or Path.cwd()), "file_size": file_size}
    with tempfile.TemporaryFile() as request, open(os.devnull, "rb") as nothing:
        request.write(json.dumps(about).encode())
        request.flush()
        socket.send_fds(connection, [b"."], [f.fileno() for f in (nothing, stdout, stderr, request)])
    return Program(connection)


def run(
    script: str | Path, *arguments: object, env: Mapping[str, str], timeout: float = 300, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; what it wrote as text. TimeoutExpired: it took too long, and was killed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        program = start(script, *arguments, env=env, stdout=out, stderr=err, **more)
        try:
            code = program.wait(timeout)
        finally:
            program.kill()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess([str(script), *map(str, arguments)], code, *texts)


def _can_fork(env: Mapping[str, str]) -> bool:
    """Whether a program with this environment sees no GPU."""
    import torch

    return env.get("CUDA_VISIBLE_DEVICES") == "" or not torch.cuda.is_available()


@functools.cache
def _server() -> tuple[str, dict[str, str]]:
    """The address of this process's server, and the environment that it was started in."""
    import launch

    if SHARED in os.environ:
        (address, env), server = json.loads(os.environ[SHARED]), None
    else:
        env = launch.environment()
        address, server = _start_server(env)
    deadline = time.monotonic() + 120
    while not Path(address).exists():
        running = server is None or server.poll() is None
        assert running and time.monotonic() < deadline, "the server of prepared programs did not start"
        time.sleep(0.02)
    return address, env


def share() -> None:
    """Start one server for the workers that this process starts."""
    import launch

    env = launch.environment()
    address, _ = _start_server(env)
    os.environ[SHARED] = json.dumps([address, {name: env[name] for name in env if name.startswith(READ_ONCE)}])


def _start_server(env: Mapping[str, str]) -> tuple[str, subprocess.Popen]:
    """Start a server that ends with this process, and do not wait for it: its address, and itself."""
    folder = tempfile.TemporaryDirectory(prefix="prepared-")
    address = str(Path(folder.name) / "socket")
    server = subprocess.Popen(
        [sys.executable, __file__, address], env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip

    def end() -> None:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return address, server


# -- the server --------------------------------------------------------------------------------------------------------


def serve(address: str) -> dict[str, Any] | None:
    """Fork a program for each connection. Returns what is to be run in the fork, and None when all is over."""
    # There is little garbage among what is imported, and looking for it takes half a second.
    gc.disable()
    for name in IMPORTS:
        importlib.import_module(name)
    warm_up()
    gc.enable()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not survive the fork"
    # What is imported stays, and nobody need look through it for garbage.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*SELDOM)
    programs: dict[int, socket.socket] = {}
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Whoever sees the address can connect to it.
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)
    while True:
        ready = select.select([sys.stdin, woken, listener], [], [])[0]
        if sys.stdin in ready:
            for pid in programs:
                os.kill(pid, signal.SIGKILL)
            return None
        if woken in ready:
            woken.recv(4096)
            _report(programs)
        if listener in ready:
            connection = listener.accept()[0]
            descriptors = socket.recv_fds(connection, 1, 4)[1]
            if not (pid := os.fork()):
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for held in (woken, wake, listener, connection, *programs.values()):
                    held.close()
                return _become(descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            programs[pid] = connection
            connection.send(str(pid).encode())


def warm_up() -> None:
    """Have libraries do what they do at their first use alone, some tenth of a program that takes a second.

    They look for fonts, read the sources of options for their help, and import what shapes of tensors need.
    """
    from ipfm.engine.evaluation.results import plot_convergence
    from ipfm.engine.memory.simulate import StepSettings, simulate_distillation
    from ipfm.engine.memory.state import Sharding
    from ipfm.engine.runtime.commandline import parse_given
    from ipfm.models import presets
    from ipfm.recipes.digits_ipfm import RECIPE

    parse_given([], default=RECIPE.defaults, prog=RECIPE.file, description=RECIPE.help_text())
    with tempfile.TemporaryDirectory() as folder:
        plot_convergence([(1, 2.0), (2, 1.0)], 0.5, Path(folder) / "curve.png")
    simulate_distillation(StepSettings(presets.get("digits"), 4, Sharding()))
    # Programs make their own plans.
    simulate_distillation.cache_clear()


def _report(programs: dict[int, socket.socket]) -> None:
    """Tell those who wait the exit codes of the programs that have ended."""
    for pid in list(programs):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with programs.pop(pid) as connection, contextlib.suppress(OSError):
                connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(descriptors: list[int]) -> dict[str, Any]:
    """Take on what the program of a request is to have."""
    with os.fdopen(descriptors.pop(), "rb") as request:
        request.seek(0)
        about = json.load(request)
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    # Those of the server may be of another kind: a file can seek, a pipe cannot.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (they last as long as the program)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.setsid()
    os.environ.clear()
    os.environ.update(about["env"])
    os.chdir(about["cwd"])
    if limit := about["file_size"]:
        # Python does not notice bytecode that is cut off, and the next program could not import it.
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return about


class End:
    """The end of a program that has ended by itself: after its threads and its other functions for the exit."""

    def __init__(self) -> None:
        self.code: int | None = None
        # What is registered first is called last.
        atexit.register(self.leave)

    def leave(self) -> None:
        if self.code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)


def main() -> None:
    end = End()
    about = serve(sys.argv[1])
    if about is not None:
        script, *_ = sys.argv = about["words"]
        sys.path[0] = str(Path(script).parent)
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            if isinstance(stop.code, str):
                raise
            end.code = stop.code or 0
            return
    end.code = 0


if __name__ == "__main__":
    main()
