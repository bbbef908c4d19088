"""Memory format and compilation of the networks: the same numbers, laid out or executed otherwise."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.codecache import get_lock_dir
from torch.utils._filelock import FileLock

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.config import TeacherConfig
from ipfm.engine.distributed import compilation
from ipfm.engine.distributed.compilation import check_compiler, set_execution
from ipfm.engine.distributed.world import World, _compiling_later, import_deepspeed
from ipfm.engine.runtime.errors import described
from ipfm.engine.training.checkpoint_writer import save_checkpoint
from ipfm.engine.training.resolve import complete
from ipfm.models import NetworkConfig, Precond, build_network, save_model
from ipfm.models.blocks import UNetBlock
from ipfm.models.layers import Conv2d

CPU = torch.device("cpu")
SMALL = {"img_resolution": 8, "img_channels": 2, "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
NETWORKS = {
    "ncsn++": NetworkConfig(
        **SMALL, attn_resolutions=(4,), embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
        resample_filter=(1, 3, 3, 1), label_dim=3, augment_dim=9, dropout=0.0,
    ),
    "adm": NetworkConfig(**SMALL, model_type="DhariwalUNet", attn_resolutions=(4,), label_dim=3, dropout=0.0),
}  # fmt: skip


def network(name: str) -> Precond:
    torch.manual_seed(0)
    net = build_network(NETWORKS[name])
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def computed(net: Precond, *, frozen: bool) -> list[torch.Tensor]:
    """The denoised images, and the gradients of the input and of what is not frozen."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 8, 8, generator=generator).requires_grad_()
    labels = torch.eye(3)
    net.requires_grad_(not frozen)
    y = net(x, torch.tensor([0.1, 1.0, 20.0]), labels)
    wanted = [x] if frozen else [x, *net.parameters()]
    gradient = torch.randn(y.shape, generator=generator)
    grads = torch.autograd.grad(y, wanted, gradient, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", NETWORKS)
def test_channels_last(name: str, frozen: bool) -> None:
    """The activations of every block have their channels side by side; the values stay but for rounding."""
    net = network(name)
    expected = computed(net, frozen=frozen)
    assert not net.channels_last
    set_execution(net, memory_format="channels_last", compiled=False, device=CPU)
    seen = []
    for module in net.modules():
        if isinstance(module, UNetBlock):
            module.register_forward_hook(lambda _, inputs, out: seen.extend([inputs[0], out]))
    got = computed(net, frozen=frozen)
    assert len(seen) == 2 * len(list(net.model.blocks))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))


def test_what_auto_is() -> None:
    net = network("adm")
    for memory_format, device, last in (
        ("auto", CPU, False), ("auto", torch.device("cuda"), True), ("contiguous", torch.device("cuda"), False),
        ("channels_last", CPU, True),
    ):  # fmt: skip
        set_execution(net, memory_format=memory_format, compiled=False, device=device)
        assert net.channels_last is last


def laid_out(net: nn.Module) -> list[bool]:
    """Of the weights of convolutions with a neighbourhood: whether they have the channels of a tap side by side."""
    weights = [m.weight for m in net.modules() if isinstance(m, Conv2d) and m.weight is not None and m.kernel > 1]
    return [w.is_contiguous(memory_format=torch.channels_last) for w in weights]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_lie_in_memory_as_the_activations_of_a_gpu_do(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, frozen and averaged ones, the optimiser's state too: a step, a checkpoint and an export are the same."""
    config = DistillConfig(
        batch=2, max_steps=2, zero=0, precision=precision, clip_grad=0.5, memory_format="channels_last"
    )
    found = []
    for devices in ({"cuda"}, {"cuda", "cpu"}):
        teacher = network("ncsn++")
        with monkeypatch.context() as patch:
            # A GPU's order of the weights, and none of its kernels.
            patch.setattr("ipfm.models.layers.TRITON_DEVICES", devices)
            patch.setattr("ipfm.models.layers.triton_serves", lambda x: False)
            patch.setattr("ipfm.models.blocks.triton_serves", lambda x: False)
            distiller = Distiller(config, teacher.eval().requires_grad_(False), world=World(0, 1, CPU))
            for step in range(2):
                distiller.iteration(step)
            distiller.refresh()
        trained = distiller.networks["generator"]
        nets = (trained.module, distiller.teacher, distiller.average)
        assert all(all(laid_out(net)) == ("cpu" in devices) for net in nets)
        states = [t for state in trained.optimizer.state.values() for t in state.values() if t.ndim == 4]
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in states) == ("cpu" in devices)
        save_model(distiller.average, tmp_path / "model")
        checkpoint = save_checkpoint(tmp_path / "checkpoints", 2, distiller.networks, distiller.world)
        found.append(
            {**load_file(tmp_path / "model" / "model.safetensors"), **load_file(checkpoint / "generator.safetensors")}
        )
    assert list(found[0]) == list(found[1])
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-2, atol=1e-3 if precision == "bf16" else 1e-5)


def test_a_compiled_network_is_one_graph_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, frozen and without gradients, each traced once as a whole; the weights keep their names."""
    net = network("ncsn++")
    names = list(net.state_dict())
    expected = [computed(net, frozen=frozen) for frozen in (False, True)]
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.backends.registry.lookup_backend("aot_eager")(graph, inputs)

    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: original(self, backend=backend, fullgraph=True, **options)
    )
    set_execution(net, memory_format="auto", compiled=True, device=CPU)
    for _ in range(2):
        for frozen, values in zip((False, True), expected, strict=True):
            for a, b in zip(computed(net, frozen=frozen), values, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2
    assert list(net.state_dict()) == names
    assert list(copy.deepcopy(net).state_dict()) == names


def test_what_cannot_be_compiled() -> None:
    for kind in (DistillConfig, TeacherConfig):
        with pytest.raises(ValueError, match=r"^compile does not go with zero 3, .* use 0, 1 or 2$"):
            kind(compile=True, zero=3)
    with pytest.raises(ValueError, match=r"^compile does not go with teacher-storage sharded: use fp32 or half$"):
        DistillConfig(compile=True, teacher_storage="sharded")
    # Not by monkeypatch, whose undoing would hide the setting from later tests.
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(ValueError, match=r"^compile needs a C\+\+ compiler on a CPU, .* none: install g\+\+"):
            check_compiler(CPU)
        with pytest.raises(ValueError, match="compile needs a"):
            complete(DistillConfig(compile=True), NETWORKS["adm"], CPU)


def test_a_cache_of_compiled_networks_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    message = f"compile cannot keep what it compiles ({tmp_path}/file/cache: Not a directory): name a folder that can "
    with pytest.raises(ValueError) as refused:
        check_compiler(CPU)
    assert str(refused.value) == f"{message}be written by TORCHINDUCTOR_CACHE_DIR"


def test_what_the_compiler_adds_for_its_authors_is_left_out() -> None:
    error = RuntimeError("OSError: No space left\n\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please)")
    assert described(error) == "RuntimeError: OSError: No space left"


def test_libraries_that_a_killed_process_has_left_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty, cut off or zeros: torch would load them at every later start. One that is being compiled stays."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    whole = Path(torch._C.__file__).read_bytes()
    contents = {"empty": b"", "short": whole[:5000], "zeros": bytes(9000), "whole": whole, "busy": b"", "text": b"#!"}
    (tmp_path / "ab").mkdir()
    for name, content in contents.items():
        (tmp_path / "ab" / f"{name}.main.so").write_bytes(content)
    (tmp_path / "ab" / "empty.main.cpp").write_text("")
    mend = compilation.mend_cache.__wrapped__
    with FileLock(Path(get_lock_dir()) / "busy.lock"):
        mend()
    assert capsys.readouterr().err == f"removed 4 broken libraries of torch.compile from {tmp_path}\n"
    assert sorted(file.name for file in (tmp_path / "ab").iterdir()) == [
        "busy.main.so",
        "empty.main.cpp",
        "whole.main.so",
    ]
    mend()
    assert capsys.readouterr().err == f"removed 1 broken library of torch.compile from {tmp_path}\n"
    mend()
    assert not capsys.readouterr().err


def test_compiling_looks_at_the_cache_first(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(compilation, "mend_cache", lambda: looked.append(True))
    set_execution(network("adm"), memory_format="auto", compiled=False, device=CPU)
    assert not looked
    set_execution(network("adm"), memory_format="auto", compiled=True, device=CPU)
    assert looked


def test_an_optimiser_that_nobody_asked_for_is_compiled_at_its_first_call() -> None:
    """DeepSpeed's engines import Muon, whose functions ask for the compiler, in which a second goes."""
    import_deepspeed()
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    assert muon_optimizer.MuonWithAuxAdam.__module__ == muon_optimizer.__name__
    for function in (original_muon.muon_update, original_muon.zeropower_via_newtonschulz5):
        assert callable(function) and not hasattr(function, "_torchdynamo_orig_callable")
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append(graph)
        return graph.forward

    compile_now = torch.compile
    with _compiling_later():

        @torch.compile(backend=backend)
        def twice(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    assert torch.compile is compile_now and not seen
    assert float(twice(torch.tensor(3.0))) == float(twice(torch.tensor(3.0))) == 6 and len(seen) == 1
