"""How the networks are executed: the order of their activations in memory, and compilation."""

from __future__ import annotations

import functools
import os
import struct
import sys
from pathlib import Path

import torch

from ipfm.engine.config import MemoryFormat
from ipfm.engine.runtime.errors import described
from ipfm.engine.runtime.files import unwritable_ancestor
from ipfm.engine.sampling.memory_format import set_memory_format
from ipfm.models import Precond

# Networks of one class share a code object, whose compiled forms are counted together: trained, frozen, without
# gradients, for each of the networks and shapes of a run. Beyond the limit torch would run them uncompiled.
COMPILED_FORMS = 64


def set_execution(net: Precond, *, memory_format: MemoryFormat, compiled: bool, device: torch.device) -> None:
    """Set how `net` computes from now on; its weights and their names stay.

    Args:
        net: a network on `device`, not one whose weights ZeRO 3 gathers.
        memory_format: order of the activations; auto is channels_last on GPUs.
        compiled: by torch.compile, at its first use with each kind of input.
        device: where it runs.
    """
    set_memory_format(net, memory_format, device)
    if compiled:
        from torch._inductor import config as inductor

        mend_cache()
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_FORMS)
        # The dropout of PyTorch's operations: a network's second pass must repeat the first one's, whatever was fused.
        inductor.fallback_random = True
        # The U-Net alone: what is around it is little, and looks at its arguments with conditions.
        net.model.compile(dynamic=False)


@functools.cache
def mend_cache() -> None:
    """Remove libraries that are no whole ones from the cache of torch.compile, and say so on stderr.

    A process that is killed while it compiles leaves one, at which every later process would end: the compiler writes
    in place, and torch takes what is there. One that is being written is locked, and stays.
    """
    from torch._inductor.codecache import get_lock_dir
    from torch._inductor.runtime.runtime_utils import cache_dir
    from torch.utils._filelock import FileLock

    removed = 0
    for library in Path(cache_dir()).glob("*/*.so"):
        if _is_whole(library):
            continue
        try:
            with FileLock(os.path.join(get_lock_dir(), f"{library.name.partition('.')[0]}.lock"), timeout=0):
                if not _is_whole(library):
                    library.unlink(missing_ok=True)
                    removed += 1
        except (TimeoutError, OSError):  # being compiled at the moment, or another user's
            continue
    if removed:
        libraries = f"{removed} broken librar{'y' if removed == 1 else 'ies'}"
        print(f"removed {libraries} of torch.compile from {cache_dir()}", file=sys.stderr)


def _is_whole(library: Path) -> bool:
    """Whether a file is as long as its header says: the table of sections is an ELF library's end."""
    try:
        with library.open("rb") as file:
            header = file.read(64)
            length = os.fstat(file.fileno()).st_size
    except OSError:
        return True
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    if header[4:6] != b"\x02\x01":  # not one of 64 bits, least significant byte first: nothing is known of its end
        return True
    (sections,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return length >= sections + size * count


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile has a folder for what it compiles, and on a CPU the C++ compiler that it needs.

    Raises:
        ValueError: it has not.
    """
    try:
        # It makes the folder, some of the modules that it is imported with too.
        from torch._inductor.runtime.runtime_utils import cache_dir

        above = unwritable_ancestor(Path(cache_dir()))
        unwritable = "" if above is None else f"{above}: no permission"
    except OSError as error:
        unwritable = described(error)
    if unwritable:
        raise ValueError(
            f"compile cannot keep what it compiles ({unwritable}): name a folder that can be written by "
            "TORCHINDUCTOR_CACHE_DIR"
        )
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        message = "compile needs a C++ compiler on a CPU, and there is none: install g++, or leave compile out"
        raise ValueError(message) from error
