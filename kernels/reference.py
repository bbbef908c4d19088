"""The mathematics of the kernels on one page, in plain PyTorch.

Every function computes in the promoted dtype of its inputs, at least float32: float64 in gives the float64 truth that
the Triton kernels are compared with. Nothing is validated here; the public functions of the same names do that.

Random numbers: Philox4x32-10 [Salmon et al. 2011], a pure function of (seed, stream, step, sample index, element).

    key   = seed                                            64 bits: low word, high word
    c0    = block                                           see below
    c1    = bits 0..31 of the sample index
    c2    = step                                            0 <= step < 2^32
    c3    = stream | bits 32..47 of the sample index << 16  0 <= stream < 2^16

Blocks 0 .. 2^31-1: element i of a sample (its index in C-contiguous order, whatever the memory format) takes word i % 4
of block i // 4. Blocks 2^31 + t: trial t of the sample's gamma variable; words 0 and 1 make its normal, word 2 is its
acceptance uniform, and word 3 of trial 0 is the uniform of the boost for shapes below 1.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ipfm.kernels._checks import Position
from ipfm.kernels._dispatch import signed64
from ipfm.kernels._numpy_philox import (
    GAMMA_BLOCK,
    MOST,
    TRIALS,
    blocks_of,
    gamma_parts_of,
    on_host,
    uniform_of,
    words_of,
)

WEIGHT_FLOOR = 1e-5  # floor of the mean |y - T| below the generator loss's weight
SMALL_SQUARE = 1e-6  # mean square of T - S below which its weight `unsquared` weighs as a square does
LOG_RATIO_MAX = 690.0  # cap of ln sqrt(D/K): keeps 0 * inf out of x at tiny D

# Trials of a gamma variable. One is accepted with probability 0.95 or more: that none of 16 is has probability 1e-21.
# A fixed number, so that nothing waits for the device, and compilers and the meta device have no value to ask for.
_TRIALS = 16

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


# Weights of the generator's loss, see `ipfm_loss`.
LossWeight = Literal["sid", "given", "score", "unsquared"]


class IpfmLoss(NamedTuple):
    """What `ipfm_loss` returns: per-sample loss, weight λ and validity, and the gradients with respect to T, S, y."""

    loss: Tensor
    weight: Tensor
    dt: Tensor
    ds: Tensor
    dy: Tensor
    valid: Tensor


class DenoisingLoss(NamedTuple):
    """What `denoising_loss` returns: per-sample loss and validity, and the gradient with respect to the prediction."""

    loss: Tensor
    grad: Tensor
    valid: Tensor


# ------------------------------------------------------------------------------------------------- random numbers


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of broadcastable int64 counters in [0, 2^32): four int64 words in [0, 2^32)."""
    c0, c1, c2, c3 = (c.contiguous().clone() for c in torch.broadcast_tensors(c0, c1, c2, c3))
    # The rounds' keys as tensors: torch.compile makes floats of the Python numbers that a changing seed would give.
    key, rounds = torch.full((), signed64(seed), device=c0.device), torch.arange(10, device=c0.device)
    keys = [((key >> shift) & _WORD) + rounds * step & _WORD for shift, step in zip((0, 32), _KEY_STEPS, strict=True)]
    high = torch.empty_like(c0)
    for k0, k1 in zip(*(k.unbind() for k in keys), strict=True):
        # A 32 x 32-bit product fits 64 bits; that int64 reads it as signed does not matter to its bits. c1 and c3 keep
        # stray bits above bit 31, which the mask clears after the exclusive or.
        p0, p1 = c0.mul_(_MULTIPLIERS[0]), c2.mul_(_MULTIPLIERS[1])
        c0 = c1.bitwise_xor_(torch.bitwise_right_shift(p1, 32, out=high)).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = c3.bitwise_xor_(torch.bitwise_right_shift(p0, 32, out=high)).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = p1, p0
    return c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)


def _words(sample_index: Tensor, first_block: int, blocks: int, position: Position) -> Tensor:
    """(4, B, blocks) int64: the words of blocks [first_block, first_block + blocks) of every sample."""
    if _few(sample_index, blocks):
        words = words_of(sample_index, blocks_of(first_block, blocks), position)
        return torch.from_numpy(words.view(np.int64))
    index, step = sample_index.view(-1, 1), position["step"]
    block = torch.arange(first_block, first_block + blocks, device=index.device)
    c2 = step & _WORD if isinstance(step, Tensor) else torch.full_like(index, step)
    c3 = ((index >> 16) & 0xFFFF0000) | position["stream"]
    return torch.stack(philox(block, index & _WORD, c2, c3, position["seed"]))


def _uniform(sample_index: Tensor, blocks: int, position: Position, first_block: int = 0) -> Tensor:
    """(4, B, blocks) float32 in (0, 1]."""
    if _few(sample_index, blocks):
        return torch.from_numpy(uniform_of(words_of(sample_index, blocks_of(first_block, blocks), position)))
    return _to_uniform(_words(sample_index, first_block, blocks, position))


def _to_uniform(words: Tensor) -> Tensor:
    """u = w·2⁻³² + 2⁻³³ in (0, 1]. A float32 by definition, in every dtype's arithmetic."""
    return words.to(torch.float32).mul_(2.0**-32).add_(2.0**-33)


def _few(sample_index: Tensor, blocks: int) -> bool:
    return len(sample_index) * blocks <= MOST and on_host(sample_index)


def random_words(
    sample_index: Tensor, blocks: int, *, seed: int, stream: int, step: int | Tensor, first_block: int = 0
) -> Tensor:
    """(B, blocks, 4) int64: the words of Philox blocks [first_block, first_block + blocks)."""
    words = _words(sample_index, first_block, blocks, {"seed": seed, "stream": stream, "step": step})
    return words.movedim(0, -1).contiguous()


def uniform(sample_index: Tensor, count: int, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
    """(B, count) float32 in (0, 1]."""
    u = _uniform(sample_index, -(-count // 4), {"seed": seed, "stream": stream, "step": step})
    return u.movedim(0, -1).flatten(1)[:, :count]


def normal(
    sample_index: Tensor, count: int, *, seed: int, stream: int, step: int | Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, count) standard normals: two Box-Muller pairs a Philox block, computed in `dtype`."""
    u = _uniform(sample_index, -(-count // 4), {"seed": seed, "stream": stream, "step": step})
    return _normals(u, dtype)[:, :count]


def _normals(u: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniforms (4, B, blocks) -> (B, 4·blocks)."""
    u = u.to(dtype)
    radius, angle = u[0::2].log().mul_(-2).sqrt_(), u[1::2] * (2 * math.pi)
    cosine, sine = angle.cos().mul_(radius), angle.sin_().mul_(radius)
    return torch.stack((cosine[0], sine[0], cosine[1], sine[1]), -1).flatten(1)


def _gamma_parts(sample_index: Tensor, shape: float, position: Position) -> tuple[Tensor, Tensor | None]:
    """(g, b), (B,) float64, with g·exp(b) ~ Gamma(shape); b is None for shape >= 1 [Marsaglia & Tsang 2000].

    Of the trials the first accepted one counts; were there none, the value would be d, which is close to the mean.
    """
    if on_host(sample_index):
        g, boost = gamma_parts_of(sample_index, shape, position)
        return torch.from_numpy(g), None if boost is None else torch.from_numpy(boost)
    a = shape + 1 if shape < 1 else shape
    d = a - 1 / 3
    c = 1 / math.sqrt(9 * d)
    u = _uniform(sample_index, _TRIALS, position, GAMMA_BLOCK).double()
    x = (u[0].log() * -2).sqrt() * (u[1] * (2 * math.pi)).cos()
    t = c * x
    # x²/2 + d(1 - v + ln v) for v = (1+t)³, written so that nothing of the size of d cancels.
    bound = d * (3 * (torch.log1p(t) - t) + t * t * (1.5 - t))
    accept = (t > -1) & ((u[2] < 1 - 0.0331 * x**4) | (u[2].log() < bound))
    first = accept.to(torch.uint8).argmax(1, keepdim=True)
    value = d * (1 + torch.where(accept, t, 0).gather(1, first)[:, 0]) ** 3
    return value, u[3][:, 0].log() / shape if shape < 1 else None


def _uniform_and_gamma(
    sample_index: Tensor, blocks: int, shape: float, position: Position
) -> tuple[Tensor, tuple[Tensor, Tensor | None] | None]:
    """`_uniform` and `_gamma_parts`, by one call of Philox where that saves time; no gamma variable of shape ∞."""
    if math.isinf(shape) or not _few(sample_index, blocks + TRIALS):
        parts = None if math.isinf(shape) else _gamma_parts(sample_index, shape, position)
        return _uniform(sample_index, blocks, position), parts
    u = uniform_of(words_of(sample_index, blocks_of(0, blocks, trials=TRIALS), position))
    g, boost = gamma_parts_of(sample_index, shape, position, u[..., blocks:])
    return torch.from_numpy(u[..., :blocks]), (torch.from_numpy(g), None if boost is None else torch.from_numpy(boost))


def gamma(sample_index: Tensor, shape: float, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
    """(B,) float64 draws of Gamma(shape, 1)."""
    g, boost = _gamma_parts(sample_index, shape, {"seed": seed, "stream": stream, "step": step})
    return g if boost is None else torch.exp(g.log() + boost)


# ------------------------------------------------------------------------------------------------- operations


def _per_sample(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *[1] * (like.ndim - 1))


def perturb(
    y: Tensor,
    sigma: Tensor,
    D: float,
    *,
    seed: int,
    stream: int,
    step: int | Tensor,
    sample_index: Tensor,
    c_in: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x = y + σ·g/√(K/D), K = 2·Gamma(D/2), g ~ N(0, I); K/D = 1 at D = ∞ [PFGM++ eq. 4, a multivariate Student t]."""
    compute = torch.promote_types(y.dtype, torch.float32)
    position: Position = {"seed": seed, "stream": stream, "step": step}
    elements = y.shape[1:].numel()
    u, gammas = _uniform_and_gamma(sample_index, -(-elements // 4), D / 2, position)
    scale = sigma.double()
    if gammas is not None:
        g, boost = gammas
        if boost is None:
            ratio = torch.sqrt(D / 2 / g)
        else:
            ratio = torch.exp((0.5 * (math.log(D / 2) - (g.log() + boost))).clamp_(max=LOG_RATIO_MAX))
        scale = scale * ratio
    scale = scale.clamp(max=torch.finfo(compute).max).to(compute)
    noise = _normals(u, compute)[:, :elements].reshape(y.shape)
    if noise.stride() != y.stride():
        noise = torch.empty_like(y, dtype=compute).copy_(noise)  # so that x gets y's memory format
    x = noise.mul_(_per_sample(scale, y)).add_(y)
    if c_in is None:
        return x.to(y.dtype)
    scaled = _per_sample(c_in.to(compute), y) * x
    return x.to(y.dtype), scaled.to(out_dtype or y.dtype)


def _column(v: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    return _per_sample(v.to(dtype), like)


@torch.no_grad()
def ipfm_loss(
    t: Tensor,
    s: Tensor,
    y: Tensor,
    *,
    alpha: float,
    inplace: bool = False,
    x: Tensor | None = None,
    c_skip: Tensor | None = None,
    c_out: Tensor | None = None,
    real_weights: tuple[float, float] = (1.0, 1.0),
    weight_by: LossWeight = "sid",
    factor: Tensor | None = None,
    sigma: Tensor | None = None,
    by_D: float = 0.0,
) -> IpfmLoss:
    """L(α) = λ[‖T-y‖² - ‖S-y‖² - 2(α-½)‖T-S‖²] and its gradients [IPFM eq. 28; SiD eq. 23, L(α) = 2·L_SiD(α)].

    T = t and S = s, or T = c_skip x + c_out t and S = c_skip x + c_out s [EDM eq. 7]. In the latter ∂L/∂y includes the
    part that goes through x = y + noise, c_skip (∂L/∂T + ∂L/∂S), which is -c_skip times the direct one.

    With real_weights (a, b) other than (1, 1) e = a(T-c) - b(y-c) is in the place of T - y but for λ, with c = c_skip x
    in the latter case and 0 in the former: L = 2λ Σ (T-S)(e - αa(T-S)) [RealUID, in the form of a raw output's target].

    λ is 1 / mean|T-y|, or of weight_by "given" 1, "score" (N by_D + 1) / (‖x-T‖² by_D + σ²), "unsquared" (‖T-S‖² + 1e-6
    N)^-½; times `factor`.
    """
    compute = torch.promote_types(y.dtype, torch.float32)
    dims = tuple(range(1, t.ndim))
    T, S, Y = t.to(compute), s.to(compute), y.to(compute)
    ts = T - S
    out: Tensor | float = 1.0
    rest: Tensor | float = 1.0
    if x is not None and c_skip is not None and c_out is not None:
        skip, out, rest = _column(c_skip, t, compute), _column(c_out, t, compute), _column(1 - c_skip, t, compute)
        T, S, ts = skip * x.to(compute) + out * T, skip * x.to(compute) + out * S, out * ts
    ty, sy = T - Y, S - Y
    elements = t[0].numel() if len(t) else 1
    if weight_by == "given":
        weight = torch.ones_like(ty.flatten(1)[:, 0])
    elif weight_by == "score" and x is not None and sigma is not None:
        away = rest * x.to(compute) - out * t.to(compute)
        weight = (elements * by_D + 1) / (away.square().sum(dims) * by_D + sigma.to(compute).square())
    elif weight_by == "unsquared":
        weight = (ts.square().sum(dims) + SMALL_SQUARE * elements).rsqrt()
    else:
        weight = 1 / ty.abs().mean(dims).clamp_(min=WEIGHT_FLOOR)
    if factor is not None:
        weight = weight * factor.to(compute)
    a, b = real_weights
    if real_weights != (1.0, 1.0):
        # From here on of e, of a(T-S) and of e - a(T-S) in the places of T-y, T-S and S-y.
        clean = Y if x is None else Y - skip * x.to(compute)
        raw_t, raw_s = (out * v.to(compute) for v in (t, s))
        ty, ts, sy = a * raw_t - b * clean, a * (raw_t - raw_s), a * raw_s - b * clean
    # ‖T-y‖² - ‖S-y‖² = Σ (T-S)(2(T-y) - (T-S)): the factored sum does not cancel when S is close to T.
    loss = 2 * weight * (ts * (ty - alpha * ts)).sum(dims)
    if a != 1:
        loss = loss / a
    beta = 4 * (alpha - 0.5)
    lam = _per_sample(weight, t)
    dt, ds, dy = lam * out * (2 * ty - beta * ts), lam * out * (beta * ts - 2 * sy), lam * rest * (-2 * b / a * ts)
    # Any non-finite input makes the loss non-finite; so does overflow. The gradients must fit their dtype too.
    valid = loss.isfinite() & (weight > 0)
    for gradient, like in ((dt, t), (ds, s), (dy, y)):
        valid &= gradient.abs().amax(dims) <= torch.finfo(like.dtype).max
    keep = _per_sample(valid, t)
    dt, ds, dy = (torch.where(keep, g, 0).to(like.dtype) for g, like in ((dt, t), (ds, s), (dy, y)))
    if inplace:
        dt, ds = t.copy_(dt), s.copy_(ds)
    return IpfmLoss(torch.where(valid, loss, 0), torch.where(valid, weight, 0), dt, ds, dy, valid)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    addend: Tensor | None = None,
    eps: float = 1e-5,
    activation: bool = True,
) -> Tensor:
    """silu(n), or silu(n (scale + 1) + shift), n = (x - mean)/√(var + eps)·weight + bias over each group's channels.

    With an addend of the channels x is what has it added.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if addend is not None:
        x = x.to(dtype) + addend.to(dtype)[..., None, None]
    grouped = x.to(dtype).unflatten(1, (groups, -1)).flatten(2)
    centred = grouped - grouped.mean(2, keepdim=True)
    n = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).view_as(x)
    n = n * weight.to(dtype)[:, None, None] + bias.to(dtype)[:, None, None]
    if scale is not None and shift is not None:
        n = n * (scale.to(dtype) + 1) + shift.to(dtype)
    return n * torch.sigmoid(n) if activation else n


def residual_sum(a: Tensor, b: Tensor, bias: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """(a + b + bias)·scale."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    total = a.to(dtype) + b.to(dtype)
    return (total if bias is None else total + bias.to(dtype)[:, None, None]) * scale


def dropout_threshold(dropout: float) -> int:
    """A word of Philox below it drops its element."""
    return min(round(dropout * 2.0**32), _WORD)


def dropout_mask(shape: torch.Size, dropout: float, seed: Tensor) -> Tensor:
    """(B, C, H, W) truth values: which elements dropout keeps, in `mp_silu`.

    Four channels of a pixel take the words of a Philox block. Key: the seed; stream and step 0; sample index: the
    sample's place in the batch.
    """
    batch, channels, height, width = shape
    blocks = -(-channels // 4)
    index = torch.arange(batch, device=seed.device)
    words = random_words(index, height * width * blocks, seed=int(seed) % 2**64, stream=0, step=0)
    words = words.view(batch, height, width, 4 * blocks)[..., :channels]
    return (words >= dropout_threshold(dropout)).movedim(-1, 1)


def mp_silu(x: Tensor, scale: Tensor | None = None, *, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """silu(x scale) / 0.596, and dropout [Karras et al. 2024, eq. 81]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    u = x.to(dtype) if scale is None else x.to(dtype) * scale.to(dtype)[:, :, None, None]
    y = u * torch.sigmoid(u) / 0.596
    if seed is None:
        return y
    return torch.where(dropout_mask(x.shape, dropout, seed), y / (1 - dropout), 0)


def mp_cat_silu(a: Tensor, b: Tensor, t: float = 0.5) -> tuple[Tensor, Tensor]:
    """(z, silu(z) / 0.596), z = √((Ca + Cb)/((1 - t)² + t²)) [(1 - t)/√Ca a, t/√Cb b] [Karras et al. 2024, eq. 103]."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    wide, narrow = a.shape[1], b.shape[1]
    c = math.sqrt((wide + narrow) / ((1 - t) ** 2 + t**2))
    joined = torch.cat([a.to(dtype) * (c * (1 - t) / wide**0.5), b.to(dtype) * (c * t / narrow**0.5)], dim=1)
    return joined, mp_silu(joined)


def mp_sum(a: Tensor, b: Tensor, t: float, *, clip: float | None = None) -> Tensor:
    """((1 - t) a + t b) / √((1 - t)² + t²), cut to [-clip, clip] [Karras et al. 2024, eq. 88]."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    total = ((1 - t) * a.to(dtype) + t * b.to(dtype)) / math.hypot(1 - t, t)
    return total if clip is None else total.clamp(-clip, clip)


def pixel_norm_silu(x: Tensor, *, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """(n, silu(n) / 0.596), n = x / (eps + r), r the root mean square of each pixel's channels."""
    normed = _of_size_one(x, 1, eps)
    return normed, mp_silu(normed)


def qkv_norm(qkv: Tensor, heads: int, *, eps: float = 1e-4, k_scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, L, heads, d), each vector divided by eps + its root mean square; k times k_scale."""
    q, k, v = _of_size_one(qkv.unflatten(2, (3, heads, -1)), -1, eps).unbind(2)
    return q, k * k_scale, v


def row_normalise(
    master: Tensor, *, gain: float = 1.0, out_dtype: torch.dtype | None = None, eps: float = 1e-4
) -> Tensor:
    """gain n(M) / √K, n(M) = M / (eps + ‖M‖ / √K) of each row of K elements [Karras et al. 2024, section 2.3]."""
    x = master.to(torch.promote_types(master.dtype, torch.float32))
    root = math.sqrt(x.shape[1:].numel())
    size = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True) / root
    weight = x / (eps + size) * (gain / root)
    return weight if out_dtype is None else weight.to(out_dtype)


def _of_size_one(x: Tensor, dim: int, eps: float) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / (eps + torch.linalg.vector_norm(x, dim=dim, keepdim=True) / x.shape[dim] ** 0.5)


@torch.no_grad()
def denoising_loss(
    pred: Tensor,
    y: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float = 0.5,
    x: Tensor | None = None,
    c_skip: Tensor | None = None,
    c_out: Tensor | None = None,
    stretch: float = 1.0,
    share: float = 1.0,
) -> DenoisingLoss:
    """L = w‖pred - y‖² and ∂L/∂pred = 2w(pred - y), w = (σ²+σ_d²)/(σσ_d)² = 1/σ_d² + 1/σ² [EDM table 1].

    At σ_d = inf w = 1/σ², the weight of VP and VE.

    With x, c_skip and c_out `pred` is F, the prediction c_skip x + c_out F [EDM eq. 7] and the gradient that by F.

    The target is c + stretch (y - c), c = c_skip x there and 0 else, and the loss has the factor `share`.
    """
    compute = torch.promote_types(y.dtype, torch.float32)
    dims = tuple(range(1, pred.ndim))
    prediction, level = pred.to(compute), sigma.to(compute)
    weight = sigma_data**-2 + 1 / (level * level)
    if share != 1:
        weight = share * weight
    slope = 2 * weight
    target = y.to(compute)
    if x is not None and c_skip is not None and c_out is not None:
        skipped, prediction = _column(c_skip, y, compute) * x.to(compute), _column(c_out, y, compute) * prediction
        if stretch == 1:
            prediction = skipped + prediction
        else:
            target = target - skipped
        slope = slope * c_out.to(compute)
    error = prediction - (target if stretch == 1 else stretch * target)
    loss = weight * error.square().sum(dims)
    fits = slope.abs() * error.abs().amax(dims) <= torch.finfo(pred.dtype).max
    valid = loss.isfinite() & fits & level.isfinite() & (level > 0)
    grad = torch.where(_per_sample(valid, pred), _per_sample(slope, pred) * error, 0).to(pred.dtype)
    return DenoisingLoss(torch.where(valid, loss, 0), grad, valid)
