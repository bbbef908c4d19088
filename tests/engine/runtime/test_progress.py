"""The progress of long work: a bar on a terminal, a line now and then elsewhere, nothing of what is short."""

from __future__ import annotations

import io
import re
import sys

import pytest

from ipfm.engine.runtime.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr("ipfm.engine.runtime.progress.time.perf_counter", lambda: now[0])
    with ProgressBar("sample", 1000) as bar:
        for _ in range(100):
            now[0] += 1.0
            bar.advance(10)
    lines = capsys.readouterr().err.splitlines()
    # Not before ten seconds, nor sooner after each other; the work takes a hundred.
    assert [re.search(r"(\d+)/1000", line)[1] for line in lines] == [str(done) for done in range(100, 1001, 100)]
    assert lines[0].startswith("sample: ") and "10.00 img/s" in lines[0] and "\r" not in "".join(lines)


def test_short_work_and_other_processes_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("sample", 10) as bar:
        bar.advance(10)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar("sample", 10, pause=0.0, enabled=False) as bar:
        bar.advance(10)
    assert terminal.getvalue() == "" and capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar("sample", 10, leave=True) as bar:
        bar.advance(4)
        bar.move(10)
    assert "\r" in terminal.getvalue() and "10/10" in terminal.getvalue() and "sample" in terminal.getvalue()
