"""Processes that die, and processes that share: nothing acknowledged is lost, nothing is counted twice or missed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.metrics import Metrics
from tests.service.storage.conftest import SECONDS, Open
from tests.service.storage.records import exposure, flushed, label, number, send

ROOT = Path(__file__).parents[3]

ACKNOWLEDGE = """
import sys
from itertools import count
from service.metrics import Metrics
from service.sections import Storage
from service.storage.store import Store
from tests.service.storage.conftest import KEY
from tests.service.storage.records import exposure, label, send

store = Store.open(Storage(url=sys.argv[1]), KEY, Metrics())
for number in count():
    store.record(exposure(f"{number}"))
    send(store, label(f"{number}"))
    print(number, flush=True)
"""

SHARE = """
import sys
from service.metrics import Metrics
from service.sections import Storage
from service.storage.store import Store
from tests.service.storage.conftest import KEY
from tests.service.storage.records import exposure, label, send

_, url, mine, other, items = sys.argv
store = Store.open(Storage(url=url), KEY, Metrics(), replica=mine)
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(items)):
    # Backwards in one of them, so that the two meet the same units in opposite orders.
    unit = number if mine == "a" else int(items) - 1 - number
    store.record(exposure(f"{mine}-{number}", unit=f"unit-{unit}"))
    if number % 10 == 9:
        send(store, *(label(f"{other}-{n}") for n in range(number - 9, number + 1)))
store.close(20)
"""


def start(script: str, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def test_what_was_acknowledged_survives_a_kill(url: str, open_store: Open) -> None:
    with start(ACKNOWLEDGE, url) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        acknowledged = 5 + len(process.stdout.read().splitlines())
    store = open_store()
    assert send(store, *(label(f"{number}") for number in range(acknowledged))) == ("unchanged",) * acknowledged
    # The answers came before their labels through the same queue.
    assert number(store, "labelled", "small") >= acknowledged


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_two_replicas_share_a_database(url: str, open_store: Open) -> None:
    items = 200
    processes = [start(SHARE, url, *names, str(items)) for names in (("a", "b"), ("b", "a"))]
    for process in processes:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.wait(SECONDS) == 0
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()
    store = open_store()
    assert number(store, "requests", "small") == 2 * items
    assert number(store, "units", "small") == items
    assert number(store, "labelled", "small") == number(store, "repeats") == items
    assert [tally for tally in store.tallies("e", 1) if tally.name == "dropped"] == []


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_two_stores_join_what_each_other_wrote(url: str, open_store: Open) -> None:
    mine, others = Metrics(), Metrics()
    first, second = open_store(mine), open_store(others)
    first.record(exposure("a", unit="u"))
    flushed(first, mine)
    assert send(second, label("a"), label("b")) == ("matched", "orphan")
    first.record(exposure("b", unit="u"))
    flushed(first, mine)
    assert (number(second, "labelled", "small"), number(second, "repeats")) == (1, 1)
