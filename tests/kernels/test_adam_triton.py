"""AdamEMA's Triton kernels against torch's Adam, the EMA's definition and the reference."""

import copy
import math

import pytest
import torch
from parts import parts
from torch import Tensor, nn

from ipfm.kernels import _dispatch, adam_fused
from ipfm.kernels.adam import AdamEMA

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    # NumPy's, in the interpreter.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]

SHAPES = [(7, 3), (5,), ()]
EVERYTHING = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "ema": 2, "clip_norm": 50.0}
RECTIFIED = {**EVERYTHING, "rectified": True}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 16 elements, 8 at a time, so that few elements make several of both."""
    monkeypatch.setattr(adam_fused, "adam_config", lambda: (16, 8, 1))


def weights(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [nn.Parameter(v.to(device, dtype)) for v in values]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients of sizes from 1e-4 to 1e4, the same numbers for every dtype, in the parameters' memory order."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        size = 10 ** (8 * torch.rand(p.shape, generator=generator) - 4)
        p.grad = torch.empty_like(p).copy_(size * torch.randn(p.shape, generator=generator))


def everything(optimizer: AdamEMA, params: list[nn.Parameter]) -> list[Tensor]:
    entries = [optimizer.state[p][k] for p in params for k in sorted(optimizer.state[p])]
    return [t.detach().clone() for t in (*params, *entries, optimizer.steps_applied)]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        rounding = 1e-13 if a.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


LONG = (torch.optim.Adam, 0.0, 1000)


@pytest.mark.parametrize(
    ("kind", "beta1", "steps"),
    parts([LONG, (torch.optim.Adam, 0.0, 200), (torch.optim.Adam, 0.9, 50), (torch.optim.RAdam, 0.9, 50)], [LONG]),
)
def test_equals_torch_and_the_average_of_its_definition(device, kind, beta1, steps):
    """Ours and torch's float32 runs are held to torch's float64 one: ours errs no more than twice theirs."""
    start = torch.randn(40, generator=torch.Generator().manual_seed(0))
    ours, theirs = (nn.Parameter(start.to(device, copy=True)) for _ in range(2))
    truth = nn.Parameter(start.to(device, torch.float64))
    options = {"lr": 1e-2, "betas": (beta1, 0.999), "weight_decay": 0.01}
    optimizers = [
        AdamEMA([ours], ema=True, rectified=kind is torch.optim.RAdam, backend="triton", **options),
        kind([theirs], **options),
        kind([truth], **options),
    ]
    average = ours.detach().double()
    for step in range(steps):
        optimizers[0].ema_decay = decay = 0.5 ** (1 / (0.05 * (step + 1)))
        for p, optimizer in zip((ours, theirs, truth), optimizers, strict=True):
            set_gradients([p], step)
            optimizer.step()
        average = decay * average + (1 - decay) * ours.detach().double()
    error = (ours - truth).abs().max().item()
    assert error <= 2 * (theirs - truth).abs().max().item()
    assert error <= steps * torch.finfo(torch.float32).eps * truth.abs().max().item()
    assert (truth.cpu() - start).abs().max() > 0.1
    state = optimizers[0].state[ours]
    torch.testing.assert_close(state["ema"].double(), average, rtol=2e-6, atol=2e-6)
    assert (ours - state["ema"]).abs().max() > 1e-3
    assert optimizers[0].steps_applied == steps


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.5, 0.0)])
def test_where_denormals_are_flushed(device, betas):
    """As `torch.set_flush_denormal` has it, and some libraries that are loaded: the same step, of Python's zero too."""
    ends = []
    for flushed in (False, True):
        params = weights(device=device)
        optimizer = AdamEMA(params, lr=1e-2, betas=betas, ema=True, backend="triton")
        set_gradients(params, 0)
        if not torch.set_flush_denormal(flushed):
            pytest.skip("this processor does not flush denormals")
        try:
            optimizer.step()
        finally:
            torch.set_flush_denormal(False)
        ends.append(everything(optimizer, params))
    assert equal(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-2},
        {"lr": 1e-2, "eps": 0.0, "ema": True},
        {"lr": 1e-2, "betas": (0.5, 0.0), "ema": True},
        {"lr": 1e-2, "clip_norm": 1e9},
        EVERYTHING,
        RECTIFIED,
        {"lr": 1e-2, "betas": (0.0, 0.99), "eps": 0.0, "rectified": True},
        {"lr": 1e-2, "betas": (0.5, 0.6), "rectified": True},
    ],
    ids=[
        "plain",
        "no eps",
        "no beta2",
        "norm below the limit",
        "everything",
        "rectified",
        "rectified, no eps",
        "never rectified",
    ],
)
def test_agrees_with_the_reference(small, device, settings, dtype):
    runs = []
    for backend in ("triton", "reference"):
        params = weights(dtype, device)
        optimizer = AdamEMA(params, backend=backend, **settings)
        optimizer.ema_decay = (0.5, 0.9) if settings.get("ema") == 2 else 0.9
        if "rectified" in settings:
            # The first of the three steps is the last without a denominator.
            optimizer.create_state()
            optimizer.steps_applied.fill_(4)
        for step in range(3):
            set_gradients(params, step)
            if settings.get("ema") == 2:
                optimizer.grad_scale = torch.tensor(0.25, device=device)
            optimizer.step()
            assert optimizer.applied.item() is True
        runs.append(everything(optimizer, params))
    assert_close(*runs)


def test_groups_dtypes_missing_gradients_and_empty_shards(small, device):
    runs = []
    for backend in ("triton", "reference"):
        empty = nn.Parameter(torch.zeros(0, device=device))
        params = [*weights(torch.float32, device), *weights(torch.float64, device), empty]
        groups = [
            {"params": params[:2] + params[6:], "lr": 0.1, "ema": 1},
            {"params": params[2:4], "betas": (0.9, 0.99), "ema": 3, "eps": 0.0},
            {"params": params[4:6], "weight_decay": 0.1, "rectified": True},
        ]
        optimizer = AdamEMA(groups, lr=1e-2, backend=backend)
        optimizer.ema_decay = (0.5, 0.9, 0.99)
        for step in range(4):
            set_gradients(params, step)
            for p in (params, [params[1]], params[4:6], [])[step]:
                p.grad = None
            optimizer.step()
            assert optimizer.applied.item() is (step > 0)
        assert optimizer.steps_applied == 3
        runs.append(everything(optimizer, params))
    for ours, theirs in zip(*runs, strict=True):
        # The reference rounds the numbers of a group's step to the dtype of its first parameter.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_nothing_but_an_empty_shard(device):
    empty = nn.Parameter(torch.zeros(0, device=device))
    optimizer = AdamEMA([empty], lr=0.1, ema=True, clip_norm=1.0, backend="triton")
    empty.grad = torch.ones_like(empty)
    optimizer.step()
    assert optimizer.applied and optimizer.steps_applied == 1


def _laid_out(kind: str, device: torch.device) -> tuple[nn.Parameter, Tensor]:
    """A parameter and a gradient of the same values, however they lie in memory."""
    generator = torch.Generator().manual_seed(3)
    w, g = (torch.randn((6, 4, 2, 3), generator=generator).to(device) for _ in range(2))
    last = torch.channels_last
    if kind == "transposed":
        return nn.Parameter(w.transpose(0, 1).contiguous().transpose(0, 1)), torch.empty_like(w).copy_(g)
    if kind == "channels_last":
        return nn.Parameter(w.contiguous(memory_format=last)), g.contiguous(memory_format=last)
    if kind == "gradient of another order":
        return nn.Parameter(w.contiguous(memory_format=last)), g
    if kind == "gradient of one number":
        return nn.Parameter(w), g[0, 0, 0, 0].expand(w.shape)
    if kind == "with gaps":
        wide = torch.zeros((6, 8, 2, 3), device=device)
        p = nn.Parameter(wide[:, ::2])
        p.data.copy_(w)
        return p, g
    shift = {"unaligned": (1, 1), "unaligned weight": (1, 0), "unaligned gradient": (0, 3)}[kind]
    views = []
    for t, by in zip((w, g), shift, strict=True):
        buffer = torch.zeros(t.numel() + 4, device=device)
        views.append(buffer[by : by + t.numel()].view(t.shape).copy_(t))
    return nn.Parameter(views[0]), views[1]


@pytest.mark.parametrize(
    "kind",
    [
        "transposed",
        "channels_last",
        "gradient of another order",
        "gradient of one number",
        "with gaps",
        "unaligned",
        "unaligned weight",
        "unaligned gradient",
    ],
)
def test_any_place_in_memory(small, device, kind):
    runs = []
    for backend in ("triton", "reference"):
        p, g = _laid_out(kind, device)
        strides, address = p.stride(), p.data_ptr()
        optimizer = AdamEMA([p], backend=backend, **EVERYTHING)
        optimizer.ema_decay = 0.9
        for step in range(2):
            p.grad = g * (step + 1) if "unaligned" not in kind else g
            optimizer.step()
            if backend == "reference":
                g = _laid_out(kind, device)[1]
        assert (p.stride(), p.data_ptr()) == (strides, address)
        if backend == "triton":
            # Only a GPU would notice a promise of alignment that does not hold.
            assert optimizer._fused._plan is not None
            assert [b.aligned for b in optimizer._fused._plan.batches] == ["unaligned" not in kind]
        runs.append(everything(optimizer, [p]))
    assert_close(*runs)


def test_state_of_another_order(device):
    """A state dict may bring tensors whose strides are not the parameter's."""
    runs = []
    for other in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 60, device=device).reshape(5, 12).t())
        optimizer = AdamEMA([p], backend="triton", **EVERYTHING)
        optimizer.create_state()
        if other:
            optimizer.state[p] = {k: t.contiguous() for k, t in optimizer.state[p].items()}
            assert optimizer.state[p]["ema"].stride() != p.stride()
        for step in range(2):
            set_gradients([p], step)
            optimizer.step()
        runs.append(everything(optimizer, [p]))
    assert equal(*runs)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e30, "norm", "norm of several programs", "scale"])
def test_a_non_finite_gradient_changes_nothing(small, device, bad):
    """Not even a bit, in any parameter, and the run goes on as if the step had not been."""
    runs = []
    for stumbles in (True, False):
        params = weights(device=device)
        optimizer = AdamEMA(params, **{**EVERYTHING, "eps": 0.0, "backend": "triton"})
        optimizer.ema_decay = (0.5, 0.9)
        for step in range(2):
            if stumbles:
                optimizer.create_state()
                before = everything(optimizer, params)
                set_gradients(params, 99)
                if bad == "norm":
                    params[0].grad.fill_(1.5e19)  # finite squares, but a norm that is not
                elif bad == "norm of several programs":
                    params[0].grad.view(-1)[::20] = 1.5e19
                elif bad == "scale":
                    optimizer.grad_scale = torch.tensor(math.nan, device=device)
                else:
                    params[step].grad.view(-1)[-1 - step] = bad
                optimizer.step()
                assert optimizer.applied.item() is False
                assert equal(everything(optimizer, params), before)
                optimizer.grad_scale = None
            set_gradients(params, step)
            optimizer.step()
            assert optimizer.applied.item() is True
        runs.append(everything(optimizer, params))
    assert equal(*runs)


def test_a_skipped_step_does_not_bring_rectification_closer(small, device):
    """The sixth applied step is the first that is rectified, however many were void before it."""
    runs = []
    for stumbles in (True, False):
        params = weights(device=device)
        optimizer = AdamEMA(params, backend="triton", **RECTIFIED)
        optimizer.create_state()
        optimizer.steps_applied.fill_(4)
        for step in range(2):
            if stumbles:
                set_gradients(params, 99)
                params[step].grad.view(-1)[-1] = math.nan
                optimizer.step()
                assert optimizer.applied.item() is False
            set_gradients(params, step)
            optimizer.step()
        assert optimizer.steps_applied == 6
        runs.append(everything(optimizer, params))
    assert equal(*runs)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_no_epsilon(device, beta1):
    """An element without a gradient, or with one whose square vanishes, stays; the others move by lr."""
    p = nn.Parameter(torch.zeros(4, device=device))
    optimizer = AdamEMA([p], lr=0.1, betas=(beta1, 0.999), eps=0.0, backend="triton")
    p.grad = torch.tensor([0.0, 1e-30, -5.0, 2e-20], device=device)  # the last square is subnormal
    optimizer.step()
    torch.testing.assert_close(p.detach().cpu(), torch.tensor([0.0, 0.0, 0.1, -0.1]), rtol=1e-2, atol=0)


def test_shards_act_as_one(device):
    """Two halves in lockstep: clipped by their common norm, stopped by a bad gradient in either."""
    whole = nn.Parameter(torch.linspace(-1, 1, 27, dtype=torch.float64, device=device))
    halves = [nn.Parameter(part.clone()) for part in whole.detach().split([10, 17])]
    single, *sharded = (
        AdamEMA([p], lr=1e-2, clip_norm=3.0, backend=backend)
        for p, backend in ((whole, "reference"), (halves[0], "triton"), (halves[1], "triton"))
    )

    def tell(found: Tensor) -> None:
        told.append(found.clone())
        raise InterruptedError

    for step in range(3):
        set_gradients([whole], step)
        if step == 1:
            whole.grad[0] = math.nan
        for half, part in zip(halves, whole.grad.clone().split([10, 17]), strict=True):
            half.grad = part
        # One after the other: first each tells what it has found, then each is told the sum.
        told: list[Tensor] = []
        for optimizer in sharded:
            optimizer.sum_over_shards = tell
            with pytest.raises(InterruptedError):
                optimizer.step()
        for optimizer in sharded:
            optimizer.sum_over_shards = lambda found, common=told[0] + told[1]: found.copy_(common)
            optimizer.step()
        single.step()
        assert {bool(o.applied) for o in (single, *sharded)} == {step != 1}
        torch.testing.assert_close(torch.cat([h.detach() for h in halves]), whole.detach(), rtol=1e-13, atol=1e-13)


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize(("shape", "launches"), [((8,), 4), ((3, 3), 6)], ids=["whole vectors", "with a rest"])
def test_launches_do_not_grow_with_the_number_of_tensors(monkeypatch, device, shape, launches):
    """Nor is a table sent again unless a tensor moved."""
    names = ("measure_kernel", "reduce_kernel", "numbers_kernel", "update_kernel")
    kernels = [Counted(getattr(adam_fused, name)) for name in names]
    for name, kernel in zip(names, kernels, strict=True):
        monkeypatch.setattr(adam_fused, name, kernel)
    sent = []
    send = adam_fused.FusedAdam._sent
    monkeypatch.setattr(
        adam_fused.FusedAdam, "_sent", lambda self, host, device: sent.append(host) or send(self, host, device)
    )
    for tensors in (1, 7):
        params = [nn.Parameter(torch.zeros(shape, device=device)) for _ in range(tensors)]
        optimizer = AdamEMA(params, lr=1e-2, ema=True, clip_norm=1.0, backend="triton")
        for expected in (3, 0, 1):
            if expected:
                kept = [p.grad for p in params]  # their places must not be taken by the new ones
                for p in params:
                    p.grad = torch.ones(shape, device=device)
                del kept
            for kernel in kernels:
                kernel.launches = 0
            sent.clear()
            optimizer.step()
            assert sum(kernel.launches for kernel in kernels) == launches
            assert len(sent) == expected


def test_gradients_are_read_only_and_autograd_sees_new_weights(device):
    p = nn.Parameter(torch.ones(5, device=device))
    optimizer = AdamEMA([p], lr=1e-2, clip_norm=0.1, backend="triton")
    loss = (p * p).sum()
    given = p.grad = torch.full((5,), 2.0, device=device)
    optimizer.step()
    assert given.tolist() == [2.0] * 5
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_learning_rate_and_decays_as_tensors(device):
    runs = []
    for tensors in (True, False):
        params = weights(device=device)[1:]
        rate = torch.tensor(0.0, dtype=torch.float64, device=device)
        optimizer = AdamEMA(params, lr=rate if tensors else 0.0, ema=2, backend="triton")
        for step in range(3):
            rate.fill_(0.1 / (step + 1))
            decays = [0.5 / (step + 1), 0.9]
            optimizer.ema_decay = torch.tensor(decays, dtype=torch.float64, device=device) if tensors else decays
            if not tensors:
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            set_gradients(params, step)
            optimizer.step()
        runs.append(everything(optimizer, params))
    assert equal(*runs)
    assert not torch.equal(runs[0][0].cpu(), weights()[1])
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64, device="meta")
    message = f"lr as a tensor must be on the parameters' device {params[0].device}, got meta"
    with pytest.raises(ValueError, match=f"^{message}$"):
        optimizer.step()


def test_state_dict_continues_the_run(device):
    def advance(optimizer: AdamEMA, params: list[nn.Parameter], steps: range) -> None:
        optimizer.ema_decay = (0.5, 0.9)
        for step in steps:
            set_gradients(params, step)
            optimizer.step()

    params = weights(device=device)
    optimizer = AdamEMA(params, backend="triton", **EVERYTHING)
    advance(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    assert set(saved["state"][0]) == {"exp_avg", "exp_avg_sq", "ema", "ema_1"}
    other_params = [nn.Parameter(p.detach().clone()) for p in params]
    other = AdamEMA(other_params, backend="triton", **EVERYTHING)
    other.load_state_dict(saved)
    for pair in ((optimizer, params), (other, other_params)):
        advance(*pair, range(2, 4))
    assert equal(everything(optimizer, params), everything(other, other_params))


def test_refusals(monkeypatch):
    params = weights()
    with pytest.raises(ValueError, match=r"^AdamEMA: backend must be one of auto, triton, reference; got 'cuda'$"):
        AdamEMA(params, lr=1e-2, backend="cuda")
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^AdamEMA: backend 'triton' needs CUDA tensors, got cpu"):
        AdamEMA(params, lr=1e-2, backend="triton")


# --------------------------------------------------------------------------------------------------- on a GPU alone


def _network(device: torch.device) -> list[nn.Parameter]:
    """Some 4 million numbers in 60 tensors of all sizes, one of them in channels_last."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(256, 256, 3, 3), (1000, 999), *[(257,)] * 28, *[(64, 64, 3, 3)] * 28, (3,), ()]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
    return params


def _random_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator(params[0].device).manual_seed(step)
    for p in params:
        p.grad = torch.empty_like(p).normal_(generator=generator)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"lr": 1e-3, "ema": True}, EVERYTHING], ids=["distillation", "everything"])
def test_agrees_with_the_reference_at_size(device, settings):
    """With an eps above the rounding of gradients that the weight decay cancels, and no clipping.

    The reference's norm is a float32 sum, some 1e-5 off at this size.
    """
    runs = []
    for backend in ("auto", "reference"):
        params = _network(device)
        optimizer = AdamEMA(params, backend=backend, **{**settings, "eps": 1e-3, "clip_norm": 1e9})
        optimizer.ema_decay = 0.9
        for step in range(5):
            _random_gradients(params, step)
            optimizer.step()
        runs.append(everything(optimizer, params))
    assert_close(*runs)


@pytest.mark.gpu
def test_no_step_waits_for_the_device(device):
    params = _network(device)
    optimizer = AdamEMA(params, **EVERYTHING)
    optimizer.grad_scale = torch.tensor(0.5, device=device)
    optimizer.ema_decay = 0.9
    _random_gradients(params, 0)
    optimizer.step()  # compiles and loads the kernels
    kept = [p.grad for p in params]
    _random_gradients(params, 1)
    assert kept[0].data_ptr() != params[0].grad.data_ptr()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            optimizer.param_groups[0]["lr"] = 1e-3 / step
            optimizer.ema_decay = 1 - 0.1 / step
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.steps_applied == 4


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [EVERYTHING, RECTIFIED], ids=["everything", "rectified"])
@pytest.mark.parametrize("static", [True, False], ids=["gradients stay", "gradients of the graph"])
def test_a_captured_graph_follows_tensors(device, static, settings):
    """Replays with other gradients, rates and decays equal steps outside the graph, bit for bit.

    Rectification, too, begins in a replay.
    """
    runs = []
    for captured in (True, False):
        params = _network(device)
        rate = torch.tensor(1e-3, dtype=torch.float64, device=device)
        decays = torch.tensor([0.5, 0.9], dtype=torch.float64, device=device)
        optimizer = AdamEMA(params, **{**settings, "lr": rate if captured else 1e-3})
        optimizer.ema_decay = decays if captured else (0.5, 0.9)
        optimizer.create_state()
        optimizer.steps_applied.fill_(3)
        _random_gradients(params, 0)
        inputs = [p.grad for p in params]
        if captured:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                optimizer.step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                if not static:
                    for p, g in zip(params, inputs, strict=True):
                        p.grad = g * 1
                optimizer.step()
        else:
            optimizer.step()
        for step in range(1, 5):
            source = [nn.Parameter(p.detach()) for p in params]
            _random_gradients(source, step)
            if step == 3:
                source[1].grad[5, 7] = math.nan
            for g, s in zip(inputs, source, strict=True):
                g.copy_(s.grad)
            rate.fill_(1e-3 / step)
            decays.fill_(1 - 0.1 / step)
            if captured:
                graph.replay()
            else:
                optimizer.param_groups[0]["lr"] = 1e-3 / step
                optimizer.ema_decay = 1 - 0.1 / step
                optimizer.step()
            assert bool(optimizer.applied) == (step != 3)
        runs.append(everything(optimizer, params))
    assert equal(*runs)
