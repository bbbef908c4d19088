"""What the libraries say of this machine. Each group of questions is asked in a process of its own, see `probe`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ipfm.engine.commands.doctor.findings import Check, Finding, one_line
from ipfm.engine.commands.doctor.machine import GPU, LIBRARIES, gpus_there
from ipfm.engine.runtime.versions import installed
from ipfm.engine.runtime.wording import size

RUN = "what a run takes"
# Packages that some options need, and which.
EXTRAS = {
    "lpips": ("perceptual distances in a distillation, LPIPS", "pip install --no-deps lpips==0.1.4"),
    "pyarrow": ("images in parquet and arrow files", 'pip install "ipfm[datasets]"'),
    "onnx": ("ipfm export --format onnx", 'pip install "ipfm[onnx]"'),
    "onnxscript": ("ipfm export --format onnx", 'pip install "ipfm[onnx]"'),
    "onnxruntime": ("the check of what was exported", 'pip install "ipfm[onnx]"'),
    "pillow_heif": ("HEIC pictures", "pip install pillow-heif"),
}
FILES_ALONE = ("lpips",)
REQUIRED = ("numpy", "scipy", "sklearn", "PIL", "safetensors", "matplotlib", "jinja2", "tqdm", "tyro", "pynvml")


def again(package: str) -> str:
    """The command that puts a package in the place of a broken one."""
    return f"where it cannot be loaded: pip install --force-reinstall {package}=={installed(package)}"


def groups() -> dict[str, list[Check]]:
    """What is asked of the libraries, by process."""
    return {
        "torch": [
            Check(LIBRARIES, "torch", _torch, remedy=again("torch")),
            Check(GPU, "GPU", _gpus),
            Check(GPU, "driver's account", _nvml, needed=False),
            Check(RUN, "device", _device),
            Check(RUN, "precision", _precision),
            Check(RUN, "attention", _attention, needed=False),
        ],
        "triton": [Check(LIBRARIES, "Triton kernels", _kernels, remedy=again("triton"))],
        "deepspeed": [
            Check(LIBRARIES, "DeepSpeed", _deepspeed, remedy=again("deepspeed")),
            Check(RUN, "launchers", _launchers, needed=False),
            Check(RUN, "processes", _group),
        ],
        "imports": [
            *(Check(LIBRARIES, name, functools.partial(_required, name)) for name in REQUIRED),
            *(Check("extras", name, functools.partial(_extra, name), needed=False) for name in EXTRAS),
        ],
    }


# -- torch -------------------------------------------------------------------------------------------------------------


def _torch() -> Iterator[Finding]:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Finding(LIBRARIES, "torch is built", f"{torch.__version__}, {built}")
    if torch.version.hip:
        yield Finding(LIBRARIES, "ROCm", f"torch is built for {torch.version.hip}, which is not supported", "remark")
    if torch.cuda.is_available():
        cudnn = torch.backends.cudnn.version()
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
        yield Finding(LIBRARIES, "cuDNN", str(cudnn), "ok" if cudnn else "missing")
        several = torch.cuda.device_count() > 1
        yield Finding(LIBRARIES, "NCCL", nccl or "none", "ok" if nccl else "missing" if several else "remark")


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and (not hidden or hidden.startswith("-")):
            yield Finding(GPU, "hidden", f"CUDA_VISIBLE_DEVICES={hidden!r} hides all GPUs: computing on the CPU")
        elif gpus_there():
            yield Finding(GPU, "torch", f"cannot use the GPU: {_why_no_cuda()}", "missing", _remedy_no_cuda())
        return
    covered = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        yield from _gpu(index, covered)
    yield from _peers()


def _gpu(index: int, covered: list[str]) -> Iterator[Finding]:
    import torch

    name = f"cuda:{index}"
    about = torch.cuda.get_device_properties(index)
    kind = f"sm_{about.major}{about.minor}"
    try:
        free, whole = torch.cuda.mem_get_info(index)
        # A kernel of torch's own: where there is none for this GPU, or another process has it alone, this fails.
        total = float((torch.arange(1000, device=name) * 2.0).sum())
        if total != 999_000.0:
            raise RuntimeError(f"the numbers 0 to 999, doubled, add up to {total}")
    except Exception as error:
        remedy = "nvidia-smi shows who uses it and what state it is in; nvidia-smi -q -d ECC its errors"
        yield Finding(GPU, name, f"{about.name} ({kind}) does not compute: {one_line(error)}", "missing", remedy)
        return
    value = f"{about.name} ({kind}), {about.multi_processor_count} SMs, {size(whole)}, {size(free)} free"
    if free < 0.5 * whole:
        yield Finding(GPU, name, value, "remark", "another program uses much of its memory: nvidia-smi shows which")
    else:
        yield Finding(GPU, name, value)
    if covered and not _covers(covered, about.major, about.minor):
        remedy = f"install a torch that has code for {kind}: pip install torch --index-url {_build_for(about.major)}"
        yield Finding(GPU, name, f"torch has code for {' '.join(covered)}, not {kind}", "remark", remedy)
    if (about.major, about.minor) < (7, 5):
        yield Finding(GPU, name, f"{kind} is older than what the kernels are compiled for (sm_75)", "missing")


def _build_for(major: int) -> str:
    """The index of a torch with code for GPUs of this major capability: GPUs from Blackwell on need CUDA 12.8."""
    return f"https://download.pytorch.org/whl/{'cu126' if major < 10 else 'cu128'}"


def _covers(covered: list[str], major: int, minor: int) -> bool:
    """Whether code for one of `covered` runs on a GPU of this capability: the same major, or PTX of an older one."""
    for arch in covered:
        kind, _, number = arch.partition("_")
        digits = "".join(filter(str.isdigit, number))
        there = divmod(int(digits or 0), 10)
        if (kind == "sm" and there[0] == major and there[1] <= minor) or (
            kind == "compute" and there <= (major, minor)
        ):
            return True
    return False


def _peers() -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    without = [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    value = "each with each" if not without else f"not between {', '.join(without)}"
    yield Finding(GPU, "memory of each other", value, "remark" if without else "ok")


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:
        return one_line(error)
    return f"it sees {torch.cuda.device_count()} GPUs"


def _remedy_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "install a torch with CUDA: pip install --force-reinstall torch"
    return (
        f"the driver must support CUDA {torch.version.cuda} (nvidia-smi names its version at the top): update it, or "
        "install a torch built for an older CUDA"
    )


def _nvml() -> Iterator[Finding]:
    """What the driver says: its version, MIG, who else computes."""
    if not gpus_there():
        return
    import pynvml

    try:
        pynvml.nvmlInit()
    except Exception as error:
        yield Finding(GPU, "NVML", f"does not answer ({one_line(error)}): no memory by the driver's count", "remark")
        return
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        yield Finding(GPU, "driver", f"{driver}, for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}")
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for ask in (_mig, _exclusive, _others, _throttled):
                with contextlib.suppress(Exception):  # what a GPU does not have, or one may not ask
                    yield from ask(pynvml, handle, f"GPU {index}")
    finally:
        pynvml.nvmlShutdown()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _mig(pynvml: Any, handle: Any, name: str) -> Iterator[Finding]:
    current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    if current:
        yield Finding(GPU, name, "MIG is on: a process has one part of it, and NCCL does not join parts", "remark")


def _exclusive(pynvml: Any, handle: Any, name: str) -> Iterator[Finding]:
    if pynvml.nvmlDeviceGetComputeMode(handle) != pynvml.NVML_COMPUTEMODE_DEFAULT:
        remedy = "nvidia-smi -c DEFAULT lets several processes use it, as two of --full's sections need"
        yield Finding(GPU, name, "its compute mode is exclusive: one process at a time", "remark", remedy)


def _others(pynvml: Any, handle: Any, name: str) -> Iterator[Finding]:
    others = [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid != os.getpid()]
    if others:
        yield Finding(GPU, name, f"other processes compute on it: {' '.join(map(str, others))}", "remark")


def _throttled(pynvml: Any, handle: Any, name: str) -> Iterator[Finding]:
    reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    hot = pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksThrottleReasonHwSlowdown
    if reasons & hot:
        yield Finding(GPU, name, "it has slowed itself down (heat, power)", "remark", "nvidia-smi -q -d PERFORMANCE")


def _device() -> Iterator[Finding]:
    from ipfm.engine.distributed.device import run_device
    from ipfm.engine.distributed.launch_environment import check_environment, environment_remarks

    try:
        check_environment()
    except ValueError as error:
        yield Finding(RUN, "environment", str(error), "missing")
    for remark in environment_remarks():
        yield Finding(RUN, "environment", remark, "remark")
    yield Finding(RUN, "device", str(run_device()))


def _precision() -> Iterator[Finding]:
    from ipfm.engine.distributed.device import run_device
    from ipfm.engine.distributed.precision import fp16_supported
    from ipfm.engine.objectives.ipfm import DistillConfig
    from ipfm.engine.training.resolve import resolve_precision

    device = run_device()
    taken = resolve_precision(DistillConfig(), device).precision
    fp16 = "runs" if fp16_supported(device) else "does not run here"
    yield Finding(RUN, "precision auto", f"{taken}; fp16 {fp16}")


def _attention() -> Iterator[Finding]:
    """The backend that each kind of network takes on this device, and why not the other."""
    import torch

    from ipfm.engine.distributed.device import run_device
    from ipfm.models import attention

    device = run_device()
    taken = "torch's scaled_dot_product_attention"
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            reason = attention.xformers_obstacle(device, dtype, 64)
        other = f"not xformers: {reason}" if reason else "xformers where it is asked for"
        yield Finding(RUN, "attention", f"{str(dtype).removeprefix('torch.')}: {taken}; {other}")


# -- Triton ------------------------------------------------------------------------------------------------------------


def _kernels() -> Iterator[Finding]:
    """A kernel, launched and compared where there is a GPU, compiled for one where there is none."""
    import torch

    from ipfm.kernels._dispatch import INTERPRETED

    if INTERPRETED:
        yield Finding(
            LIBRARIES, "Triton kernels", "TRITON_INTERPRET=1: computed in Python", "remark", "unset TRITON_INTERPRET"
        )
        return
    if torch.cuda.is_available():
        from ipfm.kernels import reference
        from ipfm.kernels.perturbation import perturb

        index = torch.arange(4, device="cuda")
        y, sigma = torch.randn(4, 3, 8, 8, device="cuda"), torch.ones(4, device="cuda")
        position: dict[str, Any] = {"seed": 1, "stream": 0, "step": 0, "sample_index": index}
        off = float((perturb(y, sigma, 128.0, **position) - reference.perturb(y, sigma, 128.0, **position)).abs().max())
        wrong = not off < 1e-4
        value = f"run; perturb differs from its reference by {off:.1e}"
        yield Finding(LIBRARIES, "Triton kernels", value, "missing" if wrong else "ok")
        return
    from ipfm.kernels._cache import usable_cache
    from ipfm.kernels.bench.compile_report import compile_variant
    from ipfm.kernels.bench.variants import cases, perturb_situations

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cache that cannot be written, which is said elsewhere
        usable_cache()
    (first, *_) = cases(quick=True, of=[perturb_situations])
    length = len(compile_variant(first.code, 90)[0])
    yield Finding(LIBRARIES, "Triton kernels", f"need a GPU; perturb compiles for sm_90 ({length} bytes)")


# -- DeepSpeed ---------------------------------------------------------------------------------------------------------


def _deepspeed() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ipfm.engine.distributed.world import import_deepspeed

    deepspeed = import_deepspeed()
    accelerator = deepspeed.accelerator.get_accelerator()._name
    yield Finding(LIBRARIES, "DeepSpeed", f"{deepspeed.__version__}, accelerator {accelerator}")


def _launchers() -> Iterator[Finding]:
    beside = Path(sys.executable).parent
    for name in ("deepspeed", "torchrun"):
        found = shutil.which(name)
        if found:
            yield Finding(RUN, name, found)
        elif (beside / name).exists():
            remedy = f"source {beside}/activate, or call {beside / name}"
            yield Finding(RUN, name, f"{beside / name}, which is not on the PATH", "remark", remedy)
        else:
            yield Finding(RUN, name, "none", "remark", "python -m torch.distributed.run starts several processes too")


def _group() -> Iterator[Finding]:
    """A process group of one, as a run without a launcher makes it."""
    import torch

    from ipfm.engine.distributed.world import start_world
    from ipfm.engine.runtime.launcher import stop_world

    world = start_world()
    try:
        total = torch.ones(3, device=world.device)
        torch.distributed.all_reduce(total)
        backend = torch.distributed.get_backend()
        yield Finding(RUN, "processes talk by", f"{backend}, on {world.device}")
    finally:
        stop_world()


# -- imports -----------------------------------------------------------------------------------------------------------


def _required(name: str) -> Iterator[Finding]:
    try:
        importlib.import_module(name)
    except Exception as error:
        yield Finding(
            LIBRARIES, name, f"cannot be loaded: {one_line(error)}", "missing", f"pip install --force-reinstall {name}"
        )


def _extra(name: str) -> Iterator[Finding]:
    what, install = EXTRAS[name]
    try:
        if name in FILES_ALONE:
            # Its weights are read, and it asks for torchvision when it is imported.
            yield Finding("extras", name, importlib.metadata.version(name))
            return
        found = importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (None, name):
            yield Finding("extras", name, "not installed", "remark", f"for {what}: {install}")
            return
        yield Finding("extras", name, f"cannot be loaded: {one_line(error)}", "remark", f"for {what}: {install}")
    else:
        yield Finding("extras", name, str(getattr(found, "__version__", "there")))
