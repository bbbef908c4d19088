"""Checks that the operations share. Every failure is one ValueError line with what was given and what is possible.

Only Python numbers, shapes, dtypes and devices are checked: reading a value of a device tensor would synchronise.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Position(TypedDict):
    """Where in the random numbers; a tensor as the step is read when the numbers are drawn, by a replayed graph too."""

    seed: int
    stream: int
    step: int | Tensor


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(op: str, what: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {what} must be a tensor; got {type(value).__name__}")
    return value


def real(op: str, what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{op}: {what} must be a real number; got {value!r}")
    return float(value)


def finite(op: str, what: str, value: object) -> float:
    number = real(op, what, value)
    if not math.isfinite(number):
        raise ValueError(f"{op}: {what} must be finite; got {value!r}")
    return number


def positive(op: str, what: str, value: object, *, infinite: bool = False) -> float:
    number = real(op, what, value)
    if not number > 0 or (math.isinf(number) and not infinite):
        raise ValueError(f"{op}: {what} must be in (0, {'inf]' if infinite else 'inf)'}; got {value!r}")
    return number


def share(op: str, what: str, value: object) -> float:
    number = real(op, what, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{op}: {what} must be in [0, 1]; got {value!r}")
    return number


def integer(op: str, what: str, value: object, bits: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) < 1 << bits:
        raise ValueError(f"{op}: {what} must be an integer in [0, 2**{bits}); got {value!r}")
    return int(value)


def position(op: str, seed: object, stream: object, step: object, like: Tensor) -> Position:
    """Seed, stream and step of the random numbers, as keyword arguments; the step may be a tensor on like's device."""
    return {
        "seed": integer(op, "seed", seed, 64),
        "stream": integer(op, "stream", stream, 16),
        "step": _clock(op, step, like) if isinstance(step, Tensor) else integer(op, "step", step, 32),
    }


def _clock(op: str, step: Tensor, like: Tensor) -> Tensor:
    if step.shape or step.dtype != torch.int64:
        raise ValueError(
            f"{op}: step must be an integer or a 0-d int64 tensor; got {name(step.dtype)} {tuple(step.shape)}"
        )
    if step.device != like.device:
        raise ValueError(f"{op}: step must be on {like.device}; got {step.device}")
    return step


def float_dtype(op: str, what: str, dtype: object) -> None:
    if dtype not in FLOATS:
        given = name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise ValueError(f"{op}: {what} must be one of {', '.join(map(name, FLOATS))}; got {given}")


def samples(op: str, what: str, value: object) -> Tensor:
    """A batch of samples: (B, ...) floating point with at least one element a sample; B = 0 is fine."""
    batch = tensor(op, what, value)
    float_dtype(op, f"{what}'s dtype", batch.dtype)
    if batch.ndim < 2 or 0 in batch.shape[1:]:
        raise ValueError(f"{op}: {what} must be (B, C, H, W) or (B, N) with N > 0; got {tuple(batch.shape)}")
    return batch


def images(op: str, what: str, value: object) -> Tensor:
    """(B, C, H, W) floating point with at least one element an image; B = 0 is fine."""
    batch = samples(op, what, value)
    if batch.ndim != 4:
        raise ValueError(f"{op}: {what} must be (B, C, H, W); got {tuple(batch.shape)}")
    return batch


def seed(op: str, value: object, like: Tensor) -> Tensor:
    """A 0-d int64 tensor on like's device, made of an integer or given."""
    if not isinstance(value, Tensor):
        return torch.full((), integer(op, "seed", value, 63), dtype=torch.int64, device=like.device)
    if value.shape or value.dtype != torch.int64:
        raise ValueError(
            f"{op}: seed must be an integer or a 0-d int64 tensor; got {name(value.dtype)} {tuple(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(f"{op}: seed must be on {like.device}; got {value.device}")
    return value


def same(
    op: str,
    what: str,
    value: object,
    other: str,
    like: Tensor,
    attributes: Sequence[str] = ("shape", "dtype", "device"),
) -> Tensor:
    """A tensor with `like`'s shape, dtype and device, or with some of them."""
    given = tensor(op, what, value)
    for attribute in attributes:
        got, wanted = getattr(given, attribute), getattr(like, attribute)
        if got != wanted:
            show = tuple if attribute == "shape" else str
            raise ValueError(f"{op}: {what} must have {other}'s {attribute} {show(wanted)}; got {show(got)}")
    return given


def per_sample(op: str, what: str, value: object, like: Tensor) -> Tensor:
    """A contiguous float32 or float64 (B,) vector on `like`'s device."""
    vector = tensor(op, what, value)
    if vector.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: {what} must be float32 or float64; got {name(vector.dtype)}")
    return _vector(op, what, vector, like)


def preconditioning(
    op: str, x: object, c_skip: object, c_out: object, y: Tensor
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """x like y and c_skip and c_out (B,), or none of them."""
    given = {"x": x, "c_skip": c_skip, "c_out": c_out}
    there = [what for what, value in given.items() if value is not None]
    if not there:
        return None, None, None
    if len(there) < 3:
        raise ValueError(f"{op}: x, c_skip and c_out go together; got {' and '.join(there)} alone")
    return same(op, "x", x, "y", y), per_sample(op, "c_skip", c_skip, y), per_sample(op, "c_out", c_out, y)


def real_weights(op: str, value: object) -> tuple[float, float]:
    """(a, b) of the term on real data: a in (0, 1], b in (0, 1e6], and (1, 1) where a is 1."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{op}: real_weights must be two numbers, a and b; got {value!r}")
    a, b = positive(op, "a of real_weights", value[0]), positive(op, "b of real_weights", value[1])
    if a > 1 or b > 1e6 or (a == 1 and b != 1):
        raise ValueError(
            f"{op}: real_weights must have a in (0, 1] and b in (0, 1e6], and b = 1 where a = 1; got {a:g} and {b:g}"
        )
    return a, b


def narrower(op: str, what: str, value: Tensor, other: str, like: Tensor) -> None:
    """`like`'s dtype holds every number of `value`'s."""
    if torch.promote_types(value.dtype, like.dtype) != like.dtype:
        raise ValueError(
            f"{op}: {what}'s dtype must be {other}'s or one that it holds; "
            f"got {name(value.dtype)} beside {name(like.dtype)}"
        )


def index(op: str, value: object, like: Tensor | None = None) -> Tensor:
    """A contiguous int64 (B,) vector of sample indices, on `like`'s device and of its length where there is one."""
    vector = tensor(op, "sample_index", value)
    if vector.dtype != torch.int64:
        raise ValueError(f"{op}: sample_index must be int64; got {name(vector.dtype)}")
    if like is None and vector.ndim != 1:
        raise ValueError(f"{op}: sample_index must be (B,); got {tuple(vector.shape)}")
    return vector.contiguous() if like is None else _vector(op, "sample_index", vector, like)


def _vector(op: str, what: str, vector: Tensor, like: Tensor) -> Tensor:
    if vector.shape != like.shape[:1]:
        raise ValueError(f"{op}: {what} must be (B,) = ({len(like)},); got {tuple(vector.shape)}")
    if vector.device != like.device:
        raise ValueError(f"{op}: {what} must be on {like.device}; got {vector.device}")
    return vector.contiguous()
