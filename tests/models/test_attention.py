"""Attention backends and the residual block, against the formulas written out in float64."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_values import randomise
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ipfm.models import EDMPrecond
from ipfm.models import attention as attentions
from ipfm.models.attention import attention
from ipfm.models.blocks import QKVProjection, UNetBlock
from ipfm.models.initialisation import Init


def loops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    for n in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                logits = torch.stack([q[n, i, h] @ k[n, j, h] for j in range(k.shape[1])]) / math.sqrt(q.shape[3])
                out[n, i, h] = logits.softmax(0) @ v[n, :, h]
    return out


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 6, 3, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_attention_value_and_gradient(backend):
    inputs = [t.requires_grad_() for t in qkv()]
    g = torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = loops(*[t.detach() for t in inputs])
    got = attention(*inputs, backend=backend)
    assert got.shape == expected.shape
    torch.testing.assert_close(got.detach(), expected, rtol=0, atol=1e-12)
    copies = [t.detach().clone().requires_grad_() for t in inputs]
    reference = torch.autograd.grad(
        torch.stack(
            [
                (torch.softmax(copies[0][:, :, h] @ copies[1][:, :, h].mT / math.sqrt(5), -1) @ copies[2][:, :, h])
                for h in range(3)
            ],
            dim=2,
        ),
        copies,
        g,
    )
    for a, b in zip(torch.autograd.grad(got, inputs, g), reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_softmax_is_float32_in_half_precision(backend, dtype):
    """A quarter of the error that logits and softmax in that dtype would make; √d = 4, so scaling k is exact."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 64, 2, 16, generator=generator) * scale for scale in (4, 4, 1))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("blhd,bmhd->bhlm", q, k / 4).softmax(-1)
        return torch.einsum("bhlm,bmhd->blhd", weights, v).double()

    truth = written_out(q.double(), k.double(), v.double())
    got = attention(q, k, v, backend=backend)
    assert got.dtype == dtype
    assert (got.double() - truth).abs().mean() < (written_out(q, k, v) - truth).abs().mean() / 4


def test_impossible_backends():
    with pytest.raises(ValueError, match="'flash' is unknown; possible: auto, xformers, sdpa, math"):
        attention(*qkv(), backend="flash")
    with pytest.raises(ValueError, match="'xformers' cannot run: it needs CUDA tensors, got cpu"):
        attention(*qkv(), backend="xformers")


def test_backend_of_a_built_network():
    net = EDMPrecond(img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 1), num_blocks=1)
    assert net.attention_backend == "auto"
    net.attention_backend = "math"
    assert {block.attention_backend for block in net.model.blocks} == {"math"}
    with pytest.raises(ValueError, match="is unknown"):
        net.attention_backend = "fast"
    net.attention_backend = "xformers"
    with pytest.raises(ValueError, match="needs CUDA"):
        net(torch.zeros(1, 1, 8, 8), 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [32, 64, 256])
def test_backends_agree_on_cuda(dtype, width):
    q, k, v = (torch.randn(2, 64, 2, width, device="cuda", dtype=dtype) for _ in range(3))
    truth = attention(q.double(), k.double(), v.double(), backend="math")
    for backend in ("auto", "sdpa"):
        error = (attention(q, k, v, backend=backend).double() - truth).abs().max()
        assert error < (5e-3 if dtype == torch.float32 else 3e-2)


def test_qkv_layout():
    """Output channel (head·width + c)·3 + j of the checkpoint is channel c of that head's q, k or v."""
    heads, width = 2, 3
    projection = QKVProjection(heads * width, num_heads=heads, init=Init(bias=1.0)).double()
    x = torch.randn(2, heads * width, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = torch.nn.functional.conv2d(x, projection.weight, projection.bias).flatten(2)
    parts = projection(x)
    for j, part in enumerate(parts):
        assert part.shape == (2, 8, heads, width)
        for head in range(heads):
            for c in range(width):
                torch.testing.assert_close(part[:, :, head, c], flat[:, (head * width + c) * 3 + j], rtol=0, atol=1e-12)


def naive_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    groups = min(32, x.shape[1] // 4)
    parts = x.reshape(x.shape[0], groups, -1)
    parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, unbiased=False, keepdim=True) + eps).sqrt()
    return parts.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def naive_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    pad = weight.shape[-1] // 2
    windows = torch.nn.functional.pad(x, (pad,) * 4).unfold(2, weight.shape[2], 1).unfold(3, weight.shape[3], 1)
    return torch.einsum("nchwab,ocab->nohw", windows, weight) + bias[:, None, None]


def naive_block(block: UNetBlock, x: Tensor, emb: Tensor, *, eps: float, resample: str | None) -> Tensor:
    p = {name: value.detach() for name, value in block.state_dict().items()}

    def silu(z: Tensor) -> Tensor:
        return z / (1 + torch.exp(-z))

    def norm(z: Tensor, name: str) -> Tensor:
        return naive_norm(z, p[f"{name}.weight"], p[f"{name}.bias"], eps)

    def conv(z: Tensor, name: str) -> Tensor:
        return naive_conv(z, p[f"{name}.weight"], p[f"{name}.bias"])

    def resampled(z: Tensor) -> Tensor:
        if resample == "up":
            return z.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if resample == "down":
            return (z[:, :, ::2, ::2] + z[:, :, 1::2, ::2] + z[:, :, ::2, 1::2] + z[:, :, 1::2, 1::2]) / 4
        return z

    h = conv(resampled(silu(norm(x, "norm0"))), "conv0")
    params = (torch.einsum("ne,oe->no", emb, p["affine.weight"]) + p["affine.bias"])[:, :, None, None]
    if block.adaptive_scale:
        scale, shift = params[:, : h.shape[1]], params[:, h.shape[1] :]
        h = silu(shift + norm(h, "norm1") * (scale + 1))
    else:
        h = silu(norm(h + params, "norm1"))
    shortcut = resampled(x)
    if "skip.weight" in p:
        shortcut = conv(shortcut, "skip")
    x = (conv(h, "conv1") + shortcut) * block.skip_scale
    if block.num_heads:
        n, c, height, width = x.shape
        y = conv(norm(x, "norm2"), "qkv").reshape(n * block.num_heads, c // block.num_heads, 3, height * width)
        q, k, v = y[:, :, 0], y[:, :, 1], y[:, :, 2]
        w = torch.softmax(torch.einsum("ncq,nck->nqk", q, k / math.sqrt(q.shape[1])), dim=2)
        a = torch.einsum("nqk,nck->ncq", w, v).reshape(n, c, height, width)
        x = (conv(a, "proj") + x) * block.skip_scale
    return x


@pytest.mark.pairs
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((8, 12), {"attention": True, "num_heads": 3, "adaptive_scale": True}),
        ((8, 8), {"attention": True, "channels_per_head": 4, "adaptive_scale": True, "eps": 1e-2}),
        ((8, 8), {"attention": True, "num_heads": 1, "adaptive_scale": False, "skip_scale": math.sqrt(0.5)}),
        ((12, 8), {"adaptive_scale": False, "resample_proj": True, "eps": 1e-6}),
        ((8, 8), {"adaptive_scale": True, "resample_proj": True, "skip_scale": 0.5}),
    ],
    ids=["heads", "per-head", "one-head", "narrowing", "proj"],
)
def test_block_against_the_formulas(channels, options, resample, memory_format):
    block = UNetBlock(*channels, 6, up=resample == "up", down=resample == "down", **options).double().eval()
    randomise(block)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels[0], 4, 4, generator=generator, dtype=torch.float64)
    emb = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    expected = naive_block(block, x, emb, eps=options.get("eps", 1e-5), resample=resample)
    with torch.no_grad():
        got = block(x.to(memory_format=memory_format), emb)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_which_parts_a_block_has():
    def parts(*args: int, **options) -> list[str]:
        return [name for name, _ in UNetBlock(*args, 6, **options).named_children()]

    plain = ["norm0", "conv0", "affine", "norm1", "conv1"]
    assert parts(8, 8) == plain
    assert parts(8, 12) == [*plain, "skip"]
    assert parts(8, 8, attention=True, num_heads=2) == [*plain, "norm2", "qkv", "proj"]
    # 64 channels a head by default: a narrower block has no attention at all.
    assert parts(32, 32, attention=True) == plain
    assert UNetBlock(128, 192, 6, attention=True).num_heads == 3
    pure = UNetBlock(8, 8, 6, down=True)
    assert list(pure.skip.state_dict()) == ["resample_filter"]
    assert "weight" in UNetBlock(8, 8, 6, down=True, resample_proj=True).skip.state_dict()
    with pytest.raises(ValueError, match="3 attention heads do not divide 8 channels"):
        UNetBlock(8, 8, 6, attention=True, num_heads=3)


def test_dropout_acts_only_in_training_and_before_conv1():
    torch.manual_seed(0)
    block = UNetBlock(8, 8, 6, dropout=0.5)
    randomise(block)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    seen: list[Tensor] = []
    block.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    block.train()
    assert not torch.equal(block(x, emb), block(x, emb))
    block.eval()
    assert torch.equal(block(x, emb), block(x, emb))
    dropped, kept = seen[0], seen[2]
    zero = dropped == 0
    # 6 standard deviations of 256 draws: a false alarm of 2e-9.
    assert abs(zero.float().mean() - 0.5) < 6 * 0.5 / math.sqrt(zero.numel())
    torch.testing.assert_close(dropped[~zero], 2 * kept[~zero])


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_checkpointing_gives_the_same_gradients(backend):
    block = UNetBlock(8, 12, 6, attention=True, num_heads=3, dropout=0.3).double().train()
    block.attention_backend = backend
    randomise(block)
    emb = torch.randn(2, 6, dtype=torch.float64)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    wanted = [x, *block.parameters()]

    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        y = checkpoint(block, x, emb, use_reentrant=False) if recompute else block(x, emb)
        return torch.autograd.grad(y.square().sum(), wanted)

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_importing_the_models_imports_no_optional_package():
    code = (
        "import sys, ipfm.models\n"
        "print([m for m in ('deepspeed', 'xformers', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An xformers that was built for a version of CUDA as its files write it, and a torch for another; it may run."""
    package = tmp_path / "xformers"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "ops" / "__init__.py").write_text(
        "import logging\nlogging.getLogger('xformers').warning('six lines')\n"
        "def memory_efficient_attention(q, k, v):\n    raise NotImplementedError('No operator found\\nmore')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)

    def build(xformers: object, torchs: str | None) -> None:
        (package / "cpp_lib.json").write_text(json.dumps({"version": {"cuda": xformers, "hip": None}}))
        monkeypatch.setattr(torch.version, "cuda", torchs)
        attentions.xformers_misfit.cache_clear()
        attentions._tried.cache_clear()

    yield build
    attentions.xformers_misfit.cache_clear()
    attentions._tried.cache_clear()
    for name in [n for n in sys.modules if n.partition(".")[0] == "xformers"]:
        del sys.modules[name]


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("xformers", "torchs", "misfit"),
    [
        (1208, "13.0", f"it was built for CUDA 12.8, and torch {torch.__version__} for 13.0"),
        (None, "13.0", f"it was built without CUDA, and torch {torch.__version__} for 13.0"),
        (1208, "12.6", ""),
        (1300, "13.1", ""),
        (1208, None, ""),
        ("another way of saying it", "13.0", ""),
    ],
)
def test_what_xformers_was_built_for(built, xformers, torchs, misfit):
    """Its files say so, and it is not imported: that costs a second and six lines of warning."""
    built(xformers, torchs)
    assert attentions.xformers_misfit() == misfit
    if misfit:
        assert attentions.xformers_obstacle(GPU, torch.bfloat16, 64) == misfit
    assert attentions.xformers_obstacle(torch.device("cpu"), torch.float32, 64) == "it needs CUDA tensors, got cpu"
    assert "no kernel" in attentions.xformers_obstacle(GPU, torch.float64, 64)
    assert "xformers" not in sys.modules


def test_xformers_that_has_no_operator_here(built, monkeypatch, caplog, capfd):
    """It is tried once for each kind of tensors, and what its own module says of it is not repeated."""
    built(1300, "13.0")
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **more: zeros(*size, **more))
    for _ in range(2):
        reason = attentions.xformers_obstacle(GPU, torch.bfloat16, 64)
        assert reason == "no operator for torch.bfloat16 and head width 64 (No operator found)"
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_attention_is_torchs_own_unless_asked_otherwise(built, monkeypatch):
    """Also on a GPU that xformers would fit."""
    built(1300, "13.0")
    q, k, v = (torch.randn(1, 4, 1, 8) for _ in range(3))
    monkeypatch.setattr(attentions, "xformers_obstacle", lambda *_: None)
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="sdpa"))
    assert "xformers" not in sys.modules
    with pytest.raises(NotImplementedError, match="No operator found"):
        attention(q, k, v, backend="xformers")
