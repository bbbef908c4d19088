"""The operations under torch.compile and CUDA graphs: one graph, the eager result, no compilation for a new number.

Triton kernels are operators of the namespace `ipfm`, checked by `torch.library.opcheck`; references are traced.
"""

import math
import os
import shutil
import sys

import pytest
import torch
from parts import parts
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor
from torch.utils import cpp_extension
from torch.utils._pytree import tree_leaves

from ipfm.kernels import (
    denoising_loss,
    generator_loss,
    group_norm,
    group_norm_silu,
    ipfm_loss,
    mp_cat_silu,
    mp_silu,
    mp_sum,
    perturb,
    philox,
    pixel_norm_silu,
    qkv_norm,
    residual,
    residual_sum,
    row_normalise,
)
from ipfm.kernels import perturbation as radial

pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
    # What torch.compile itself uses and warns of.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]
BACKENDS = ["reference", "triton"]
LAST = torch.channels_last
SHAPE = (2, 4, 3, 5)
AT = {"seed": 2**40 + 7, "stream": 3}


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def draw(*shape: int, device: torch.device | str = "cpu", seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def tensors(batch: int = 2, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of every operation below."""
    shape = (batch, *SHAPE[1:])
    return {
        "t": draw(*shape, device=device, seed=seed + 1),
        "s": draw(*shape, device=device, seed=seed + 2),
        "y": draw(*shape, device=device, seed=seed + 3),
        "sigma": draw(batch, device=device, seed=seed + 4).abs() + 0.1,
        "index": torch.arange(batch, device=device) + 2**33 + seed,
        "weight": draw(SHAPE[1], device=device, seed=5),
        "bias": draw(SHAPE[1], device=device, seed=6),
        "scale": draw(batch, SHAPE[1], 1, 1, device=device, seed=seed + 7),
        "shift": draw(batch, SHAPE[1], 1, 1, device=device, seed=seed + 8),
        "addend": draw(batch, SHAPE[1], device=device, seed=seed + 9),
    }


def preconditioning(v: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Arguments of the losses of raw outputs; any numbers will do."""
    return {"x": v["s"] + v["y"], "c_skip": 1 / (1 + v["sigma"]), "c_out": v["sigma"]}


# Each takes the inputs, a step, a seed and a backend, and returns the results and what is to be differentiated.
def run_uniform(v, step, seed, backend):
    return philox.uniform(v["index"], 6, seed=seed, stream=1, step=step, backend=backend)


def run_normal(v, step, seed, backend):
    return philox.normal(v["index"], 6, seed=seed, stream=1, step=step, backend=backend)


def run_gamma(v, step, seed, backend):
    return philox.gamma(v["index"], 0.5, seed=seed, stream=1, step=step, backend=backend)


def run_perturb(v, step, seed, backend):
    at = {"seed": seed, "stream": 1, "step": step, "sample_index": v["index"], "backend": backend}
    if backend == "reference":  # whose operations are many to trace
        return perturb(v["y"], v["sigma"], 8.0, **at, c_in=v["sigma"] + 1)
    return perturb(v["y"], v["sigma"], math.inf, **at), perturb(v["y"], v["sigma"], 0.8, **at, c_in=v["sigma"] + 1)


def run_ipfm_loss(v, step, seed, backend):
    plain = ipfm_loss(v["t"], v["s"], v["y"], alpha=1.0, backend=backend)
    return plain, ipfm_loss(v["t"].half(), v["s"].half(), v["y"], alpha=1.0, **preconditioning(v), backend=backend)


def run_ipfm_loss_inplace(v, step, seed, backend):
    t, s, raw = v["t"] + 0, v["s"] * 1, {"t": v["t"].half(), "s": v["s"].half()}
    plain = ipfm_loss(t, s, v["y"], alpha=1.2, inplace=True, backend=backend)
    return plain, ipfm_loss(**raw, y=v["y"], alpha=1.2, inplace=True, **preconditioning(v), backend=backend), t, s, raw


def run_denoising_loss(v, step, seed, backend):
    plain = denoising_loss(v["t"], v["y"], v["sigma"], backend=backend)
    return plain, denoising_loss(v["t"].half(), v["y"], v["sigma"], **preconditioning(v), backend=backend)


def run_group_norm_silu(v, step, seed, backend):
    plain = group_norm_silu(v["y"], 2, v["weight"], v["bias"], addend=v["addend"], backend=backend)
    return group_norm_silu(plain, 2, v["weight"], v["bias"], scale=v["scale"], shift=v["shift"], backend=backend)


def run_residual_sum(v, step, seed, backend):
    total = residual_sum(v["y"], v["s"], v["bias"], scale=0.5, backend=backend)
    return residual_sum(total, v["y"], backend=backend)


def run_magnitude_preserving(v, step, seed, backend):
    """The operations of EDM2's blocks one after the other: an encoder's, a decoder's, attention."""
    x, y = pixel_norm_silu(v["y"], backend=backend)
    x = mp_sum(x, mp_silu(y, v["scale"][:, :, 0, 0] + 1, backend=backend), 0.3, clip=1.0, backend=backend)
    joined, activated = mp_cat_silu(x, v["s"], backend=backend)
    tokens = (joined + activated).flatten(2).transpose(1, 2)
    return x, *qkv_norm(torch.cat([tokens, tokens, tokens], dim=2), 2, k_scale=0.5, backend=backend)


def run_row_normalise(v, step, seed, backend):
    weight = row_normalise(v["y"], gain=0.5, backend=backend)
    return weight, row_normalise(v["y"].flatten(1), out_dtype=torch.bfloat16, backend=backend)


RUNS = [
    run_uniform,
    run_normal,
    run_gamma,
    run_perturb,
    run_ipfm_loss,
    run_ipfm_loss_inplace,
    run_denoising_loss,
    run_group_norm_silu,
    run_residual_sum,
    run_magnitude_preserving,
    run_row_normalise,
]
DRAWS = [run_uniform, run_normal, run_gamma, run_perturb]
DIFFERENTIABLE = {
    run_perturb: ["y"],
    run_group_norm_silu: ["y", "weight", "bias", "scale", "shift", "addend"],
    run_residual_sum: ["y", "s", "bias"],
    run_magnitude_preserving: ["y", "s", "scale"],
}
each_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__.removeprefix("run_"))
# Tracing the references' rounds of Philox takes seconds, and that of perturb has those of the others.
COMPILED = [(run, "triton") for run in RUNS] + [(run, "reference") for run in RUNS if run not in DRAWS[:3]]
# `make thorough`: perturb is compiled by `test_a_step_in_memory_is_the_same_step` too, the loss of the generator by
# `test_compiled_inplace_overwrites_its_inputs`, the others are plain PyTorch.
LATER = [
    (run, "reference")
    for run in (run_perturb, run_ipfm_loss, run_ipfm_loss_inplace, run_denoising_loss, run_residual_sum)
]
each_draw = pytest.mark.parametrize("run", DRAWS, ids=lambda run: run.__name__.removeprefix("run_"))
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def evaluate(run, function, v, step=3, seed=AT["seed"], backend="reference") -> list[torch.Tensor]:
    """Results, and gradients where there are such; `function` is `run`, compiled or not."""
    names = DIFFERENTIABLE.get(run, [])
    v = {name: t.detach().requires_grad_() if name in names else t for name, t in v.items()}
    results = tree_leaves(function(v, step, seed, backend))
    if not names:
        return results
    total = sum((r * draw(*r.shape, seed=i).to(r.device)).sum() for i, r in enumerate(results))
    return [*(r.detach() for r in results), *torch.autograd.grad(total, [v[name] for name in names])]


def assert_same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """The same operations ran; sums and exponentials of a batch in other strides may differ in their last bits."""
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    ("run", "backend"), parts(COMPILED, LATER), ids=lambda v: getattr(v, "__name__", v).removeprefix("run_")
)
def test_one_graph_serves_every_batch_step_and_seed(run, backend, device):
    """fullgraph: nothing breaks it. Compiled for the first numbers, then once for any; a memory format is another."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for i, (batch, step, seed) in enumerate([(2, 3, 5), (3, 4, 6), (5, 2**32 - 1, 2**62), (4, 9, 7)]):
        v = tensors(batch, device, seed=i)
        got = evaluate(run, compiled, v, step, seed, backend)
        assert_same(got, evaluate(run, run, v, step, seed, backend))
        assert counter.frame_count == min(i + 1, 2)
    if run not in DRAWS and backend == "triton":
        v = {n: t.contiguous(memory_format=LAST) if t.ndim == 4 else t for n, t in tensors(2, device).items()}
        got, wanted = (evaluate(run, function, v, backend=backend) for function in (compiled, run))
        assert_same(got, wanted)
        results = len(wanted) - len(DIFFERENTIABLE.get(run, []))
        assert [g.stride() for g in got[:results]] == [w.stride() for w in wanted[:results]]


@each_backend
def test_a_seed_that_no_signed_number_holds(backend, device):
    v, compiled = tensors(device=device), torch.compile(run_uniform, backend="aot_eager", fullgraph=True)
    # Each is another graph, and tracing the reference's rounds takes seconds.
    for seed in (2**64 - 5, 3) if backend == "reference" else (2**64 - 5, 2**64 - 6, 3):
        got = evaluate(run_uniform, compiled, v, 3, seed, backend)
        assert all(map(torch.equal, got, evaluate(run_uniform, run_uniform, v, 3, seed, backend)))


@pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="inductor compiles C++ on a CPU, and there is no compiler",
)
def test_inductor(device, tmp_path, monkeypatch):
    """The compiler that users have, with the kernels as calls among its own operations.

    Its vector instructions are not ours to test: without them it tries none, and reads far fewer headers.
    """
    monkeypatch.setattr(inductor.cpp, "vec_isa_ok", False)
    monkeypatch.setattr(inductor, "cpp_cache_precompile_headers", False)
    if " " in cpp_extension.TORCH_LIB_PATH:
        # Inductor does not quote this path for the linker: PyTorch that lies below a space cannot compile for a CPU.
        (tmp_path / "lib").symlink_to(cpp_extension.TORCH_LIB_PATH)
        monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(tmp_path / "lib"))

    def run(v, step, seed, backend):
        x, scaled = perturb(
            v["y"],
            v["sigma"],
            math.inf,
            seed=seed,
            stream=1,
            step=step,
            sample_index=v["index"],
            c_in=v["sigma"],
            backend=backend,
        )
        pred = group_norm_silu(scaled, 2, v["weight"], v["bias"], backend=backend) + x
        return pred, denoising_loss(pred.detach(), v["y"], v["sigma"], backend=backend)

    v = {n: t.contiguous(memory_format=LAST) if t.ndim == 4 else t for n, t in tensors(device=device).items()}
    v["weight"].requires_grad_()
    compiled = torch.compile(run, fullgraph=True)
    gradients = []
    for function in (compiled, run):
        pred, loss = function(v, 3, 5, "triton")
        (dw,) = torch.autograd.grad((pred * loss.grad).sum(), v["weight"])
        gradients.append([pred.detach(), *loss, dw])
    for g, w in zip(*gradients, strict=True):
        assert g.stride() == w.stride()
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@each_backend
def test_compiled_inplace_overwrites_its_inputs(backend, device):
    def run(t, s, y):
        return ipfm_loss(t, s, y, alpha=1.0, inplace=True, backend=backend)

    v = tensors(device=device)
    wanted = run(v["t"].clone(), v["s"].clone(), v["y"])
    t, s = v["t"].clone(), v["s"].clone()
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(t, s, v["y"])
    assert_same([*got, t, s], [*wanted, wanted.dt, wanted.ds])


@each_backend
def test_no_second_derivative_of_group_norm_silu(backend, device, monkeypatch):
    monkeypatch.setattr("ipfm.kernels.group_norm_reference.SMALL", 0)
    v = tensors(device=device)
    y = v["y"].requires_grad_()
    out = group_norm_silu(y, 2, v["weight"], v["bias"], backend=backend)
    with pytest.raises(RuntimeError, match=r"no second derivative|no autograd formula"):
        (dy,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
        torch.autograd.grad(dy.sum(), y)


# ------------------------------------------------------------------------------------------------------- operators

# The package's attributes of these names are the functions.
LOSS = sys.modules["ipfm.kernels.denoising_loss"]
MP = {name: sys.modules[f"ipfm.kernels.{name}"]._operation for name in (
    "mp_sum", "mp_silu", "mp_cat_silu", "pixel_norm_silu", "qkv_norm", "row_normalise",
)}  # fmt: skip


def magnitude_preserving_cases():
    a, b, c = (draw(*SHAPE, seed=i) for i in (1, 2, 3))
    last, other = (t.to(memory_format=LAST) for t in (a, b))
    leaf, leaves = a.clone().requires_grad_(), [t.detach().requires_grad_() for t in (last, other)]
    inside, seed = torch.full((15,), 173, dtype=torch.uint8), torch.tensor(-5)
    scale, tokens = draw(2, 4).requires_grad_(), draw(2, 5, 18).requires_grad_()
    q, k, v, dq, dk, dv = (draw(2, 5, 2, 3, seed=i) for i in range(6))
    joined, half = torch.cat([last, other], 1).contiguous(memory_format=LAST), a.bfloat16()
    return {
        "mp_sum": (MP["mp_sum"].forward, (leaf, b, 0.9, 0.4, math.inf, False)),
        "mp_sum clip": (MP["mp_sum"].forward, (*leaves, 0.9, 0.4, 1.0, True)),
        "mp_sum_backward": (MP["mp_sum"].backward, (last, inside, 0.9, 0.4, True, True)),
        "mp_sum_backward one": (MP["mp_sum"].backward, (half, inside[:0], 0.9, 0.4, False, True)),
        "mp_silu": (MP["mp_silu"].forward, (leaf, None, None, 0.0)),
        "mp_silu dropout": (MP["mp_silu"].forward, (leaves[0], scale, seed, 0.5)),
        "mp_silu_backward": (MP["mp_silu"].backward, (a, b, None, None, 0.0)),
        "mp_silu_backward dropout": (MP["mp_silu"].backward, (last, other, scale.detach()[:1], seed, 0.5)),
        "mp_cat_silu": (MP["mp_cat_silu"].forward, (leaf, b, 0.9, 0.4)),
        "mp_cat_silu channels_last": (MP["mp_cat_silu"].forward, (*leaves, 0.9, 0.4)),
        "mp_cat_silu_backward": (MP["mp_cat_silu"].backward, (joined, joined + 1, None, 0.9, 0.4, 3)),
        "pixel_norm_silu": (MP["pixel_norm_silu"].forward, (leaf, 1e-4)),
        "pixel_norm_silu channels_last": (MP["pixel_norm_silu"].forward, (leaves[0], 1e-4)),
        "pixel_norm_silu_backward": (MP["pixel_norm_silu"].backward, (last, other, last + 1, 1e-4)),
        "pixel_norm_silu_backward one": (MP["pixel_norm_silu"].backward, (a, None, c, 1e-4)),
        "row_normalise": (MP["row_normalise"].forward, (leaf, 0.5, 1e-4, torch.float32)),
        "row_normalise channels_last": (MP["row_normalise"].forward, (leaves[0], 0.5, 1e-4, torch.bfloat16)),
        "row_normalise_backward": (MP["row_normalise"].backward, (last, other, 0.5, 1e-4)),
        "qkv_norm": (MP["qkv_norm"].forward, (tokens, 2, 1e-4, 0.5, True)),
        "qkv_norm alone": (MP["qkv_norm"].forward, (tokens.detach(), 2, 1e-4, 1.0, False)),
        "qkv_norm_backward": (MP["qkv_norm"].backward, (q, k, v, dq, dk, dv, draw(3, 20).abs(), 1e-4, 0.5)),
    }


def operator_cases():
    v = tensors()
    index, sigma, y, position = v["index"], v["sigma"], v["y"], (-5, 1, 3, None)
    leaf = y.clone().requires_grad_()
    weight, bias = v["weight"].requires_grad_(), v["bias"].requires_grad_()
    scale, shift = v["scale"].requires_grad_(), v["shift"].requires_grad_()
    last, sliced = y.to(memory_format=LAST), torch.stack([y, y], -1).flatten(-2)[..., ::2]
    inside = y.movedim(0, -1).contiguous().movedim(-1, 0)
    half, none = y.to(torch.bfloat16), (None, None, None)
    statistics = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)], dim=2)
    addend = v["addend"].requires_grad_()
    return {
        "philox words": (philox.launch_philox, (index, 6, philox.WORDS, 2**31, *position)),
        "philox normal": (philox.launch_philox, (index, 6, philox.NORMAL, 0, *position)),
        "philox clock": (philox.launch_philox, (index, 6, philox.UNIFORM, 0, -5, 1, 0, torch.tensor(3))),
        "gamma": (philox.launch_gamma, (index, 0.5, *position)),
        "gamma clock": (philox.launch_gamma, (index, 3.0, -5, 1, 0, torch.tensor(3))),
        "perturb": (radial._perturb, (leaf, sigma, math.inf, *position, index)),
        "perturb channels_last": (radial._perturb, (last, sigma, 8.0, *position, index)),
        "perturb sliced": (radial._perturb, (sliced, sigma, 8.0, -5, 1, 0, torch.tensor(3), index)),
        "perturb_scaled": (radial._perturb_scaled, (leaf, sigma, 8.0, *position, index, sigma, torch.bfloat16)),
        "ipfm_loss": (generator_loss._ipfm_loss, (last, y + 1, y * 2, 1.0, *none)),
        "ipfm_loss bf16": (generator_loss._ipfm_loss, (half, half + 1, half * 2, 1.0, *none)),
        "ipfm_loss raw": (generator_loss._ipfm_loss, (half, half + 1, y, 1.0, last + 1, sigma, sigma.double())),
        "ipfm_loss_": (generator_loss._ipfm_loss_, (y.clone(), last + 1, sliced * 2, 1.0, *none)),
        "ipfm_loss_ raw": (generator_loss._ipfm_loss_, (half + 0, half + 1, last, 1.0, y + 1, sigma, sigma)),
        "ipfm_loss_ batch inside": (generator_loss._ipfm_loss_, (inside + 0, inside + 1, y, 1.0, *none)),
        "ipfm_loss score": (
            generator_loss._ipfm_loss,
            (half, half + 1, y, 0.5, last + 1, sigma, sigma, 1.0, 1.0, "score", sigma, sigma.double(), 0.1),
        ),
        "ipfm_loss real": (generator_loss._ipfm_loss, (half, half + 1, y, 0.5, last + 1, sigma, sigma, 0.92, 0.94)),
        "denoising_loss": (LOSS._denoising_loss, (last, y + 1, sigma, 0.5, *none)),
        "denoising_loss real": (LOSS._denoising_loss, (half, y, sigma, 0.5, last + 1, sigma, sigma, 1.02, 0.92)),
        "denoising_loss raw": (LOSS._denoising_loss, (half, y, sigma, 0.5, last + 1, sigma, sigma.double())),
        "denoising_loss batch inside": (LOSS._denoising_loss, (inside, y + 1, sigma.double(), 0.5, *none)),
        "group_norm_silu": (group_norm._forward, (leaf, weight, bias, scale, shift, 2, 1e-5, True)),
        "group_norm_silu channels_last": (group_norm._forward, (last, weight, bias, None, None, 2, 1e-5, False)),
        "group_norm_silu addend": (
            group_norm._forward,
            (leaf, weight, bias, scale, shift, 2, 1e-5, True, addend),
        ),
        "group_norm_silu_backward": (
            group_norm._backward,
            (y, last, *(p.detach() for p in (weight, bias, scale, shift)), statistics, True),
        ),
        "group_norm_silu_backward addend": (
            group_norm._backward,
            (y, last, weight.detach(), bias.detach(), None, None, statistics, True, addend.detach()[:1]),
        ),
        "group_norm_silu_backward of a branch": (
            group_norm._backward,
            (y, last, weight.detach(), bias.detach(), None, None, statistics, True, None, last + 1),
        ),
        "residual_sum": (residual._forward, (leaf, y + 1, bias, 0.5)),
        "residual_sum channels_last": (residual._forward, (last, last + 1, None, 0.5)),
        "residual_sum_backward": (residual._backward, (last, 0.5, True)),
        "residual_sum_backward without bias": (residual._backward, (y, 0.5, False)),
        **magnitude_preserving_cases(),
        "residual_sum_backward of a part": (residual._backward, (torch.cat([last, last], 1)[:, :4], 0.5, True)),
    }


# `make thorough`: of operators that have other cases too, which stay.
VARIANTS = [
    "philox normal", "gamma clock", "perturb channels_last", "perturb sliced", "ipfm_loss bf16", "ipfm_loss raw",
    "ipfm_loss real", "ipfm_loss_ batch inside", "denoising_loss real", "denoising_loss batch inside",
    "group_norm_silu", "group_norm_silu channels_last",
    "group_norm_silu_backward of a branch", "residual_sum channels_last", "residual_sum_backward without bias",
    "residual_sum_backward of a part", "mp_sum", "mp_sum_backward one", "mp_silu", "mp_silu_backward", "mp_cat_silu",
    "pixel_norm_silu", "pixel_norm_silu_backward one", "row_normalise", "qkv_norm alone",
]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cases are CPU tensors, for the interpreter")
@pytest.mark.parametrize("name", parts(operator_cases(), VARIANTS))
def test_operators_keep_their_promises(name):
    """Schema and mutation, autograd registration, fake results as the real ones, equal results when compiled."""
    operator, arguments = operator_cases()[name]
    torch.library.opcheck(operator, arguments)


def test_every_operator_is_checked():
    checked = {operator._qualname for name, (operator, _) in operator_cases().items() if name not in VARIANTS}
    names = (
        "denoising_loss",
        "gamma",
        "group_norm_silu",
        "group_norm_silu_backward",
        "ipfm_loss",
        "ipfm_loss_",
        *(f"{name}{way}" for name in MP for way in ("", "_backward")),
        "perturb",
        "perturb_scaled",
        "philox",
        "residual_sum",
        "residual_sum_backward",
    )
    assert checked == {f"ipfm::{name}" for name in names}


# ------------------------------------------------------------------------------------------ steps and values unread


@each_backend
@each_draw
def test_a_step_in_memory_is_the_same_step(run, backend, device):
    """Bit for bit, eager and compiled; the compiled graph follows the tensor's value."""
    v, clock = tensors(device=device), torch.zeros((), dtype=torch.int64, device=device)
    functions = [run]
    if (run, backend) in COMPILED:
        functions.append(torch.compile(run, backend="aot_eager", fullgraph=True))
    for step in (0, 7, 2**32 - 1):
        clock.fill_(step)
        wanted = evaluate(run, run, v, step, backend=backend)
        for function in functions:
            got = evaluate(run, function, v, clock, backend=backend)
            assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (torch.zeros(1, dtype=torch.int64), r"step must be an integer or a 0-d int64 tensor; got int64 \(1,\)"),
        (torch.tensor(3.0), r"step must be an integer or a 0-d int64 tensor; got float32 \(\)"),
        (torch.tensor(3, dtype=torch.int32), r"step must be an integer or a 0-d int64 tensor; got int32 \(\)"),
        (torch.zeros((), dtype=torch.int64, device="meta"), "step must be on cpu; got meta"),
    ],
)
@each_draw
def test_a_tensor_that_is_no_step(run, step, message):
    with pytest.raises(ValueError, match=f"^[a-z]+: {message}$"):
        run(tensors(), step, 3, "reference")


@each_run
def test_no_value_is_read(run):
    """Tensors without values give results without values, of the right shapes."""
    v = tensors()
    wanted = evaluate(run, run, v)
    clock = torch.zeros((), dtype=torch.int64, device="meta")
    got = evaluate(run, run, {name: t.to("meta") for name, t in v.items()}, clock)
    assert [(g.shape, g.dtype, g.stride()) for g in got] == [(w.shape, w.dtype, w.stride()) for w in wanted]


# ------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@each_backend
@each_run
def test_the_host_does_not_wait(run, backend):
    v, clock = tensors(device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    steps = (3, clock) if run in DRAWS else (3,)
    for step in steps:
        evaluate(run, run, v, step, backend=backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            run(v, step, 5, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_graph_replays_other_inputs_and_steps():
    """Noise, both losses, and group_norm_silu forward and backward, in one graph."""
    v, clock = tensors(batch=6, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    v["y"].requires_grad_()

    def run():
        results = [tree_leaves(one(v, clock, 5, "triton")) for one in RUNS]
        (normed,), (total,) = results[-2:]
        gradients = torch.autograd.grad(normed.square().sum() + total.sum() + results[3][1].sum(), v["y"])
        return [r.detach() for rs in results for r in rs] + list(gradients)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed, step in ((0, 0), (20, 7), (40, 2**32 - 1)):
        with torch.no_grad():
            for name, value in tensors(batch=6, device="cuda", seed=seed).items():
                v[name].copy_(value)
        clock.fill_(step)
        graph.replay()
        got = [c.clone() for c in captured]
        assert all(map(torch.equal, got, run()))


@pytest.mark.gpu
@each_run
def test_compiled_with_cuda_graphs(run):
    compiled = torch.compile(run, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # warms up, records, replays
        v = tensors(batch=6, device="cuda", seed=seed)
        clock = torch.full((), seed, dtype=torch.int64, device="cuda")
        got = [g.clone() for g in evaluate(run, compiled, v, clock, backend="triton")]
        for g, w in zip(got, evaluate(run, run, v, clock, backend="triton"), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
