"""What importing ipfm.kernels does and does not do, and the choice of the backend."""

import math
import os
import subprocess
import sys

import pytest
import torch

import ipfm.kernels as kernels
from ipfm.kernels import _dispatch

HEAVY = ("deepspeed", "xformers", "matplotlib", "sklearn", "scipy")


CODE = f"""
import sys, ipfm.kernels, ipfm.kernels.bench
print([m for m in {HEAVY} if m in sys.modules], __import__('torch').cuda.is_initialized())
import torch
from ipfm.kernels import denoising_loss; from ipfm.kernels import ipfm_loss; from ipfm.kernels import perturb
y = torch.ones(2, 4)
for op, arguments in (
    (perturb, dict(y=y, sigma=y[:, 0], D=1.0, seed=0, stream=0, step=0, sample_index=torch.arange(2))),
    (ipfm_loss, dict(t=y, s=y, y=y, alpha=1)),
    (denoising_loss, dict(pred=y, y=y, sigma=y[:, 0])),
):
    try:
        op(**arguments, backend="triton")
    except ValueError as error:
        print(error)
    print(len(op(**arguments)))
"""


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess:
    """A fresh process, without the interpreter flag of this one."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=300)


def test_import_is_light(done):
    assert done.stdout.split("\n")[0] == "[] False", done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on this machine's CUDA device")
def test_triton_on_the_cpu_needs_the_interpreter(done):
    lines = done.stdout.splitlines()[1:]
    assert len(lines) == 6, done.stderr
    for op, refused in zip(("perturb", "ipfm_loss", "denoising_loss"), lines[::2], strict=True):
        assert refused.startswith(f"{op}: backend 'triton' needs CUDA tensors, got cpu")
        assert "TRITON_INTERPRET=1" in refused
    assert lines[1::2] == ["2", "6", "3"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the choice on a machine without CUDA")
def test_auto_takes_the_reference_on_the_cpu():
    assert _dispatch.INTERPRETED
    assert not _dispatch.use_triton("op", "auto", torch.device("cpu"))
    assert _dispatch.use_triton("op", "triton", torch.device("cpu"))


def test_auto_takes_triton_on_cuda():
    assert _dispatch.use_triton("op", "auto", torch.device("cuda"))
    assert not _dispatch.use_triton("op", "reference", torch.device("cuda"))


def test_exported_names_have_a_reference_of_the_same_name():
    for name in ("perturb", "ipfm_loss", "denoising_loss"):
        assert callable(getattr(kernels, name))
        assert callable(getattr(kernels.reference, name))
    for name in ("random_words", "uniform", "normal", "gamma"):
        assert callable(getattr(kernels.philox, name))
        assert callable(getattr(kernels.reference, name))


@pytest.mark.parametrize("value", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_integer_arguments_keep_their_bits(value):
    signed = _dispatch.signed32(value)
    assert -(2**31) <= signed < 2**31
    assert signed & 0xFFFFFFFF == value


def test_launch_sizes_cover_every_element():
    for elements in (1, 3, 35, 64, 192, 3072, 4096, 4097, 12288, 196608):
        block, warps = _dispatch.row_config(elements)
        assert block & (block - 1) == 0
        assert 1 <= warps <= 8
        for samples in (1, 128, 2731, 1 << 20):
            block, tiles, warps = _dispatch.noise_config(samples, elements)
            programs = math.ceil(math.ceil(elements / block) / tiles)
            assert block * tiles * programs >= elements
            assert block * tiles * (programs - 1) < elements
            assert warps == 1
