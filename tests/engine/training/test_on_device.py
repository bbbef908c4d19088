"""Whole trainings on this process's device: the plain loop, the compiler, the memory plan, resuming, evaluation.

On a GPU at sizes that mean something there; on the CPU, where other tests look closer, the same tests with next to
nothing to compute, so that they are known to work when a GPU comes.
"""

from __future__ import annotations

import copy
import gc
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import equivalence
import launch
import pytest
import tiny_inception
import torch
from recorded_graphs import Recorder
from safetensors.torch import load_file

from ipfm.engine import DistillConfig, Distiller, PidConfig, TeacherConfig, TeacherTraining
from ipfm.engine.commands.bench import memory_step, plain_loop
from ipfm.engine.commands.bench.memory_step import StepCase
from ipfm.engine.commands.bench.plain_rule import EDM2
from ipfm.engine.config import RunConfig
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed import pieces
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.metrics import InceptionFeatures
from ipfm.engine.memory.live import bytes_in_use
from ipfm.kernels import reference
from ipfm.models import NetworkConfig, Precond, build_network, load_teacher, presets

ON = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
NETWORK = NetworkConfig(
    img_resolution=8, img_channels=3, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
    dropout=0.0, augment_dim=9, D=16.0,
)  # fmt: skip
BASE: dict[str, Any] = {
    "batch": 8, "micro_batch": 8, "lr": 1e-3, "eps": 1e-2, "ema_kimg": 0.05, "zero": 0, "precision": "fp32",
    "tf32": False, "activation_checkpointing": "off",
}  # fmt: skip
CONFIG = DistillConfig(**BASE, backward="joint", max_steps=2)


def teacher(network: NetworkConfig = NETWORK) -> Precond:
    """With weights that matter everywhere."""
    torch.manual_seed(0)
    net = build_network(network)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


def here(on: str) -> World:
    """One process on a kind of device."""
    return World(0, 1, torch.device(on, 0) if on == "cuda" else torch.device(on))


def weights(distiller: Distiller | TeacherTraining) -> dict[str, torch.Tensor]:
    """Of its networks, on the host."""
    return {
        f"{which}/{name}": p.detach().float().cpu().clone()
        for which, network in distiller.networks.items()
        for name, p in network.module.named_parameters()
    }


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a parameter."""
    assert one.keys() == other.keys()
    return max(float((p - other[name]).norm() / p.norm().clamp(min=1e-12)) for name, p in one.items())


# The CPU has all stages and two processes in tests/engine/objectives/test_equivalence.py.
@pytest.mark.distributed
@pytest.mark.parametrize("on", ON)
def test_the_engine_equals_the_plain_loop_at_each_stage(tmp_path: Path, on: str) -> None:
    steps, stages = (2, (0, 1, 2, 3)) if on == "cuda" else (1, (1,))
    folder = equivalence.make_teacher(tmp_path)
    base = {**equivalence.BASE, "max_steps": steps, "tf32": False, "precision": "fp32"}
    forms = [(stage, form) for stage in stages for form in (("joint", "phased") if on == "cuda" else ("joint",))]
    cases = [
        {
            "name": f"z{stage}-{form}",
            "config": {**base, "zero": stage, "backward": form, "micro_batch": base["batch"]},
            "steps": steps,
        }
        for stage, form in forms
    ]
    job = {"teacher": str(folder), "out": str(tmp_path), "cases": cases}
    launch.run_workers("distill_steps.py", 1, job, gpu=on == "cuda")
    plain = plain_loop.distill(load_teacher(folder), DistillConfig(**base), steps)
    # A GPU's sums have another order, of which Adam's denominators make more.
    limit = equivalence.LIMIT if on == "cpu" else 20 * equivalence.LIMIT
    for case in cases:
        found = {name: t.cpu() for name, t in load_file(tmp_path / f"{case['name']}-1.safetensors").items()}
        assert max(equivalence.difference(plain, found)) <= limit, case["name"]


@pytest.mark.parametrize(
    ("on", "memory_format"),
    [
        pytest.param("cpu", "channels_last", id="cpu"),
        pytest.param("cuda", "channels_last", id="cuda-channels_last", marks=pytest.mark.gpu),
        pytest.param("cuda", "contiguous", id="cuda-contiguous", marks=pytest.mark.gpu),
    ],
)
def test_compiled_networks_train_as_others_do(on: str, memory_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU by Inductor, with the Triton kernels as operators; on the CPU by a compiler that only looks."""
    if on == "cpu":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        monkeypatch.setattr("ipfm.engine.training.resolve.check_compiler", lambda device: None)
    network = replace(NETWORK, channel_mult=(1,), attn_resolutions=()) if on == "cpu" else NETWORK
    found, losses = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        config = replace(CONFIG, compile=compiled, memory_format=memory_format)
        distiller = Distiller(config, teacher(network), world=here(on))
        losses.append(
            [float(v) for step in range(1 if on == "cpu" else 2) for v in distiller.iteration(step).sums.values()]
        )
        found.append(weights(distiller))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert apart(*found) < 1e-4
    moved = {
        f"{which}/{name}": p for which in ("student", "generator") for name, p in teacher(network).named_parameters()
    }
    assert apart(moved, found[0]) > 10 * apart(*found)


@pytest.mark.parametrize("on", ON)
def test_networks_whose_weights_are_normalised_train_as_on_the_host(on: str) -> None:
    """EDM2's: on a GPU by the kernels of its blocks and of its rows."""
    torch.manual_seed(0)
    small = {"channel_mult": (1,), "attn_resolutions": ()} if on == "cpu" else {}
    net = build_network(replace(EDM2, **small)).eval().requires_grad_(False)
    found, losses = [], []
    for place in ("cpu", on):
        # (Twice the same on the CPU, which is what one can say of it there.)
        distiller = Distiller(CONFIG, copy.deepcopy(net), world=here(place))
        steps = range(1 if on == "cpu" else 2)
        losses.append([float(v) for step in steps for v in distiller.iteration(step).sums.values()])
        found.append(weights(distiller))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    begun = {f"{which}/{name}": p for which in ("student", "generator") for name, p in net.named_parameters()}
    limit = 0 if on == "cpu" else 1e-4
    assert apart(*found) <= limit < 1e-3 < apart(begun, found[0])


# Settings of a distillation, of a teacher's training, or of a distillation by another objective.
GRAPHS: dict[str, tuple[type[RunConfig], dict[str, Any]]] = {
    "teacher": (TeacherConfig, {"precision": "fp32", "dropout": 0.3, "augment": 0.5, "micro_batch": 4}),
    "teacher, bf16": (TeacherConfig, {"precision": "bf16", "dropout": 0.3}),
    "joint": (DistillConfig, {"backward": "joint", "student_updates": 2}),
    "phased": (DistillConfig, {"backward": "phased", "precision": "bf16", "steps": 2, "micro_batch": 4}),
    "checkpointed": (DistillConfig, {"activation_checkpointing": "on"}),
    "dropout": (DistillConfig, {"dropout": 0.3, "precision": "bf16"}),
    "last": (DistillConfig, {"steps": 3, "gradient": "last", "dropout": 0.1}),
    "fp16": (DistillConfig, {"precision": "fp16"}),
    "pid": (PidConfig, {"points": 20}),
    "compiled": (DistillConfig, {"compile": True}),
    "compiled, dropout": (TeacherConfig, {"compile": True, "dropout": 0.3}),
}


@pytest.mark.parametrize(
    ("on", "case"),
    [
        pytest.param("cpu", "teacher"),
        *(pytest.param("cuda", case, marks=pytest.mark.gpu) for case in GRAPHS),
    ],
)
def test_steps_in_cuda_graphs_are_the_steps(on: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU with a stand-in for the graphs, see tests/engine/objectives/test_captured_steps.py."""
    captured: list[str] = []

    class Counted(pieces.CudaGraphs if on == "cuda" else Recorder):  # type: ignore[misc]
        def capture(self, work: Any) -> Any:
            captured.append("")
            return super().capture(work)

    monkeypatch.setitem(pieces.CAPTURES, on, Counted)
    if on == "cpu":
        monkeypatch.setattr(reference, "on_host", lambda tensor: False)
    kind, settings = GRAPHS[case]
    network = NETWORK if on == "cuda" else replace(NETWORK, channel_mult=(1,), attn_resolutions=())
    steps = 16 if case == "last" else 5
    found, losses, moved = [], [], 0.0
    for graphs in ("off", "on"):
        torch._dynamo.reset()
        config: Any = kind(**{**BASE, **settings, "cuda_graphs": graphs, "max_steps": steps})
        run: Distiller | TeacherTraining
        if isinstance(config, TeacherConfig):
            images = torch.randint(256, (24, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
            torch.manual_seed(0)
            run = TeacherTraining(config, network, ImageDataset(images, name="few"), world=here(on))
        else:
            run = Distiller(config, teacher(network), world=here(on))
        before = weights(run)
        losses.append([float(v) for step in range(steps) for v in run.iteration(step).sums.values()])
        found.append(weights(run))
        moved = apart(before, found[-1])
    assert len(captured) >= 2 * len(run.networks)
    allowed = (1e-4, 1e-2)[config.precision != "fp32"]
    assert losses[1] == pytest.approx(losses[0], rel=10 * allowed, abs=10 * allowed)
    assert apart(*found) <= (0 if on == "cpu" else max(1e-4, allowed * moved)) < moved


@pytest.mark.parametrize("on", ON)
def test_a_step_takes_the_memory_that_the_plan_says(tmp_path: Path, on: str) -> None:
    """On a GPU the allocator's peak, with what convolutions take within themselves."""
    if on == "cuda":
        network, batch = replace(presets.get("cifar10-ncsnpp"), dropout=0.0), 32
    else:
        network, batch = replace(presets.get("digits"), model_channels=8), 32
    for kind in ("joint", "phased") if on == "cuda" else ("joint",):
        case = StepCase(kind, kind, network.to_json(), batch, False, 1, str(tmp_path / "timeline.png"))
        gc.collect()
        others = bytes_in_use(here(on).device)
        row = memory_step.measure(case, here(on))
        assert row.live_bytes - others == pytest.approx(row.predicted_bytes, rel=0.1), asdict(row)


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_training_that_goes_on_ends_as_one_that_never_stopped(
    tmp_path: Path, on: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit where algorithms are deterministic, which on a GPU has to be asked for, and nearly so elsewhere."""
    # Settings of a process are put back: other tests are not to be slower.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    network = NETWORK if on == "cpu" else replace(NETWORK, img_resolution=16, model_channels=64, attn_resolutions=(8,))
    more: dict[str, Any] = {"deterministic": deterministic, "heun_steps": 1, "checkpoint_every": 2, "log_every": 1}

    def trained(folder: str, steps: int) -> dict[str, torch.Tensor]:
        config = replace(CONFIG, max_steps=steps, **more)
        distiller = Distiller(config, teacher(network), world=here(on))
        distiller.run(tmp_path / folder)
        return weights(distiller)

    try:
        whole = trained("whole", 4)
        trained("parts", 2)
        parts = trained("parts", 4)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
    assert apart(whole, parts) == 0 if deterministic or on == "cpu" else apart(whole, parts) < 1e-4


@pytest.mark.parametrize("on", ON)
def test_a_torchscript_inception_computes_there_what_it_computes_on_the_host(tmp_path: Path, on: str) -> None:
    path = tiny_inception.write(tmp_path / "inception.pt")
    host, device = InceptionFeatures(path), InceptionFeatures(path, here(on).device)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for computed in (lambda f, x: f(x), lambda f, x: f.probabilities(x)):
        expected, got = computed(host, images), computed(device, images.to(here(on).device))
        assert got.device.type == on
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
