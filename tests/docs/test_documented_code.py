"""The Python that README.md and docs/kernels.md print for other code runs as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import launch
import pytest
import soak
import torch

from ipfm.models import load_model, save_model

KERNELS = launch.ROOT / "docs" / "kernels.md"


def printed(page: Path, part: str | None = None) -> dict[str, str]:
    """Blocks of Python of a page by the heading above them; `part`: below the headings within this one."""
    text, level = page.read_text(encoding="utf-8"), "## "
    if part is not None:
        (text,) = re.findall(rf"^## {part}\n(.*?)^## ", text, flags=re.MULTILINE | re.DOTALL)
        level = "### "
    found: dict[str, str] = {}
    for section in re.split(rf"^{level}", text, flags=re.MULTILINE)[1:]:
        for block in re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL):
            assert section.partition("\n")[0] not in found, "one block a section: they do not build on each other"
            found[section.partition("\n")[0]] = block
    return found


# As a notebook does: within an event loop, where __main__ has no file, and the cell a second time.
NOTEBOOK = """
import asyncio, os, sys

block = sys.argv[1]
assert not hasattr(sys.modules["__main__"], "__file__")

async def cell(text):
    exec(compile(text, "<cell>", "exec"), globals())

async def session():
    await cell(block)
    first = images
    await cell(block)  # the run is finished: it is read again
    assert images.equal(first) and images.shape == (16, 1, 8, 8)

asyncio.run(session())
# A program that is started from here must not take itself for one process of several.
assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & set(os.environ)
"""


def test_the_library_example_of_the_readme(tmp_path: Path) -> None:
    """Two cells of a notebook, in a folder that holds the teacher it names."""
    (block,) = [code for code in printed(launch.ROOT / "README.md").values() if "Distiller(" in code]
    assert len([line for line in block.splitlines() if line]) <= 6
    (named,) = re.findall(r'load_teacher\("(.*?)"\)', block)
    (run,) = re.findall(r'\.run\("(.*?)"\)', block)
    soak.make_teacher(tmp_path / named)
    before = set(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, block], cwd=tmp_path, env=launch.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_model(tmp_path / run / "generator").D == 128.0
    assert all(tmp_path / run in (path, *path.parents) for path in set(tmp_path.rglob("*")) - before)


def test_a_generator_in_three_lines_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [code for code in printed(launch.ROOT / "README.md").values() if "load_generator(" in code]
    assert len([line for line in block.splitlines() if line]) == 3
    (named,) = re.findall(r'load_generator\("(.*?)"\)', block)
    net = load_model(soak.make_teacher(tmp_path / "net"))
    save_model(net, tmp_path / named, extra={"task": "generator", "sigmas": [2.5]})
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["images"].shape == (64, 1, 8, 8) and "D = 128" in repr(names["G"])


def test_every_kernel_has_a_documented_import() -> None:
    import ipfm.kernels

    table = " ".join(re.findall(r"^\| `from ipfm\.kernels import (.*?)`", KERNELS.read_text(), flags=re.MULTILINE))
    assert sorted(table.replace(",", "").split()) == sorted(ipfm.kernels.__all__)


SNIPPETS = printed(KERNELS, "Snippets")


@pytest.mark.parametrize("heading", SNIPPETS)
def test_the_snippets_for_other_code(heading: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each one trains what it builds."""
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(SNIPPETS[heading], f"{KERNELS.name}: {heading}", "exec"), names)
    trained = [value for value in names.values() if isinstance(value, torch.nn.Module)]
    gradients = [p.grad for module in trained for p in module.parameters() if p.grad is not None]
    assert gradients and all(bool(grad.isfinite().all()) for grad in gradients)
    assert any(float(grad.abs().sum()) > 0 for grad in gradients)
    shown = capsys.readouterr().out
    if "AdamEMA" in heading:
        assert shown == "applied: True steps: 10\n"
        averages = names["averages"]
        assert isinstance(averages, list) and not any(
            torch.equal(e, p) for e, p in zip(averages, trained[0].parameters(), strict=True)
        )
    if "ipfm_loss" in heading:
        assert re.fullmatch(r"loss: -?\d+\.\d+\n", shown)
