"""A training step as a GPU would get it, on the meta device: its operators, its Triton launches and their bytes.

`record` runs one iteration of the true `Distiller` or `TeacherTraining`. Nothing is computed and nothing allocated, so
that a step of any size takes seconds. Tensors on the meta device pass for those of a GPU (`fake_cuda`), convolutions
keep channels_last as cuDNN's do, and attention is one operator each way, as it is on a GPU. Not seen are what a single
operator launches within itself, but for the sum with its bias that follows a convolution there, and DeepSpeed's copies
between its flat buffers: a network in 16 bits steps here with one flat master alone.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ipfm.engine.config import Precision, Resolved, RunConfig, TeacherConfig, ZeroStage
from ipfm.engine.data.dataset import Batch, ImageDataset
from ipfm.engine.distributed import pieces, zero
from ipfm.engine.distributed.precision import DTYPES
from ipfm.engine.distributed.single_process import UnshardedEngine
from ipfm.engine.distributed.world import World
from ipfm.engine.memory.budget import gpu_budget
from ipfm.engine.memory.choose import choose_layout, choose_training
from ipfm.engine.objectives import initial_networks
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.objectives.phases import Phase, listening
from ipfm.engine.training import distiller as distiller_module
from ipfm.engine.training import teacher as teacher_module
from ipfm.engine.training.distiller import Distiller
from ipfm.engine.training.resolve import complete, complete_training
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.kernels.bench.fake_driver import Launch, Launches, fake_cuda, implementation
from ipfm.kernels.bench.measurement import tensors, traffic
from ipfm.kernels.bench.rehearsal import heaviest
from ipfm.models import NetworkConfig, Precond, build_network, edm2_unet, presets
from ipfm.models.layers import lay_out_weights, triton_serves

META = torch.device("meta")
# The GPU that a recipe is laid out for where nothing else is said: eight of 80 GB.
GPU_MEMORY, GPUS = 80e9, 8


@dataclass(frozen=True, order=True)
class Convolution:
    """A convolution: everything that decides which kernel runs."""

    shape: tuple[int, ...]
    """Of the input, (B, C, H, W)."""
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    transposed: bool
    groups: int
    bias: bool
    dtype: str
    channels_last: bool
    backward: tuple[bool, ...] = ()
    """Which gradients (input, weight, bias) are computed; () for the forward pass."""


@dataclass(frozen=True, order=True)
class Norm:
    """A call of a group normalisation."""

    shape: tuple[int, ...]
    groups: int
    dtype: str
    channels_last: bool
    silu: bool
    scaled: bool
    vectors: tuple[str, ...]
    """Names of what is given beside weight and bias."""


@dataclass
class Recording:
    """What an iteration asks of a GPU."""

    operators: dict[Phase, Counter[str]] = field(default_factory=dict)
    """Operators dispatched, by phase and name: no views and no allocations. A launch outside of one counts as one."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Read and written by all calls of an operator together, each tensor once."""
    launches: list[Launch] = field(default_factory=list)
    convolutions: Counter[Convolution] = field(default_factory=Counter)
    norms: Counter[Norm] = field(default_factory=Counter)
    attentions: Counter[tuple[tuple[int, ...], str]] = field(default_factory=Counter)
    """Shapes (B, L, heads, d) and dtypes of queries."""
    flops: Counter[str] = field(default_factory=Counter)
    added_biases: int = 0
    """Bytes of the sums with a convolution's bias that cuDNN's convolutions leave to a kernel of their own."""
    reduced_biases: int = 0
    """Bytes that are read for the gradients of such biases."""
    reordered: int = 0
    """Copies of weights that cuDNN makes for convolutions of activations in another order than theirs."""
    reordered_bytes: int = 0
    """That these read and write."""
    replays: int = 0
    """Replays of CUDA graphs."""

    @property
    def elementwise_bytes(self) -> int:
        """Read and written outside of convolutions, matrix products and attention, each tensor of an operator once."""
        seen = sum(bytes_ for name, bytes_ in self.bytes.items() if name.partition(".")[2] not in MATRIX)
        attended = self.bytes["attention"] + self.bytes["attention_backward"]
        return seen - attended + self.added_biases + self.reduced_biases

    @property
    def norm_rereads(self) -> int:
        """Bytes that normalisations read again, from cache or memory, where a group does not stay in the registers."""
        return sum(map(_read_again, self.launches))

    @property
    def operator_count(self) -> int:
        """Operators dispatched in an iteration."""
        return sum(map(Counter.total, self.operators.values()))

    @property
    def by_operator(self) -> Counter[str]:
        """Operators dispatched, by name."""
        return sum(self.operators.values(), Counter())


# ---------------------------------------------------------------------------------------------------------- counting


_NOTHING = {
    "aten._unsafe_view", "aten._reshape_alias", "aten.detach", "aten.alias", "aten.lift_fresh", "aten.is_same_size",
    "aten.sym_size", "aten.sym_stride", "aten.set_", "aten.promote_types", "prim.device",
}  # fmt: skip
# What is computed on the tensor cores, and its reads and writes with it.
MATRIX = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}


def _read_again(launch: Launch) -> int:
    if not launch.variant.name.startswith("group_norm") or launch.variant.constant("RESIDENT", False):
        return 0
    # Kernels that go by lanes never hold a group. Forward the mean, the variance and the result read x; backward the
    # sums and the result read x and dy.
    return launch.bytes["p_x"] + launch.bytes["p_dy"] if "p_dy" in launch.bytes else 2 * launch.bytes["p_x"]


def _is_counted(func: Any) -> bool:
    packet = str(func._overloadpacket)
    return not func.is_view and "empty" not in packet and packet not in _NOTHING


class _Counting(TorchDispatchMode):
    """Fills a recording with the operators that run meanwhile."""

    def __init__(self, recording: Recording, launches: Launches) -> None:
        super().__init__()
        self.recording, self.launches = recording, launches
        self.phase: Phase = "start"
        self._within_operator = False
        launches.on_launch = self._launched

    def note(self, name: str, bytes_: int = 0) -> None:
        """Count an operator."""
        self.recording.operators.setdefault(self.phase, Counter())[name] += 1
        self.recording.bytes[name] += bytes_

    def _launched(self, launch: Launch) -> None:
        if not self._within_operator:
            self.note(f"triton.{launch.variant.name}", sum(launch.bytes.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "ipfm":
            result = self._through_launcher(func, args, kwargs)
        else:
            result = _as_on_a_gpu(func, args, func(*args, **kwargs))
        if not _is_counted(func):
            return result
        name = str(func._overloadpacket)
        if name == "ipfm.group_norm_silu":
            self.recording.norms[_norm(args)] += 1
        given = tensors((args, kwargs))
        self.note(name, traffic(func, args, kwargs, given, tensors(result)))
        if (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.recording.flops[name] += flops(*args, **kwargs, out_val=result)
        if name.startswith("aten.convolution"):
            self._convolution(name, args, result)
        return result

    def _through_launcher(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operator's own implementation: on the meta device torch would ask for the shapes alone."""
        self._within_operator = True
        try:
            return implementation(func)(*args, **kwargs)
        finally:
            self._within_operator = False

    def _convolution(self, name: str, args: Sequence[Any], result: Any) -> None:
        backward = name.endswith("backward")
        x, weight, *rest = args[1:] if backward else args
        bias, stride, padding, _, transposed, _, groups = rest[:7]
        mask = tuple(args[-1]) if backward else ()
        if _is_channels_last(x) and weight.is_contiguous() and weight.shape[2] > 1 < weight.shape[1]:
            self.recording.reordered += 1
            self.recording.reordered_bytes += 2 * weight.nbytes
        given = bias is not None and (not backward or mask[2])
        self.recording.convolutions[
            Convolution(
                tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), transposed, groups, given,
                str(x.dtype).removeprefix("torch."), _is_channels_last(x), mask,
            )
        ] += 1  # fmt: skip
        if given and backward:
            self.recording.reduced_biases += args[0].nbytes
        elif given:
            self.recording.added_biases += 2 * result.nbytes


def _is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


_KEEPING = ("avg_pool2d", "upsample_nearest2d", "convolution")


def _as_on_a_gpu(func: Any, args: Sequence[Any], result: Any) -> Any:
    """The result in the memory format in which a GPU leaves it: meta convolutions make contiguous ones."""
    name = func._overloadpacket.__name__
    if not name.startswith(_KEEPING) or not any(_is_channels_last(t) for t in args if isinstance(t, Tensor)):
        return result
    if isinstance(result, Tensor):
        return result.contiguous(memory_format=torch.channels_last)
    return tuple(t if t is None or t.dim() != 4 else t.contiguous(memory_format=torch.channels_last) for t in result)


class _Attention(torch.autograd.Function):
    """One operator each way, which keeps what the fused kernels of real devices keep."""

    @staticmethod
    def forward(ctx: Any, count: _Counting, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # As the fused kernels do, tokens and heads in the order in which they lie in q.
        out = torch.empty_like(q)
        ctx.count = count
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device))
        batch, heads, length, width = q.shape
        count.note("attention", 4 * q.nbytes)
        count.recording.attentions[(batch, length, heads, width), str(q.dtype).removeprefix("torch.")] += 1
        count.recording.flops["attention"] += 4 * batch * heads * length * k.shape[2] * width
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> Any:
        q, k, v, *_rest = ctx.saved_tensors
        batch, heads, length, width = q.shape
        ctx.count.note("attention_backward", 8 * q.nbytes)
        ctx.count.recording.flops["attention_backward"] += 10 * batch * heads * length * k.shape[2] * width
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def counting(recording: Recording) -> Iterator[_Counting]:
    """Fill `recording` with what runs on the meta device meanwhile."""
    with fake_cuda() as launches:
        mode = _Counting(recording, launches)
        recording.launches = launches.calls
        attend = mock.patch.object(
            F, "scaled_dot_product_attention", lambda q, k, v: _Attention.apply(mode, q, k, v)
        )  # not a TorchFunctionMode: none is active while a checkpointed block is computed again on the way back
        with attend, mode:
            yield mode


# ------------------------------------------------------------------------------------------------ the training, on meta


class _StayingOnMeta(TorchDispatchMode):
    """Copies to the host stay on the meta device, and what is compared is equal: nothing there has values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func._overloadpacket is torch.ops.aten.allclose:
            return True
        if func._overloadpacket is torch.ops.aten._to_copy and args[0].is_meta:
            kwargs.pop("device", None)
        return func(*args, **kwargs)


class _FlatMaster(UnshardedEngine):
    """DeepSpeed's engine at ZeRO 1 for a network in 16 bits: its optimiser steps with one flat fp32 tensor."""

    def __init__(self, module: Precond, optimizer: Any, precision: Precision) -> None:
        flat: Any = _FlatOptimizer(optimizer, DTYPES[precision])
        super().__init__(module, flat)
        module.to(DTYPES[precision])
        self.loss_scale = 1.0


class _FlatOptimizer:
    """DeepSpeed's optimiser of stage 1 on one process, as far as `TrainedNetwork` and `NormalisedWeights` know it.

    Args:
        optimizer: of the network's parameters, which are masters yet; afterwards of one flat tensor.
        dtype: of the network.
    """

    cpu_offload = False

    def __init__(self, optimizer: Any, dtype: torch.dtype) -> None:
        self.inner = optimizer
        self.weights = [p for group in optimizer.param_groups for p in group["params"]]
        *starts, numbers = itertools.accumulate((p.numel() for p in self.weights), initial=0)
        self.flat = nn.Parameter(torch.empty(numbers, device=META))
        optimizer.param_groups[0]["params"] = [self.flat]
        self.single_partition_of_fp32_groups = [self.flat]
        self.parallel_partitioned_bit16_groups = [[torch.empty(numbers, device=META, dtype=dtype)]]
        self.round_robin_bit16_groups, self.round_robin_bit16_offsets = [self.weights], [starts]
        self.partition_size = [numbers]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of what the engine takes the gradients away: nothing that `step` leaves."""
        return []

    def step(self) -> None:
        """A step with the flat gradient, which DeepSpeed's copies have filled."""
        self.flat.grad = torch.empty_like(self.flat)
        self.inner.step()
        self.flat.grad = None
        for p in self.weights:
            p.grad = None

    def update_lp_params(self) -> None:
        """DeepSpeed's copy of the flat tensor into the network's weights is not seen here."""


class _WithoutValues(ImageDataset):
    """Data of which no value is asked for: they stay where they are, and a batch of them has none."""

    def to(self, device: object) -> ImageDataset:
        """Itself."""
        return self

    def batch(self, step: int, sample_index: Tensor, *, batch_size: int, seed: int) -> Batch:
        """See `ImageDataset.batch`."""
        count, classes = len(sample_index), self.classes
        labels = torch.empty(count, classes, device=META) if classes else None
        return Batch(torch.empty(count, *self.shape, device=META), labels)


def gpu_settings(
    config: RunConfig, network: NetworkConfig, *, memory: float = GPU_MEMORY, gpus: int = GPUS
) -> Resolved[Any]:
    """A recipe's settings as GPUs of `memory` bytes leave them: bf16, channels_last, laid out by the memory plan.

    Of the batch there is one micro-batch.
    """
    execution = "channels_last" if config.memory_format == "auto" else config.memory_format
    precision = "bf16" if config.precision == "auto" else config.precision
    config = replace(config, max_steps=1, kimg=None, memory_format=execution, precision=precision)
    if isinstance(config, TeacherConfig):
        config = complete_training(config, network, META)
        plan = choose_training(config, replace(network, dropout=config.dropout), ranks=gpus, budget=gpu_budget(memory))
    else:
        assert isinstance(config, Distillation)
        config = complete(config, network, META)
        trained = initial_networks.trained_config(network, config.dropout)
        plan = choose_layout(config, trained, ranks=gpus, budget=gpu_budget(memory)).plan
    return one_micro_batch(
        config,
        network,
        plan.micro_batch,
        stage=plan.parts.stage,
        phased=plan.phased,
        checkpointed=plan.activation_checkpointing,
    )


def one_micro_batch(
    config: RunConfig,
    network: NetworkConfig,
    images: int,
    *,
    stage: ZeroStage,
    phased: bool = False,
    checkpointed: bool = False,
) -> Resolved[Any]:
    """Settings of a step of so many images at once."""
    config = replace(config, batch=images, micro_batch=images, zero=stage, D=network.D)  # type: ignore[call-arg]
    return config.laid_out(
        D=network.D,
        stage=stage,
        micro_batch=images,
        phased=phased,
        checkpointed=checkpointed,
    )


def on_meta(settings: Resolved[Any], network: NetworkConfig) -> Distiller | TeacherTraining:
    """The training with these settings, on the meta device as on a GPU. Call it while a fake driver is active."""
    world = World(0, 1, META)

    def made(config: NetworkConfig, build: Callable[[NetworkConfig], Precond] = build_network) -> Precond:
        with META:
            return build(config)

    def flat_master(stage: Any, precision: Any, offload: Any, module: Precond, optimizer: Any) -> Any:
        return _FlatMaster(module, optimizer, precision)

    with ExitStack() as patched:
        for owner, name, value in (
            (initial_networks, "build_network", made),
            (teacher_module, "build_network", made),
            (zero, "_initialize", flat_master),
            (zero.TrainedNetwork, "load", lambda *_: None),
            (zero.TrainedNetwork, "_create_state", lambda trained: trained.optimizer.create_state()),
            (distiller_module, "teacher_facts", lambda teacher: {}),
            (distiller_module, "resolve", lambda *_: settings),
            (teacher_module, "resolve_training", lambda *_: settings),
        ):
            patched.enter_context(mock.patch.object(owner, name, value))
        patched.enter_context(_StayingOnMeta())
        one = torch.zeros(1, *network.image_shape, dtype=torch.uint8)
        labels = torch.zeros(1, dtype=torch.int64) if network.label_dim else None
        data = _WithoutValues(one, labels, classes=network.label_dim or None)
        if isinstance(settings.config, TeacherConfig):
            return TeacherTraining(settings.config, network, data, world=world)
        real = data if settings.config.takes_real_images else None
        return Distiller(settings.config, made(network).eval().requires_grad_(False), real=real, world=world)


class EmptyGraphs:
    """In place of `pieces.CudaGraphs`: what is captured was run once, and a replay is counted and does nothing."""

    def __init__(self, device: torch.device) -> None:
        EmptyGraphs.replays = 0

    replays = 0

    def warm_up(self, work: Callable[[], Tensor | None]) -> Tensor | None:
        """See `pieces.Capture.warm_up`."""
        return work()

    def capture(self, work: Callable[[], Tensor | None]) -> pieces.Captured:
        """See `pieces.Capture.capture`."""
        return pieces.Captured(self._replay, work())

    @staticmethod
    def _replay() -> None:
        EmptyGraphs.replays += 1


def record(settings: Resolved[Any], network: NetworkConfig, *, graphs: bool = False) -> Recording:
    """One iteration of a distillation or of a teacher's training.

    Args:
        settings: with nothing left open, as `gpu_settings` or `one_micro_batch` make them.
        network: the teacher's architecture.
        graphs: one in which what can be captured in CUDA graphs was, and is replayed; see `EmptyGraphs`.
    """
    recording = Recording()
    config = settings.config
    begin = config.planned_step if isinstance(config, Distillation) else 0
    first = begin + (pieces.WARM_UPS + 1 if graphs else 0)
    captures = mock.patch.dict(pieces.CAPTURES, {"meta": EmptyGraphs} if graphs else {})
    with fake_cuda(), captures:
        training = on_meta(settings, network)
    with counting(Recording()):
        for step in range(begin, first):
            training.iteration(step)
    EmptyGraphs.replays = 0
    with counting(recording) as mode, listening(lambda phase: setattr(mode, "phase", phase)):
        training.iteration(first)
    recording.replays = EmptyGraphs.replays if graphs else 0
    return recording


def preset_launches(*, quick: bool = False) -> list[Launch]:
    """One launch of each kind in a distillation and in the training of every preset, in bf16 and channels_last.

    A GPU has 32 images.

    Args:
        quick: of the digits alone, in colour, and of each kernel the one with the most to do.
    """
    chosen = [replace(presets.get("digits"), img_channels=3)] if quick else [*presets.TABLE.values()]
    same: dict[str, Any] = {"max_steps": 1, "precision": "bf16", "zero": 1, "memory_format": "channels_last"}
    configs = (DistillConfig(**same), TeacherConfig(**same))
    launches: dict[Any, Launch] = {}
    # D and class labels launch the same.
    for network in dict.fromkeys(replace(network, D=128.0, label_dim=0) for network in chosen):
        for config in configs:
            here = replace(config, dropout=fused_dropout(network))
            for launch in record(one_micro_batch(here, network, 32, stage=1), network).launches:
                launches.setdefault(launch.variant, launch)
    kept = heaviest(launches.values()) if quick else launches
    return [launches[variant] for variant in kept]


def fused_dropout(network: NetworkConfig) -> float:
    """A network's dropout where the project's own kernels drop, else 0: what it adds there is torch's."""
    return network.dropout if network.model_type == "EDM2UNet" else 0.0


def _norm(args: Sequence[Any]) -> Norm:
    x, _, _, scale, shift, groups, _, activation, *addend = args
    given = {"scale": scale, "shift": shift, "addend": addend[0] if addend else None}
    return Norm(
        tuple(x.shape),
        groups,
        str(x.dtype).removeprefix("torch."),
        _is_channels_last(x),
        activation,
        scale is not None,
        tuple(sorted(name for name, value in given.items() if value is not None)),
    )


def block_passes(network: NetworkConfig, images: int) -> float:
    """Passes over the data in a residual block's forward, outside of its convolutions, in training in bf16.

    Reads and writes of tensors as large as the block's activations, of the first block that neither resamples, attends
    nor changes the number of channels.
    """
    recording = Recording()
    with fake_cuda(), META:
        net = build_network(network).to(torch.bfloat16)
    net.compute_dtype, net.channels_last = torch.bfloat16, True
    block = plain_block(net)
    found: list[float] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(recording.elementwise_bytes)

    def after(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        found[-1] = (recording.elementwise_bytes - found[-1]) / result.nbytes

    handles = [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    with counting(recording):
        net(torch.empty(images, *network.image_shape, device=META), torch.empty(images, device=META))
    for handle in handles:
        handle.remove()
    return found[0]


def network_traffic(network: NetworkConfig, images: int, *, backward: bool = False, kernels: bool = True) -> float:
    """Bytes an image that a network reads and writes outside of convolutions, matrix products and attention, in fp16.

    Args:
        network: of EDM2's architecture.
        images: in a batch; what is done to weights counts for all of them together.
        backward: with the gradients of all weights, else without any.
        kernels: by the Triton kernels, as on a GPU; else by PyTorch's operations one after the other.
    """
    recording = Recording()
    with fake_cuda(), META:
        net = build_network(network).to(torch.float16).eval().requires_grad_(backward)
        lay_out_weights(net)
    net.compute_dtype, net.channels_last = torch.float16, True
    x = torch.empty(images, *network.image_shape, device=META)
    labels = torch.empty(images, network.label_dim, device=META) if network.label_dim else None
    served = mock.patch.object(edm2_unet, "triton_serves", triton_serves if kernels else lambda x: False)
    with served, torch.set_grad_enabled(backward), counting(recording):
        y = net(x, torch.empty(images, device=META), labels)
        if backward:
            torch.autograd.backward(y, torch.empty_like(y))
    return recording.elementwise_bytes / images


def plain_block(net: Precond) -> nn.Module:
    """The first residual block of a network that neither resamples, attends nor changes the number of channels."""
    found = next(block for block in net.model.blocks if block.is_plain)
    assert isinstance(found, nn.Module)
    return found
