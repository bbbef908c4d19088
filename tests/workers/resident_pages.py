"""What `resident_bytes` says before, while and after this process holds pages that it has written."""

from __future__ import annotations

import gc
import json
import mmap
import sys
import time
from pathlib import Path

from ipfm.engine.memory.process import Sampler, largest_resident_bytes, resident_bytes

asked = json.loads(sys.argv[1])
# Nothing may give pages back meanwhile: they would be missing from the growth.
gc.collect()
gc.disable()
before = resident_bytes()
with Sampler(resident_bytes) as sampler:
    # A mapping, written in place: an allocator would take what it has, and might return what lies free beside it.
    block = mmap.mmap(-1, asked["bytes"])
    for place in range(0, asked["bytes"], mmap.PAGESIZE):
        block[place] = 1
    # The reading that was under way may have been of less: the second from here saw all of it.
    written = len(sampler.readings)
    while len(sampler.readings) < written + 2:
        time.sleep(0.005)
    block.close()
    peak = sampler.take_peak()
said = {"before": before, "peak": peak, "after": resident_bytes(), "largest": largest_resident_bytes()}
Path(asked["out"]).write_text(json.dumps(said))
