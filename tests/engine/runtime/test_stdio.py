"""Programs whose standard streams are closed, full, of a narrow encoding, or read by nobody."""

from __future__ import annotations

import json
import subprocess
import sys

import launch

# One process imports, and a fork of it is each case: {name: (exit code, what was read from the stream)}.
CASES = """
import json, os, sys
from pathlib import Path
from ipfm.engine.runtime.commandline import run_command; from ipfm.engine.runtime.commandline import user_input

def speak(argv):
    print("é · done")
    print("noted", file=sys.stderr)

def chatter(argv):
    with user_input():
        for _ in range(10_000):
            print("x" * 1000)

def open_a_file(argv):
    with open(os.devnull) as file:
        assert file.fileno() > 2

def broken(argv):
    raise BrokenPipeError(32, "another pipe")

def closed(number):
    os.close(number)
    setattr(sys, ("stdin", "stdout", "stderr")[number], None)

def stream(number, target, encoding="utf-8"):
    os.dup2(target, number)
    setattr(sys, ("stdin", "stdout", "stderr")[number], open(number, "w", encoding=encoding, closefd=False))

def case(main, prepare, read=None):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            prepare()
            run_command("program", main, [])
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = 99
        try:
            sys.stdout.flush(), sys.stderr.flush()
        except OSError:
            code = 120  # what Python makes of it at its end
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def gone(number):
    read, write = os.pipe()
    os.close(read)
    stream(number, write)

results = {
    "closed stdout": case(speak, lambda: closed(1)),
    "closed stderr": case(speak, lambda: closed(2)),
    "all closed": case(open_a_file, lambda: [closed(number) for number in range(3)]),
    "reader of stdout gone": case(chatter, lambda: gone(1)),
    "little to a reader that is gone": case(speak, lambda: gone(1)),
    "full": case(speak, lambda: stream(1, os.open("/dev/full", os.O_WRONLY))),
    "another pipe": case(broken, lambda: stream(2, os.open(os.devnull, os.O_WRONLY))),
}
read, write = os.pipe()
results["ascii"] = case(speak, lambda: stream(1, write, "ascii"))
os.close(write)
results["printed"] = os.read(read, 1000).decode()
print(json.dumps(results))
"""


def test_streams() -> None:
    done = subprocess.run([sys.executable, "-c", CASES], env=launch.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "closed stdout": 0,
        "closed stderr": 0,
        "all closed": 0,
        "reader of stdout gone": 141,
        "little to a reader that is gone": 141,
        "full": 1,
        "another pipe": 99,
        "ascii": 0,
        "printed": "\\xe9 \\xb7 done\n",
    }
    assert "program: failed: cannot write: No space left on device" in done.stderr
