"""AdamEMA against torch's Adam and the EMA's definition; steps that must change nothing; its state."""

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ipfm.engine.commands.bench.no_reading import NoReading
from ipfm.kernels.adam import AdamEMA

SHAPES = [(7, 3), (5,), ()]


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


@functools.cache
def gradients(step: int, shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    sizes = [10 ** (8 * torch.rand(shape, generator=generator) - 4) for shape in shapes]
    return [size * torch.randn(shape, generator=generator) for size, shape in zip(sizes, shapes, strict=True)]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients of sizes from 1e-4 to 1e4, the same numbers for every dtype."""
    for p, g in zip(params, gradients(step, tuple(p.shape for p in params)), strict=True):
        p.grad = g.to(p.dtype, copy=True)


def everything(optimizer: AdamEMA, params: list[nn.Parameter]) -> list[Tensor]:
    entries = [optimizer.state[p][k] for p in params for k in sorted(optimizer.state[p])]
    return [t.detach().clone() for t in (*params, *entries, optimizer.steps_applied)]


def assert_equals_torch(
    ours_kind: Callable[..., AdamEMA],
    torch_kind: type[torch.optim.Optimizer],
    options: dict[str, object],
    dtype: torch.dtype,
) -> None:
    """1000 steps. In float32 both round, and both are held to the float64 run: ours errs no more than twice theirs."""
    runs = []
    for kind, run_dtype in ((ours_kind, dtype), (torch_kind, dtype), (torch_kind, torch.float64)):
        params = [nn.Parameter(p.detach().to(run_dtype)) for p in weights()]
        optimizer = kind(params, **options)
        for step in range(1000):
            set_gradients(params, step)
            optimizer.step()
        runs.append(torch.cat([p.detach().double().flatten() for p in params]))
    ours, theirs, truth = runs
    if dtype == torch.float64:
        torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-13)
    else:
        error = (ours - truth).abs().max().item()
        assert error <= 2 * (theirs - truth).abs().max().item()
        # Each step rounds the weight once, by at most half a unit of its size, and its update less.
        assert error <= 1000 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    start = torch.cat([p.detach().double().flatten() for p in weights()])
    assert (truth - start).abs().max() > 0.5


@pytest.mark.pairs
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torch_adam(dtype, beta1, eps, weight_decay):
    options = {"lr": 1e-2, "betas": (beta1, 0.999), "eps": eps, "weight_decay": weight_decay}
    assert_equals_torch(AdamEMA, torch.optim.Adam, options, dtype)


@pytest.mark.parametrize(
    ("dtype", "beta1", "eps", "weight_decay"),
    [(torch.float32, 0.9, 1e-8, 0.0), (torch.float32, 0.0, 1e-3, 0.01), (torch.float64, 0.9, 1.0, 0.01)],
    ids=str,
)
def test_equals_torch_rectified_adam(dtype, beta1, eps, weight_decay):
    """The first five steps have no denominator. An eps of 1 beside gradients from 1e-4 to 1e4 shows its place."""
    options = {"lr": 1e-2, "betas": (beta1, 0.999), "eps": eps, "weight_decay": weight_decay}
    assert_equals_torch(functools.partial(AdamEMA, rectified=True), torch.optim.RAdam, options, dtype)


@pytest.mark.parametrize("beta2", [0.0, 0.6, 0.9, 0.999])
def test_the_step_in_which_rectification_begins(beta2):
    """Each of 12 steps: it is never reached where rho_inf <= 5, as at 0 and 0.6, where a factor of r_t divides by 0."""
    ours, theirs = weights(torch.float64), weights(torch.float64)
    optimizers = [
        AdamEMA(ours, lr=torch.tensor(1e-2, dtype=torch.float64), betas=(0.9, beta2), rectified=True),
        torch.optim.RAdam(theirs, lr=1e-2, betas=(0.9, beta2)),
    ]
    for step in range(12):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_rectification_is_decided_without_reading_a_tensor():
    params = weights()
    optimizer = AdamEMA(params, lr=1e-2, betas=(0.9, 0.999), rectified=True, clip_norm=50.0, ema=True)
    optimizer.grad_scale = torch.tensor(0.5)
    for step in range(7):
        set_gradients(params, step)
        with NoReading():
            optimizer.step()
    assert optimizer.steps_applied == 7


def test_a_skipped_step_does_not_bring_rectification_closer():
    """The sixth applied step is the first that is rectified, however many were void before it."""
    runs = []
    for bad in ((), (0, 3, 5)):
        params = weights()
        optimizer = AdamEMA(params, lr=1e-2, betas=(0.9, 0.999), rectified=True, weight_decay=0.1, ema=2)
        optimizer.ema_decay = (0.5, 0.9)
        good = 0
        for step in range(7 + len(bad)):
            set_gradients(params, good)
            if step in bad:
                params[1].grad[2] = math.nan
            optimizer.step()
            good += step not in bad
            assert bool(optimizer.applied) == (step not in bad)
        assert optimizer.steps_applied == good == 7
        runs.append(everything(optimizer, params))
    assert all(map(torch.equal, *runs))


def test_learning_rate_may_change_each_step():
    pairs = []
    for kind in (AdamEMA, torch.optim.Adam):
        params = weights(torch.float64)
        optimizer = kind(params, lr=1.0, betas=(0.9, 0.999))
        for step in range(20):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            set_gradients(params, step)
            optimizer.step()
        pairs.append(params)
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ema(dtype):
    """e = decay e + (1 - decay) w after each step, from e = w at the start, with a decay of its own each step."""
    params = weights(dtype)
    optimizer = AdamEMA(params, lr=1e-2, ema=True)
    expected = [p.detach().double().clone() for p in params]
    for step in range(200):
        optimizer.ema_decay = decay = 0.5 ** (1 / (0.05 * (step + 1)))
        set_gradients(params, step)
        optimizer.step()
        expected = [decay * e + (1 - decay) * p.detach().double() for e, p in zip(expected, params, strict=True)]
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"].double(), e, rtol=tolerance, atol=tolerance)
        assert (p - optimizer.state[p]["ema"]).abs().max() > 1e-4


def test_several_averages():
    """Each is what it would be alone; a number is the decay of all; groups with fewer take the first decays."""
    decays = (0.5, 0.9, 0.99)

    def run(ema: int, decay: float | tuple[float, ...] | Tensor, groups: int = 1) -> list[dict[str, Tensor]]:
        params = [nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(groups)]
        optimizer = AdamEMA([{"params": [p], "ema": ema - i} for i, p in enumerate(params)], lr=1e-2)
        optimizer.ema_decay = decay
        for step in range(5):
            for p in params:
                set_gradients([p], step)
            optimizer.step()
        return [optimizer.state[p] for p in params]

    alone = [run(1, decay)[0]["ema"] for decay in decays]
    for several in (decays, torch.tensor(decays, dtype=torch.float64)):
        (state,) = run(3, several)
        assert list(state) == ["exp_avg_sq", "ema", "ema_1", "ema_2"]
        assert all(map(torch.equal, (state["ema"], state["ema_1"], state["ema_2"]), alone))
    assert torch.equal(run(2, 0.9)[0]["ema"], alone[1]) and torch.equal(run(2, 0.9)[0]["ema_1"], alone[1])
    two, one = run(2, (0.5, 0.9), groups=2)
    assert torch.equal(two["ema"], alone[0]) and torch.equal(two["ema_1"], alone[1])
    assert set(one) == {"exp_avg_sq", "ema"} and torch.equal(one["ema"], alone[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0.5,), "ema_decay must be a number or 2, one for each average, got 1"),
        ((0.5, 0.6, 0.7), "ema_decay must be a number or 2, one for each average, got 3"),
        (torch.tensor([0.5, 0.6]), r"ema_decay as a tensor must be \(2,\) float64, got \(2,\) float32"),
        (torch.tensor(0.5).double(), r"ema_decay as a tensor must be \(2,\) float64, got \(\) float64"),
        (
            torch.zeros(2, dtype=torch.float64, device="meta"),
            "ema_decay as a tensor must be on the parameters' device cpu, got meta",
        ),
    ],
)
def test_refused_decays(given, message):
    p = nn.Parameter(torch.ones(2))
    optimizer = AdamEMA([p], lr=1e-2, ema=2)
    optimizer.ema_decay = given
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=f"^{message}$"):
        optimizer.step()


def test_learning_rate_and_decay_as_tensors():
    runs = []
    for tensors in (False, True):
        params = weights()
        rate = torch.tensor(0.0, dtype=torch.float64)
        optimizer = AdamEMA(params, lr=rate if tensors else 0.0, ema=True)
        for step in range(5):
            rate.fill_(0.1 / (step + 1))
            if tensors:
                optimizer.ema_decay = torch.tensor(0.9, dtype=torch.float64)
            else:
                optimizer.param_groups[0]["lr"], optimizer.ema_decay = float(rate), 0.9
            set_gradients(params, step)
            optimizer.step()
        runs.append(everything(optimizer, params))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize(("decay", "follows"), [(0.0, True), (1.0, False)])
def test_ends_of_the_decay(decay, follows):
    params, start = weights(torch.float64), weights(torch.float64)
    optimizer = AdamEMA(params, lr=1e-2, ema=True)
    optimizer.ema_decay = decay
    set_gradients(params, 0)
    optimizer.step()
    for p, s in zip(params, start, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], p if follows else s, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("beta1", "ema", "entries", "size"),
    [
        (0.0, False, {"exp_avg_sq"}, 4),
        (0.0, True, {"exp_avg_sq", "ema"}, 8),
        (0.0, 1, {"exp_avg_sq", "ema"}, 8),
        (0.0, 3, {"exp_avg_sq", "ema", "ema_1", "ema_2"}, 16),
        (0.9, False, {"exp_avg", "exp_avg_sq"}, 8),
        (0.9, True, {"exp_avg", "exp_avg_sq", "ema"}, 12),
    ],
)
def test_state_holds_no_more_than_it_needs(beta1, ema, entries, size):
    p = nn.Parameter(torch.ones(1000))
    optimizer = AdamEMA([p], lr=1e-3, betas=(beta1, 0.999), ema=ema)
    for _ in range(2):
        p.grad = torch.ones(1000)
        optimizer.step()
    assert set(optimizer.state[p]) == entries
    assert sum(t.numel() * t.element_size() for t in optimizer.state[p].values()) == size * 1000


@pytest.mark.pairs
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30], ids=["nan", "inf", "-inf", "square overflows"])
@pytest.mark.parametrize("when", [0, 3], ids=["first step", "later"])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_non_finite_gradient_changes_nothing(beta1, eps, when, bad):
    """Not even a bit, in any parameter, and the run goes on as if the step had not been."""
    params = weights()
    optimizer = AdamEMA(params, lr=1e-2, betas=(beta1, 0.999), eps=eps, weight_decay=0.1, ema=True)
    optimizer.ema_decay = 0.9
    for step in range(when):
        set_gradients(params, step)
        optimizer.step()
        assert optimizer.applied.item() is True
    optimizer.create_state()
    before = everything(optimizer, params)
    set_gradients(params, 99)
    params[1].grad[2] = bad
    optimizer.step()
    assert optimizer.applied.item() is False
    assert all(torch.equal(a, b) for a, b in zip(everything(optimizer, params), before, strict=True))
    assert optimizer.steps_applied.item() == when

    twin_params = weights()
    twin = AdamEMA(twin_params, lr=1e-2, betas=(beta1, 0.999), eps=eps, weight_decay=0.1, ema=True)
    twin.ema_decay = 0.9
    for step in range(when):
        set_gradients(twin_params, step)
        twin.step()
    for pair in ((optimizer, params), (twin, twin_params)):
        set_gradients(pair[1], 50)
        pair[0].step()
    assert optimizer.applied.item() is True
    for a, b in zip(everything(optimizer, params), everything(twin, twin_params), strict=True):
        assert torch.equal(a, b)


def test_grad_scale():
    pairs = []
    for scale in (None, 2.5):
        params = weights(torch.float64)
        optimizer = AdamEMA(params, lr=1e-2, eps=1e-3)
        for step in range(5):
            set_gradients(params, step)
            if scale is None:
                optimizer.step()
                continue
            for p in params:
                p.grad /= scale
            optimizer.grad_scale = torch.tensor(scale, dtype=torch.float64)
            optimizer.step()
        pairs.append(params)
    for plain, scaled in zip(*pairs, strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-13, atol=1e-13)


def test_a_non_finite_scale_changes_nothing():
    params, start = weights(), weights()
    optimizer = AdamEMA(params, lr=1e-2, eps=1e-3)
    optimizer.grad_scale = torch.tensor(math.nan)
    set_gradients(params, 0)
    optimizer.step()
    assert not optimizer.applied
    assert all(torch.equal(p, s) for p, s in zip(params, start, strict=True))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_no_epsilon(beta1):
    """eps = 0: an element without a gradient, or with one whose square vanishes, stays; the others move by lr."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = AdamEMA([p], lr=0.1, betas=(beta1, 0.999), eps=0.0)
    p.grad = torch.tensor([0.0, 1e-30, -5.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.0, 0.0, 0.1]))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_no_epsilon_but_rectification(beta1):
    """Under a constant gradient the first five steps are lr g, and the sixth lr r_6 where v is not 0."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = AdamEMA([p], lr=0.1, betas=(beta1, 0.999), eps=0.0, rectified=True)
    for _ in range(6):
        p.grad = torch.tensor([0.0, 1e-30, -5.0])
        optimizer.step()
    # rho_t by its definition: twice the mean age of the gradients in v, counted from 1, less 1.
    rho, rho_inf = (
        2 * sum((i + 1) * 0.999**i for i in range(t)) / sum(0.999**i for i in range(t)) - 1 for t in (6, 10**5)
    )
    r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    torch.testing.assert_close(p.detach(), torch.tensor([0.0, -0.5e-30, 2.5 + 0.1 * r]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_state_created_beforehand_is_the_same(beta1):
    runs = []
    for early in (False, True):
        params = weights()
        optimizer = AdamEMA(params, lr=1e-2, betas=(beta1, 0.999), ema=True)
        optimizer.ema_decay = 0.5
        if early:
            optimizer.create_state()
            optimizer.create_state()
            assert all(torch.equal(optimizer.state[p]["ema"], p) for p in params)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        runs.append(everything(optimizer, params))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_restart_of_the_ema():
    params = weights()
    optimizer = AdamEMA(params, lr=1e-2, ema=2)
    optimizer.restart_ema()  # nothing is there yet
    optimizer.create_state()
    with torch.no_grad():
        params[0].fill_(7)
    optimizer.restart_ema()
    assert all((optimizer.state[params[0]][entry] == 7).all() for entry in ("ema", "ema_1"))
    AdamEMA(params, lr=1e-2).restart_ema()  # and none is kept


@pytest.mark.parametrize("rectified", [False, True])
def test_groups_have_settings_of_their_own(rectified):
    """Two groups equal two optimisers, but for the check: a bad gradient in one stops both."""
    p, q, p_alone, q_alone = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(4))
    settings = {"betas": (0.9, 0.99), "ema": True, "weight_decay": 0.1, "rectified": rectified}
    together = AdamEMA([{"params": [p], "lr": 1e-1}, {"params": [q], **settings}], lr=1e-3)
    alone = [AdamEMA([p_alone], lr=1e-1), AdamEMA([q_alone], lr=1e-3, **settings)]
    for optimizer in (together, *alone):
        optimizer.ema_decay = 0.5
    for step in range(10):
        set_gradients([p, q], step)
        set_gradients([p_alone, q_alone], step)
        for optimizer in (together, *alone):
            optimizer.step()
    assert torch.equal(p, p_alone) and torch.equal(q, q_alone)
    assert set(together.state[p]) == {"exp_avg_sq"} and set(together.state[q]) == {"exp_avg", "exp_avg_sq", "ema"}
    assert torch.equal(together.state[q]["ema"], alone[1].state[q_alone]["ema"])
    before = p.detach().clone()
    set_gradients([p, q], 11)
    q.grad[0] = math.nan
    together.step()
    assert torch.equal(p, before)


def test_parameters_without_a_gradient_stay():
    params, start = weights(), weights()
    optimizer = AdamEMA(params, lr=1e-2)
    optimizer.step()
    assert not optimizer.applied and optimizer.steps_applied == 0
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert optimizer.applied and torch.equal(params[1], start[1]) and not torch.equal(params[0], start[0])


def test_an_empty_shard():
    """ZeRO may leave a process without any element of a group."""
    empty, p = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(2))
    for params in ([empty], [empty, p]):
        optimizer = AdamEMA(params, lr=0.1, ema=True)
        for q in params:
            q.grad = torch.ones_like(q)
        optimizer.step()
        assert optimizer.applied
    torch.testing.assert_close(p.detach(), torch.full((2,), -0.1))


@pytest.mark.parametrize("clip_norm", [1e-3, 30.0, 1e9])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_clipping_is_that_of_torch(clip_norm, scale):
    """The norm is that of all scaled gradients together; below the limit nothing changes."""
    pairs = []
    for kind in (AdamEMA, torch.optim.Adam):
        params = weights(torch.float64)
        optimizer = kind(params, lr=1e-2, betas=(0.5, 0.9), eps=1.0)
        optimizer.clip_norm = clip_norm
        for step in range(10):
            set_gradients(params, step)
            if kind is AdamEMA:
                optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            else:
                for p in params:
                    p.grad.mul_(scale or 1.0)
                # torch adds 1e-6 to the norm.
                torch.nn.utils.clip_grad_norm_(params, clip_norm)
            optimizer.step()
        pairs.append(params)
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_clipping_of_nothing_and_of_too_much():
    params = weights()
    start = [p.detach().clone() for p in params]
    optimizer = AdamEMA(params, lr=1e-2, clip_norm=1.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.applied and all(map(torch.equal, params, start))
    # Finite squares, but a norm that is not: the step is not taken.
    params[0].grad = torch.full_like(params[0], 1.5e19)
    optimizer.step()
    assert not optimizer.applied and all(map(torch.equal, params, start))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"^clip_norm must be a finite number > 0 or None, got {bad}$"):
            AdamEMA(weights(), lr=1e-2, clip_norm=bad)


@pytest.mark.parametrize("chunk", [1, 4, 21])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_pieces_change_nothing(monkeypatch, chunk, beta1):
    """Whatever the foreach operations update at a time, the bits are the same; strides too."""
    monkeypatch.setattr("ipfm.kernels.adam_reference._torch_can", lambda group: False)
    runs = []
    for size in (2**24, chunk):
        monkeypatch.setattr("ipfm.kernels.adam_reference.CHUNK", size)
        params = [*weights(), nn.Parameter(torch.linspace(-1, 1, 60).reshape(5, 12).t())]
        optimizer = AdamEMA(params, lr=1e-2, betas=(beta1, 0.999), ema=True, clip_norm=50.0, weight_decay=0.1)
        optimizer.ema_decay = 0.9
        for step in range(5):
            set_gradients(params, step)
            optimizer.step()
        runs.append(everything(optimizer, params))
        assert params[-1].stride() == optimizer.state[params[-1]]["ema"].stride() == (1, 12)
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("clip_norm", [None, 3.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_torchs_fused_adam_and_foreach_operations_agree(monkeypatch, beta1, weight_decay, clip_norm):
    """In float64, with a step between that is not applied; the former is what runs where it can."""
    runs = []
    for fused in (True, False):
        calls = []
        if not fused:
            monkeypatch.setattr("ipfm.kernels.adam_reference._torch_can", lambda group: False)
        original = torch._fused_adam_
        monkeypatch.setattr(torch, "_fused_adam_", lambda *a, c=calls, f=original, **k: c.append(1) or f(*a, **k))
        params = weights(torch.float64)
        options = {"betas": (beta1, 0.999), "weight_decay": weight_decay, "clip_norm": clip_norm, "ema": 2}
        optimizer = AdamEMA(params, lr=1e-2, **options)
        optimizer.ema_decay = (0.9, 0.5)
        for step in range(6):
            set_gradients(params, step)
            if step == 3:
                params[0].grad[0, 0] = math.inf
            optimizer.step()
            assert bool(optimizer.applied) == (step != 3)
        runs.append(everything(optimizer, params))
        assert len(calls) == (6 if fused else 0)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_strides_that_differ_go_to_the_foreach_operations(monkeypatch):
    """torch's fused Adam walks memory; a gradient in another order than its weight would be taken for another."""
    runs = []
    for order in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(torch.linspace(-1, 1, 48).view(2, 3, 2, 4).clone())
        optimizer = AdamEMA([p], lr=1e-2, ema=True)
        p.grad = torch.linspace(1, 3, 48).view(2, 3, 2, 4).clone().to(memory_format=order)
        optimizer.step()
        runs.append([p.detach(), *optimizer.state[p].values()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [None, 0, 1])
def test_shards_act_as_one(bad):
    """Two halves of the parameters, in lockstep: clipped by their common norm, stopped by a bad gradient in either."""
    whole = weights(torch.float64)
    flat = torch.cat([p.detach().flatten() for p in whole])

    def tell(found: Tensor) -> None:
        told.append(found.clone())
        raise InterruptedError

    halves = [nn.Parameter(part.clone()) for part in flat.split([10, len(flat) - 10])]
    single = AdamEMA(whole, lr=1e-2, clip_norm=3.0)
    sharded = [AdamEMA([half], lr=1e-2, clip_norm=3.0) for half in halves]
    for step in range(4):
        set_gradients(whole, step)
        if bad is not None and step == 2:
            whole[0 if bad == 0 else -1].grad.fill_(math.nan)
        parts = torch.cat([p.grad.flatten() for p in whole]).split([10, len(flat) - 10])
        # One after the other: first each tells what it has found, then each is told the sum.
        told: list[Tensor] = []
        for optimizer, half, part in zip(sharded, halves, parts, strict=True):
            half.grad, optimizer.sum_over_shards = part.clone(), tell
            with pytest.raises(InterruptedError):
                optimizer.step()
        common = told[0] + told[1]
        for optimizer, half, part in zip(sharded, halves, parts, strict=True):
            half.grad, optimizer.sum_over_shards = part.clone(), lambda found, common=common: found.copy_(common)
            optimizer.step()
        single.step()
        assert {bool(o.applied) for o in (single, *sharded)} == {bad is None or step != 2}
        now = torch.cat([p.detach().flatten() for p in whole])
        torch.testing.assert_close(torch.cat([h.detach() for h in halves]), now, rtol=1e-13, atol=1e-13)
    assert not torch.equal(now, flat)


@pytest.mark.parametrize(("taken_at", "rectified"), [(0, False), (5, False), (3, True), (7, True)])
def test_state_dict_continues_the_run(taken_at, rectified):
    """Rectified: from before its begin over it, and from after it; the settings are those of the state."""

    def advance(optimizer: AdamEMA, params: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            set_gradients(params, step)
            optimizer.step()

    params = weights()
    optimizer = AdamEMA(params, lr=1e-2, betas=(0.9, 0.999), rectified=rectified, ema=True)
    optimizer.ema_decay = 0.9
    advance(optimizer, params, range(taken_at))
    saved = copy.deepcopy(optimizer.state_dict())
    other_params = [nn.Parameter(p.detach().clone()) for p in params]
    other = AdamEMA(other_params, lr=1.0, betas=(0.9, 0.999), ema=True)
    other.ema_decay = 0.9
    other.load_state_dict(saved)
    for pair in ((optimizer, params), (other, other_params)):
        advance(*pair, range(taken_at, taken_at + 5))
    assert all(
        torch.equal(a, b) for a, b in zip(everything(optimizer, params), everything(other, other_params), strict=True)
    )
    with pytest.raises(KeyError, match="steps_applied"):
        other.load_state_dict(torch.optim.Adam(other_params).state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1e-3}, "lr must be a finite number >= 0, got -0.001"),
        ({"lr": math.nan}, "lr must be a finite number >= 0, got nan"),
        ({"lr": math.inf}, "lr must be a finite number >= 0, got inf"),
        ({"betas": (1.0, 0.999)}, r"betas must be two numbers in \[0, 1\), got \(1.0, 0.999\)"),
        ({"betas": (0.0, -0.1)}, r"betas must be two numbers in \[0, 1\), got \(0.0, -0.1\)"),
        ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), got \(0.9,\)"),
        ({"betas": (0.9, math.nan)}, r"betas must be two numbers in \[0, 1\), got \(0.9, nan\)"),
        ({"eps": -1e-8}, "eps must be a finite number >= 0, got -1e-08"),
        ({"eps": math.nan}, "eps must be a finite number >= 0, got nan"),
        ({"lr": torch.tensor(0.1)}, r"lr as a tensor must be 0-d float64, got \(\) float32"),
        ({"lr": torch.zeros(1).double()}, r"lr as a tensor must be 0-d float64, got \(1,\) float64"),
        ({"ema": 5}, "ema must be a number of averages from 0 to 4, got 5"),
        ({"ema": -1}, "ema must be a number of averages from 0 to 4, got -1"),
        ({"ema": 0.5}, "ema must be a number of averages from 0 to 4, got 0.5"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number >= 0, got inf"),
        ({"rectified": 1}, "rectified must be True or False, got 1"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        AdamEMA(weights(), **{"lr": 1e-3, **settings})
    with pytest.raises(ValueError, match=f"^{message}$"):
        AdamEMA([{"params": weights(), **settings}], lr=1e-3)


def test_other_refusals():
    with pytest.raises(ValueError, match=r"^params must be float32 or float64, got torch.bfloat16$"):
        AdamEMA(weights(torch.bfloat16), lr=1e-3)
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamEMA([], lr=1e-3)
    with pytest.raises(ValueError, match="takes no closure"):
        AdamEMA(weights(), lr=1e-3).step(lambda: 0.0)
