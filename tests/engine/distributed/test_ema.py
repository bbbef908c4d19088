"""The averaged network: there while it is looked at, gone in between."""

from __future__ import annotations

import weakref

import pytest
import torch

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.distributed.ema import EmaNetwork
from ipfm.engine.distributed.world import World
from ipfm.models import NetworkConfig, build_network

CONFIG = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
    embedding_type="fourier", dropout=0.3, D=16.0,
)  # fmt: skip


class Trained:
    """Keeps an average that grows by one with each gathering, and one that falls."""

    averages = ("ema500k", "ema0.1")

    def __init__(self) -> None:
        self.gathered = 0

    def copy_ema_to(self, net: torch.nn.Module, which: str | None = None) -> None:
        self.gathered += 1
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(-self.gathered if which == "ema0.1" else self.gathered)


@pytest.mark.quick
def test_it_exists_from_a_refresh_to_the_release() -> None:
    torch.manual_seed(0)
    buffers = dict(build_network(CONFIG).named_buffers())
    averaged = EmaNetwork(Trained(), CONFIG, buffers, "bf16", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="call refresh"):
        _ = averaged.net
    averaged.refresh()
    net = averaged.net
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net.compute_dtype == torch.bfloat16 and net.D == 16.0
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all((p == 1).all() for p in net.parameters())
    # The frequencies of a Fourier embedding are random, and not trained.
    assert buffers and all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    assert bool(net(torch.randn(2, 1, 8, 8), torch.ones(2)).isfinite().all())

    averaged.refresh()
    assert averaged.net is net and all((p == 2).all() for p in net.parameters()) and averaged.shown == "ema500k"
    averaged.refresh("ema0.1")
    assert averaged.net is net and all((p == -3).all() for p in net.parameters()) and averaged.shown == "ema0.1"
    gone = weakref.ref(net)
    averaged.release()
    assert gone() is net  # whoever holds it keeps it
    del net
    assert gone() is None
    with pytest.raises(RuntimeError, match="call refresh"):
        _ = averaged.net


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Graphs that torch.compile made of networks; they run as they are."""
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: original(self, backend=backend, **more))
    return graphs


def test_the_average_is_sampled_as_the_networks_are_trained(traced: list[object]) -> None:
    """In the run's memory format, and compiled, once for all the networks that are made of it."""
    teacher = build_network(CONFIG).eval().requires_grad_(False)
    form = {"batch": 2, "max_steps": 1, "precision": "fp32", "backward": "joint", "micro_batch": 2, "zero": 0}
    run = Distiller(
        DistillConfig(**form, activation_checkpointing="off", memory_format="channels_last", compile=True),
        teacher,
        world=World(0, 1, torch.device("cpu")),
    )
    plain = Distiller(
        DistillConfig(**form, activation_checkpointing="off"), teacher, world=World(0, 1, torch.device("cpu"))
    )
    seen = []
    for _ in range(2):
        run.refresh()
        plain.refresh()
        assert run.average.channels_last and not plain.average.channels_last
        torch.testing.assert_close(run.sample(0, 2, seed=0), plain.sample(0, 2, seed=0), rtol=1e-4, atol=1e-5)
        seen.append(len(traced))
        run.averaged.release()
    assert seen == [1, 1]
