"""Does the server's verdict agree with the two checkpoints? The demo's test rows as live traffic, with feedback.

    python -m benchmarks.replay [--tasks spam language] [--margin 0.02]

Each task is served three times in one process, as shadow experiments of its full model: against its pruned child,
against a child that lost all but the fewest experts at random, and against itself. A real client sends every test row
with its label as feedback, then the report, the page and `secateur report` are read. The offline comparison evaluates
the same checkpoints on the same rows without a server; its verdict uses each distinct input once, as the server does.
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
from service.statistics.paired import betting_interval

KINDS = ("pruned", "broken", "twin")
LOADED = "deployment is ready"
# Rows in one go; then the shadow catches up, so that none of its items is dropped.
CHUNK = 64
PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """One experiment: what the report says, and what the checkpoints say without a server."""

    task: str
    child: str
    rows: int
    units: int
    dropped: int
    only_control: int
    only_candidate: int
    lower: float
    upper: float
    verdict: str
    offline_only_control: int
    offline_only_candidate: int
    offline_verdict: str
    page_agrees: bool
    terminal_agrees: bool
    rows_per_second: float

    @property
    def agrees(self) -> bool:
        """Counts and verdict are the same, on the wire, on the page and in the terminal.

        A shadow that was shed on a busy machine has met fewer rows; then the verdicts are compared, the counts are not.
        """
        counts = (self.only_control, self.only_candidate) == (self.offline_only_control, self.offline_only_candidate)
        is_fair = self.child != "twin" or self.verdict != "inferior"
        return (
            (counts or self.dropped > 0)
            and self.verdict == self.offline_verdict
            and self.page_agrees
            and self.terminal_agrees
            and is_fair
        )


def replay(tasks: Sequence[DemoTask], margin: float, directory: Path) -> Iterator[Outcome]:
    """Serve, send every test row of each task, and compare; one outcome per task and child."""
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
                began = time.monotonic()
                send_all(address, f"{task.name}-{kind}", rows)
                seconds = time.monotonic() - began
                yield compare(address, task, kind, rows, (full, child), margin, seconds)


def compare(
    address: str,
    task: DemoTask,
    kind: str,
    rows: Sequence[Row],
    evaluations: tuple[Evaluation, Evaluation],
    margin: float,
    seconds: float,
) -> Outcome:
    """The report of one experiment beside the offline comparison."""
    name = f"{task.name}-{kind}"
    report = get_json(address, f"/experiments/{name}")
    page = get(address, f"/experiments/{name}?format=html").decode()
    command = [sys.executable, "-m", "service", "report", name, "--url", f"http://{address}", "--json"]
    terminal = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    control, candidate = _first_of_each(rows, *evaluations)
    only_control, only_candidate = control - candidate, candidate - control
    difference = report["difference"]
    return Outcome(
        task=task.name,
        child=kind,
        rows=len(rows),
        units=report["units"],
        dropped=sum(report["dropped"].values()),
        only_control=report["pairs"]["only_control"],
        only_candidate=report["pairs"]["only_candidate"],
        lower=difference["lower"],
        upper=difference["upper"],
        verdict=report["verdict"],
        offline_only_control=len(only_control),
        offline_only_candidate=len(only_candidate),
        offline_verdict=offline_verdict(len(only_control), len(only_candidate), _distinct(rows), margin),
        page_agrees=report["words"] in html.unescape(page),
        terminal_agrees=(terminal["verdict"], terminal["pairs"]) == (report["verdict"], report["pairs"]),
        rows_per_second=len(rows) / seconds,
    )


def offline_verdict(only_control: int, only_candidate: int, units: int, margin: float) -> str:
    """The word for finished counts, by the interval that the server would have had after the last row."""
    interval = betting_interval(only_control, only_candidate, units)
    if interval.upper < -margin:
        return "inferior"
    if interval.lower > 0:
        return "superior"
    return "non_inferior" if interval.lower > -margin else "undecided"


def _first_of_each(rows: Sequence[Row], *evaluations: Evaluation) -> list[set[int]]:
    """For each evaluation the rows it got right, counting the first of each distinct input."""
    first: dict[bytes, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(_bytes(row), number)
    return [{i for i in first.values() if e.predictions[i] == e.truth[i]} for e in evaluations]


def _distinct(rows: Sequence[Row]) -> int:
    return len({_bytes(row) for row in rows})


def _bytes(row: Row) -> bytes:
    return row.text.encode() if row.image is None else _png(row.image)


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def send_all(address: str, task: str, rows: Sequence[Row]) -> None:
    """Every row once, a chunk at a time, each with its label as feedback; then the shadow has caught up."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_SECONDS)
    for start in range(0, len(rows), CHUNK):
        labels = []
        for number, row in enumerate(rows[start : start + CHUNK], start):
            source = row.text if row.image is None else {"image": base64.b64encode(_png(row.image)).decode()}
            answer = post(connection, "/classify", {"task": task, "inputs": [source], "subject": f"row-{number}"})
            labels.append({"id": answer["id"], "index": 0, "label": row.label})
        post(connection, "/feedback", {"items": labels})
        wait_for_pairs(address, task, start + len(labels))
    connection.close()


def wait_for_pairs(address: str, experiment: str, wanted: int) -> None:
    """Wait until the shadow has run or dropped so many items."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while pairs(address, experiment) < wanted:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{experiment}: the shadow stands at {pairs(address, experiment):.0f} of {wanted} items")
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


COLUMNS = (
    *("task", "child", "rows", "units", "shed", "only full / only child", "offline", "difference at 95 %", "verdict"),
    *("offline", "same everywhere", "rows/s"),
)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for o in outcomes:
        cells = (
            *(o.task, o.child, o.rows, o.units, o.dropped, f"{o.only_control} / {o.only_candidate}"),
            f"{o.offline_only_control} / {o.offline_only_candidate}",
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
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = [task for task in TASKS if task.name in options.tasks]
    outcomes = []
    with tempfile.TemporaryDirectory() as directory:
        for outcome in replay(chosen, options.margin, Path(directory)):
            outcomes.append(outcome)
            print(f"{outcome.task} {outcome.child}: {outcome.verdict}", file=sys.stderr, flush=True)
    print(
        json.dumps([asdict(o) | {"agrees": o.agrees} for o in outcomes], indent=1) if options.json else table(outcomes)
    )
    sys.exit(0 if all(outcome.agrees for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
