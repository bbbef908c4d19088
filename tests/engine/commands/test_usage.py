"""What ipfm says of itself: help within a page, versions, shell completion; and that it ends quietly at `| head`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import launch
import pytest
from launch import BIN, ROOT

from ipfm.engine.commands.main import Command, _main
from ipfm.engine.commands.sample.command import Sample
from ipfm.engine.commands.usage import Shell, completion_script, summary
from ipfm.engine.runtime.commandline import run_command

COMMANDS = {about.name: kind for kind, about in map(get_args, get_args(Command))}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run_command("ipfm", _main, arguments)
    assert not stop.value.code
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_list_of_commands_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rows = said(capsys, "--help").splitlines()
    assert len(rows) <= 24 and max(map(len, rows)) <= 100
    for name, kind in COMMANDS.items():
        assert [row.split() for row in rows if row.startswith(f"  {name} ")] == [[name, *summary(kind).split()]]
    text = "\n".join(rows)
    assert "example: ipfm " in text and "exit codes: 0 done; 1 failed; 2 bad input" in text and "128 + n" in text
    assert said(capsys) == said(capsys, "-h") == text + "\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_a_page_without_noise(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, name, "--help")
    rows = text.splitlines()
    assert len(rows) <= 48 and max(map(len, rows)) <= 100
    assert re.search(rf"(example|Example|^ +).*ipfm {name} ", text, re.M)
    for noise in ("None", "(default: )", "(default: False)", "--no-", "[FLOAT"):
        assert noise not in text
    assert not [row for row in rows if re.fullmatch(r"[│|] +[│|]", row)]


def test_every_command_is_documented() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert set(sections) == set(COMMANDS)
    for name, text in sections.items():
        assert f"| [`{name}`](#{name}) |" in page and re.search(rf"^    ipfm {name} ", text, re.M)
        if "json" in {f.name for f in fields(COMMANDS[name])}:
            assert "| key | |" in text


QUICK = """
import sys
from ipfm.engine.commands.main import main
for given in (["--version"], ["--help"], ["sample", "--help"], ["completion", "zsh"]):
    sys.argv = ["ipfm", *given]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
print(*sorted({"torch", "triton", "deepspeed", "matplotlib", "numpy"} & set(sys.modules)), "loaded")
"""


def test_versions_and_help_need_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUICK], env=launch.environment(), capture_output=True, text=True, check=True
    )
    assert re.match(
        r"ipfm \S+\nPython 3\.\d+\.\d+\ntorch \d\S+\ntriton \d\S+\ndeepspeed \d\S+\nusage: ipfm", done.stdout
    )
    assert done.stdout.endswith("\nloaded\n")


# What bash does when TAB is pressed: calls the function that was registered, with the words of the line.
BASH = """
source "$1"
function=$(complete -p ipfm); function=${function##*-F }; function=${function%% *}
complete_line() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  $function
  echo "${COMPREPLY[*]}"
}
complete_line ipfm sa
complete_line ipfm sample --
complete_line ipfm sample --solver h
complete_line ipfm info "$2/mod"
complete_line ipfm completion ""
"""


def test_bash_completes_without_python(tmp_path: Path) -> None:
    script = tmp_path / "ipfm.bash"
    script.write_text(completion_script(Command, "bash"))
    (tmp_path / "model").mkdir()
    done = subprocess.run(
        [shutil.which("bash") or "bash", "--norc", "-c", BASH, "bash", script, tmp_path],
        capture_output=True, text=True, env={"PATH": ""}, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    command, options, choice, file, shells = done.stdout.splitlines()
    assert (command, choice, file) == ("sample", "heun", f"{tmp_path}/model")
    assert set(options.split()) == {"--help"} | {f"--{f.name.replace('_', '-')}" for f in fields(Sample)[1:]}
    assert shells.split() == ["bash", "zsh", "fish"]


@pytest.mark.parametrize(("shell", "start"), [("zsh", "#compdef ipfm\n"), ("fish", "# AUTOMATICALLY GENERATED")])
def test_scripts_of_other_shells(shell: Shell, start: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("ipfm", _main, ["completion", shell])
    script = capsys.readouterr().out
    assert script.startswith(start)
    assert all(name in script for name in COMMANDS) and "heun-steps" in script and "None" not in script


# As recipes read their options.
RECIPE = """
import dataclasses
from ipfm.engine.runtime.commandline import parse, run_command, user_input

@dataclasses.dataclass
class Options:
    seed: int = 0

def main(argv):
    with user_input():
        parse(Options, argv, prog="recipe.py", description="A recipe.")

run_command("recipe.py", main, ["--help"])
"""


@pytest.mark.parametrize(
    "command", [[BIN / "ipfm", "sample", "--help"], [sys.executable, "-c", RECIPE]], ids=["ipfm", "recipe"]
)
def test_nobody_reads_to_the_end(command: list[str]) -> None:
    """The reader has gone, as after `| head -1`: no word, and the code of SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=launch.environment())
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
