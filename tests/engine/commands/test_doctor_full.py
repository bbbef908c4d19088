"""`ipfm doctor --full`: every section on this machine, and every line that a GPU takes through a stand-in for one."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launch
import prepared
import pytest
import stand_ins
import torch

from ipfm.engine.commands.bench import short_run
from ipfm.engine.commands.bench.plain_rule import EDM2
from ipfm.engine.commands.bench.step import Variant
from ipfm.engine.commands.doctor import command, full, outcome, page, page_mark, section, sections
from ipfm.engine.commands.doctor.forms import BEFORE_REPLAY
from ipfm.engine.commands.doctor.place import (
    FAILED,
    LEFT_OUT,
    OK,
    OutOfTime,
    Place,
    TookTooLong,
    at_most,
    judged,
    tried,
    within,
)
from ipfm.engine.commands.doctor.sections import SECTIONS, Section
from ipfm.engine.commands.main import _main
from ipfm.engine.runtime.commandline import run_command
from ipfm.models import presets

POPEN = subprocess.Popen
BY_NAME = {s.name: s for s in SECTIONS}


class StandIn(Place):
    """A CPU that every section takes for a GPU."""

    cuda = True  # type: ignore[assignment]


def rows_of(name: str, tmp_path: Path, kind: type[Place] = Place, **more: Any) -> list[dict[str, Any]]:
    place = kind("cpu", tmp_path, more.pop("seconds", 600.0), more.pop("quick", True), **more)
    found = list(BY_NAME[name].rows(place))
    assert found and not [row for row in found if str(row["verdict"]).startswith(FAILED)], found
    return found


@pytest.fixture(autouse=True)
def linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's, for the tests that follow: DeepSpeed puts its own in their place where a process shards weights."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of the presets' names, thin."""
    monkeypatch.setattr(presets, "TABLE", stand_ins.THIN_PRESETS)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs are forked, and not started."""

    def start(words: list[str], env: dict[str, str], stdin: int, stdout: Any, stderr: Any) -> Any:
        assert words[:3] == [sys.executable, "-m", short_run.__name__]
        return prepared.start(short_run.__file__, *words[3:], env=env, stdout=stdout, stderr=stderr)

    monkeypatch.setattr(short_run, "subprocess", types.SimpleNamespace(**vars(subprocess) | {"Popen": start}))
    for name, value in launch.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


# -- the sections ------------------------------------------------------------------------------------------------------


def test_all_together_are_ten_minutes() -> None:
    assert sum(s.seconds for s in SECTIONS) <= 600
    assert set(sections.NAMES) == set(command.Name.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Place, StandIn])
def test_speed_of_the_machine(kind: type[Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipfm.engine.commands.doctor.findings import Finding
    from ipfm.engine.commands.doctor.sections import environment

    monkeypatch.setattr(environment, "ELEMENTS", {True: 1 << 10, False: 1 << 10})
    monkeypatch.setattr(environment, "SIDE", {True: 16, False: 16})
    monkeypatch.setattr("ipfm.kernels.bench.measurement.SECONDS", {True: 0.01})
    remark = Finding("extras", "onnx", "not installed", "remark", "pip install onnx")
    monkeypatch.setattr(environment, "findings", lambda: [Finding("libraries", "torch", "2.13"), remark])
    found = rows_of("environment", tmp_path, kind, quick=False)
    assert [row["verdict"] for row in found[:2]] == [OK, "pip install onnx"]
    assert [row["what"] for row in found[2:]] == [
        "copy, float32", "matrix product, float32", "copy, bfloat16", "matrix product, bfloat16",
    ]  # fmt: skip
    monkeypatch.setattr(environment, "findings", lambda: [Finding("libraries", "torch", "2", "missing", "install it")])
    place = Place("cpu", tmp_path, 60.0)
    assert next(BY_NAME["environment"].rows(place))["verdict"] == "FAILED: install it"


@pytest.mark.parametrize("kind", [Place, StandIn])
def test_kernels_are_right_and_timed(kind: type[Place], thin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipfm.engine.commands.doctor.sections import kernels

    monkeypatch.setattr("ipfm.kernels.bench.measurement.SECONDS", {True: 0.001})
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    monkeypatch.setattr(kernels, "NETWORKS", (("ncsnpp", 2),))
    found = rows_of("kernels", tmp_path, kind)
    measured = [row for row in found if row.get("by") == "eager"]
    assert {row["operation"] for row in measured} >= {"perturb", "ipfm_loss", "denoising_loss", "AdamEMA"}
    norms = [row for row in found if row.get("by") == "recomputed"]
    assert len(norms) == (4 if kind is StandIn else 2) and all(float(row["error over allowed"]) <= 1 for row in norms)
    assert {row["what"].split()[-1] for row in norms} == {"channels_last", "contiguous"}


@pytest.mark.parametrize("name", ["ncsnpp", "adm"])
def test_normalisations_are_those_that_a_gpu_gets(name: str, thin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases and embeddings that enter before one are compared too."""
    from ipfm.engine.commands.doctor.sections import kernels

    monkeypatch.setattr("ipfm.kernels.bench.measurement.SECONDS", {True: 0.0})
    norms = kernels.distinct_norms(name, presets.get(name), 2)
    kinds = {(norm.silu, norm.scaled, norm.addend and len(norm.addend)): norm for norm in norms}
    assert {dims for _, _, dims in kinds} > {None} and {scaled for _, scaled, _ in kinds} >= {name == "adm"}
    for norm in kinds.values():
        for dtype in (torch.float32, torch.bfloat16):
            row = kernels._norm(norm, dtype, True, torch.device("cpu"))
            assert row["verdict"] == OK, (norm, row)


def test_what_takes_too_long_is_left() -> None:
    began, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(TookTooLong, match="not at its end after 0 s"), at_most(0.05):
        time.sleep(20)
    assert time.monotonic() - began < 10 and signal.getsignal(signal.SIGALRM) is before

    def slow() -> dict[str, Any]:
        with at_most(0.05):
            time.sleep(20)
        return {}

    assert tried({"a": 1}, slow) == {"a": 1, "verdict": "left out: not at its end after 0 s"}


def test_a_wrong_normalisation_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipfm.engine.commands.doctor.sections import kernels
    from ipfm.models.layers import GroupNorm

    (norm, *_) = kernels.distinct_norms("digits", presets.get("digits"), 2)
    right = GroupNorm.forward
    monkeypatch.setattr(GroupNorm, "forward", lambda self, x, **more: right(self, x, **more) * 1.001)
    monkeypatch.setattr("ipfm.kernels.bench.measurement.SECONDS", {True: 0.001})
    row = kernels._norm(norm, torch.float32, True, torch.device("cpu"))
    assert row["verdict"].startswith("FAILED: error ")


def test_registers_and_spills_of_what_was_launched() -> None:
    from ipfm.engine.commands.doctor.sections import kernels

    loaded = []
    fine, spilled = (
        types.SimpleNamespace(_init_handles=lambda: loaded.append(1), n_regs=regs, n_spills=spills)
        for regs, spills in ((40, 0), (255, 16))
    )
    found = list(kernels.of_kernel("perturb_kernel", {0: ({"a": fine, "b": spilled}, {}, None, None, None)}))
    assert [(r["registers"], r["spills"], r["verdict"]) for r in found] == [
        (40, 0, OK), (255, 16, "FAILED: 16 bytes a thread spill"),
    ]  # fmt: skip
    assert len(loaded) == 2 and list(kernels.launched()) == []


def test_without_a_gpu_kernels_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: those of this one are interpreted."""
    from ipfm.kernels.bench import compile_report

    row = types.SimpleNamespace(registers=40, spills=3)
    monkeypatch.setattr(compile_report, "report_rows", lambda cases, arch: iter([row]))
    from ipfm.engine.commands.doctor.sections import kernels

    monkeypatch.setattr(kernels, "INTERPRETED", False)
    (found,) = kernels._compiled(Place("cpu", tmp_path, 60.0, quick=True))
    assert found["registers"] == 40 and found["verdict"] == "FAILED: 3 instructions spill registers"


@pytest.mark.parametrize("kind", [Place, StandIn])
def test_convolutions_equal_pytorchs(kind: type[Place], thin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU in bfloat16."""
    from ipfm.engine.commands.doctor.sections import convolutions

    monkeypatch.setattr("ipfm.kernels.bench.measurement.SECONDS", {True: 0.001})
    monkeypatch.setattr(convolutions, "NETWORKS", (("ncsnpp", 2),))
    found = rows_of("convolutions", tmp_path, kind)
    assert len(found) == 8 and {row["gradients"] for row in found} == {"all", "input"}
    assert all(float(row["TFLOP/s"]) > 0 or row["layer"].startswith("filter") for row in found)


@pytest.mark.parametrize("name", ["ncsnpp", "ddpmpp", "adm"])
def test_every_kind_of_convolution_layer_is_tried(name: str, thin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up, down, a filter alone: each computes the same as PyTorch's operations in both memory formats."""
    from ipfm.engine.commands.doctor.sections import convolutions

    monkeypatch.setattr("ipfm.kernels.bench.measurement.SECONDS", {True: 0.0})
    layers = convolutions.distinct_layers(name, presets.get(name), 2)
    kinds = {(layer.module.up, layer.module.down, layer.module.kernel): layer for layer in layers}
    assert {up for up, _, _ in kinds} == {down for _, down, _ in kinds} == {True, False}
    for layer in kinds.values():
        for frozen in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                row = convolutions._measured(layer, True, frozen, dtype, torch.device("cpu"))
                assert row["verdict"] == OK, (layer.words, row)
    assert sum(layer.count for layer in layers) == sum(
        type(m) is convolutions.Conv2d for m in presets_network(name).modules()
    )


def presets_network(name: str) -> torch.nn.Module:
    from ipfm.models import build_network

    with torch.device("meta"):
        return build_network(presets.get(name))


@pytest.mark.parametrize("kind", [Place, StandIn])
def test_attention_by_backend(kind: type[Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipfm.engine.commands.doctor.sections import attention

    monkeypatch.setattr("ipfm.kernels.bench.measurement.SECONDS", {True: 0.001})
    monkeypatch.setattr(attention, "SHAPES", ((2, 16, 1, 16),))
    found = rows_of("attention", tmp_path, kind)
    assert [row["backend"] for row in found if row["auto"]] == ["sdpa"] * (2 if kind is StandIn else 1)
    by = {row["backend"]: row for row in found}
    assert by["sdpa"]["verdict"] == OK and by["math"]["same bits twice"] == "yes"
    # What does not run here is no failure, and says why.
    assert "does not run: " in by["xformers"]["note"] and by["xformers"]["verdict"] == OK


def test_the_engine_against_the_plain_loop(tmp_path: Path) -> None:
    found = rows_of("engine", tmp_path)
    assert {row["setting"].partition(",")[0] for row in found} == {"fp32", "bf16"}
    assert {row["network"] for row in found} == {"NCSN++", "EDM2"}
    for row in found:
        assert float(row["generator"]) <= float(row["allowed"]) < float(row["moved"])


def test_an_engine_that_computes_something_else_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipfm.engine.commands.doctor.sections import engine
    from ipfm.engine.objectives.ipfm import DistillConfig

    monkeypatch.setattr(
        engine,
        "cases",
        lambda device, quick: (
            [("NCSN++", "none", {"x": 1})]
            + [(network, "other", {"zero": 0, "lr": 1.1e-3}) for network in engine.NETWORKS]
        ),
    )
    none, *others = BY_NAME["engine"].rows(Place("cpu", tmp_path, 60.0, quick=True))
    assert none["verdict"].startswith("FAILED: TypeError: ")
    assert len(others) == 2 and all(row["verdict"].startswith("FAILED: differs by ") for row in others), others
    monkeypatch.undo()
    every = engine.cases(torch.device("cuda"))
    assert len({case[:2] for case in every}) == len(every) >= 20
    for network in engine.NETWORKS:  # each at every stage, in 16 bits, and captured
        mine = [settings for name, _, settings in every if name == network]
        assert {settings["zero"] for settings in mine} == {0, 1, 2, 3}
        assert {settings.get("precision") for settings in mine} >= {None, "bf16"}
        assert any(settings.get("cuda_graphs") == "on" for settings in mine)
        for settings in mine:
            DistillConfig(**{**engine.BASE, **settings})


def test_what_the_host_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipfm.engine.commands.doctor.sections import waiting

    (found,) = rows_of("waiting", tmp_path)
    assert (found["device-wide waits"], found["readings"], found["waits"]) == (0, 0, 0)
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    task = types.SimpleNamespace(world=types.SimpleNamespace(device=torch.device("cpu")))

    def iteration(step: int) -> None:
        import warnings

        if step == BEFORE_REPLAY + 1:
            warnings.warn("called a synchronizing CUDA operation", UserWarning)

    task.iteration = iteration
    places: list[str] = []
    row = waiting._seen_by_cuda(task, places)  # type: ignore[arg-type]
    assert modes == ["warn", "default"] and row["warnings"] == 1 and __file__ in places[0]
    # Each network eagerly and captured on a GPU; the large ones only there.
    every = [name for name, *_ in waiting._cases(Place("cuda", tmp_path, 60.0, quick=False))]
    assert len(set(every)) == len(every)
    for network in ("digits, ", "edm2, ", "ncsnpp, batch 32, ", "edm2-img64-xs, batch 32, "):
        mine = [name for name in every if name.startswith(network)]
        assert {name.endswith("CUDA graphs") for name in mine} == {False, True}
    on_cpu = {name.split(",")[0] for name, *_ in waiting._cases(Place("cpu", tmp_path, 60.0, quick=False))}
    assert on_cpu == {"digits", "edm2"}


def event(name: str, start: float, end: float, device: str = "DeviceType.CPU") -> types.SimpleNamespace:
    span = types.SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return types.SimpleNamespace(name=name, time_range=span, device_type=device)


def test_an_account_of_a_profile() -> None:
    """The profiler's own wait at the end is none of the step's."""
    from ipfm.engine.commands.doctor.sections.waiting import RANGE, account

    events = [
        event(RANGE, 0, 1000), event("cudaStreamSynchronize", 100, 110), event("cudaLaunchKernel", 120, 130),
        event("kernel", 200, 700, "DeviceType.CUDA"), event("cudaDeviceSynchronize", 1001, 2000),
        event(RANGE, 200, 700, "DeviceType.CUDA"), event("Optimizer.step", 200, 700, "DeviceType.CUDA"),
    ]  # fmt: skip
    events[-1].is_user_annotation = True
    row = account(events, 1e-3, 2e-3)
    assert (row["waits"], row["kernels"], row["GPU busy"], row["step ms"]) == (1, 1, "25%", "2.0")


EAGER = [Variant("plain", "bf16"), Variant("plain", "bf16", rival="tuned"), Variant("joint", "bf16")]


def test_a_step_is_timed_beside_plain_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipfm.engine.commands.doctor.sections import time as timing

    monkeypatch.setattr(timing, "BATCHES", (2,))
    published = timing._compared()
    digits = presets.get("digits", D=128.0)
    monkeypatch.setattr(timing, "_compared", lambda: {"digits": (digits, (2,)), "edm2": (EDM2, (2,))})
    monkeypatch.setattr(timing, "ROUNDS_QUICK", 1)
    compiled = timing._compiled
    monkeypatch.setattr(timing, "_compiled", lambda precision, world: [])
    monkeypatch.setattr(timing, "_eager", lambda precision, world, quick=False: EAGER)
    found = rows_of("time", tmp_path, StandIn)
    assert {name: batches for name, (_, batches) in published.items()} == {"ncsnpp": (2,), "edm2-img64-xs": (2,)}
    for network in ("digits", "edm2"):
        forms = [row["form"] for row in found if row["network"] == network]
        assert forms[:2] == ["plain", "plain tuned"] and "joint" in forms
    assert all(float(row["expected of an H100, ms"]) > 0 for row in found) and {row["precision"] for row in found} == {
        "bf16"
    }
    assert [v.name for v in compiled("fp32", types.SimpleNamespace(device=torch.device("cuda")))] == [
        "plain", "plain tuned", "joint", "joint, cuda-graphs on",
    ]  # fmt: skip


def test_too_little_memory_for_a_comparison_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipfm.engine.commands.doctor.sections import time as timing

    def refuse(*_: object) -> Iterator[None]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        yield

    monkeypatch.setattr(timing, "measure_steps", refuse)
    (row,) = rows_of("time", tmp_path)
    assert row["verdict"] == "left out: not enough memory (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    # Half of the images then, down to 32.
    assert [row["batch"] for row in rows_of("time", tmp_path, quick=False)] == [64, 32]


def test_memory_is_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipfm.engine.commands.doctor.sections import memory

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    small = memory._networks(Place("cpu", tmp_path, 60.0, quick=True))
    monkeypatch.setattr(memory, "_networks", lambda place: small)
    found = rows_of("memory", tmp_path, StandIn)
    assert {row["network"] for row in found} == {"ncsnpp", "edm2"}
    assert found[-1]["phase"] == "peak" and {"planned", "measured", "off"} <= set(found[1])
    monkeypatch.setattr(memory, "TOLERANCE", 0.0)
    assert any("promised" in r["verdict"] for r in BY_NAME["memory"].rows(Place("cpu", tmp_path, 60.0, quick=True)))


@pytest.mark.distributed
def test_a_killed_run_ends_with_the_same_bits(forked, tmp_path: Path) -> None:
    run, images = rows_of("resume", tmp_path)
    assert run["same bits"] == "yes" and run["largest difference"] == "0.0e+00"
    assert images["features"] == "pixels" and float(images["largest difference"]) == 0


@pytest.mark.distributed
def test_two_processes_of_which_one_is_killed(forked, tmp_path: Path) -> None:
    killed, same = rows_of("ranks", tmp_path)
    assert float(same["largest difference"]) <= 1e-5
    assert killed["exit codes"] == "1, -9" and killed["seconds"] < 30 and killed["then"] == "resumed on one"


# -- how they are run --------------------------------------------------------------------------------------------------


def a_section(name: str, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, seconds: float = 20) -> Section:
    """A section whose process runs `text`."""
    (tmp_path / f"{name}.py").write_text(
        "import json, os, sys, time\nplace, rows = json.loads(sys.argv[2]), open(sys.argv[3], 'a')\n"
        f"def row(**r): rows.write(json.dumps({{'row': r}}) + chr(10)); rows.flush()\n{text}\n"
    )

    def start(words: list[str], **more: Any) -> subprocess.Popen:
        assert words[:3] == [sys.executable, "-m", section.__name__]
        return POPEN([sys.executable, str(tmp_path / f"{words[3]}.py"), *words[3:]], **more)

    monkeypatch.setattr(full.subprocess, "Popen", start)
    return Section(name, f"What {name} is", seconds)


def test_what_a_section_has_found_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is killed, one that hangs, one that ends by an error: the rows are there, and the others go on."""
    monkeypatch.setattr(full, "ON_A_CPU", 1.0)
    texts = {
        "environment": "row(topic='GPU', what='cuda:0', found='NVIDIA H100 (sm_90), 132 SMs', verdict='ok')",
        "kernels": "row(a=1, verdict='ok'); row(a='x|y', b=2, verdict='FAILED: wrong'); rows.write('{\"row\": {\"a');"
        "rows.flush(); os.kill(os.getpid(), 9)",
        "attention": "row(a=1, verdict='ok'); time.sleep(60)",
        "engine": "row(a=1, verdict='ok'); raise SystemExit('no memory')",
        "ranks": "row(a=1, verdict='ok'); rows.write(json.dumps({'left out': '3 of 4 cases'}))",
    }
    made = [
        a_section(name, tmp_path, text, monkeypatch, 1.0 if name == "attention" else 20) for name, text in texts.items()
    ]
    for module in (full, outcome):
        monkeypatch.setattr(module, "SECTIONS", tuple(made))
    out = tmp_path / "out dir"
    out.mkdir()
    said: list[str] = []
    found = full.examine(out, made, device="cpu", done=lambda o: said.append(f"{o.section.name}: {o.verdict}"))
    assert said == [
        "environment: ok", "kernels: 2 FAILED", "attention: 1 FAILED", "engine: 1 FAILED",
        "ranks: ok; left out: 3 of 4 cases",
    ]  # fmt: skip
    assert found[1].failures == ["x|y, 2: FAILED: wrong", "FAILED: its process ended with SIGKILL"]
    assert found[2].failures == ["FAILED: not at its end after 1 s, which are all that it has"]
    assert found[3].failures == ["FAILED: its process ended with 1: no memory"]
    with (out / "kernels.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"a": "1", "b": "", "verdict": "ok"}, {"a": "x|y", "b": "2", "verdict": "FAILED: wrong"},
        ]  # fmt: skip
    text = (out / "doctor.md").read_text()
    assert text.startswith("# ipfm doctor: NVIDIA H100 (sm_90)\n") and "| x/y | 2 | FAILED: wrong |" in text
    html = (out / page_mark.PAGE).read_text()
    assert 'class="bad">FAILED: wrong<' in html and 'class="bad">2 FAILED<' in html and "What ranks is" in html
    assert not (out / "work" / "kernels").exists()
    # Those that are repeated take the place of what they were; the others stay on the page.
    (tmp_path / "kernels.py").write_text((tmp_path / "environment.py").read_text())
    full.examine(out, made[1:2], device="cpu")
    assert [o.verdict.partition(" ")[0] for o in outcome.read_outcomes(out)] == ["ok", "ok", "1", "1", "ok;"]
    assert "2 FAILED" not in (out / "doctor.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_page_and_no_process(
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    made = a_section(
        "engine", tmp_path, "row(a=1, verdict='ok'); print(os.getpid(), flush=True); time.sleep(60)", monkeypatch
    )
    started: list[subprocess.Popen] = []
    start = full.subprocess.Popen

    def interrupted(words: list[str], **more: Any) -> subprocess.Popen:
        started.append(start(words, **more))

        def wait(timeout: float | None = None) -> int:
            if timeout is None:
                return real()
            while not (tmp_path / "engine.jsonl").read_text():
                pass
            signal.raise_signal(number)
            raise AssertionError("the signal is taken up at once")

        real, started[0].wait = started[0].wait, wait  # type: ignore[method-assign]
        return started[0]

    monkeypatch.setattr(full.subprocess, "Popen", interrupted)
    # Programs that are started in the background may have it ignored.
    inherited = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, inherited))
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as end:
        full.examine(tmp_path, [made], device="cpu")
    assert signal.getsignal(number) == before
    if number != signal.SIGINT:
        assert end.value.code == 128 + number and capsys.readouterr().err == f"ipfm: stopped by {number.name}\n"
    assert started[0].poll() == -signal.SIGKILL
    (found,) = outcome.read_outcomes(tmp_path)
    assert found.rows == ({"a": 1, "verdict": "ok"},) and found.reason == "it was ended before it was done"
    assert (tmp_path / page_mark.PAGE).is_file()


def test_a_section_fills_its_rows_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipfm.engine.commands.doctor.sections import ranks

    rows = tmp_path / "rows"

    def fake(place: Place) -> Iterator[dict]:
        yield {"a": float("nan"), "b": Path("x"), "c": torch.float32, "verdict": OK}
        assert len(rows.read_text().splitlines()) == 1
        for case in within(place, [1, 2, 3], "cases"):
            yield tried({"case": case}, lambda: 1 / 0)  # type: ignore[return-value,arg-type]

    monkeypatch.setattr(ranks, "rows", fake)
    section.fill(BY_NAME["ranks"], Place("cpu", tmp_path, 0.0), rows)
    first, second, left = map(json.loads, rows.read_text().splitlines())
    assert first["row"] == {"a": None, "b": "x", "c": "torch.float32", "verdict": OK}
    assert second["row"] == {"case": 1, "verdict": "FAILED: ZeroDivisionError: division by zero"}
    assert left == {LEFT_OUT: "2 of 3 cases: 0 s are over"}
    with pytest.raises(OutOfTime):
        list(within(Place("cpu", tmp_path, 0.0), [1, 2], "cases"))
    assert judged(True, "x") == OK and judged(False, "a\n b") == "FAILED: a b"


def test_a_process_fills_a_table(tmp_path: Path) -> None:
    """From end to end, on the section that needs the least."""
    made = BY_NAME["attention"]
    full.run_section(made, tmp_path, device="cpu", inception=None, quick=True)
    found = outcome.write_table(tmp_path, made)
    assert found.verdict == "ok" and len(found.rows) == 7 and found.seconds > 0
    assert (tmp_path / "attention.csv").is_file() and page.machine([found]) == "a machine"


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_what_fails(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    found = outcome.Outcome(BY_NAME["engine"], ({"setting": "fp32", "verdict": "FAILED: wrong"},), 3.0)
    asked: dict[str, Any] = {}

    def examine(folder: Path, chosen: list[Section], **more: Any) -> list[outcome.Outcome]:
        asked.update(more, folder=folder, names=[s.name for s in chosen])
        more["done"](found)
        return [found]

    monkeypatch.setattr(full, "examine", examine)
    arguments = ["doctor", "--full", "--only", "engine", "ranks", "--out", str(out)]
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            run_command("ipfm", _main, [*arguments, *options])
        said, err = capsys.readouterr()
        assert stop.value.code == 1
        assert err.splitlines() == [
            "engine: 1 FAILED, 3 s",
            f"ipfm: failed: what fails: engine; {out}/doctor.html has all of it",
        ]
    assert asked["names"] == ["engine", "ranks"] and asked["device"] in ("cpu", "cuda") and out.is_dir()
    facts = json.loads(said)
    assert facts["ok"] is False and facts["sections"][0]["failures"] == ["fp32: FAILED: wrong"]
    assert facts["sections"][0]["rows"] == [{"setting": "fp32", "verdict": "FAILED: wrong"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "x"], "out go with --full: add it, or leave them out"),
        (["--full", "--only", "speed"], "--only must be one of"),
        (["--full", "--only"], "only"),
        (["--full", "--inception", "none.pt"], "inception none.pt is no file"),
        (["--full", "--out", "file/x"], "file/x cannot be written"),
        (["--full", "--out", "/proc/x"], "/proc/x: No such file or directory"),
        (["--full", "--out", "."], "doctor.html is there and is no page of this command: choose another --out"),
    ],
)
def test_refusals(options: list[str], message: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / page_mark.PAGE).write_text("<html>mine</html>")
    with pytest.raises(SystemExit) as stop:
        run_command("ipfm", _main, ["doctor", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_torch_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert command.device_to_examine() == "cpu"
