"""Random numbers: published words, the counter layout, backends, and the laws of uniform, normal and gamma draws.

Statistical tests have fixed seeds. Each rejects at 1e-9, and this file has fewer than 100 of them, so that a right
generator fails the file with probability below 1e-7.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ipfm.kernels import perturb, philox, reference
from ipfm.kernels._numpy_philox import uniform_of

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
LEVEL = 1e-9

# Random123's known answers for Philox4x32-10: counter, key, words.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def position_of(counter: list[int], key: list[int]) -> tuple[torch.Tensor, dict]:
    """The sample index, and the arguments of `random_words`, that make this counter and key."""
    block, low, step, last = counter
    index = torch.tensor([low | (last >> 16) << 32])
    return index, {"seed": key[0] | key[1] << 32, "stream": last & 0xFFFF, "step": step, "first_block": block}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, words, backend, device):
    index, arguments = position_of(counter, key)
    got = philox.random_words(index.to(device), 1, **arguments, backend=backend)
    assert got.cpu().tolist() == [[words]]


@triton.jit
def _tl_philox_kernel(p_counter, p_out, seed):
    c0, c1, c2, c3 = tl.load(p_counter), tl.load(p_counter + 1), tl.load(p_counter + 2), tl.load(p_counter + 3)
    w0, w1, w2, w3 = tl.philox(seed, c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32))
    tl.store(p_out, w0.to(tl.int64))
    tl.store(p_out + 1, w1.to(tl.int64))
    tl.store(p_out + 2, w2.to(tl.int64))
    tl.store(p_out + 3, w3.to(tl.int64))


@pytest.mark.parametrize(("index", "block", "stream", "step"), [(5, 7, 3, 2), (2**48 - 1, 2**31 + 9, 65535, 2**32 - 1)])
def test_words_are_those_of_triton_at_the_documented_counter(index, block, stream, step, device):
    seed = 0x0123456789ABCDEF
    counter = torch.tensor([block, index & 0xFFFFFFFF, step, stream | (index >> 32) << 16], device=device)
    out = torch.empty(4, dtype=torch.int64, device=device)
    _tl_philox_kernel[(1,)](counter, out, seed)
    for backend in ("reference", "triton"):
        got = philox.random_words(
            torch.tensor([index], device=device),
            1,
            seed=seed,
            stream=stream,
            step=step,
            first_block=block,
            backend=backend,
        )
        assert got.flatten().tolist() == out.tolist()


def numbers(kind: str, index: torch.Tensor, count: int, backend: str = "reference", **position) -> torch.Tensor:
    position = {"seed": 11, "stream": 1, "step": 5, **position}
    return getattr(philox, kind)(index, count, **position, backend=backend)


@pytest.mark.parametrize("count", [1, 4, 7, 1030])
def test_backends_agree(count, device, no_worse):
    index = torch.tensor([0, 3, 2**33 + 1], device=device)
    assert torch.equal(numbers("uniform", index, count, "triton"), numbers("uniform", index, count))
    truth = reference.normal(index, count, seed=11, stream=1, step=5, dtype=torch.float64)
    got = numbers("normal", index, count, "triton")
    no_worse(got, numbers("normal", index, count), truth)
    assert (got.double() - truth).abs().max() < 1e-6  # a few units in the last place of the largest normals


@pytest.mark.parametrize("shape", [0.01, 0.0625, 0.999, 1.0, 1.5, 64.0, 1024.0, 5e6, 1e15])
def test_gamma_backends_accept_the_same_trials(shape, device):
    index = torch.arange(40, device=device) * 977
    position = {"seed": 3, "stream": 2, "step": 1}
    got = philox.gamma(index, shape, **position, backend="triton")
    plain = philox.gamma(index, shape, **position, backend="reference")
    torch.testing.assert_close(got, plain, rtol=2e-12, atol=0)


def test_gamma_trials_beyond_the_first_are_used(device):
    """About 5 % of the first trials at shape 1 fail; a draw that gave up there would show as the wrong value."""
    position = {"seed": 3, "stream": 2, "step": 1}
    index = torch.arange(400)
    words = philox.random_words(index, 1, **position, first_block=reference.GAMMA_BLOCK)
    u = (words[:, 0].to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    x = torch.sqrt(-2 * u[:, 0].log()) * torch.cos(2 * torch.pi * u[:, 1])
    d = 1 - 1 / 3
    v = (1 + x / (9 * d) ** 0.5) ** 3
    accepted = (v > 0) & (u[:, 2].log() < 0.5 * x**2 + d - d * v + d * v.clamp(min=1e-300).log())
    got = philox.gamma(index, 1.0, **position)
    torch.testing.assert_close(got[accepted], (d * v)[accepted], rtol=1e-12, atol=0)
    assert 5 <= int((~accepted).sum()) <= 60
    assert bool((got[~accepted] != (d * v)[~accepted]).all())
    rejected = index[~accepted][:5].to(device)
    again = philox.gamma(rejected, 1.0, **position, backend="triton")
    torch.testing.assert_close(again.cpu(), got[~accepted][:5], rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [5, 2**32 - 1, torch.tensor(2**40 + 5)])
def test_numpy_draws_what_pytorch_draws(step, monkeypatch):
    """The reference on a CPU is NumPy's; elsewhere, and while something is compiled, PyTorch's."""
    index = torch.tensor([0, 3, 977, 2**33 + 1, 2**48 - 1]).repeat(40) + torch.arange(200)
    at = {"seed": 2**63 + 12345, "stream": 65535, "step": step}
    draws = {
        "words": lambda: philox.random_words(index, 3, **at, first_block=2**31 - 1),
        "uniform": lambda: philox.uniform(index, 7, **at),
        "normal": lambda: philox.normal(index, 7, **at),
        **{f"gamma {a}": lambda a=a: philox.gamma(index, a, **at) for a in (0.05, 0.5, 1.0, 1.7, 64.0, 1e9)},
        **{
            f"perturb {D}": lambda D=D: perturb(torch.zeros(200, 1, 3, 3), torch.ones(200), D, **at, sample_index=index)
            for D in (0.5, 128.0, float("inf"))
        },
    }
    numpy = {name: draw() for name, draw in draws.items()}
    monkeypatch.setattr(reference, "on_host", lambda _: False)
    for name, draw in draws.items():
        if name in ("words", "uniform", "normal", "perturb inf"):
            assert torch.equal(numpy[name], draw()), name
        else:
            torch.testing.assert_close(numpy[name], draw(), rtol=1e-6 if "perturb" in name else 1e-12, atol=0)


# ------------------------------------------------------------------------------------------------- reproducibility


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    order=st.permutations(range(6)),
    cut=st.integers(0, 6),
    count=st.integers(1, 40),
    longer=st.integers(0, 9),
    kind=st.sampled_from(["uniform", "normal"]),
)
def test_numbers_do_not_depend_on_the_batch(order, cut, count, longer, kind):
    index = torch.tensor([0, 1, 2, 2**31, 2**32 + 1, 2**47])
    whole = numbers(kind, index, count)
    shuffled = index[list(order)]
    parts = [numbers(kind, part, count + longer)[:, :count] for part in (shuffled[:cut], shuffled[cut:])]
    torch.testing.assert_close(torch.cat(parts), whole[list(order)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"seed": 12}, {"seed": 11 + 2**32}, {"stream": 2}, {"step": 6}, {"step": 5 + 2**31}]
)
def test_every_coordinate_changes_the_numbers(change):
    index = torch.arange(8)
    assert not torch.isclose(numbers("uniform", index, 64), numbers("uniform", index, 64, **change)).any(1).all()


def test_sample_index_beyond_32_bits_changes_the_numbers():
    low, high = (numbers("uniform", torch.tensor([i]), 64) for i in (5, 5 + 2**40))
    assert (low != high).sum() >= 60


def test_empty_batch_and_count(device):
    for backend in ("reference", "triton"):
        none = torch.empty(0, dtype=torch.int64, device=device)
        assert numbers("normal", none, 5, backend).shape == (0, 5)
        assert numbers("uniform", torch.arange(2, device=device), 0, backend).shape == (2, 0)
        assert philox.gamma(none, 2.0, seed=0, stream=0, step=0, backend=backend).shape == (0,)


# ------------------------------------------------------------------------------------------------------------- laws


def test_uniform_extremes_and_law():
    u = numbers("uniform", torch.arange(64), 4096)
    assert u.dtype == torch.float32
    assert 0 < float(u.min()) < 1e-4
    assert 1 - 1e-4 < float(u.max()) <= 1
    assert stats.kstest(u.double().flatten().numpy(), "uniform").pvalue > LEVEL
    ends = [0, 2**32 - 1]
    assert reference._to_uniform(torch.tensor(ends)).tolist() == [2.0**-33, 1.0]
    assert uniform_of(np.array(ends, np.uint64)).tolist() == [2.0**-33, 1.0]


@pytest.mark.parametrize("word", range(4))
def test_each_normal_of_a_block_is_normal(word):
    z = numbers("normal", torch.arange(64), 4096).double()[:, word::4].flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > LEVEL


@pytest.mark.parametrize("other", [{"step": 6}, {"stream": 2}, {"seed": 12}, "element", "sample", "block"])
def test_normals_are_uncorrelated(other):
    index = torch.arange(64)
    z = numbers("normal", index, 4096).double()
    w = {
        "element": lambda: z.roll(1, 1),
        "block": lambda: z.roll(4, 1),
        "sample": lambda: z.roll(1, 0),
    }.get(str(other), lambda: numbers("normal", index, 4096, **other).double())()
    for a, b in ((z, w), (z.square() - 1, w.square() - 1)):
        correlation = float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
        assert abs(correlation) * np.sqrt(z.numel()) < stats.norm.isf(LEVEL / 2)


@pytest.mark.parametrize("shape", [0.01, 0.05, 0.25, 0.5, 0.9, 1.0, 1.5, 4.0, 64.0, 1024.0, 1e6])
def test_gamma_law(shape):
    draws = philox.gamma(torch.arange(20_000), shape, seed=5, stream=7, step=9)
    assert draws.dtype == torch.float64
    assert bool((draws >= 0).all())
    assert stats.kstest(draws.numpy(), stats.gamma(shape).cdf).pvalue > LEVEL


def test_gamma_is_independent_of_the_normals_of_its_sample():
    index = torch.arange(20_000)
    g = philox.gamma(index, 2.0, seed=11, stream=1, step=5).numpy()
    z = numbers("normal", index, 8).square().sum(1).numpy()
    assert stats.spearmanr(g, z).pvalue > LEVEL


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be an integer in"),
        ({"seed": 2**64}, "seed must be an integer in"),
        ({"seed": 1.0}, "got 1.0"),
        ({"stream": 2**16}, "stream must be"),
        ({"step": 2**32}, "step must be"),
        ({"step": True}, "got True"),
        ({"count": -1}, "count must be"),
        ({"sample_index": torch.arange(3, dtype=torch.int32)}, "int64; got int32"),
        ({"sample_index": torch.zeros(2, 2, dtype=torch.int64)}, r"\(B,\); got \(2, 2\)"),
        ({"sample_index": [1, 2]}, "tensor; got list"),
        ({"backend": "cuda"}, "auto, triton, reference; got 'cuda'"),
    ],
)
def test_errors(arguments, message):
    valid = {"sample_index": torch.arange(3), "count": 4, "seed": 0, "stream": 0, "step": 0}
    with pytest.raises(ValueError, match=message) as caught:
        philox.uniform(**(valid | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [0.0, -1.0, float("nan"), float("inf"), "2", 1j])
def test_gamma_errors(shape):
    with pytest.raises(ValueError, match="shape must be"):
        philox.gamma(torch.arange(3), shape, seed=0, stream=0, step=0)


# ------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
def test_compiled_normals_and_gammas_match_the_reference(no_worse):
    index = torch.arange(4096) * 12_345_677
    position = {"seed": 2**63 + 5, "stream": 9, "step": 2**32 - 2}
    got = philox.normal(index.cuda(), 3073, **position)
    assert torch.equal(philox.uniform(index.cuda(), 3073, **position).cpu(), philox.uniform(index, 3073, **position))
    truth = reference.normal(index, 3073, **position, dtype=torch.float64)
    no_worse(got.cpu(), philox.normal(index, 3073, **position), truth)
    for shape in (0.01, 0.5, 1.0, 64.0, 5e6):
        plain = philox.gamma(index, shape, **position)
        torch.testing.assert_close(philox.gamma(index.cuda(), shape, **position).cpu(), plain, rtol=1e-11, atol=0)
