"""Training in 16 bits on one process without DeepSpeed: the same weights as ZeRO 1 gives, and nothing read."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equivalence
import pytest
import torch

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench.no_reading import NoReading
from ipfm.engine.config import RunConfig
from ipfm.engine.distributed import single_process
from ipfm.engine.distributed.single_process import LossScale, MasterEngine, rounded, wide_gradients
from ipfm.engine.distributed.world import World
from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.engine.memory.live import LiveBytes
from ipfm.engine.memory.state import Sharding
from ipfm.engine.training import resolve
from ipfm.models import load_teacher

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
BASE = {**equivalence.BASE, "max_steps": 4, "backward": "joint"}
# What may differ by rounding: a norm is summed in another order than over a flat partition.
CLIPPED = {"clip_grad": 0.05}
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16-accumulated": {"precision": "bf16", "micro_batch": 4, "steps": 2, "backward": "phased"},
    "bf16-clipped": {"precision": "bf16", **CLIPPED},
    "fp16": {"precision": "fp16", "generator_beta1": 0.9, "batch": 2},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return equivalence.make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def found(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, torch.Tensor]]:
    """Weights after some steps at stages 0 and 1, and of runs that go from one to the other; one process."""
    out = tmp_path_factory.mktemp("out")
    cases: dict[str, dict[str, Any]] = {}
    for name, settings in SETTINGS.items():
        for stage in (0, 1):
            cases[f"{name}-z{stage}"] = {"steps": 2, "config": {**BASE, **settings, "zero": stage}, "start": stage == 0}
    config = {**BASE, **SETTINGS["fp16"]}
    for stage, other in ((0, 1), (1, 0)):
        folder = str(out / f"from-{stage}")
        cases[f"saved-{stage}"] = {"steps": 1, "config": {**config, "zero": stage}, "save": folder}
        cases[f"to-{other}"] = {"steps": 2, "config": {**config, "zero": other}, "load": folder}
    jobs = [{"name": name, **case} for name, case in cases.items()]
    equivalence.launch.run_workers("distill_steps.py", 1, {"teacher": str(teacher), "out": str(out), "cases": jobs})
    return {path.stem[:-2]: equivalence.load_file(path) for path in out.glob("*.safetensors")}


@pytest.mark.distributed
@pytest.mark.parametrize("name", SETTINGS)
def test_the_weights_are_those_of_zero_1(name: str, teacher: Path, found: Mapping[str, dict]) -> None:
    """Bit for bit, averages and moments too; masters start from the exact weights."""
    alone, sharded = found[f"{name}-z0"], found[f"{name}-z1"]
    assert alone.keys() == sharded.keys() and len(alone) > 100
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if "clipped" in name else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(alone, sharded, **tolerance)
    for parameter, p in load_teacher(teacher).named_parameters():
        for key in (f"student/weight/{parameter}", f"generator/weight/{parameter}", f"generator/ema/{parameter}"):
            assert torch.equal(found[f"{name}-z0-start"][key], p), key
    moved = [key for key in alone if "/weight/" in key and not torch.equal(alone[key], found[f"{name}-z0-start"][key])]
    assert len(moved) > 100


@pytest.mark.distributed
def test_a_run_goes_on_at_the_other_stage(found: Mapping[str, dict]) -> None:
    straight = {key: value for key, value in found["fp16-z0"].items() if not key.startswith("loss")}
    for stage in (0, 1):
        other = {key: value for key, value in found[f"to-{stage}"].items() if not key.startswith("loss")}
        torch.testing.assert_close(other, straight, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_reads_nothing(precision: str, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not fp16's loss scale either, which DeepSpeed's engines read in each step."""
    monkeypatch.setattr(resolve, "fp16_supported", lambda device: True)
    config = DistillConfig(**{**BASE, "precision": precision, "clip_grad": 1.0, "steps": 2})
    run = Distiller(config, load_teacher(teacher), world=ALONE)
    assert run.settings.stage == 0 and isinstance(run.generator.engine, MasterEngine)
    run.iteration(0)
    with NoReading(count=True) as mode:
        run.iteration(1)
    assert not [place for place in mode.found if "_numpy_philox" not in place]


def trained(precision: str, module: torch.nn.Module | None = None) -> TrainedNetwork:
    torch.manual_seed(0)
    config = RunConfig(eps=1e-3, zero=0, precision=precision)
    settings = config.laid_out(D=math.inf, stage=0, micro_batch=1, phased=False, checkpointed=False)
    return TrainedNetwork(module or torch.nn.Linear(4, 4), settings, world=ALONE, lr=1e-2, beta1=0.0, ema=True)


def test_an_overflow_lowers_the_scale_and_is_not_counted() -> None:
    """As with DeepSpeed, see tests/engine/distributed/test_fp16.py; NaN is counted once the scale has fallen to 1."""
    net = trained("fp16")
    scales = [256.0, 128.0, 128.0, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0]
    for factor, scale in zip((300.0, 1.0, *[math.nan] * 9, 1.0), scales, strict=True):
        before = torch.cat([p.flatten() for _, p in net.full("weight")])
        assert net.loss_scale == scale
        net.backward((net(torch.ones(1, 4, dtype=torch.float16)) * factor).sum())
        good = net.step(lr=1e-2, ema_decay=0.5)
        moved = not torch.equal(torch.cat([p.flatten() for _, p in net.full("weight")]), before)
        assert moved == (factor == 1.0)
        assert bool(good) == (moved or scale > 1)
    assert net.steps_applied == 2


def test_the_loss_scale_is_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through overflows and long quiet stretches, and from a state that either of them left."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(single_process, "SCALE_WINDOW", 7)
    theirs = loss_scaler.DynamicLossScaler(
        init_scale=256,
        scale_window=7,
        min_scale=1,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
    )
    ours, chance, seen = LossScale(CPU), random.Random(0), set()
    for step in range(400):
        overflow = chance.random() < (0.9 if step % 100 < 12 else 0.01)
        theirs.update_scale(overflow)
        ours.update(torch.tensor(not overflow))
        assert ours.state == {
            "scale": theirs.cur_scale,
            "steps": theirs.cur_iter,
            "last_overflow": theirs.last_overflow_iter,
        }
        seen.add(theirs.cur_scale)
        if step % 50 == 0:
            state, ours = ours.state, LossScale(CPU)
            ours.state = state
    assert {1.0, 2.0, 256.0} <= seen and len(seen) > 9


def test_the_weights_are_the_masters_rounded_and_learn_what_they_cannot_hold() -> None:
    """Many updates that are each below a 16-bit step add up."""
    net = trained("bf16", torch.nn.Linear(4, 4, bias=False))
    start = net.module.weight.detach().clone()
    assert start.dtype == torch.bfloat16
    masters = [dict(net.full("weight"))["weight"].clone()]
    for _ in range(400):
        net.backward(net(torch.ones(1, 4, dtype=torch.bfloat16)).sum())
        net.step(lr=1e-5, ema_decay=0.5)
        masters.append(dict(net.full("weight"))["weight"].clone())
        assert torch.equal(net.module.weight, masters[-1].bfloat16()) and net.module.weight.grad is None
    assert torch.equal(masters[1].bfloat16(), start)  # one update is lost in rounding
    torch.testing.assert_close(masters[0] - masters[-1], torch.full((4, 4), 400 * 1e-5), rtol=0.01, atol=0)


def test_gradients_are_widened_some_at_a_time_in_the_order_of_their_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_process, "WIDENED", 100)
    last = torch.channels_last
    module = torch.nn.ModuleList([torch.nn.Conv2d(2, 3, 3, bias=False), torch.nn.Linear(7, 1), torch.nn.Linear(30, 30)])
    module[0].weight.data = module[0].weight.data.contiguous(memory_format=last)
    masters = rounded(module, torch.bfloat16)
    for p in list(module.parameters())[:-1]:
        p.grad = torch.randn_like(p)
    given = {p: p.grad.clone() for p in masters if p.grad is not None}
    left = []
    for p, wide in wide_gradients(masters):
        assert wide.dtype == torch.float32 and torch.equal(wide, given[p].float())
        assert wide.stride() == masters[p].stride() and wide.data_ptr() % 16 == 0
        left.append(sum(p.grad is not None for p in masters))
    assert len(left) == len(given) == 4 and left == [1, 1, 1, 0]


def test_what_the_update_takes_is_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_process, "WIDENED", 5000)
    monkeypatch.setattr("ipfm.engine.memory.state.WIDENED", 5000)
    net = trained("bf16", torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(20)]))
    n = net.parameter_count
    peaks = []
    for _ in range(2):
        with LiveBytes() as live:
            net.backward(net(torch.ones(1, 64, dtype=torch.bfloat16)).sum())
            live.reset_peak()
            before = live.current
            net.step(lr=1e-3, ema_decay=0.5)
            peaks.append(live.peak - before)
    expected = Sharding(1, 0, "bf16").update(n)
    assert peaks[1] == pytest.approx(expected, rel=0.1) and expected < 0.6 * Sharding(1, 1, "bf16").update(n)


def test_several_processes_share_out_their_masters() -> None:
    settings = RunConfig(zero=0, precision="bf16").laid_out(
        D=math.inf, stage=0, micro_batch=1, phased=False, checkpointed=False
    )
    with pytest.raises(ValueError, match=r"^precision bf16 on 2 processes needs zero 1, 2 or 3, .*, got 0$"):
        TrainedNetwork(torch.nn.Linear(4, 4), settings, world=World(0, 2, CPU), lr=1e-2, beta1=0.0, ema=True)
