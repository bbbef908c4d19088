"""A step on the meta device as a GPU would get it: what is recorded is what is launched."""

from collections import Counter
from dataclasses import replace

import edm2_fixtures
import pytest
import torch

from ipfm.engine.commands.bench.meta_step import gpu_settings, one_micro_batch, preset_launches, record
from ipfm.engine.config import TeacherConfig
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.training import run
from ipfm.models import presets

# Of colour images: those of one channel are in both memory formats at once, and a convolution takes the contiguous one.
NETWORK = replace(presets.get("digits", D=128.0), img_channels=3)
CONFIG = DistillConfig(max_steps=1, precision="bf16", zero=1, memory_format="channels_last", augment=0.0)


@pytest.fixture(scope="module")
def recording():
    return record(one_micro_batch(CONFIG, NETWORK, 8, stage=1), NETWORK)


def test_every_normalisation_is_a_launch_each_way(recording):
    launched = Counter(call.variant.name for call in recording.launches)
    assert launched["group_norm_silu_kernel"] == sum(recording.norms.values()) > 50
    assert 0 < launched["group_norm_silu_backward_kernel"] < launched["group_norm_silu_kernel"]
    assert {"perturb_kernel", "ipfm_loss_kernel", "denoising_loss_kernel", "update_kernel"} <= set(launched)


def test_real_images_are_one_launch_more_of_each_kernel_of_the_student(recording):
    """The shifted targets are computed within the losses that there are."""
    config = replace(CONFIG, real_weights=(0.92, 0.94))
    found = record(one_micro_batch(config, NETWORK, 8, stage=1), NETWORK)
    counts = [Counter(call.variant.name for call in one.launches) for one in (recording, found)]
    for kernel, more in {"denoising_loss_kernel": 1, "perturb_kernel": 1, "ipfm_loss_kernel": 0}.items():
        assert counts[1][kernel] - counts[0][kernel] == more, kernel


def test_everything_is_in_the_precision_and_the_memory_format_of_a_gpu(recording):
    assert {norm.dtype for norm in recording.norms} == {"bfloat16"}
    wide = [norm for norm in recording.norms if norm.shape[2] > 1]
    assert wide
    assert all(norm.channels_last for norm in wide)
    assert {c.dtype for c in recording.convolutions} == {"bfloat16"}
    assert all(c.channels_last for c in recording.convolutions)
    types = {dict(call.variant.types)["p_x"] for call in recording.launches if "group_norm" in call.variant.name}
    assert types == {"*bf16"}


def test_no_weight_is_put_in_another_order_for_its_convolution(recording, monkeypatch):
    """Nor are gradients put back, at any stage; else both are copies, each one more launch."""
    alone = record(one_micro_batch(replace(CONFIG, zero=0), NETWORK, 8, stage=0), NETWORK)
    # What goes up has a weight that is made at each use.
    assert recording.reordered == alone.reordered < 10
    monkeypatch.setattr(run, "orders_weights", lambda device: False)
    apart = record(one_micro_batch(CONFIG, NETWORK, 8, stage=1), NETWORK)
    assert apart.reordered > 50
    assert apart.by_operator["aten.copy_"] > recording.by_operator["aten.copy_"] + 10


def test_operators_are_counted_by_phase_without_views_and_allocations(recording):
    assert {"student: optimiser", "generator: backward"} <= set(recording.operators)
    assert recording.operator_count == sum(recording.by_operator.values()) > 1000
    assert not {"aten.view", "aten.empty_like", "aten.detach"} & set(recording.by_operator)
    assert recording.by_operator["attention"] == sum(recording.attentions.values()) > 0
    assert recording.flops["aten.convolution"] > recording.flops["attention"] > 0
    # Two networks with their bias, each way.
    assert recording.added_biases > 0
    assert recording.reduced_biases > 0


def test_the_batch_changes_bytes_and_grids_and_not_the_number_of_operators(recording):
    larger = record(one_micro_batch(CONFIG, NETWORK, 16, stage=1), NETWORK)
    assert larger.by_operator == recording.by_operator
    assert larger.added_biases == 2 * recording.added_biases
    assert max(call.grid[0] for call in larger.launches) > max(call.grid[0] for call in recording.launches)


def test_a_teachers_step_is_recorded_too_as_a_gpu_lays_it_out():
    config = TeacherConfig(batch=64, kimg=10, augment=0.0)
    settings = gpu_settings(config, NETWORK, gpus=2)
    assert (settings.precision, settings.config.memory_format, settings.micro_batch) == ("bf16", "channels_last", 32)
    recording = record(settings, NETWORK)
    assert {"denoising_loss_kernel", "update_kernel"} <= {call.variant.name for call in recording.launches}
    assert {norm.shape[0] for norm in recording.norms} == {32}


def test_what_presets_launch_has_their_training_in_it(recording, monkeypatch):
    monkeypatch.setattr(presets, "TABLE", {"digits": NETWORK})

    def betas(launches):
        return {dict(call.variant.constants)["BETA1"] for call in launches if call.variant.name == "update_kernel"}

    assert betas(recording.launches) < betas(preset_launches())


def test_activations_computed_again_are_launched_again():
    network = replace(NETWORK, attn_resolutions=(8,))
    once, again = (record(one_micro_batch(CONFIG, network, 4, stage=1, checkpointed=c), network) for c in (False, True))
    assert sum(again.norms.values()) > sum(once.norms.values())
    assert again.by_operator["attention"] > once.by_operator["attention"]
    assert torch.get_default_device() == torch.device("cpu")


def test_what_is_captured_is_replayed_and_not_dispatched():
    config = replace(CONFIG, zero=0)
    eager, replayed = (
        record(one_micro_batch(config, NETWORK, 8, stage=0), NETWORK, graphs=graphs) for graphs in (False, True)
    )
    assert eager.replays == 0
    assert 0 < replayed.replays <= 6
    assert replayed.operator_count < 30 < eager.operator_count
    assert replayed.launches == []


def test_networks_whose_weights_are_normalised_are_recorded_with_zeros_flat_memory():
    """EDM2's, with classes: a distillation and a teacher's training, whose labels have no values there."""
    for config, trained in ((CONFIG, 2), (TeacherConfig(batch=4, max_steps=1, precision="bf16", zero=1), 1)):
        recording = record(one_micro_batch(config, edm2_fixtures.SMALL, 4, stage=1), edm2_fixtures.SMALL)
        launched = Counter(call.variant.name for call in recording.launches)
        updates = launched["update_kernel"]
        assert updates >= trained
        # Of each network in each step: the gradients of its masters, the masters, the weights.
        assert [launched[f"row_{what}_kernel"] for what in ("gradients", "masters", "plain")] == [updates] * 3
