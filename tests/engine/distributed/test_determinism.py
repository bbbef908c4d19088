"""--deterministic: what it asks of PyTorch and of the libraries below it, and that training does without the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.determinism import compute_deterministically, prepare_determinism
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.metrics.precision_recall import precision_recall
from ipfm.engine.experiments import recipe as choreography
from ipfm.engine.objectives.pid import PidConfig
from ipfm.engine.runtime.commandline import BadInput
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.models import NetworkConfig, build_network
from ipfm.models.attention import attention
from ipfm.recipes import digits_ipfm

ALONE = World(0, 1, torch.device("cpu"))
NETWORK = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
    dropout=0.1, label_dim=3, augment_dim=9, D=16.0, encoder_type="residual", embedding_type="fourier",
    resample_filter=(1, 3, 3, 1),
)  # fmt: skip
STEP: dict[str, Any] = {"batch": 4, "micro_batch": 2, "max_steps": 2, "zero": 0, "precision": "fp32", "lr": 1e-3}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
        # Set first, so that what is set meanwhile is undone at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    cudnn, filled = torch.backends.cudnn, torch.utils.deterministic
    monkeypatch.setattr(cudnn, "benchmark", cudnn.benchmark)
    monkeypatch.setattr(cudnn, "deterministic", cudnn.deterministic)
    monkeypatch.setattr(filled, "fill_uninitialized_memory", filled.fill_uninitialized_memory)
    yield
    torch.use_deterministic_algorithms(False)


def state() -> tuple[bool, bool, bool, bool, str | None, str | None]:
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"), os.environ.get("NCCL_NVLS_ENABLE"),
    )  # fmt: skip


ON = (True, False, True, False, ":4096:8", "0")
OFF = (False, False, False, False, None, None)


def distiller(kind: type[DistillConfig] | type[PidConfig] = DistillConfig, **settings: Any) -> Distiller:
    torch.manual_seed(0)
    return Distiller(kind(**STEP | settings), build_network(NETWORK), world=ALONE)


def teaching(**settings: Any) -> TeacherTraining:
    images = torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageDataset(images, torch.arange(8) % 3, classes=3)
    torch.manual_seed(0)
    return TeacherTraining(TeacherConfig(**STEP | {"augment": 0.5} | settings), NETWORK, data, world=ALONE)


@pytest.mark.parametrize("make", [distiller, teaching])
def test_a_run_asks_for_it_where_it_is_told_to(make: Any) -> None:
    assert state() == OFF
    make()
    assert state() == OFF
    make(deterministic=True)
    assert state() == ON
    # What the caller has asked for stays.
    make()
    assert state() == ON


WHOLE = {
    "joint": lambda: distiller(backward="joint", steps=2, student_updates=2),
    "phased": lambda: distiller(
        backward="phased", steps=2, dropout=0.1, clip_grad=1.0, activation_checkpointing="on", augment=0.5
    ),
    "bf16": lambda: distiller(precision="bf16", zero=None, memory_format="channels_last"),
    "pid": lambda: distiller(PidConfig, distance="l2"),
    "teacher": lambda: teaching(dropout=0.1),
}


def weights(task: Any) -> dict[str, Tensor]:
    return {f"{n}.{k}": v.clone() for n, net in task.networks.items() for k, v in net.full("weight")}


@pytest.mark.parametrize("name", WHOLE)
def test_steps_need_nothing_that_does_not_repeat(name: str) -> None:
    """Neither this project's operators nor PyTorch's refuse, and no memory is read that nobody wrote: NaN fills it."""
    usual = WHOLE[name]()
    usual.iteration(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    found = WHOLE[name]()
    sums = found.iteration(0).sums
    assert all(bool(torch.isfinite(value).all()) for value in sums.values())
    for key, value in weights(found).items():
        assert torch.equal(value, weights(usual)[key]), key


def test_neighbours_are_found_another_way() -> None:
    """A GPU has the k-th smallest value only in a form whose index may change."""
    generator = torch.Generator().manual_seed(0)
    real, generated = (torch.randn(40, 3, generator=generator) for _ in range(2))
    usual = precision_recall(real, generated)
    torch.use_deterministic_algorithms(True)
    assert precision_recall(real, generated) == usual


def test_xformers_is_refused() -> None:
    torch.use_deterministic_algorithms(True)
    with pytest.raises(ValueError, match=r"'xformers' cannot run: its gradients do not repeat, and they have to here"):
        attention(*(torch.zeros(1, 2, 1, 8) for _ in range(3)), backend="xformers")


@pytest.mark.parametrize(
    ("name", "given", "possible"),
    [("CUBLAS_WORKSPACE_CONFIG", ":0:0", ":4096:8 or :16:8"), ("NCCL_NVLS_ENABLE", "1", "0")],
)
def test_an_environment_that_says_otherwise(
    name: str, given: str, possible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, given)
    with pytest.raises(ValueError) as error:
        compute_deterministically()
    assert str(error.value) == f"deterministic needs {name} to be {possible}, got {given!r}: unset it"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_smaller_workspace_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare_determinism()
    assert state()[-2:] == (":16:8", "0")


class Enough(Exception):
    """The rest of a run is not wanted."""


@pytest.mark.parametrize("given", [[], ["--deterministic"]])
def test_the_libraries_hear_of_it_before_anything_starts(
    given: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start() -> World:
        raise Enough(*state()[-2:])

    monkeypatch.setattr(choreography, "start_world", start)
    words = ["--out", str(tmp_path / "run"), "--max-steps", "1", "--teacher-steps", "1", *given]
    with pytest.raises(Enough) as found:
        digits_ipfm.main(words)
    assert found.value.args == (ON if given else OFF)[-2:]
    if given:
        monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
        with pytest.raises(BadInput, match=r"^deterministic needs NCCL_NVLS_ENABLE to be 0, got '1': unset it$"):
            digits_ipfm.main(words)
