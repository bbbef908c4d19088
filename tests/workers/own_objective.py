"""Commands of `ipfm` in a process of their own, one after the other. Argument, JSON: the arguments of each by a name.

Prints JSON: what each printed, or the line that refused it.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

from ipfm.engine.commands.main import _main as ipfm
from ipfm.engine.runtime.commandline import BadInput

said = {}
for name, arguments in json.loads(sys.argv[1]).items():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            ipfm(arguments)
        except SystemExit as stop:
            assert not stop.code, name
        except BadInput as error:
            print(f"error: {error}")
    said[name] = printed.getvalue()
print(json.dumps(said))
