"""Launches that repeat: what Triton compiled is called again where it is right, and nowhere else."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

import ipfm.kernels
from ipfm.kernels import denoising_loss, group_norm, ipfm_loss, perturb, philox, residual
from ipfm.kernels._dispatch import float64_bits
from ipfm.kernels._operators import launches_directly
from ipfm.kernels.bench.fake_driver import fake_cuda
from ipfm.kernels.group_norm import unchecked_group_norm_silu
from ipfm.kernels.residual import unchecked_residual_sum


class Looking(TorchDispatchMode):
    """Looks at operators, and lets them pass."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


LAST = torch.channels_last


@pytest.fixture(autouse=True)
def nothing_is_known():
    """Every launch is the first; none of a fake driver stays."""
    for module in (group_norm, residual):
        module._launch.cache_clear()
    yield
    for module in (group_norm, residual):
        module._launch.cache_clear()


def norm(x: torch.Tensor, weight: torch.Tensor | None = None, **options: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(x.shape[1], dtype=x.dtype) if weight is None else weight
    options = {"scale": None, "shift": None, **options}
    return unchecked_group_norm_silu(
        x, 4, weight, torch.zeros_like(weight), eps=1e-5, activation=True, triton_runs=True, **options
    )


def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills up with the kernels that Triton is asked for."""
    found: list[str] = []
    for module, names in (
        (group_norm, ("group_norm_silu_kernel", "group_norm_silu_backward_kernel")),
        (residual, ("residual_sum_kernel", "residual_sum_backward_kernel")),
    ):
        for name in names:
            kernel = getattr(module, name)

            class Seen:
                arg_names = kernel.arg_names

                def __init__(self, kernel, name) -> None:
                    self.kernel, self.name = kernel, name

                def __getitem__(self, grid):
                    found.append(self.name)
                    return self.kernel[grid]

            monkeypatch.setattr(module, name, Seen(kernel, name))
    return found


def test_triton_is_asked_once_for_each_kind_of_tensors(monkeypatch):
    found = asked(monkeypatch)
    with fake_cuda(("cpu",)) as launches:
        x = torch.randn(2, 32, 4, 4).requires_grad_()
        for _ in range(3):
            norm(x).sum().backward()
            unchecked_residual_sum(x, x, x[0, :, 0, 0], scale=0.5, triton_runs=True).sum().backward()
        assert len(launches.calls) == 4 * 3 and len(found) == 4
        # Another layout, shape, dtype, option, and the stride of an addend: another kernel or other numbers.
        wide = torch.randn(2, 64)
        for more in (
            lambda: norm(x.to(memory_format=LAST)),
            lambda: norm(x[:, :, :2].contiguous()),
            lambda: norm(x.detach().half()),
            lambda: norm(x, addend=wide[:, :32]),
            lambda: norm(x, addend=wide[:, :32].contiguous()),
            lambda: norm(x, addend=wide[0, :32]),
            lambda: norm(x, torch.ones(32, dtype=torch.float64)),
        ):
            before = len(found)
            more()
            more()
            assert len(found) == before + 1
        numbers = [dict(call.numbers) for call in launches.calls[-8:-2]]
        assert [n["s_ab"] for n in numbers] == [64, 64, 32, 32, 0, 0]


def test_memory_that_begins_elsewhere_gets_its_own_kernel(monkeypatch):
    """A view, or parameters within a flat tensor, of which no 128 bits may be read at once."""
    found = asked(monkeypatch)
    flat = torch.randn(33)
    with fake_cuda(("cpu",)) as launches:
        x = torch.randn(2, 32, 4, 4)
        norm(x, flat[:32])
        for _ in range(2):
            norm(x, flat[1:])
        norm(x, flat[:32])
        aligned = ["p_weight" in call.variant.aligned for call in launches.calls]
    assert aligned == [True, False, False, True] and len(found) == 3


def test_a_driver_that_is_gone_is_not_called(device):
    x = torch.randn(2, 32, 4, 4, device=device)
    wanted = norm(x, torch.ones(32, device=device))
    if device.type == "cpu":
        with fake_cuda(("cpu",)) as first:
            norm(x)
            norm(x)
        with fake_cuda(("cpu",)) as second:
            norm(x)
        assert (len(first.calls), len(second.calls)) == (2, 1)
    assert torch.equal(norm(x, torch.ones(32, device=device)), wanted)


def test_what_is_compiled_for_a_profiler_is_started_by_triton_alone(monkeypatch):
    """It may be another kernel, with instructions that measure; and the profiler is to hear of every launch."""
    found = asked(monkeypatch)
    x = torch.randn(2, 32, 4, 4)
    with fake_cuda(("cpu",)) as launches:
        with monkeypatch.context() as profiled:
            profiled.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
            for _ in range(2):
                norm(x)
        assert len(found) == 2
        for _ in range(3):
            norm(x)
        assert len(found) == 3 and len(launches.calls) == 5


def test_every_device_has_launches_of_its_own():
    """A compiled kernel is loaded on one device."""
    names = [module.name for module in pkgutil.iter_modules(ipfm.kernels.__path__)]
    modules = [importlib.import_module(f"ipfm.kernels.{name}") for name in names]
    known = [module._launch for module in modules if hasattr(module, "_launch")]
    assert len(known) == 8
    assert all("device" in inspect.signature(launch).parameters for launch in known)


def test_operators_are_called_where_somebody_looks():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 32, 2, 2).requires_grad_()
    assert launches_directly(x) and launches_directly(torch.nn.Parameter(x.detach()))
    assert not launches_directly(x.to("meta"))
    with Looking():
        assert not launches_directly(x)
        (norm(x) + unchecked_residual_sum(x, x, None, scale=0.5, triton_runs=True)).sum().backward()
    names = ("group_norm_silu", "residual_sum")
    assert {f"ipfm.{name}{way}.default" for name in names for way in ("", "_backward")} <= set(seen)


def test_bits_of_a_number():
    for value in (0.0, -0.0, 1.0, -2.5, 1e-320, float("inf")):
        assert float64_bits(value) == int(torch.tensor(value, dtype=torch.float64).view(torch.int64))


def test_noise_and_losses_without_an_operator_are_those_with_one(device):
    """Values and gradients, and what autograd is told of tensors that are overwritten."""
    sigma, index, c_in = torch.tensor([0.5, 1.0]), torch.arange(2), torch.tensor([0.3, 0.4])
    sigma, index, c_in = sigma.to(device), index.to(device), c_in.to(device)
    position = {"seed": 1, "stream": 2, "step": 3, "backend": "triton"}

    def results() -> tuple[list[torch.Tensor], list[str]]:
        generator = torch.Generator().manual_seed(0)
        y = torch.randn(2, 3, 4, 4, generator=generator).to(device).requires_grad_()
        x, scaled = perturb(y, sigma, 128.0, **position, sample_index=index, c_in=c_in)
        (gradient,) = torch.autograd.grad(x.sum() + (scaled * scaled).sum(), y)
        flat = perturb(y, sigma, torch.inf, **position, sample_index=index)
        (flat_gradient,) = torch.autograd.grad((flat * flat).sum(), y)
        with torch.no_grad():
            found = [perturb(y, sigma, 5.0, **position, sample_index=index)]
        t, s, clean = x.detach().clone(), flat.detach().clone(), y.detach()
        versions = t._version, s._version
        found += [*ipfm_loss(t, s, clean, alpha=1.0, backend="triton")]
        assert (t._version, s._version) == versions
        found += [*ipfm_loss(t, s, clean, alpha=1.0, inplace=True, backend="triton")]
        assert t._version > versions[0] and s._version > versions[1]
        found += [*denoising_loss(x.detach(), clean, sigma, backend="triton")]
        found += [draw(index, 10, **position) for draw in (philox.uniform, philox.normal)]
        return [x, scaled, gradient, flat, flat_gradient, *found], [x.grad_fn.name(), flat.grad_fn.name()]

    got, names = results()
    with Looking():
        expected, through = results()
    assert all(map(torch.equal, got, expected))
    assert not any("ipfm" in name for name in names) and all("ipfm" in name for name in through)
