"""Attention with a choice of implementation; the optional ones are imported only when they are used."""

import functools
import importlib.util
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

AttentionBackend = Literal["auto", "xformers", "sdpa", "math"]
ATTENTION_BACKENDS: tuple[AttentionBackend, ...] = get_args(AttentionBackend)


def check_attention_backend(backend: str) -> None:
    """Check that `backend` is one of the names that `attention` knows.

    Raises:
        ValueError: it is none of them.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; possible: {', '.join(ATTENTION_BACKENDS)}")


def head_count(channels: int, num_heads: int | None = None, *, channels_per_head: int = 64) -> int:
    """Attention heads over `channels`: `num_heads`, or where that is None channels // channels_per_head (it may be 0).

    Raises:
        ValueError: they do not divide the channels.
    """
    heads = channels // channels_per_head if num_heads is None else num_heads
    if heads and channels % heads:
        raise ValueError(f"{heads} attention heads do not divide {channels} channels")
    return heads


def attention(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend = "auto") -> Tensor:
    """softmax over keys of q·kᵀ/√d, times v.

    The logits and the softmax are at least float32, forward and backward.

    Args:
        q: (B, L, heads, d), of any floating dtype.
        k: (B, M, heads, d), of q's dtype.
        v: (B, M, heads, d), of q's dtype.
        backend: "xformers" is its memory-efficient attention (CUDA; float16, bfloat16, float32), "sdpa" torch's
            `scaled_dot_product_attention`, "math" the formula written out, which holds B·heads·L·M logits. "auto" is
            torch's: it has the same kernels as xformers, and forms of them that repeat their results.

    Returns:
        (B, L, heads, d) in q's dtype.

    Raises:
        ValueError: an unknown backend, or one that cannot run, with the reason.
    """
    check_attention_backend(backend)
    if backend == "xformers":
        # Under torch.compile it has been asked before.
        obstacle = None if torch.compiler.is_compiling() else xformers_obstacle(q.device, q.dtype, q.shape[-1])
        if obstacle is not None:
            raise ValueError(f"attention backend 'xformers' cannot run: {obstacle}; possible: auto, sdpa, math")
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    if backend != "math":
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return _written_out(q, k, v)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("blhd,bmhd->bhlm", q.to(wide), (k / math.sqrt(q.shape[-1])).to(wide))
    return torch.einsum("bhlm,bmhd->blhd", logits.softmax(dim=-1).to(q.dtype), v)


def xformers_obstacle(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why xformers cannot serve such tensors, or None; asked once, by a tiny forward and backward pass.

    It is imported only where what it says of its build fits this torch, and says nothing itself.

    Args:
        device: of the tensors.
        dtype: theirs.
        head_width: theirs in the last dimension.
    """
    if torch.are_deterministic_algorithms_enabled():
        return "its gradients do not repeat, and they have to here"
    if device.type != "cuda":
        return f"it needs CUDA tensors, got {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it has no kernel for {dtype}"
    return xformers_misfit() or _tried(device, dtype, head_width)


@functools.cache
def xformers_misfit() -> str:
    """What in xformers' build does not fit this torch, as its files say; "" where nothing does. It is not imported."""
    found = importlib.util.find_spec("xformers")
    if found is None or found.origin is None:
        return "it is not installed"
    try:
        built = json.loads((Path(found.origin).parent / "cpp_lib.json").read_text(encoding="utf-8"))["version"]
        cuda, hip = built["cuda"], built["hip"]
        theirs = None if cuda is None else f"{int(cuda) // 100}.{int(cuda) % 100}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # another way of saying it: trying tells
    ours = torch.version.cuda
    if ours is None or hip is not None or (theirs is not None and theirs.split(".")[0] == ours.split(".")[0]):
        return ""
    return (
        f"it was built {f'for CUDA {theirs}' if theirs else 'without CUDA'}, and torch {torch.__version__} for {ours}"
    )


@functools.cache
def _tried(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    try:
        with _silent("xformers"):
            from xformers.ops import memory_efficient_attention
    except Exception as error:  # a build that does not fit this torch or CUDA fails in many ways, not only ImportError
        return f"import failed ({type(error).__name__}: {_first_line(error)})"
    try:
        with torch.enable_grad():
            q, k, v = (torch.zeros(1, 8, 1, head_width, device=device, dtype=dtype).requires_grad_() for _ in range(3))
            torch.autograd.grad(memory_efficient_attention(q, k, v).sum(), (q, k, v))
    except (NotImplementedError, ValueError, RuntimeError) as error:
        return f"no operator for {dtype} and head width {head_width} ({_first_line(error)})"
    return None


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep the warnings of a library's logger to itself: what it lacks is said in a line of our own, if at all."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
