"""`ipfm doctor`: a whole machine, and machines on which something is missing, broken, dead or slow."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import launch
import pytest
import torch

from ipfm.engine.commands.doctor import command, libraries, machine, probe
from ipfm.engine.commands.doctor.findings import Check, Finding, answers, in_words, missing, verdict
from ipfm.engine.commands.main import _main
from ipfm.engine.runtime.commandline import run_command


def said_of(check: str) -> list[Finding]:
    (found,) = [c for c in machine.checks() if c.name == check]
    return list(answers([found]))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes so many GPUs appear in /dev, beside the file of a driver."""

    def make(count: int) -> None:
        for index in range(count):
            (tmp_path / f"nvidia{index}").touch()
        (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 2025\n")
        monkeypatch.setattr(machine, "NVIDIA_DEVICES", str(tmp_path / "nvidia[0-9]*"))
        monkeypatch.setattr(machine, "NVIDIA_DRIVER", tmp_path / "version")

    return make


def test_this_machine_in_text_and_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a run needs is here, or the tests would not run."""
    asked = {"torch": libraries.groups()["torch"], "deepspeed": libraries.groups()["deepspeed"][1:2]}
    monkeypatch.setattr(probe, "groups", lambda: asked)
    monkeypatch.setattr(probe, "_answers_of_process", _here(asked))
    monkeypatch.setattr(machine, "gpus_there", lambda: 0)
    run_command("ipfm", _main, ["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is True and facts["missing"] == []
    found = {(f["topic"], f["name"]): f for f in facts["findings"]}
    assert found["libraries", "torch"]["value"] == importlib.metadata.version("torch")
    assert found["what a run takes", "device"]["value"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert found["what a run takes", "precision auto"]["value"].startswith(("fp32", "bf16"))
    topics = [f["topic"] for f in facts["findings"]]
    assert topics == sorted(topics, key=list(dict.fromkeys(topics)).index)
    run_command("ipfm", _main, ["doctor"])
    text = capsys.readouterr().out
    assert text.startswith("this machine\n") and text.endswith("everything that a run needs is here\n")
    for (_, name), fact in found.items():
        # What is free changes.
        assert f" {name} " in text and fact["remedy"] in text and ("free" in fact["value"] or fact["value"] in text)


def _here(asked: dict[str, list[Check]]):
    """The answers of a process, given in this one."""

    def ask(group: str, first: int, patience: float) -> tuple[list[dict], str]:
        return [vars(finding) for finding in answers(asked[group][first:])], ""

    return ask


def test_what_is_missing_is_a_line_and_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        Finding("libraries", "torch", "2.13.0"),
        Finding("extras", "onnx", "not installed", "remark", "pip install onnx"),
        Finding("libraries", "triton", "not installed", "missing", "pip install triton"),
    ]
    monkeypatch.setattr(command, "findings", lambda: command.sorted_by_topic(found))
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            run_command("ipfm", _main, ["doctor", *options])
        out, err = capsys.readouterr()
        assert stop.value.code == 1
        assert err == "ipfm: failed: a run needs what is missing (!): triton\n"
        assert "pip install triton" in out and out.index("triton") < out.index("onnx")
    assert json.loads(out)["missing"] == ["triton: not installed"] and not json.loads(out)["ok"]
    assert "! triton  not installed\n          pip install triton\n" in in_words(found)


@pytest.mark.parametrize(
    ("left", "state", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "missing", "has RANK, WORLD_SIZE of a launcher but no MASTER_ADDR"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "remark",
         "process 1 of 2, as the environment says"),
    ],
)  # fmt: skip
def test_what_a_launcher_has_left_behind(left, state: str, said: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command, "findings", lambda: [Finding("libraries", "torch", "2.13.0")])
    if state == "missing":
        with pytest.raises(SystemExit) as stop:
            run_command("ipfm", _main, ["doctor", "--json"])
        assert stop.value.code == 1
    else:
        run_command("ipfm", _main, ["doctor", "--json"])
    (_, found) = json.loads(capsys.readouterr().out)["findings"]
    assert (found["name"], found["state"]) == ("launcher", state) and said in found["value"]
    assert not {"RANK", "WORLD_SIZE"} & set(os.environ)


def test_it_needs_nothing_that_could_be_broken() -> None:
    """Neither its help nor what it asks of the machine loads a library; that of the libraries is asked elsewhere."""
    text = "from ipfm.engine.commands.doctor import machine, probe, command; list(map(len, machine.checks()[:0]))\n"
    text += "from ipfm.engine.commands.doctor.findings import answers; list(answers(machine.checks()))\n"
    text += "import sys; print(*{'torch', 'triton', 'deepspeed', 'numpy', 'pynvml'} & set(sys.modules), 'loaded')"
    done = subprocess.run([sys.executable, "-c", text], env=launch.environment(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("loaded\n", "")


def test_a_question_that_fails_is_an_answer() -> None:
    def fails() -> list[Finding]:
        raise OSError(13, "Permission denied", "/proc/x")

    found = list(
        answers([Check("a", "b", fails, remedy="again"), Check("a", "c", fails, needed=False), Check("a", "d", list)])
    )
    assert [(f.name, f.state) for f in found] == [("b", "missing"), ("c", "remark")]
    assert found[0].value == "cannot be looked at: PermissionError: [Errno 13] Permission denied: '/proc/x'"
    assert [f.remedy for f in found] == ["again", ""]
    assert verdict(found) == "a run needs what is missing (!): b" and missing(found) == found[:1]


STUB = """
import os, signal, time
from ipfm.engine.commands.doctor import libraries, probe
from ipfm.engine.commands.doctor.findings import Check, Finding

def fine(): return [Finding("t", "fine", "1")]
def crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def ends(): raise SystemExit("no licence")
def prints(): os.write(1, b"[WARNING] noise\\n[1, 2]\\n"); print("noise"); return [Finding("t", "prints", "2")]
def hangs(): time.sleep(60)
probe.groups = lambda: {"g": [Check("t", f.__name__, f) for f in (fine, crashes, prints, ends, fine, hangs, fine)]}
probe.main(*__import__("sys").argv[1:])
"""


def test_a_library_that_crashes_prints_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stub.py").write_text(STUB)
    real = subprocess.Popen

    def start(words: list[str], **more: object) -> subprocess.Popen:
        assert words[:3] == [sys.executable, "-m", probe.__name__]
        return real([sys.executable, str(tmp_path / "stub.py"), *words[3:]], **more)

    monkeypatch.setattr(probe.subprocess, "Popen", start)
    checks = [Check("t", name, list) for name in ("fine", "crashes", "prints", "ends", "fine", "hangs", "fine")]
    started = time.monotonic()
    found = list(probe.ask("g", checks, patience=3))
    assert time.monotonic() - started < 20
    assert [(f.name, f.state) for f in found[:5]] == [
        ("fine", "ok"), ("crashes", "missing"), ("prints", "ok"), ("ends", "missing"), ("fine", "ok"),
    ]  # fmt: skip
    assert found[1].value == "cannot be looked at: it ended by SIGSEGV"
    assert found[3].value == "cannot be looked at: it ended with 1: no licence"
    assert [f.name for f in found[5:]] == ["hangs", "fine"] and found[5].value.startswith(
        "cannot be looked at: no answer within "
    )


HANGING = """
import os, subprocess, sys, time
from pathlib import Path
from ipfm.engine.commands.doctor import probe
from ipfm.engine.commands.doctor.findings import Check

def hangs():
    Path(sys.argv[-1]).write_text(str(os.getpid()))
    time.sleep(60)

checks = [Check("t", "hangs", hangs)]
probe.groups = lambda: {"g": checks}
if len(sys.argv) > 2:
    probe.main(*sys.argv[1:4])
real = subprocess.Popen
probe.subprocess.Popen = lambda words, **more: real([sys.executable, __file__, *words[3:], sys.argv[-1]], **more)
list(probe.ask("g", checks))
"""


def test_a_library_that_hangs_does_not_outlive_the_command(tmp_path: Path) -> None:
    """Not even where that is killed, and cannot end what it has started."""
    stub, pid = tmp_path / "stub.py", tmp_path / "pid"
    stub.write_text(HANGING)
    asking = subprocess.Popen([sys.executable, str(stub), str(pid)], env=launch.environment())
    deadline = time.monotonic() + 60
    while not pid.exists() or not pid.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    asked = Path("/proc", pid.read_text(), "stat")
    assert asked.exists()
    asking.kill()
    asking.wait()
    deadline = time.monotonic() + 20
    # Whoever has it as a child now may not have heard of its end.
    while asked.exists() and asked.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_who_asks_has_ended_before_a_question_is_asked() -> None:
    done = subprocess.run([sys.executable, "-m", probe.__name__, "triton", "0", "1"], env=launch.environment())
    assert done.returncode == 1


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(probe.subprocess, "Popen", start)
    (found,) = probe.ask("g", [Check("t", "torch", list)])
    assert found.state == "missing" and "no process can be started: Resource temporarily" in found.value


@pytest.mark.parametrize(
    ("count", "free", "state"), [(0, 2**26, "remark"), (1, 2**26, "remark"), (2, 2**26, "missing"), (8, 2**33, "ok")]
)
def test_docker_gives_little_shared_memory(gpus, count: int, free: int, state: str, monkeypatch) -> None:
    gpus(count)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    (found,) = said_of("/dev/shm")
    assert found.state == state and ("--shm-size" in found.remedy) == (state != "ok")


def test_no_compiler_and_no_header(gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})
    gpus(0)
    assert {f.state for f in said_of("C compiler")} == {"remark"}
    gpus(1)
    states = {f.name: (f.state, f.remedy) for f in said_of("C compiler")}
    assert states["C compiler"][0] == states["Python.h"][0] == "missing" and states["C++ compiler"][0] == "remark"
    assert "apt-get install gcc" in states["C compiler"][1] and "python3-dev" in states["Python.h"][1]


def test_a_container_without_the_drivers_library(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    done = types.SimpleNamespace(stdout="\tlibc.so.6 (libc6,x86-64) => /lib/libc.so.6\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: done)
    devices, library = said_of("driver")
    assert devices.value == "2 GPUs in /dev, driver 570.86.15"
    assert library.state == "missing" and "--gpus all" in library.remedy
    done.stdout += "\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/libcuda.so.1\n"
    assert [f.state for f in said_of("driver")] == ["ok"]


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("HOME", str(file))
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    (found,) = said_of("home")
    assert found.state == "remark" and str(file) in found.value and "TRITON_CACHE_DIR" in found.remedy
    # Where root may write, and nobody can.
    monkeypatch.setenv("HOME", "/proc/none")
    (found,) = said_of("home")
    assert found.state == "remark" and "(/proc)" in found.value
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (found,) = said_of("home")
    assert found.state == "ok" and not (tmp_path / "cache").exists()

    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    (found,) = said_of("temporary files")
    assert found.state == "missing" and "TMPDIR" in found.remedy
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**20))
    (found,) = said_of("disk")
    assert found.state == "remark" and found.value.startswith("1.0 MiB free in ")


def test_packages_that_are_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "scipy":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.4.0" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {f.name: f for f in said_of("versions")}
    assert found["torch"].state == found["scipy"].state == "missing" and found["numpy"].state == "ok"
    assert found["torch"].value.startswith("2.4.0, needed is ") and found["scipy"].remedy.startswith(
        'pip install "scipy'
    )


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(libraries, "gpus_there", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = libraries._gpus()
    assert found.state == "missing" and "built without CUDA" in found.value and "pip install" in found.remedy

    def old_driver() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    (found,) = libraries._gpus()
    assert "too old (found version 11040)" in found.value and "CUDA 13.0" in found.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (found,) = libraries._gpus()
    assert found.state == "ok" and "hides all GPUs" in found.value
    monkeypatch.setattr(libraries, "gpus_there", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert list(libraries._gpus()) == []


ABOUT = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)


def test_gpus_as_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free, half taken, of a kind that torch has no code for, and one at which computing fails; no peers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: ABOUT)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((79 - 60 * index) * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda n, device: arange(n))
    free, taken, peers = libraries._gpus()
    assert (free.state, taken.state, peers.state) == ("ok", "remark", "remark")
    assert free.value == "NVIDIA H100 (sm_90), 132 SMs, 80.00 GiB, 79.00 GiB free" and peers.value.endswith("0-1, 1-0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    assert [f.state for f in libraries._gpus()] == ["ok", "remark", "remark", "remark", "remark"]

    def broken(n: int, device: str) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "arange", broken)
    assert [f.state for f in libraries._gpus()] == ["missing", "missing", "remark"]
    assert "no kernel image is available" in next(iter(libraries._gpus())).value


@pytest.mark.parametrize(
    ("covered", "capability", "runs"),
    [(["sm_80"], (8, 6), True), (["sm_86"], (8, 0), False), (["sm_90"], (10, 0), False),
     (["sm_90", "compute_90"], (12, 0), True), (["sm_120a"], (12, 0), True), (["compute_100"], (9, 0), False)],
)  # fmt: skip
def test_which_code_a_gpu_runs(covered: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert libraries._covers(covered, *capability) == runs


class Nvml(types.ModuleType):
    """A driver of one GPU with MIG on, on which another process computes; or one that does not answer."""

    nvmlClocksEventReasonSwThermalSlowdown, nvmlClocksThrottleReasonHwSlowdown = 0x20, 0x8

    def __init__(self, *, dead: bool = False) -> None:
        super().__init__("pynvml")
        self.dead = dead

    def nvmlInit(self) -> None:
        if self.dead:
            raise RuntimeError("NVML Shared Library Not Found")

    def nvmlShutdown(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.86.15"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12080

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:
        return 1, 1

    NVML_COMPUTEMODE_DEFAULT = 0

    def nvmlDeviceGetComputeMode(self, handle: int) -> int:
        return 3

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list:
        return [types.SimpleNamespace(pid=1), types.SimpleNamespace(pid=os.getpid())]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        raise RuntimeError("Not Supported")


def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "gpus_there", lambda: 1)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    driver, mig, exclusive, others = libraries._nvml()
    assert driver.value == "570.86.15, for CUDA up to 12.8" and "MIG is on" in mig.value
    assert others.value.endswith(": 1") and "exclusive" in exclusive.value
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(dead=True))
    (found,) = libraries._nvml()
    assert found.state == "remark" and "NVML Shared Library Not Found" in found.value


def test_extras_that_are_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extra.py").write_text("import there_is_no_such_module")
    (tmp_path / "old_extra.py").write_text("raise RuntimeError('compiled for another numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("absent_extra", "broken_extra", "old_extra"):
        monkeypatch.setitem(libraries.EXTRAS, name, ("nothing", f"pip install {name}"))
    (absent,), (broken,), (old,) = (list(libraries._extra(n)) for n in ("absent_extra", "broken_extra", "old_extra"))
    assert {f.state for f in (absent, broken, old)} == {"remark"} and absent.value == "not installed"
    assert "there_is_no_such_module" in broken.value and "compiled for another numpy" in old.value
    (needed,) = libraries._required("old_extra")
    assert needed.state == "missing" and list(libraries._required("json")) == []


def test_a_broken_package_is_put_in_place_again() -> None:
    (torch_,) = [check for check in libraries.groups()["torch"] if check.name == "torch"]
    version = importlib.metadata.version("torch")
    assert torch_.failed("x").remedy == f"where it cannot be loaded: pip install --force-reinstall torch=={version}"


def test_the_kernels_are_tried_as_far_as_this_machine_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ipfm.kernels import _dispatch

    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    (found,) = libraries._kernels()
    assert found.state == "remark" and found.remedy == "unset TRITON_INTERPRET"


def test_launchers_beside_this_python_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    deepspeed, torchrun = libraries._launchers()
    assert {deepspeed.state, torchrun.state} == {"remark"} and "activate" in deepspeed.remedy
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert [f.value for f in libraries._launchers()] == ["none", "none"]
