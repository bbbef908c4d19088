"""Steps that are captured and replayed: the same losses and weights as by themselves, bit for bit.

There is no GPU here: tests/helpers/recorded_graphs.py stands in for its graphs.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import parts
from recorded_graphs import Recorder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ipfm.engine import DistillConfig, Distiller, PidConfig, TeacherConfig, TeacherTraining
from ipfm.engine.commands.bench.equivalence import real_images
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed import pieces
from ipfm.engine.distributed.pieces import CapturedPieces, Number
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.cmt import CmtConfig
from ipfm.engine.objectives.dmd import DmdConfig
from ipfm.engine.objectives.phases import listening
from ipfm.engine.training import resolve
from ipfm.engine.training.checkpoint import find_checkpoint, load_checkpoint
from ipfm.engine.training.checkpoint_writer import save_checkpoint
from ipfm.kernels import reference
from ipfm.models import NetworkConfig, Precond, build_network

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
NETWORK = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(8,),
    dropout=0.0, label_dim=3, augment_dim=9, D=16.0,
)  # fmt: skip
BASE: dict[str, Any] = {
    "batch": 4, "max_steps": 9, "lr": 1e-3, "eps": 1e-3, "ema_kimg": 0.02, "ema": (0.1,), "ema_rampup": 0.5, "seed": 5,
    "zero": 0, "micro_batch": 4, "backward": "joint", "activation_checkpointing": "off",
}  # fmt: skip
CASES: dict[str, tuple[type[Distillation], dict[str, Any]]] = {
    "joint": (DistillConfig, {"precision": "fp32", "activation_checkpointing": "on", "student_updates": 2}),
    "accumulated": (
        DistillConfig,
        {"precision": "bf16", "micro_batch": 2, "steps": 2, "augment": 0.5, "clip_grad": 0.5, "backward": "phased"},
    ),
    "last": (DistillConfig, {"precision": "fp32", "steps": 3, "gradient": "last", "generator_beta1": 0.9}),
    "fp16": (DistillConfig, {"precision": "fp16", "steps": 2}),
    "dropout": (DistillConfig, {"precision": "bf16", "dropout": 0.3, "micro_batch": 2}),
    "last, dropout": (DistillConfig, {"precision": "fp32", "dropout": 0.3, "steps": 2, "gradient": "last"}),
    "pid": (PidConfig, {"precision": "bf16", "points": 20, "micro_batch": 2, "backward": "phased"}),
    "varied": (
        DmdConfig,
        {
            "precision": "fp16",
            "weight": "score",
            "weight_power": 0.5,
            "levels_generator": "log-t:0:0.5:2",
            "levels_student": "half",
            "student_ema": 0.9,
            "student_updates": 2,
        },
    ),
    # Of three steps together, and those of the next three.
    "cmt": (CmtConfig, {"precision": "fp16", "points": 4, "micro_batch": 2}),
    "lora": (DistillConfig, {"precision": "fp16", "student": "lora", "generator": "lora", "rank": 2, "micro_batch": 2}),
    # The real half goes on with the dropout that the other has begun.
    "real": (DistillConfig, {"precision": "fp32", "dropout": 0.3, "micro_batch": 2, "real_weights": (0.92, 0.94)}),
    # The term comes in the second step.
    "told": (
        DistillConfig,
        {
            "precision": "bf16",
            "micro_batch": 2,
            "discriminator": "encoder",
            "augment": 0.5,
            "discriminator_weights": (1.0, 0.02),
            "discriminator_kimg": (0.0, 0.004),
        },
    ),
    # Its difference is weighed by the ratio that the discriminator sees.
    "dmd, told": (
        DmdConfig,
        {
            "precision": "fp32",
            "student_updates": 2,
            "discriminator": "encoder",
            "discriminator_weights": (1.0, 0.02),
            "discriminator_kimg": (0.0, 0.004),
            "f_weight": "kl",
        },
    ),
}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: graphs can be had, noise is drawn by operators, and fp16 computes."""
    monkeypatch.setitem(pieces.CAPTURES, "cpu", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(reference, "on_host", lambda tensor: False)
    monkeypatch.setattr(resolve, "fp16_supported", lambda device: True)


@pytest.fixture(scope="module")
def teacher() -> Precond:
    torch.manual_seed(0)
    net = build_network(NETWORK)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


def made(case: str, teacher: Precond, **more: Any) -> Distiller:
    kind, settings = CASES[case]
    config = kind(**{**BASE, **settings, **more})
    return Distiller(config, teacher, real=real_images() if config.takes_real_images else None, world=ALONE)


def goes_on(run: Distiller, steps: range) -> list[Mapping[str, Tensor]]:
    """Iterations, of which the learning rate changes too; what each measured, read at the end as the loop does."""
    measured = []
    for step in steps:
        run.steps.config = replace(run.config, lr=run.config.lr / (1 + step))
        found = run.iteration(step)
        measured.append({**found.sums, **{f"{name}_bad": value for name, value in found.bad.items()}})
    return measured


def state(run: Distiller | TeacherTraining) -> dict[str, Tensor]:
    found = {
        f"{name}/{kind}/{parameter}": tensor.clone()
        for name, network in run.networks.items()
        for kind in network.state_kinds
        for parameter, tensor in network.full(kind)
    }
    rates = {f"{n}/{r}": torch.tensor(v) for n, net in run.networks.items() for r, v in net.rates.items()}
    return found | rates | {f"{n}/steps": torch.tensor(net.steps_applied) for n, net in run.networks.items()}


# "varied" and "cmt" are in fp16 too; "last" and "dropout" each by itself stay.
@pytest.mark.parametrize("case", parts(CASES, ["fp16", "last, dropout", "dropout", "varied"]))
def test_replayed_steps_are_the_steps(case: str, teacher: Precond, tmp_path: Path) -> None:
    """With other noise, labels, learning rate and decay in each, saved and resumed between replays."""
    eager, captured = made(case, teacher, cuda_graphs="off"), made(case, teacher, cuda_graphs="on")
    assert len(Recorder.made) == 1 and (eager.captures, captured.captures) == (False, True)
    measured = [goes_on(run, range(4)) for run in (eager, captured)]
    save_checkpoint(tmp_path, 4, captured.networks, ALONE)
    measured = [a + goes_on(run, range(4, 6)) for a, run in zip(measured, (eager, captured), strict=True)]
    torch.testing.assert_close(measured[1], measured[0], rtol=0, atol=0)
    assert len({float(m["generator_loss"]) for m in measured[0]}) == 6
    expected = state(eager)
    torch.testing.assert_close(state(captured), expected, rtol=0, atol=0)
    (recorder,) = Recorder.made
    assert recorder.replayed > 0 and recorder.captured >= len(captured.networks)

    # Back to the checkpoint, with the graphs that there are.
    found = find_checkpoint(tmp_path)
    assert found is not None
    before = recorder.captured
    load_checkpoint(found, captured.networks)
    captured.refresh()
    torch.testing.assert_close(goes_on(captured, range(4, 6)), measured[0][4:], rtol=0, atol=0)
    torch.testing.assert_close(state(captured), expected, rtol=0, atol=0)
    assert recorder.captured == before or "last" in case


def test_a_step_with_nan_is_left_out_by_the_device(teacher: Precond) -> None:
    """Counted as by itself, and the next one is as if nothing had been."""
    runs = [made("joint", teacher, cuda_graphs=graphs) for graphs in ("off", "on")]
    for run in runs:
        goes_on(run, range(4))
        weight = next(run.teacher.parameters())
        kept = weight.clone()
        weight.fill_(float("nan"))
        bad = goes_on(run, range(4, 5))
        assert bad[0]["generator_bad"] >= 4 and bad[0]["student_bad"] == 0
        weight.copy_(kept)
    measured = [goes_on(run, range(5, 7)) for run in runs]
    torch.testing.assert_close(measured[1], measured[0], rtol=0, atol=0)
    torch.testing.assert_close(state(runs[1]), state(runs[0]), rtol=0, atol=0)
    # Samples that do not count are left out: the step has none, and moves nothing.
    assert runs[1].generator.steps_applied == 7


class Counted(TorchDispatchMode):
    """Counts the operators that the host begins."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_host_begins_a_handful_of_operators(teacher: Precond) -> None:
    counts = []
    for graphs in ("off", "on"):
        run = made("joint", teacher, cuda_graphs=graphs, ema=None)
        goes_on(run, range(4))
        with Counted() as mode:
            run.iteration(4)
        counts.append(mode.count)
    assert counts[0] > 1000 and counts[1] < 20, counts
    (recorder,) = Recorder.made
    # A step and an update each, of the student twice in an iteration.
    assert recorder.replayed == 2 * (10 - 2) + 2 * (5 - 2)


def test_gradients_stay_where_they_are_and_share_their_place(teacher: Precond) -> None:
    run = made("joint", teacher, cuda_graphs="on")
    places = {}
    for step in range(4):
        goes_on(run, range(step, step + 1))
        for name, network in run.networks.items():
            addresses = [p.grad.data_ptr() for p in network.module.parameters()]
            assert places.setdefault(name, addresses) == addresses
            assert not any(p.grad.any() for p in network.module.parameters())
    assert places["student"] == places["generator"]


# -- what is frozen, and what cannot be captured -----------------------------------------------------------------------


def pieces_on_a_cpu(**more: Any) -> tuple[CapturedPieces, list[str]]:
    said: list[str] = []
    return CapturedPieces(Recorder(CPU), CPU, **{"required": True, "tell": said.append, **more}), said


def test_a_number_that_is_not_given_as_one_is_frozen() -> None:
    """So that the comparison above would see it."""
    total, free = torch.zeros(()), [1.0]
    run, _ = pieces_on_a_cpu()

    def work(numbers: Mapping[str, Number]) -> None:
        total.add_(free[0]).add_(numbers["given"])

    for step in range(6):
        free[0] = float(step)
        run.run(("work",), work, given=float(10 * step))
    # Steps 0 and 1 warm up; from 2 on the captured 2.0 stays.
    assert total == 0 + 1 + 2 * 4 + 10 * 15


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (lambda x: x.add_(float(x)), "the host reads a tensor"),
        (lambda x: x.add_(1) if x > 0 else x, "the host reads a tensor"),
        (lambda x: x.add_(torch.tensor(3.0)), "the host makes a tensor"),
        (lambda x: x.copy_(torch.nn.functional.dropout(x.view(1), 0.5)[0]), "the host makes a tensor"),
        (lambda x: x.add_(x.view(1)[x.view(1) > 0].sum()), "a size that depends on values"),
    ],
    ids=["item", "if", "fresh tensor", "dropout", "mask"],
)
def test_what_cannot_be_captured(work: Any, why: str) -> None:
    """Required: an error, and nothing was carried out; else a line, and everything runs as it is from then on."""
    for required in (True, False):
        x = torch.ones(())
        run, said = pieces_on_a_cpu(required=required, warm_ups=0)

        def piece(numbers: Mapping[str, Number], x: Tensor = x) -> None:
            x.mul_(2)
            work(x)

        if required:
            with pytest.raises(
                RuntimeError, match=f"^the step cannot be captured in a CUDA graph .*{why}.*: give --cuda"
            ):
                run.run(("the step",), piece)
            assert x == 1 and not said
        else:
            expected = torch.ones(())
            # Not at the seed itself, which is what a piece with dropout begins with.
            torch.manual_seed(0)
            torch.rand(())
            piece({}, expected)
            torch.manual_seed(0)
            torch.rand(())
            run.run(("the step",), piece)
            assert x == expected and len(said) == 1
            assert said[0].endswith("the training goes on without graphs") and why in said[0]
            run.run(("another",), lambda numbers: None)
            assert len(said) == 1


SEVERAL = "the host seeds dropout several times within a step"
REFUSED = [
    ({"dropout": 0.1, "steps": 2}, SEVERAL),
    ({"dropout": 0.1, "backward": "phased"}, SEVERAL),
    ({"dropout": 0.1, "rules": 1}, SEVERAL),
    ({"dropout": 0.1, "activation_checkpointing": "on"}, "what is computed again takes its dropout from the host"),
    ({"zero": 1}, "DeepSpeed's ZeRO 1 decides on the host"),
    ({"teacher_storage": "sharded"}, "a sharded teacher is gathered by the host"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED)
def test_where_graphs_do_not_go(settings: dict[str, Any], reason: str, teacher: Precond) -> None:
    config = DistillConfig(**{**BASE, "precision": "fp32", **settings, "cuda_graphs": "on"})
    message = f"cuda-graphs on is not possible here, as {reason}: give auto or off"
    with pytest.raises(ValueError) as refused:
        resolve.complete(config, NETWORK, CPU)
    assert str(refused.value) == message
    form = {"phased": config.backward == "phased", "checkpointed": config.activation_checkpointing == "on"}
    assert replace(config, cuda_graphs="auto").without_graphs(NETWORK, ranks=1, stage=config.zero, **form) == reason


def test_where_graphs_do_not_go_besides(teacher: Precond, capsys: pytest.CaptureFixture[str]) -> None:
    config = DistillConfig(**{**BASE, "precision": "fp32", "micro_batch": 2})
    assert config.without_graphs(NETWORK, ranks=2, stage=0) == "the 2 processes talk within a step"
    with pytest.raises(ValueError, match=r"^cuda-graphs on is not possible here, as the 2 processes talk"):
        resolve.resolve(replace(config, cuda_graphs="on"), NETWORK, World(0, 2, CPU))
    assert replace(config, cuda_graphs="off").without_graphs(NETWORK, ranks=1, stage=0) == "off was given"
    # A distillation drops no labels, whatever its teacher was trained with.
    assert config.without_graphs(replace(NETWORK, label_dropout=0.1), ranks=1, stage=0) == ""
    both = PidConfig(**{**BASE, "precision": "fp32", "dropout": 0.1})
    assert both.without_graphs(NETWORK, ranks=1, stage=0) == SEVERAL

    class Weighted(DistillConfig):
        def generator_weight(self, sigma: Tensor, weight: Tensor) -> Tensor:
            return weight

    own = Weighted(**{**BASE, "precision": "fp32"})
    assert own.without_graphs(NETWORK, ranks=1, stage=0) == "the objective's own functions may decide on the host"
    capsys.readouterr()
    run = Distiller(own, teacher, world=ALONE)
    assert capsys.readouterr().err == "ipfm: no CUDA graphs: the objective's own functions may decide on the host\n"
    run.iteration(0)
    made("joint", teacher)
    made("joint", teacher, cuda_graphs="off")
    assert capsys.readouterr().err == ""


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, teacher: Precond) -> None:
    monkeypatch.delitem(pieces.CAPTURES, "cpu")
    config = DistillConfig(**{**BASE, "precision": "fp32"})
    assert resolve.complete(config, NETWORK, CPU).cuda_graphs == "off"
    with pytest.raises(ValueError, match=r"^cuda-graphs on needs a GPU, and this is a cpu: give auto or off$"):
        resolve.complete(replace(config, cuda_graphs="on"), NETWORK, CPU)
    run = made("joint", teacher)
    assert all(p.grad is None for p in run.generator.module.parameters()) and not Recorder.made
    with pytest.raises(ValueError, match=r"^cuda-graphs must be auto, on or off, got 'yes'$"):
        replace(config, cuda_graphs="yes")


def test_profiled_steps_are_not_captured_yet(teacher: Precond) -> None:
    """Their phases are heard; a replayed graph says its optimiser alone."""
    gc.collect()
    run = made("joint", teacher, profile_memory=3)
    goes_on(run, range(3))
    (recorder,) = Recorder.made
    assert (recorder.captured, recorder.warmed) == (0, 3 * 6)
    heard: list[str] = []
    with listening(heard.append):
        goes_on(run, range(3, 5))
    assert (recorder.captured, recorder.replayed) == (4, 2 * 6)
    assert heard[-3:] == ["student: optimiser", "student: optimiser", "generator: optimiser"]


# -- a teacher's training ----------------------------------------------------------------------------------------------

TEACHERS: dict[str, dict[str, Any]] = {
    "dropout": {"precision": "bf16", "dropout": 0.3, "augment": 0.5, "micro_batch": 2, "lr_rampup_kimg": 0.05},
    "labels": {"precision": "fp32", "activation_checkpointing": "on", "clip_grad": 0.5},
    "fp16": {"precision": "fp16", "dropout": 0.1},
}


def training(case: str, **more: Any) -> TeacherTraining:
    """In each step other images; of "labels" a network that drops them too, and checkpoints without dropout."""
    settings = {name: value for name, value in BASE.items() if name != "backward"}
    network = replace(NETWORK, label_dropout=0.0 if case == "labels" else 0.5)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = ImageDataset(images, torch.arange(12) % 3, name="few")
    config = TeacherConfig(**{**settings, "D": 16.0, **TEACHERS[case], **more})
    return TeacherTraining(config, network, data, world=ALONE)


def trained(run: TeacherTraining, steps: range) -> list[Mapping[str, Tensor]]:
    return [{**(found := run.iteration(step)).sums, **found.bad} for step in steps]


@pytest.mark.parametrize("case", parts(TEACHERS, ["fp16"]))
def test_replayed_steps_of_a_teacher_are_its_steps(case: str, tmp_path: Path) -> None:
    """Of other images, labels, augmentations and dropout in each; resumed too."""
    runs = [training(case, cuda_graphs=graphs) for graphs in ("off", "on")]
    assert [run.captures for run in runs] == [False, True]
    measured = [trained(run, range(4)) for run in runs]
    save_checkpoint(tmp_path, 4, runs[1].networks, ALONE)
    measured = [a + trained(run, range(4, 6)) for a, run in zip(measured, runs, strict=True)]
    torch.testing.assert_close(measured[1], measured[0], rtol=0, atol=0)
    torch.testing.assert_close(state(runs[1]), state(runs[0]), rtol=0, atol=0)
    assert len({float(m["teacher_loss"]) for m in measured[0]}) == 6
    (recorder,) = Recorder.made
    assert (recorder.captured, recorder.replayed > 4) == (2, True)

    found = find_checkpoint(tmp_path)
    assert found is not None
    load_checkpoint(found, runs[1].networks)
    runs[1].refresh()
    torch.testing.assert_close(trained(runs[1], range(4, 6)), measured[0][4:], rtol=0, atol=0)
    torch.testing.assert_close(state(runs[1]), state(runs[0]), rtol=0, atol=0)


def test_where_graphs_do_not_go_for_a_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    for more, reason in (
        ({"activation_checkpointing": "on"}, "what is computed again takes its dropout from the host"),
        ({"zero": 1}, "DeepSpeed's ZeRO 1 decides on the host"),
    ):
        with pytest.raises(ValueError, match=f"^cuda-graphs on is not possible here, as {reason}: give auto or off$"):
            training("dropout", cuda_graphs="on", **more)
    capsys.readouterr()
    training("dropout", activation_checkpointing="on").iteration(0)
    assert capsys.readouterr().err == "ipfm: no CUDA graphs: what is computed again takes its dropout from the host\n"


def test_compiled_networks_are_captured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both are asked for both are had: networks are compiled in the steps before one is captured."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(resolve, "check_compiler", lambda device: None)
    torch._dynamo.reset()
    eager, both = (training("dropout", **more) for more in ({"cuda_graphs": "off"}, {"compile": True}))
    (recorder,) = Recorder.made
    measured = [trained(eager, range(3)), trained(both, range(1))]
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    assert frames >= 1 and recorder.captured == 0
    measured[1] += trained(both, range(1, 3))
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames and recorder.captured == 2
    torch.testing.assert_close(measured[1], measured[0], rtol=0, atol=0)
    torch.testing.assert_close(state(both), state(eager), rtol=0, atol=0)


# -- random numbers ----------------------------------------------------------------------------------------------------


def test_dropout_follows_the_seed_that_a_piece_begins_with() -> None:
    x, drawn = torch.ones(64), []

    def work(numbers: Mapping[str, Number]) -> Tensor:
        return torch.native_dropout(x, 0.5, True)[0]

    run, _ = pieces_on_a_cpu()
    for seed in (1, 2, 3, 4, 3, 5):
        found = run.run(("work",), work, seed)
        assert found is not None
        torch.manual_seed(seed)
        torch.testing.assert_close(found, work({}), rtol=0, atol=0)
        drawn.append(found)
    assert torch.equal(drawn[2], drawn[4]) and not torch.equal(drawn[3], drawn[5])


def test_a_seed_within_a_piece_cannot_be_captured() -> None:
    def work(numbers: Mapping[str, Number]) -> Tensor:
        torch.manual_seed(3)
        return torch.native_dropout(torch.ones(4), 0.5, True)[0]

    run, said = pieces_on_a_cpu(required=False, warm_ups=0)
    run.run(("work",), work, 1)
    assert "the host seeds random numbers within it" in said[0]
