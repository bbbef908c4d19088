"""U-Nets as they compute on a GPU, by the kernels in Triton's interpreter: the same functions in fewer operations."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import naive_unet
import pytest
import torch
from kept import ARCHITECTURES, build
from on_a_gpu import put_together_as_on_a_gpu
from random_values import rand, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipfm.models import DhariwalUNet, EDMPrecond, SongUNet, blocks, build_network, presets
from ipfm.models.blocks import UNetBlock, enter_together
from ipfm.models.layers import Linear

SHAPE = {"img_resolution": 8, "in_channels": 2, "out_channels": 3, "model_channels": 8, "channel_mult": (1, 2)}
LABELS = {"label_dim": 3, "augment_dim": 4, "num_blocks": 0, "attn_resolutions": (4,)}
NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": (1, 3, 3, 1)}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipfm.models.layers.TRITON_DEVICES", {"cuda", "cpu"})


@pytest.fixture
def without_interpreter() -> Iterator[None]:
    """As on a GPU but for the kernels, in place of which the references compute."""
    with put_together_as_on_a_gpu():
        yield


VIEWS = {
    "view", "unsqueeze", "t", "transpose", "expand", "_unsafe_view", "permute", "select", "unbind", "detach", "slice",
    "split", "split_with_sizes", "alias", "as_strided", "squeeze", "chunk", "reshape", "empty_like", "empty_strided",
    "new_empty", "new_empty_strided", "empty", "narrow",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts what reaches the dispatcher, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def gradients(function: Callable[[], Tensor], of: dict[str, Tensor]) -> dict[str, Tensor]:
    """The value, and the gradient of each of the named tensors."""
    y = function()
    found = torch.autograd.grad(y, list(of.values()), rand(*y.shape, seed=9).to(y.dtype))
    return {"value": y.detach(), **dict(zip(of, found, strict=True))}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        error = float((got[name] - value).abs().max()) / max(float(value.abs().max()), 1e-3)
        assert error <= limit, (name, error)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", ["ncsn++", "adm"])
def test_value_and_every_gradient_are_those_of_the_network_written_out(kind: str) -> None:
    """In float64, against loops and sums that know nothing of the layers."""
    torch.manual_seed(0)
    if kind == "adm":
        net: nn.Module = DhariwalUNet(**SHAPE, **LABELS).double().eval()
    else:
        net = SongUNet(**SHAPE, **LABELS, **NCSNPP).double().eval()
    randomise(net)
    inputs = [rand(2, 2, 8, 8, seed=1), rand(2, seed=2), rand(2, 3, seed=3), rand(2, 4, seed=4)]
    of = {"x": inputs[0].requires_grad_(), **dict(net.named_parameters())}
    state = {name: of.get(name, tensor) for name, tensor in net.state_dict().items()}

    def written_out() -> Tensor:
        if kind == "adm":
            return naive_unet.dhariwal_unet(state, *inputs)
        return naive_unet.song_unet(state, naive_unet.Song(8, (1, 3, 3, 1), fourier=True), *inputs)

    assert_close(gradients(lambda: net(*inputs), of), gradients(written_out, of), 1e-11)


def denoised(net: EDMPrecond) -> Tensor:
    return net(rand(2, 2, 8, 8, seed=1), torch.tensor([0.5, 3.0]), torch.eye(3)[:2])


@pytest.mark.usefixtures("without_interpreter")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_embedding_goes_through_one_product(architecture: str) -> None:
    """One for all blocks, beside those of the mapping network; in 16 bits one cast of each kind."""
    net = build(**ARCHITECTURES[architecture])
    net.compute_dtype = torch.bfloat16
    net.to(torch.bfloat16)
    affines = sum(name.endswith("affine.weight") for name, _ in net.named_parameters())
    with Operators() as seen:
        denoised(net).sum().backward()
    assert affines >= 6
    # map_layer0, map_layer1, map_label, perhaps map_augment, the affine layers, attention's q, k, v.
    attentions = sum(bool(block.num_heads) for block in net.model.blocks)
    assert seen.counts["addmm"] + seen.counts["mm"] - 3 * attentions <= 3 * 5
    assert all(p.grad is not None for name, p in net.named_parameters() if "map_augment" not in name)


@pytest.mark.parametrize("architecture", ["ncsnpp", "adm"])
def test_on_a_cpu_every_block_projects_for_itself(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Linear] = []
    forward = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: (calls.append(self), forward(self, x))[1])
    net = build(**ARCHITECTURES[architecture])
    denoised(net)
    assert all(block.affine in calls for block in net.model.blocks)


@pytest.mark.usefixtures("without_interpreter")
def test_what_looks_at_a_layer_sees_it_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on one of the layers, or another layer in its place, and each block calls its own."""
    net = build()
    expected = denoised(net)
    block = next(net.model.blocks)
    seen: list[torch.Size] = []
    handle = block.affine.register_forward_hook(lambda layer, given, out: seen.append(out.shape))
    torch.testing.assert_close(denoised(net), expected, rtol=0, atol=1e-5)
    assert seen == [(2, 8)]
    handle.remove()
    denoised(net)
    assert len(seen) == 1
    # On the block itself, and on every module.
    calls: list[nn.Module] = []
    for register in (block.register_forward_hook, nn.modules.module.register_module_forward_hook):
        calls.clear()
        handle = register(lambda module, given, out: calls.append(module))
        denoised(net)
        handle.remove()
        assert block in calls

    class Adapted(nn.Module):
        """What programs for fine-tuning put in a layer's place."""

        def __init__(self, base: Linear) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias
            self.down = nn.Parameter(torch.ones(2, base.in_features))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + F.linear(x, self.down).sum(1, keepdim=True)

    block.affine = Adapted(block.affine)
    denoised(net).sum().backward()
    assert block.affine.down.grad is not None and float(block.affine.down.grad.abs().max()) > 0


@pytest.mark.usefixtures("without_interpreter")
@pytest.mark.parametrize("frozen", ["all", "some", "none"])
def test_frozen_and_trained_layers(frozen: str) -> None:
    """Gradients reach what is trained and nothing else, accumulate, and no two of them share memory."""
    net = build(encoder_type="residual")
    names = [name for name, _ in net.named_parameters()]
    for i, (name, p) in enumerate(net.named_parameters()):
        p.requires_grad_(frozen == "none" or (frozen == "some" and (i % 3 == 0) and "map_augment" not in name))
    plain = copy.deepcopy(net)
    x = rand(2, 2, 8, 8, seed=1).float().requires_grad_()
    for each, served in ((net, True), (plain, False)):
        with pytest.MonkeyPatch.context() as patch:
            if not served:
                for module in ("blocks", "layers"):
                    patch.setattr(f"ipfm.models.{module}.triton_serves", lambda x: False)
            for sigma in (0.5, 3.0):
                each(x, sigma, torch.eye(3)[:2]).square().sum().backward()
    assert [name for name, _ in net.named_parameters()] == names
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4 * float(q.grad.abs().max()), msg=name)
    spans = sorted(
        (p.grad.data_ptr(), p.grad.data_ptr() + p.grad.numel() * 4) for p in net.parameters() if p.grad is not None
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.usefixtures("without_interpreter")
@pytest.mark.parametrize("architecture", ["ncsnpp", "adm"])
def test_blocks_that_are_computed_again(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, up to the last one."""
    net = build(**ARCHITECTURES[architecture], dropout=0.2).train()
    found = []
    for again in (True, False):
        net.activation_checkpointing = again
        torch.manual_seed(3)
        of = {name: p for name, p in net.named_parameters() if "map_augment" not in name}
        found.append(gradients(lambda: denoised(net), of))
        layer_by_layer(monkeypatch)
    assert_close(found[0], found[1], 1e-6)


@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_compiled_it_is_one_graph(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build(model_type=model_type, img_resolution=4, channel_mult=(1,), num_blocks=0, augment_dim=0)
    of = dict(net.named_parameters())
    inputs = rand(1, 2, 4, 4, seed=1), torch.tensor([0.5]), torch.eye(3)[:1]
    expected = gradients(lambda: net(*inputs), of)
    monkeypatch.setattr("ipfm.models.layers.TRITON_DEVICES", {"cuda", "cpu"})
    net.model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    assert_close(gradients(lambda: net(*inputs), of), expected, 1e-4)


def a_block(widths: tuple[int, int] = (4, 8), **settings: Any) -> tuple[UNetBlock, Tensor, Tensor]:
    """A block in training with weights that leave nothing small, an input and an embedding."""
    torch.manual_seed(1)
    block = UNetBlock(*widths, 4, skip_scale=0.7, **settings).double().train()
    randomise(block)
    return block, rand(1, widths[0], 2, 2, seed=2).requires_grad_(), rand(1, 4, seed=3)


def of_the_block(block: UNetBlock, x: Tensor, emb: Tensor) -> dict[str, Tensor]:
    """Its value and all gradients, the dropout drawn alike."""
    torch.manual_seed(5)
    of = {"x": x, **{name: p for name, p in block.named_parameters() if p.requires_grad}}
    return gradients(lambda: block(x, emb, enter_together([block], emb, x)[0]), of)


def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_whole", "_whole_attention"):
        monkeypatch.setattr(UNetBlock, name, lambda self, x, entering: None)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("song", [True, False], ids=["ncsn++", "adm"])
@pytest.mark.parametrize("more", ["", "up", "down", "attention"])
def test_a_block_as_one_function_computes_what_its_layers_do(
    song: bool, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit where it is trained; frozen, the factor of the sum comes last and is rounded elsewhere."""
    settings = {more: True, "resample_filter": (1, 3, 3, 1), "num_heads": 2} if more else {}
    block, x, emb = a_block(adaptive_scale=not song, dropout=0.3, **settings)
    whole, seen = blocks.whole_block, []
    monkeypatch.setattr(blocks, "whole_block", lambda *given: (seen.append(given), whole(*given))[1])
    trained = of_the_block(block, x, emb)
    frozen = of_the_block(block.requires_grad_(False), x, emb)
    assert len(seen) == 2
    layer_by_layer(monkeypatch)
    for name, expected in of_the_block(block.requires_grad_(True), x, emb).items():
        assert torch.equal(trained[name], expected), name
    assert_close(frozen, of_the_block(block.requires_grad_(False), x, emb), 1e-14)


@pytest.mark.usefixtures("without_interpreter")
def test_a_gradient_with_gaps_enters_a_frozen_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a part of concatenated channels has it."""
    block, x, emb = a_block()
    block.requires_grad_(False)

    def run() -> Tensor:
        y = block(x, emb, enter_together([block], emb, x)[0])
        return torch.autograd.grad(torch.cat([y, x], 1), x, rand(1, 12, 2, 2, seed=4))[0]

    found = run()
    layer_by_layer(monkeypatch)
    torch.testing.assert_close(found, run())


@pytest.mark.usefixtures("without_interpreter")
@pytest.mark.parametrize(
    "what", ["nothing", "a hook", "a layer in place", "another dtype", "resampling", "a transform"]
)
def test_blocks_whose_layers_have_to_be_called(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, emb = a_block((8, 8), up=what == "resampling")
    if what == "a hook":
        block.norm1.register_forward_hook(lambda *_: None)
    elif what == "a layer in place":
        block.conv1 = nn.Conv2d(8, 8, 3, padding=1).double()  # type: ignore[assignment]
    elif what == "another dtype":
        block.float()
    calls: list[object] = []
    whole = blocks.whole_block
    monkeypatch.setattr(blocks, "whole_block", lambda *given: (calls.append(given), whole(*given))[1])
    if what == "a transform":
        torch.func.vmap(lambda x: block(x[None], emb, enter_together([block], emb, x[None])[0]))(x.detach())
    else:
        block(x, emb, enter_together([block], emb, x)[0])
    assert bool(calls) == (what == "nothing")


@pytest.mark.usefixtures("without_interpreter")
def test_a_second_derivative_of_a_block_is_an_error() -> None:
    block, x, emb = a_block()
    y = block(x, emb, enter_together([block], emb, x)[0])
    with pytest.raises(RuntimeError, match=r"^a residual block has no second derivative: create_graph=True"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


class Passes(Operators):
    """And how often a tensor as large as an activation is read or written, but by products of matrices."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.passes, self.biases = elements, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.biases += args[2] is not None
        elif name not in ("empty_like", "addmm", "mm", "_attention") and not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.passes += sum(t.numel() >= self.elements for t in tensors)
        return out


@pytest.mark.parametrize("song", [True, False], ids=["ncsn++", "adm"])
@pytest.mark.parametrize("widths", [(16, 16), (8, 16)], ids=["same-width", "with-a-skip-convolution"])
def test_passes_over_the_data_of_a_block(song: bool, widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside convolutions: two for each normalisation, three for the sum, none for biases and the embedding."""
    monkeypatch.setattr("ipfm.models.layers.TRITON_DEVICES", {"meta"})
    with torch.device("meta"):
        block = UNetBlock(*widths, 32, adaptive_scale=not song, skip_scale=math.sqrt(0.5) if song else 1.0).bfloat16()
        x, emb = torch.empty(4, widths[0], 8, 8, dtype=torch.bfloat16), torch.empty(4, 32, dtype=torch.bfloat16)
    with torch.no_grad(), Passes(4 * widths[0] * 64) as seen:
        block(x, emb)
    assert (seen.passes, seen.biases) == (7, 0)


def test_operators_of_a_published_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10's NCSN++ in bf16, forward and backward."""
    monkeypatch.setattr("ipfm.models.layers.TRITON_DEVICES", {"meta"})
    with torch.device("meta"):
        net = build_network(presets.get("cifar10-ncsnpp", D=2048.0)).bfloat16()
        x, sigma = torch.empty(2, 3, 32, 32), torch.empty(2)
    net.compute_dtype, net.channels_last = torch.bfloat16, True
    net.eval()
    with torch.no_grad():
        net(x, sigma)  # makes what later passes find
    with Operators() as forward:
        y = net(x, sigma)
    with Operators() as backward:
        y.sum().backward()
    kinds = {"forward": forward.counts, "backward": backward.counts}
    made = {name: sum(n for op, n in counts.items() if op not in VIEWS) for name, counts in kinds.items()}
    assert made["forward"] <= 366 and made["backward"] <= 393, made
