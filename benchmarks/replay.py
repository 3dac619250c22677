"""Does the server's verdict agree with the two checkpoints? The demo's test rows as live traffic, with feedback.

    python -m benchmarks.replay [--tasks spam language] [--margin 0.02]
    python -m benchmarks.replay --url http://127.0.0.1:8000

A real client sends every test row with its label as feedback; then the report, the page and `secateur report` are read.
The offline comparison evaluates the same checkpoints on the same rows without a server, and uses each distinct input
(shadow) or each subject's arm (split) as the server does. Without --url each task is served three times by a process of
its own, as shadow experiments of its full model: against its pruned child, against a child that lost all but the fewest
experts at random, and against itself. With --url the experiments of a running demo are used, in their own modes.
Prints a table; exits with 1 if a verdict or a count disagrees, or a twin is called inferior.
"""

import argparse
import base64
import html
import http.client
import io
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.overload import await_message
from models.checkpoint import load_checkpoint
from models.dataset import Row, read_rows
from models.evaluate import Evaluation, evaluate
from models.pruning.prune import prune
from service.demo import CHECKPOINTS, FEWEST, TASKS, DemoTask, ensure_demo
from service.statistics.comparison import Paired, TwoArms
from service.statistics.verdict import verdict

KINDS = ("pruned", "broken", "twin")
LOADED = "deployment is ready"
# Rows in one go; then the shadow catches up, so that none of its items is dropped.
CHUNK = 64
PATIENCE_SECONDS = 120
# Records are written within .2 s, and a report is kept for 2 s.
SETTLE_SECONDS = 3


@dataclass(frozen=True)
class Outcome:
    """One experiment: what the report says, and what the checkpoints say without a server.

    counts: pairs that the full or the child alone got right (shadow); rows labelled and right by arm (split).
    """

    task: str
    child: str
    mode: str
    rows: int
    units: int
    shed: int
    counts: tuple[int, ...]
    offline_counts: tuple[int, ...]
    lower: float
    upper: float
    verdict: str
    offline_verdict: str
    page_agrees: bool
    terminal_agrees: bool
    rows_per_second: float

    @property
    def agrees(self) -> bool:
        """Counts and verdict are the same, on the wire, on the page and in the terminal.

        A shadow that was shed on a busy machine has met fewer rows; then the verdicts are compared, the counts are not.
        """
        counts = self.counts == self.offline_counts or self.shed > 0
        is_fair = self.child != "twin" or self.verdict != "inferior"
        return counts and self.verdict == self.offline_verdict and self.page_agrees and self.terminal_agrees and is_fair


def replay(tasks: Sequence[DemoTask], margin: float, directory: Path) -> Iterator[Outcome]:
    """Serve each task by a process of its own, send its test rows, and compare; one outcome per task and child."""
    ensure_demo()
    for task in tasks:
        broken = directory / f"{task.name}-broken"
        prune(CHECKPOINTS / task.name / "full", "random", FEWEST, broken)
        rows = read_rows(task.data, "test")
        paths = {"pruned": CHECKPOINTS / task.name / "pruned", "broken": broken}
        full = evaluate(load_checkpoint(CHECKPOINTS / task.name / "full"), rows)
        with served(task, paths, margin, directory) as address:
            for kind in KINDS:
                child = evaluate(load_checkpoint(paths[kind]), rows) if kind in paths else full
                yield compare(
                    address, f"{task.name}-{kind}", f"{task.name}-{kind}", (task.name, kind), rows, full, child
                )


def replay_running(address: str, tasks: Sequence[DemoTask]) -> Iterator[Outcome]:
    """Send the test rows of the demo's tasks to a server that runs, and compare; one outcome per experiment."""
    for listed in get_json(address, "/experiments")["data"]:
        task = next((task for task in tasks if task.name == listed["task"]), None)
        if task is None or listed["state"] != "running" or listed["mode"] == "cascade":
            continue
        rows = read_rows(task.data, "test")
        full, child = (evaluate(load_checkpoint(CHECKPOINTS / task.name / name), rows) for name in ("full", "pruned"))
        yield compare(address, listed["name"], task.name, (task.name, "pruned"), rows, full, child)


def compare(
    address: str,
    name: str,
    task: str,
    about: tuple[str, str],
    rows: Sequence[Row],
    full: Evaluation,
    child: Evaluation,
) -> Outcome:
    """Send the rows, and put the report of an experiment beside the offline comparison."""
    before = get_json(address, f"/experiments/{name}")
    began = time.monotonic()
    variants = send_all(address, task, name, rows)
    seconds = time.monotonic() - began
    time.sleep(SETTLE_SECONDS)
    report = get_json(address, f"/experiments/{name}")
    page = get(address, f"/experiments/{name}?format=html").decode()
    command = [sys.executable, "-m", "service", "report", name, "--url", f"http://{address}", "--json"]
    terminal = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if report["mode"] == "shadow":
        counts = (report["pairs"]["only_control"], report["pairs"]["only_candidate"])
        both = paired(rows, full, child)
        offline: tuple[int, ...] = (round(both.only_control), round(both.only_candidate))
        comparison: Paired | TwoArms = both
    else:
        counts = tuple(arm[key] for arm in report["arms"] for key in ("labelled", "right"))
        offline = by_arm([variant == report["candidate"] for variant in variants], full, child)
        comparison = TwoArms(offline[3], offline[2], offline[1], offline[0])
    return Outcome(
        *about,
        mode=report["mode"],
        rows=len(rows),
        units=report["units"],
        shed=sum(report["dropped"].values()) + before["units"],
        counts=counts,
        offline_counts=offline,
        lower=report["difference"]["lower"],
        upper=report["difference"]["upper"],
        verdict=report["verdict"],
        offline_verdict=verdict(comparison, report["margin"])[0],
        page_agrees=report["words"] in html.unescape(page),
        terminal_agrees=(terminal["verdict"], terminal["pairs"]) == (report["verdict"], report["pairs"]),
        rows_per_second=len(rows) / seconds,
    )


def paired(rows: Sequence[Row], full: Evaluation, child: Evaluation) -> Paired:
    """Both checkpoints on the first row of each distinct input."""
    control, candidate = _first_of_each(rows, full, child)
    return Paired(len(control - candidate), len(candidate - control), len({_bytes(row) for row in rows}))


def by_arm(to_child: Sequence[bool], full: Evaluation, child: Evaluation) -> tuple[int, ...]:
    """Rows and right rows of the full, then of the child, each on the rows that it was given."""
    right = [
        (child if is_child else full).predictions[i] == (child if is_child else full).truth[i]
        for i, is_child in enumerate(to_child)
    ]
    arms = ([ok for ok, is_child in zip(right, to_child, strict=True) if is_child is arm] for arm in (False, True))
    return tuple(number for found in arms for number in (len(found), sum(found)))


def _first_of_each(rows: Sequence[Row], *evaluations: Evaluation) -> list[set[int]]:
    """For each evaluation the rows it got right, counting the first of each distinct input."""
    first: dict[bytes, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(_bytes(row), number)
    return [{i for i in first.values() if e.predictions[i] == e.truth[i]} for e in evaluations]


def _bytes(row: Row) -> bytes:
    return row.text.encode() if row.image is None else _png(row.image)


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def send_all(address: str, task: str, experiment: str, rows: Sequence[Row]) -> list[str]:
    """Every row once, a chunk at a time, each with its label as feedback; then a shadow has caught up.

    Returns the deployment that answered each row.
    """
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_SECONDS)
    is_shadow = get_json(address, f"/experiments/{experiment}")["mode"] == "shadow"
    before, variants = pairs(address, experiment), []
    for start in range(0, len(rows), CHUNK):
        labels = []
        for number, row in enumerate(rows[start : start + CHUNK], start):
            source = row.text if row.image is None else {"image": base64.b64encode(_png(row.image)).decode()}
            answer = post(connection, "/classify", {"task": task, "inputs": [source], "subject": f"row-{number}"})
            labels.append({"id": answer["id"], "index": 0, "label": row.label})
            variants.append(answer["variant"])
        post(connection, "/feedback", {"items": labels})
        if is_shadow:
            wait_for_pairs(address, experiment, before + start + len(labels))
    connection.close()
    return variants


def wait_for_pairs(address: str, experiment: str, wanted: float) -> None:
    """Wait until the shadow has run or dropped so many items."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while pairs(address, experiment) < wanted:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{experiment}: the shadow stands at {pairs(address, experiment):.0f} of {wanted:.0f} items"
            )
        time.sleep(0.02)


def pairs(address: str, experiment: str) -> float:
    """Items that the shadow has run or dropped, by the metrics."""
    names = ("secateur_experiment_pairs_total{", "secateur_shadow_dropped_total{")
    lines = get(address, "/metrics").decode().splitlines()
    mine = (line for line in lines if line.startswith(names) and f'experiment="{experiment}"' in line)
    return sum(float(line.rsplit(" ", 1)[1]) for line in mine)


def post(connection: http.client.HTTPConnection, path: str, body: Any) -> Any:
    """Send JSON and read JSON; anything but 200 is an error."""
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(f"{path} answered {response.status}: {content.decode()}")
    return json.loads(content)


def get(address: str, path: str) -> bytes:
    """Read a page; anything but 200 is an error."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_SECONDS)
    connection.request("GET", path)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"{path} answered {response.status}")
    return content


def get_json(address: str, path: str) -> Any:
    """Read a JSON document."""
    return json.loads(get(address, path))


@contextmanager
def served(task: DemoTask, paths: dict[str, Path], margin: float, directory: Path) -> Iterator[str]:
    """A server of its own for one task's three experiments; yields host:port."""
    file = directory / f"{task.name}.yaml"
    file.write_text(json.dumps(config(task, paths, margin, directory)), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "service", "serve", "--config", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = urlsplit(await_message(process, "listening")["url"]).netloc
        for _ in range(2 * len(KINDS)):
            await_message(process, LOADED)
        assert process.stderr is not None
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield address
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_SECONDS)
    finally:
        process.kill()
        process.wait()


def config(task: DemoTask, paths: dict[str, Path], margin: float, directory: Path) -> dict[str, Any]:
    """Each comparison is a task of its own, since a task has one running experiment."""
    full = CHECKPOINTS / task.name / "full"
    deployments, tasks, experiments = {}, {}, {}
    root = Path("/")
    for kind in KINDS:
        name = f"{task.name}-{kind}"
        control, candidate = f"{name}.full", f"{name}.child"
        deployments[control] = {"path": str(full.relative_to(root)), "role": "full"}
        deployments[candidate] = {"path": str(paths.get(kind, full).relative_to(root)), "role": "pruned"}
        tasks[name] = {"deployments": [control, candidate], "full": control}
        arms = [{"deployment": control}, {"deployment": candidate}]
        experiments[name] = {"task": name, "mode": "shadow", "margin": margin, "arms": arms}
    return {
        "version": 1,
        "server": {"port": 0, "ready_off_seconds": 0},
        "models": {"root": str(root), "device": "cpu", "dtype": "float32"},
        "engine": {"shadow_queue_items": 2 * CHUNK},
        "storage": {"url": f"sqlite:///{directory / task.name}.db"},
        "deployments": deployments,
        "tasks": tasks,
        "experiments": experiments,
    }


COLUMNS = ("task", "child", "mode", "rows", "units", "shed", "counts", "offline", "difference at 95 %", "verdict")
MORE_COLUMNS = ("offline", "same everywhere", "rows/s")


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as Markdown."""
    columns = (*COLUMNS, *MORE_COLUMNS)
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for o in outcomes:
        counts, offline = (" / ".join(map(str, found)) for found in (o.counts, o.offline_counts))
        cells = (
            *(o.task, o.child, o.mode, o.rows, o.units, o.shed, counts, offline),
            f"[{100 * o.lower:+.1f}, {100 * o.upper:+.1f}]",
            *(o.verdict, o.offline_verdict, "yes" if o.agrees else "NO", f"{o.rows_per_second:.0f}"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run, print, and exit with 1 on disagreement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [task.name for task in TASKS]
    parser.add_argument("--tasks", nargs="+", choices=names, default=names)
    parser.add_argument("--margin", type=float, default=0.02, help="accuracy that may be lost, as a fraction")
    parser.add_argument("--url", help="a running demo, instead of servers of its own")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = [task for task in TASKS if task.name in options.tasks]
    outcomes = []
    with tempfile.TemporaryDirectory() as directory:
        found = (
            replay_running(urlsplit(options.url).netloc, chosen)
            if options.url
            else replay(chosen, options.margin, Path(directory))
        )
        for outcome in found:
            outcomes.append(outcome)
            print(f"{outcome.task} {outcome.child}: {outcome.verdict}", file=sys.stderr, flush=True)
    print(
        json.dumps([asdict(o) | {"agrees": o.agrees} for o in outcomes], indent=1) if options.json else table(outcomes)
    )
    sys.exit(0 if all(outcome.agrees for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
