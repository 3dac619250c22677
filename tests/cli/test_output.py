"""What commands print, and how far long work is."""

import sys
import time
from typing import Any

import pytest

from service.cli import progress
from service.cli.output import percent, print_json, print_table, size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (12_345_678, "12.3 MB")],
)
def test_size(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


def test_percent_of_nothing() -> None:
    assert (percent(1, 4), percent(1, 0)) == ("25.0 %", "-")


def test_json_keeps_letters_and_refuses_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"label": "日本語"})
    assert "日本語" in capsys.readouterr().out
    with pytest.raises(ValueError, match="JSON"):
        print_json({"score": float("nan")})


def test_a_table_in_a_pipe_is_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("t", ("name", "value"), [("x" * 90, "y" * 60)])
    assert "x" * 90 in capsys.readouterr().out


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.progress_shown() as report:
        for done in range(1, 41):  # one second per step
            now[0] += 1
            report(done, 40, "training")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "training: 16/40\ntraining: 32/40\n"


def test_a_terminal_gets_one_bar_per_stage_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    with progress.progress_shown() as report:
        _two_stages(report)
    captured = capsys.readouterr()
    assert captured.out == ""
    # Two bars, each with its last message.
    assert 0 < captured.err.rindex("reading 2") < captured.err.rindex("[cut] 2")
    assert captured.err.rindex("2/2") > captured.err.rindex("reading 2")


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.progress_shown() as report:
        _two_stages(report)
    assert capsys.readouterr().err == ""


def _two_stages(report: Any) -> None:
    for message in ("reading", "[cut]"):
        for done in range(3):
            report(done, 2, f"{message} {done}")
