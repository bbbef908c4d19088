"""Memory plan: activations against real forward passes, state against what DeepSpeed was measured to hold."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from ipfm.engine.memory import MemoryPlan, counting_saved_bytes, device_budget, plan_memory
from ipfm.engine.zero import BUCKET_ELEMENTS
from ipfm.models import EDMPrecond, NetworkConfig, presets

SMALL = NetworkConfig(
    img_resolution=8, img_channels=2, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(),
    dropout=0.0,
)  # fmt: skip
NETWORKS = {
    "ddpm++": SMALL,
    "attention": replace(SMALL, attn_resolutions=(8, 4)),
    "dropout": replace(SMALL, dropout=0.2),
    "ncsn++": replace(
        SMALL, embedding_type="fourier", encoder_type="residual", resample_filter=(1, 3, 3, 1), channel_mult_noise=2
    ),
    "conditional": replace(SMALL, label_dim=3, augment_dim=2),
    "digits": presets.get("digits"),
}
MICRO = 6


def distinct_storages(net: nn.Module, x: Tensor) -> int:
    """Bytes that a real forward pass keeps for its backward: distinct memory blocks, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    blocks: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            blocks[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x, torch.ones(len(x)))
    return sum(size for size, _ in blocks.values())


def measured(config: NetworkConfig, batch: int, *, frozen: bool, compute: torch.dtype, weights: torch.dtype) -> int:
    net = EDMPrecond(config).to(weights).requires_grad_(not frozen).train(not frozen)
    net.compute_dtype = compute
    x = torch.randn(batch, config.img_channels, config.img_resolution, config.img_resolution, requires_grad=frozen)
    return distinct_storages(net, x)


def near(got: int, real: int) -> bool:
    return abs(got - real) <= 0.02 * real


@pytest.mark.parametrize("kind", NETWORKS)
def test_activations_in_fp32(kind):
    config = NETWORKS[kind]
    plan = plan_memory(config, micro_batch=MICRO)
    trained, frozen = (
        measured(config, MICRO, frozen=f, compute=torch.float32, weights=torch.float32) for f in (False, True)
    )
    assert near(plan.activations_phased, max(trained, frozen))
    assert near(plan.activations_joint, trained + 2 * frozen)
    assert plan.activations_phased < plan.activations_joint


@pytest.mark.parametrize("kind", ["ddpm++", "attention", "ncsn++"])
def test_activations_in_bf16(kind):
    """Student and generator hold bf16 weights; the teacher casts its fp32 ones at each use, and keeps the casts."""
    config = NETWORKS[kind]
    plan = plan_memory(config, micro_batch=MICRO, precision="bf16", stage=1)
    bf16, fp32 = torch.bfloat16, torch.float32
    trained = measured(config, MICRO, frozen=False, compute=bf16, weights=bf16)
    student = measured(config, MICRO, frozen=True, compute=bf16, weights=bf16)
    teacher = measured(config, MICRO, frozen=True, compute=bf16, weights=fp32)
    assert teacher > student  # the casts
    assert near(plan.activations_phased, max(trained, student, teacher))
    assert near(plan.activations_joint, trained + student + teacher)


@pytest.mark.parametrize("batch", [1, 32])
def test_what_does_not_grow_with_the_batch_is_counted_once(batch):
    """Permuted attention weights are saved once a pass, not once a sample."""
    config = NETWORKS["attention"]
    real = measured(config, batch, frozen=False, compute=torch.float32, weights=torch.float32)
    assert near(plan_memory(config, micro_batch=batch).activations_phased, real)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shared_memory_counts_once(device):
    """Views of one tensor, one tensor saved twice, and parameters; also on the meta device, which has no addresses."""
    weight = torch.ones(8, 8, device=device, requires_grad=True)
    x = torch.ones(4, 8, device=device, requires_grad=True)
    with counting_saved_bytes([weight]) as count:
        h = x @ weight  # saves x and the weight (as views)
        assert count[0] == 4 * 8 * 4
        h.exp()  # saves its result
        assert count[0] == 2 * 4 * 8 * 4
        h.sin(), h.cos(), h.view(8, 4).sin(), h[:2].sin(), h.t().sin()  # all save h, and h once
        assert count[0] == 3 * 4 * 8 * 4
        _ = h * h
        assert count[0] == 3 * 4 * 8 * 4
    h.tan()
    assert count[0] == 3 * 4 * 8 * 4


def test_parameters_are_exact():
    for config in NETWORKS.values():
        expected = sum(p.numel() for p in EDMPrecond(config).parameters())
        assert plan_memory(config, micro_batch=1).parameters == expected


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize(
    ("stage", "precision", "weights", "masters", "gradients"),
    [
        (0, "fp32", 4, 0, 4),
        (1, "fp32", 4, 4, 4),
        (2, "fp32", 4, 4, 4),
        (1, "bf16", 2, 4, 2),
        (2, "bf16", 2, 4, 2),
    ],
)
def test_state(stage, precision, weights, masters, gradients, ranks):
    """Bytes a parameter, as measured under DeepSpeed 0.19.8 on 1 and 2 processes: a trained network holds its weights,
    at stages 1 and 2 a shard of fp32 masters, and a shard of the fp32 moments and the EMA; gradients exist for one
    network at a time and are sharded at stage 2."""
    plan = plan_memory(SMALL, micro_batch=1, ranks=ranks, stage=stage, precision=precision)
    n, shard = plan.parameters, ranks if stage else 1
    teacher_and_average = 2 * 4
    assert plan.weights == (teacher_and_average + 2 * weights) * n + 2 * masters * n // shard
    assert plan.optimizer == (2 + 1) * 4 * n // shard  # second moments of two networks, one EMA
    assert plan.gradients == gradients * n // (ranks if stage == 2 else 1)
    bucket = BUCKET_ELEMENTS if stage else n if ranks > 1 else 0
    assert plan.buckets == gradients * bucket
    assert plan.state == plan.weights + plan.gradients + plan.optimizer + plan.buckets


def test_first_moments():
    n = plan_memory(SMALL, micro_batch=1).parameters
    for student, generator, buffers in ((0.0, 0.0, 3), (0.9, 0.0, 4), (0.0, 0.5, 4), (0.9, 0.9, 5)):
        plan = plan_memory(SMALL, micro_batch=1, student_beta1=student, generator_beta1=generator)
        assert plan.optimizer == 4 * buffers * n


def test_the_budget_decides():
    free = plan_memory(SMALL, micro_batch=4)
    assert (free.backward, free.budget) == ("joint", None)
    joint, phased = free.total("joint"), free.total("phased")
    assert joint - phased == free.activations_joint - free.activations_phased > 0
    assert phased == free.state + free.activations_phased
    for budget, backward in ((joint, "joint"), (joint - 1, "phased"), (phased, "phased"), (0, "phased")):
        plan = plan_memory(SMALL, micro_batch=4, budget=budget)
        assert (plan.backward, plan.budget) == (backward, budget)
        numbers = [f.name for f in fields(MemoryPlan) if f.name not in ("backward", "budget")]
        assert all(getattr(plan, name) == getattr(free, name) for name in numbers)


def test_the_table():
    plan = MemoryPlan(10, 2**30, 2**20, 3 * 2**20, 0, 2**19, 2**31, 2**32, "joint")
    rows = {row[:28].strip(): row[28:].strip() for row in str(plan).splitlines()}
    assert rows == {
        "weights of four networks": "1.00 GiB",
        "gradients of one network": "1.0 MiB",
        "optimiser state and EMA": "3.0 MiB",
        "communication bucket": "0.0 MiB",
        "activations, joint": "2.00 GiB",
        "activations, phased": "0.5 MiB",
        "total, joint": "3.00 GiB",
        "total, phased": "1.00 GiB",
        "budget": "4.00 GiB",
        "backward": "joint",
    }
    assert "none given" in str(replace(plan, budget=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 0}, r"micro-batch must be an integer >= 1, got 0"),
        ({"micro_batch": 1.5}, r"micro-batch must be an integer >= 1, got 1.5"),
        ({"ranks": 0}, r"ranks must be an integer >= 1, got 0"),
        ({"stage": 3}, r"the ZeRO stage must be 0, 1 or 2, got 3"),
        ({"precision": "fp16"}, r"precision must be fp32 or bf16, got 'fp16'"),
        ({"precision": "bf16"}, r"precision bf16 needs ZeRO stage 1 or 2, got stage 0"),
        ({"student_beta1": 1.0}, r"student-beta1 must lie in \[0, 1\), got 1.0"),
        ({"generator_beta1": -0.1}, r"generator-beta1 must lie in \[0, 1\), got -0.1"),
        ({"budget": -1}, r"the budget must be >= 0 bytes, got -1"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        plan_memory(SMALL, **{"micro_batch": 1, **changes})


def test_budget_of_this_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    whole = device_budget(torch.device("cpu"))
    if whole is None:
        pytest.skip("this machine does not say how much memory it has")
    assert 2**20 < whole < 2**50
    monkeypatch.setenv("LOCAL_SIZE", "4")
    # Other programs take and give memory meanwhile.
    assert device_budget(torch.device("cpu")) == pytest.approx(whole / 4, rel=0.5)
