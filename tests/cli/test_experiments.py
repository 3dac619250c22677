"""`secateur report` and `secateur promote` against a real server, and against servers that are none."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.cli import experiments
from service.cli.experiments import _number_line, _print_report
from service.experiments.phrases import headline
from tests.service.conftest import Harness
from tests.service.experiments import reports
from tests.service.experiments.live import no_cache, report_of, shadow, split, swayed_loader
from tests.service.experiments.reports import report
from tests.service.toys import toy_settings

Run = Callable[..., Any]
SETTLED = {"ramp": {"steps": [5, 25, 100], "units": 1000}}


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    """A server with one split and admin routes."""
    running = Harness(toy_settings(tmp_path, experiments=split(**SETTLED), admin={"enabled": True}), swayed_loader())
    running.wait_loaded()
    with no_cache():
        yield running
    running.close()


def test_a_report_is_printed_as_the_server_tells_it(harness: Harness, run_cli: Run) -> None:
    for number in range(20):
        harness.classify("0", subject=f"user-{number}")
    printed = run_cli("report", "exp", "--url", harness.server.url)
    assert printed.code == 0
    for said in ("exp, revision 1 \u00b7 split of task mood", "May mood-pruned replace mood-full?", "Too early to say"):
        assert said in printed.out
    for column in ("arm", "weight", "p95", "mood-full", "mood-pruned", "configured"):
        assert column in printed.out
    document = run_cli("report", "exp", "--url", f"{harness.server.url}/", "--json").document
    assert document.keys() == report_of(harness).keys()
    listed = run_cli("report", "--url", harness.server.url)
    assert listed.code == 0
    assert "exp" in listed.out
    assert run_cli("report", "--url", harness.server.url, "--json").document["data"][0]["name"] == "exp"


def test_promote_takes_the_ramp_s_next_step_and_says_where_it_stands(harness: Harness, run_cli: Run) -> None:
    url = ("--url", harness.server.url)
    assert report_of(harness)["traffic"] == 5
    ran = run_cli("promote", "exp", *url)
    assert ran.code == 0
    assert "25 % of traffic (5 \u2192 [25] \u2192 100 %)" in ran.out
    assert run_cli("promote", "exp", "--to", "60", *url, "--json").document["traffic"] == 60
    assert run_cli("promote", "exp", "--pause", *url, "--json").document["state"] == "paused"
    assert run_cli("promote", "exp", "--resume", *url, "--json").document["state"] == "running"
    ended = run_cli("promote", "exp", "--end", "candidate", *url)
    assert "ended: mood-pruned answers" in ended.out
    assert harness.classify("0").json()["variant"] == "mood-pruned"
    again = run_cli("promote", "exp", *url)
    assert (again.code, again.out) == (2, "")
    assert "raise its revision to run it again (409 revision_required)" in again.err


def test_requests_that_make_no_sense(harness: Harness, run_cli: Run) -> None:
    url = ("--url", harness.server.url)
    unknown = run_cli("report", "nope", *url)
    assert (unknown.code, unknown.out) == (2, "")
    assert "no experiment has this name (404 experiment_not_found); `secateur report` lists" in unknown.err
    assert run_cli("promote", "exp", "--pause", "--resume", *url).code == 2
    assert "at most two decimals" in run_cli("promote", "exp", "--to", "1.005", *url).err
    assert run_cli("promote", "exp", "--to", "101", *url).code == 2
    assert "(404 experiment_not_found)" in run_cli("report", "exp?format=html#", *url).err


def test_a_server_without_admin_routes_is_explained(tmp_path: Path, run_cli: Run) -> None:
    running = Harness(toy_settings(tmp_path, experiments=shadow()), swayed_loader())
    running.wait_loaded()
    refused = run_cli("promote", "exp", "--to", "50", "--url", running.server.url)
    running.close()
    assert refused.code == 2
    assert "admin.enabled" in refused.err


class Canned(BaseHTTPRequestHandler):
    """Answers every request alike and remembers what was asked."""

    answer: tuple[int, bytes] = (200, b"{}")
    asked: list[tuple[str, str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.command, self.path, self.headers["authorization"]))
        status, body = self.answer
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def canned() -> Iterator[Callable[[int, bytes], tuple[str, list[tuple[str, str, str | None]]]]]:
    servers: list[ThreadingHTTPServer] = []

    def serve(status: int, body: bytes) -> tuple[str, list[tuple[str, str, str | None]]]:
        asked: list[tuple[str, str, str | None]] = []
        handler = type("Handler", (Canned,), {"answer": (status, body), "asked": asked})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_key_is_sent_and_no_proxy_is_asked_for_loopback(
    canned: Any, run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    url, asked = canned(200, json.dumps({"object": "list", "data": []}).encode())
    key = tmp_path / "key"
    key.write_text("secret-of-mine\n", encoding="utf-8")
    ran = run_cli("report", "--url", url, "--key-file", key)
    assert ran.out == "No experiment is configured.\n"
    assert asked == [("GET", "/experiments", "Bearer secret-of-mine")]
    key.write_text("two words", encoding="utf-8")
    ran = run_cli("report", "--url", url, "--key-file", key)
    assert (ran.code, len(asked)) == (2, 1)
    assert "must hold one API key" in ran.err
    assert "two words" not in ran.err


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b'{"error":{"code":"missing_key","message":"a key is needed"}}', "give a key with --key-file"),
        (403, b'{"error":{"code":"insufficient_scope","message":"no"}}', "the scope admin"),
        (502, b"<html>", "the server answered 502, and not as this service does: is --url right?"),
        (200, b"{}", "has another shape than this version knows"),
        (200, b"not json", "has another shape than this version knows"),
    ],
)
def test_answers_that_are_no_report(canned: Any, run_cli: Run, status: int, body: bytes, message: str) -> None:
    url, _ = canned(status, body)
    ran = run_cli("report", "exp", "--url", url)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_nobody_at_home_and_no_address(run_cli: Run) -> None:
    silent = run_cli("report", "--url", "http://127.0.0.1:9")
    assert silent.code == 1
    assert "nothing answers at http://127.0.0.1:9" in silent.err
    assert "--url is 'file:///etc/passwd', must begin with http" in run_cli("report", "--url", "file:///etc/passwd").err


@pytest.mark.parametrize("mode", ["shadow", "split", "inferior", "cascade", "empty"])
def test_every_mode_is_printed_whole(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(getattr(reports, mode)())
    _print_report(found)
    out = capsys.readouterr().out
    assert headline(found) in out
    assert found.words in out
    assert "None" not in out
    for step in found.steps:
        assert step.detail in out
    for row in found.classes:
        assert row.label in out


def test_markup_in_labels_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    flips = [{"control_label": "[bold]red[/bold]", "candidate_label": "[/]", "n": 3}]
    _print_report(report(reports.shadow(), flips=flips, words="[red]said[/red]"))
    out = capsys.readouterr().out
    assert "[bold]red[/bold]" in out
    assert "[red]said[/red]" in out


def test_the_number_line_is_to_scale() -> None:
    found = report(reports.split())
    difference = found.difference
    assert difference is not None
    line = _number_line(found).splitlines()[0]
    low = line.index("\u251c")
    width = line.rindex("\u2524") - low
    assert width == experiments.LINE_WIDTH - 1
    span = difference.upper - difference.lower
    assert line.index("\u25cf") - low == round((difference.estimate - difference.lower) / span * width)
    assert line.index("\u2502") - low == round(-difference.lower / span * width)
    assert line.index("\u250a") - low == round((-found.margin - difference.lower) / span * width)
