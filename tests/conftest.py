"""Shared by all tests: GPUs hidden unless `-m gpu` asks for them, and Triton's interpreter where there is none to use.

Also NaN-filled allocations, and comparison with float64.
"""

import contextlib
import gc
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import drawn_once
import gpus
import interpreted
import parts
import prepared
import pytest
import torch
import torch.distributed as dist
import torch.utils._device

from ipfm.engine.runtime import launcher

TESTS = Path(__file__).parent
# Seconds that each file took when somebody last ran `make durations`, by its path below tests/.
DURATIONS = TESTS / "durations.json"
# Of the whole process: how each is asked for, and set.
SETTINGS = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Called as soon as this file is imported, before any other file of tests is."""
    parser.addoption("--record-durations", action="store_true", help=f"write how long each file took to {DURATIONS}")
    config: pytest.Config = pluginmanager.get_plugin("pytestconfig")
    choose_device(config.known_args_namespace.markexpr)


def choose_device(marks: str) -> None:
    """Hide GPUs unless what is given to `-m` asks for them; where there is none, have kernels interpreted."""
    if not gpus.asked(marks):
        gpus.hide()
    if not torch.cuda.is_available():
        # Triton looks at this when it decorates a kernel, so it has to be set before anything imports ipfm.kernels.
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    # Workers report to the process that started them.
    if config.getoption("--record-durations") and not is_worker:
        config.pluginmanager.register(Recorder())
    if not is_worker and getattr(config.option, "dist", "no") != "no":
        if not torch.cuda.is_available():
            prepared.share()
        return
    if not torch.cuda.is_available():
        interpreted.hasten()
    # There is little garbage among what is imported and collected, and looking for it takes a second.
    gc.disable()


class Recorder:
    """Adds up the seconds of the tests of each file."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid.partition("::")[0].removeprefix("tests/")] += report.duration

    def pytest_sessionfinish(self) -> None:
        rounded = {file: round(seconds, 1) for file, seconds in sorted(self.seconds.items())}
        DURATIONS.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = gpus.asked(config.option.markexpr)
    parts.leave_to_thorough(items)
    mark_by_device(items, "needs a CUDA device, and torch sees none" if asked else gpus.ASKING)
    # The longest files first, so that two workers end together (with --no-loadscope-reorder).
    recorded = json.loads(DURATIONS.read_text(encoding="utf-8")) if DURATIONS.exists() else {}
    expected = {path: expected_seconds(path, recorded) for path in {item.path for item in items}}
    items.sort(key=lambda item: -expected[item.path])


def mark_by_device(items: list[pytest.Item], missing: str) -> None:
    """Leave out tests that the device of this process is not for.

    Args:
        items: the tests.
        missing: why there is no GPU, if there is none.
    """
    cuda = torch.cuda.is_available()
    for item in items:
        given = getattr(item, "callspec", None)
        if cuda and "device" in getattr(item, "fixturenames", ()) and "device" not in (given.params if given else ()):
            # Of the kernels, wherever they run: `-m gpu` chooses these as well.
            item.add_marker(pytest.mark.gpu)
        if not cuda and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=missing))
        if cuda and not item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="is for the CPU: run it without `-m gpu`"))


def expected_seconds(file: Path, recorded: Mapping[str, float]) -> float:
    """What a file took; one that was moved is known by its name, and one that nobody has timed may take long."""
    names = {Path(path).name: seconds for path, seconds in recorded.items()}
    return recorded.get(file.relative_to(TESTS).as_posix(), names.get(file.name, math.inf))


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: nobody need look through it for garbage, nor often for new."""
    gc.freeze()
    gc.set_threshold(*prepared.SELDOM)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As they were, for the next file: which files share a process is the schedule's choice.

    A file's tests start in an empty folder, and leave nothing there: what the one in which pytest was started holds,
    such as the runs of a demo, is none of theirs.

    The environment's variables, the process group that a network trained here has made, PyTorch's linear layer, in
    whose place DeepSpeed puts its own where weights are sharded, and what torch.compile has made of code or has given
    up: under a dispatch mode, as graphs are recorded with, it leaves a function alone from then on. And what a run sets
    for its whole process: threads, deterministic algorithms, signals.
    """
    # It imports Triton, which has been told by now to interpret, in a process that is no worker too.
    from ipfm.engine.distributed.signals import SIGNALS

    variables, linear, alone = dict(os.environ), torch.nn.functional.linear, not dist.is_initialized()
    settings, handlers = [get() for get, _ in SETTINGS], [signal.getsignal(signum) for signum in SIGNALS]
    folder = tmp_path_factory.mktemp("elsewhere")
    with drawn_once.convergence(), contextlib.chdir(folder):
        yield
    if alone and dist.is_initialized():
        launcher.stop_world()
    torch.nn.functional.linear = linear
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    for (get, put), before in zip(SETTINGS, settings, strict=True):
        if get() != before:
            put(before)
    for signum, handler in zip(SIGNALS, handlers, strict=True):
        if signal.getsignal(signum) != handler:
            signal.signal(signum, handler)
    os.environ.update(variables)
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    assert not os.listdir(folder), "a test has left files where it was started"


@pytest.fixture
def device() -> torch.device:
    """Where the Triton kernels run: compiled on CUDA, else in the interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _spoil(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype != torch.bool and not tensor.is_complex():
            tensor.fill_(torch.iinfo(tensor.dtype).min)
    return tensor


@pytest.fixture
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN (integers: the smallest one), so that an element a kernel forgets is seen."""
    # What `with torch.device(…)` knows are the functions that it finds at its first use: not these.
    torch.utils._device._device_constructors()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _original=original, **k: _spoil(_original(*a, **k)))


def _worst(got: torch.Tensor, truth: torch.Tensor) -> float:
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    if not truth.numel():
        return 0.0
    error = (got - truth).abs() / (truth.abs() + truth.square().mean().sqrt() + 1e-30)
    return float("inf") if bool(error.isnan().any()) else float(error.max())


@pytest.fixture
def no_worse():
    """Fails where a kernel's error exceeds that of plain PyTorch in the same dtype.

    It is called with the kernel's result, plain PyTorch's and the truth: no_worse(got, plain, truth).

    Errors are relative to an element's size plus the root mean square, against a float64 truth; the hair allowed on top
    is one unit in the last place (the interpreter truncates on its way to bfloat16 where a GPU rounds). In float64 the
    truth is plain PyTorch itself, whose own rounding then counts as the kernel's: 16 units. `hair`: 2 for operations in
    which many roundings follow each other, where either side may be lucky.
    """

    def check(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, *, hair: int = 1) -> None:
        assert got.shape == plain.shape == truth.shape
        assert got.dtype == plain.dtype
        if got.is_floating_point():
            units = 16 if got.dtype == torch.float64 else hair
            limit = _worst(plain, truth) + units * torch.finfo(got.dtype).eps
            assert _worst(got, truth) <= limit
        else:
            assert torch.equal(got.cpu(), plain.cpu())
            assert torch.equal(got.cpu(), truth.cpu())

    return check
