"""The reference's random numbers in a host's memory: few words, and all gamma variables, by NumPy.

Its operations take a third of the time that PyTorch needs to begin one, and reading their results costs nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ipfm.kernels._checks import Position

Words = NDArray[np.uint64]
Uniforms = NDArray[np.float32]
Doubles = NDArray[np.float64]

MOST = 2**16  # Philox blocks up to which NumPy's one thread wins
GAMMA_BLOCK = 1 << 31  # first Philox block of the gamma trials
TRIALS = 2  # trials of a gamma variable at a time

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_WORD, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def on_host(tensor: Tensor) -> bool:
    """Whether this is a plain tensor in the host's memory, outside of a compiler's tracing."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def blocks_of(first: int, count: int, *, trials: int = 0) -> Words:
    """The numbers of `count` Philox blocks, and after them those of a gamma variable's first trials."""
    block = np.arange(first, first + count + trials, dtype=np.uint64)
    block[count:] += np.uint64((GAMMA_BLOCK - first - count) % 2**64)
    return block


def words_of(sample_index: Tensor, block: Words, position: Position) -> Words:
    """(4, B, n): the words of these n blocks of every sample; counters and key as in `reference`."""
    index, step = sample_index.numpy().view(np.uint64)[:, None], position["step"]
    x, y, p = np.empty((3, 2, len(index), len(block)), np.uint64)
    # Words 0 and 2 in x, 1 and 3 in y.
    x[0] = block
    x[1] = step.numpy().view(np.uint64) & _WORD if isinstance(step, Tensor) else step
    y[0] = index & _WORD
    y[1] = ((index >> np.uint64(16)) & np.uint64(0xFFFF0000)) | np.uint64(position["stream"])
    x, y, p = (a.reshape(2, -1) for a in (x, y, p))
    for key in _keys(position["seed"]):
        np.multiply(x, _MULTIPLIERS, out=p)
        # What is above bit 31 of y goes with the mask.
        np.right_shift(p[::-1], _HALF, out=x)
        x ^= y
        x ^= key
        x &= _WORD
        y, p = p[::-1], y
    words = np.stack((x[0], y[0], x[1], y[1]))
    words[1::2] &= _WORD
    return words.reshape(4, len(index), len(block))


@lru_cache(maxsize=64)
def _keys(seed: int) -> Words:
    """(10, 2, 1): the rounds' keys."""
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64)
    keys: Words = ((key + np.arange(10, dtype=np.uint64)[:, None] * _KEY_STEPS) & _WORD)[..., None]
    return keys


def uniform_of(words: Words) -> Uniforms:
    """u = w·2⁻³² + 2⁻³³ in (0, 1]."""
    u = words.astype(np.float32)
    u *= np.float32(2.0**-32)
    u += np.float32(2.0**-33)
    return u


def gamma_parts_of(
    sample_index: Tensor, shape: float, position: Position, u: Uniforms | None = None
) -> tuple[Doubles, Doubles | None]:
    """`reference.gamma_parts`, with as many trials as it takes; `u` (4, B, TRIALS) are the first ones' uniforms."""
    if u is None:
        u = uniform_of(words_of(sample_index, blocks_of(0, 0, trials=TRIALS), position))
    d = (shape + 1 if shape < 1 else shape) - 1 / 3
    value = d * (1 + _accepted(sample_index, d, position, u, 0)) ** 3
    return value, np.log(u[3, :, 0].astype(np.float64)) / shape if shape < 1 else None


def _accepted(sample_index: Tensor, d: float, position: Position, u: Uniforms, trial: int) -> Doubles:
    """(B,) c·x of each sample's first accepted trial among those from `trial` on, of which `u` are the first."""
    exact = u[:3].astype(np.float64)
    log = np.log(exact[0::2])
    x = np.sqrt(-2 * log[0]) * np.cos(exact[1] * (2 * math.pi))
    t, square = x * (1 / math.sqrt(9 * d)), x * x
    with np.errstate(invalid="ignore", divide="ignore"):
        bound = d * (3 * (np.log1p(t) - t) + t * t * (1.5 - t))
    accept = (t > -1) & ((exact[2] < 1 - 0.0331 * (square * square)) | (log[1] < bound))
    chosen: Doubles = t[np.arange(len(t)), accept.argmax(1)]
    rejected = ~accept.any(1)
    if rejected.any():
        left, trial = sample_index[torch.from_numpy(rejected)], trial + TRIALS
        block = blocks_of(GAMMA_BLOCK + trial, TRIALS)
        chosen[rejected] = _accepted(left, d, position, uniform_of(words_of(left, block, position)), trial)
    return chosen
