"""Run `ipfm sample` as one of several processes; what each command line said goes to rank{rank}.json."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from ipfm.engine.commands.main import _main
from ipfm.engine.runtime.commandline import run_command

job = json.loads(sys.argv[1])
rank = os.environ["RANK"]
out, err = [], []
for line in job["jobs"]:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as warned:
        run_command("ipfm", _main, line)
    out.append(said.getvalue())
    err.append(warned.getvalue())
Path(job["out"], f"rank{rank}.json").write_text(json.dumps({"said": out, "err": err}))
