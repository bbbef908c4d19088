"""A CUDA driver for Triton without a GPU: launches go as far as the driver, which writes them down and does nothing.

While `fake_cuda` is active, `kernel[grid](...)` takes Triton's own way: it binds the arguments, specialises on their
types, on 1 and on what 16 divides, and asks for a compiled kernel. Instead of compiling it gets a `FakeKernel`, whose
launch checks the grid and the arguments as Triton's launcher in C does and records them. What is recorded is what
`triton.compile` takes, see `compile_report.compile_variant`. Works in a process whose kernels are interpreted, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from ipfm.kernels._dispatch import TRITON_DEVICES

# CUDA's limits of a grid.
LARGEST_GRID = (2**31 - 1, 65535, 65535)
# Of Triton's caches of compiled kernels; no device of a real driver is called so.
FAKE_DEVICE = "fake"


@dataclass(frozen=True)
class Variant:
    """What Triton compiles a kernel for: everything that makes the machine code another."""

    module: str
    name: str
    """Of the kernel in the module."""
    types: tuple[tuple[str, str], ...]
    """Arguments and their types, as in ("p_x", "*bf16"); "constexpr" for constants, also those that are 1 or None."""
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    """Arguments that 16 divides."""
    warps: int
    stages: int

    @property
    def fn(self) -> Any:
        """The kernel."""
        return getattr(importlib.import_module(self.module), self.name)

    def constant(self, name: str, default: Any = None) -> Any:
        """The value of a constant."""
        return dict(self.constants).get(name, default)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    variant: Variant
    grid: tuple[int, int, int]
    bytes: Mapping[str, int]
    """Of the tensors, by the arguments' names."""
    numbers: Mapping[str, int]
    """Integers among the arguments, constants too."""


@dataclass
class Launches:
    """What was launched, in order."""

    calls: list[Launch] = field(default_factory=list)
    on_launch: Callable[[Launch], None] | None = None
    count: int = 0
    recorded: bool = True
    """False: launches are counted alone, and cost the host next to nothing."""

    @property
    def variants(self) -> dict[Variant, int]:
        """How often each variant was launched."""
        counts: dict[Variant, int] = {}
        for call in self.calls:
            counts[call.variant] = counts.get(call.variant, 0) + 1
        return counts

    def add(self, launch: Launch) -> None:
        """Write down a launch."""
        self.calls.append(launch)
        if self.on_launch is not None:
            self.on_launch(launch)


_active: Launches | None = None


class FakeKernel:
    """What Triton's `CompiledKernel` is to those who launch it."""

    module = function = n_regs = n_spills = 0
    packed_metadata = ()
    n_max_threads = 1024

    def __init__(self, variant: Variant) -> None:
        self.variant, self.name = variant, variant.name
        self.metadata = SimpleNamespace(num_warps=variant.warps, num_stages=variant.stages, shared=0, name=self.name)
        self._taken = [(name, kind) for name, kind in variant.types]

    def _init_handles(self) -> None:
        """Nothing to load."""

    def launch_metadata(self, *_: Any) -> None:
        """Nobody is told of a launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        sizes = (*grid, 1, 1)[:3]

        def launch(*arguments: Any, stream: int = 0) -> None:
            self.run(*sizes, stream, self.function, self.packed_metadata, None, None, None, *arguments)

        return launch

    def run(self, gx: int, gy: int, gz: int, stream: Any, function: Any, packed: Any, *more: Any) -> None:
        """A launch; `more`: metadata, two hooks, then all arguments.

        Raises:
            ValueError: the grid or an argument is one that the real launcher would refuse or cut.
        """
        if _active is None:
            raise RuntimeError(f"{self.name} was launched under a fake driver that is gone")
        _active.count += 1
        if not _active.recorded:
            return
        arguments = more[3:]
        bytes_: dict[str, int] = {}
        numbers: dict[str, int] = {}
        grid = (gx, gy, gz)
        if not all(0 < size <= largest for size, largest in zip(grid, LARGEST_GRID, strict=True)):
            raise ValueError(f"{self.name}: the grid {grid} is empty or beyond {LARGEST_GRID}")
        for (name, kind), value in zip(self._taken, arguments, strict=True):
            if isinstance(value, int) and not isinstance(value, bool):
                numbers[name] = value
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                if value is not None and not hasattr(value, "data_ptr"):
                    raise ValueError(f"{self.name}: {name} is {kind} and gets {value!r}")
                bytes_[name] = 0 if value is None else value.numel() * value.element_size()
            elif kind[0] in "iu":
                _check_integer(self.name, name, kind, value)
        _active.add(Launch(self.variant, grid, bytes_, numbers))


def _check_integer(kernel: str, name: str, kind: str, value: Any) -> None:
    bits = int(kind[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "i" else (0, (1 << bits) - 1)
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{kernel}: {name} is {kind} and gets {value!r}")


class _Driver:
    """The part of Triton's driver for CUDA that a launch asks."""

    def __init__(self) -> None:
        properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return FAKE_DEVICE

    def set_current_device(self, device: object) -> None:
        """There is one."""

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_device_capability(self, device: object = None) -> tuple[int, int]:
        return 9, 0

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def fake_cuda(devices: Collection[str] = ("meta",), *, recorded: bool = True) -> Iterator[Launches]:
    """Take tensors on these kinds of devices for those of a GPU, as far as Triton's kernels are concerned.

    On the meta device a whole training step is its operators and launches and nothing else; on the CPU it is what the
    host does, with launches that leave their results unwritten.

    Args:
        devices: kinds of devices, as torch names them.
        recorded: False counts the launches alone, where the host's time is looked at.

    Yields:
        What is launched meanwhile.

    Raises:
        RuntimeError: one is active already.
    """
    global _active
    if _active is not None:
        raise RuntimeError("a fake driver is active already")
    before = driver._active
    added = set(devices) - TRITON_DEVICES
    compile_, interpret = JITFunction._do_compile, InterpretedFunction.run
    _active = Launches(recorded=recorded)
    driver.set_active(_Driver())
    JITFunction._do_compile = _fake_kernel
    InterpretedFunction.run = _run_as_compiled
    TRITON_DEVICES.update(added)
    try:
        yield _active
    finally:
        TRITON_DEVICES.difference_update(added)
        JITFunction._do_compile, InterpretedFunction.run = compile_, interpret
        driver.set_active(before)
        _active = None


class ThroughLaunchers(TorchDispatchMode):
    """Operators of this project go through their launchers: on the meta device torch would ask for the shapes alone."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (implementation(func) if func.namespace == "ipfm" else func)(*args, **(kwargs or {}))


def implementation(func: Any) -> Callable[..., Any]:
    """What one of this project's operators was made of."""
    run: Callable[..., Any] = OPDEFS[func._schema.name]._init_fn
    return run


def _fake_kernel(
    self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: bool
) -> FakeKernel:
    """In place of `JITFunction._do_compile`."""
    names = self.arg_names
    variant = Variant(
        self.fn.__module__,
        self.fn.__name__,
        tuple(signature.items()),
        tuple((names[path[0]], value) for path, value in constexprs.items()),
        tuple(names[path[0]] for path, found in attrs.items() if ["tt.divisibility", 16] in found),
        options.num_warps,
        options.num_stages,
    )
    kernel = self.device_caches[device][0][key] = FakeKernel(variant)
    return kernel


_twins: dict[Any, JITFunction[Any]] = {}


def _run_as_compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
    """In place of `InterpretedFunction.run`: the launch of the same function as if it were to be compiled."""
    if self.fn not in _twins:
        _twins[self.fn] = JITFunction(self.fn, **self.kwargs)
    return _twins[self.fn].run(*arguments, grid=grid, warmup=warmup, **keywords)
