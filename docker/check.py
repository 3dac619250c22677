"""What docker/check.sh asks of the running containers, from outside. Standard library only; exits with 1 on a failure.

    check.py answers SERVICE              every task answers through the published port, each deployment of it
    check.py traffic SERVICE FILE         send requests and labels, note in FILE what was sent and what came back
    check.py numbers SERVICE PROMETHEUS FILE   Prometheus' answers to the dashboard's queries equal FILE
    check.py busy SERVICE SECONDS         mixed traffic with labels, so that there is something to draw
    check.py label SERVICE FILE           send one more label and note in FILE what the experiments then hold
    check.py recall SERVICE FILE          the experiments hold what FILE says
    check.py keys SERVICE PROMETHEUS KEY  only who has a key is served, and Prometheus has one of its own
    check.py refused SERVICE KEY          a key that was taken out is none any more
    check.py load SERVICE FILE [SECONDS]  send requests until refused, or long enough; note in FILE what became of them
    check.py steady FILE                  every request of FILE was answered
    check.py drained FILE LOG             no request of FILE was lost, and LOG, the service's, has as many answers

SERVICE and PROMETHEUS are addresses such as 127.0.0.1:8000.
"""

import base64
import gzip
import json
import math
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

# The key to call with, where the service asks for one.
KEY = os.environ.get("SECATEUR_KEY", "")
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "demo" / "data"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "secateur.json"
TEXT_TASKS = ("spam", "icd10", "language")
IMAGE_TASK, IMAGE, IMAGE_LABEL = "digits", DATA / "seven.png", "7"
# Far below what the demo reaches on its test rows, far above chance.
RIGHT_SHARE = 0.6
ROWS = 60
SUBJECTS = 40
LONG_WORDS = 4000
SECONDS = 30
SCRAPES_SECONDS = 60
REPORT_SECONDS = 60
# Longer than a transaction of records waits, and than a report is reused.
COMMIT_SECONDS = 3
CLIENTS = 8


def main() -> None:
    every = (answers, traffic, numbers, busy, label, recall, keys, refused, load, steady, drained)
    commands: dict[str, Callable[..., None]] = {command.__name__: command for command in every}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])


def ask(address: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """One exchange over a connection of its own: status and JSON. Raises OSError or HTTPException without an answer."""
    connection = HTTPConnection(address, timeout=SECONDS)
    try:
        text = None if body is None else json.dumps(body)
        kinds = {} if body is None else {"content-type": "application/json"}
        key = {"authorization": f"Bearer {KEY}"} if KEY else {}
        connection.request("GET" if body is None else "POST", path, text, {**kinds, **key, **(headers or {})})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def get(address: str, path: str) -> Any:
    """The JSON of a page that must be there."""
    status, document = ask(address, path)
    check(status == 200, f"GET {path} answered {status}: {document}")
    return document


def check(is_right: bool, complaint: str) -> None:
    if not is_right:
        sys.exit(f"check: {complaint}")


def wait_for(what: str, seconds: float, look: Callable[[], str]) -> None:
    """Look until there is no complaint any more."""
    deadline = time.monotonic() + seconds
    while complaint := look():
        check(time.monotonic() < deadline, f"{what}, after {seconds:g} s: {complaint}")
        time.sleep(1)


def test_rows(task: str) -> Iterator[tuple[str, str]]:
    """Distinct texts of a task's test rows, with their labels."""
    seen = set()
    with gzip.open(DATA / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["split"] == "test" and row["text"] not in seen:
                seen.add(row["text"])
                yield row["text"], row["label"]


def answers(service: str) -> None:
    """Every deployment of every task answers, mostly right."""
    deployments = [d for d in get(service, "/deployments")["data"] if check_ready(d)]
    for deployment in deployments:
        task, variant = deployment["task"], deployment["name"]
        rows: list[tuple[Any, str]]
        if task == IMAGE_TASK:
            rows = [({"image": base64.b64encode(IMAGE.read_bytes()).decode()}, IMAGE_LABEL)]
        else:
            rows = list(islice(test_rows(task), ROWS))
        body = {"task": task, "variant": variant, "inputs": [given for given, _ in rows]}
        status, document = ask(service, "/classify", body)
        check(status == 200, f"{variant} answered {status}: {document}")
        right = sum(item["label"] == label for item, (_, label) in zip(document["data"], rows, strict=True))
        check(right >= RIGHT_SHARE * len(rows), f"{variant} is right on {right} of {len(rows)} rows")
        print(f"  {variant}: {right} of {len(rows)} right")
    check({d["task"] for d in deployments} == {*TEXT_TASKS, IMAGE_TASK}, "a task of the demo is missing")


def check_ready(deployment: dict[str, Any]) -> bool:
    check(deployment["state"] == "ready", f"{deployment['name']} is {deployment['state']}")
    return True


def traffic(service: str, file: str) -> None:
    """Requests with subjects, then their labels; one after the other, so that their numbers are exact."""
    requests: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    arms: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    batch = []
    for task in TEXT_TASKS:
        for number, (text, label) in enumerate(islice(test_rows(task), SUBJECTS)):
            body = {"task": task, "inputs": text, "subject": f"subject-{number}"}
            status, document = ask(service, "/classify", body)
            check(status == 200, f"{task} answered {status}: {document}")
            requests[document["variant"]] += 1
            codes["200"] += 1
            if document["experiment"]:
                arms[f"{document['experiment']['name']} {document['experiment']['arm']}"] += 1
            batch.append((task, {"id": document["id"], "label": label}))
        long = {"task": task, "variant": "full", "inputs": "word " * LONG_WORDS, "truncate": False}
        status, document = ask(service, "/classify", long)
        check(status == 422, f"a text that is too long answered {status}")
        codes["422"] += 1
        requests[f"{task}-full"] += 1
    # Answered once these labels are committed. Those whose request is not yet written are joined to it later.
    status, document = ask(service, "/feedback", {"items": [item for _, item in batch]})
    check(status == 200 and document["accepted"] == len(batch), f"feedback answered {status}: {document}")
    labels.update(task for task, _ in batch)
    sent = {"requests": requests, "codes": codes, "arms": arms, "labels": labels}
    Path(file).write_text(json.dumps(sent), encoding="utf-8")
    print(f"  sent {sum(requests.values())} requests and {sum(labels.values())} labels")


def panel_queries() -> dict[str, list[str]]:
    """Title of each panel -> what it asks, its variables filled in."""
    document = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    variables = {variable["name"]: variable["allValue"] for variable in document["templating"]["list"]}

    def filled(expr: str) -> str:
        for name, value in variables.items():
            expr = expr.replace(f"${name}", value)
        return expr.replace("$__rate_interval", "1m")

    panels = [panel for panel in document["panels"] if "targets" in panel]
    return {panel["title"]: [filled(target["expr"]) for target in panel["targets"]] for panel in panels}


def as_totals(expr: str) -> str:
    """The same query of the counters themselves instead of their rates, which can be compared with a count."""
    return re.sub(r"rate\(([^\[]*)\[1m\]\)", r"\1", expr)


def query(prometheus: str, expr: str) -> dict[str, float]:
    """Values by the series' labels, joined by spaces."""
    document = get(prometheus, f"/api/v1/query?{urlencode({'query': expr})}")
    found: list[dict[str, Any]] = document["data"]["result"]
    series = [({k: v for k, v in one["metric"].items() if k != "__name__"}, float(one["value"][1])) for one in found]
    return {" ".join(value for _, value in sorted(labels.items())): value for labels, value in series}


def numbers(service: str, prometheus: str, file: str) -> None:
    """The dashboard's queries tell what the client knows. The service must be idle, and fresh when `traffic` began."""
    sent = json.loads(Path(file).read_text(encoding="utf-8"))
    panels = panel_queries()
    deployments = get(service, "/deployments")["data"]
    # Every deployment was asked once before by `answers`.
    requests = {f"{d['task']} {d['name']}": 1 + sent["requests"].get(d["name"], 0) for d in deployments}
    codes = {**sent["codes"], "200": sent["codes"]["200"] + len(deployments)}
    wanted: list[tuple[str, str, dict[str, float]]] = [
        ("Requests by deployment", as_totals(panels["Requests by deployment"][0]), requests),
        ("Answers by status", as_totals(panels["Answers by status"][0]), codes),
        ("Labels received", f"sum by (task) ({as_totals(panels['Labels received'][0])})", sent["labels"]),
        ("Requests per second", as_totals(panels["Requests per second"][0]), {"": sum(codes.values())}),
        ("p95", f"sum(max by (task, variant) ({counted(panels['p95'][0])}))", {"": codes["200"]}),
        ("Ready", panels["Ready"][0], {"": 1}),
        ("Memory saved", panels["Memory saved"][0], savings(deployments, "ratio")),
        ("Saved against the full deployment", panels["Saved against the full deployment"][0], saved(deployments)),
        ("Experts kept, by layer", panels["Experts kept, by layer"][0], experts(deployments)),
        ("Worker failures and bad outputs", panels["Worker failures and bad outputs"][0], {"": 0}),
    ]
    # Overrides, such as those of `answers` and of the long texts, are not for an arm to decide.
    assigned = as_totals(panels["Assigned"][0]).replace("}", ', source!="override"}', 1)
    wanted.append(("Assigned", assigned, by_labels(sent["arms"])))
    reports = get(service, "/experiments")["data"]
    wanted.append(("Verdict", panels["Verdict"][0], {f"{r['name']} {r['verdict']}": 1 for r in reports}))

    def look() -> str:
        for title, expr, expected in wanted:
            found = query(prometheus, expr)
            if not is_close(found, expected):
                return f"{title}: Prometheus says {found}, the client {expected}; asked {expr}"
        return ""

    wait_for("the dashboard tells something else", SCRAPES_SECONDS, look)
    for title, exprs in panels.items():
        for expr in exprs:
            query(prometheus, expr)  # exits unless Prometheus understands it
        print(f"  {title}")
    groups = get(prometheus, "/api/v1/rules")["data"]["groups"]
    bad = [rule["name"] for group in groups for rule in group["rules"] if rule["health"] != "ok"]
    check(bool(groups) and not bad, f"rules that do not work: {bad}")
    alerts = get(prometheus, "/api/v1/alerts")["data"]["alerts"]
    firing = [alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"]
    check(not firing, f"alerts in a healthy service: {firing}")
    print(f"  {len(wanted)} panels equal the client's counts, {len(groups)} groups of rules work, no alert")


def counted(expr: str) -> str:
    """Of a quantile's query: what it counts, in all buckets."""
    return as_totals(expr).removeprefix("histogram_quantile(0.95, ").removesuffix(")")


def by_labels(counts: dict[str, int]) -> dict[str, float]:
    """Keys as `query` joins them: by the names of the labels, where arm comes before experiment."""
    return {" ".join(reversed(key.split(" "))): count for key, count in counts.items()}


def savings(deployments: list[dict[str, Any]], key: str) -> dict[str, float]:
    return {f"{d['task']} {d['name']}": d["memory_saved"][key] for d in deployments if d["memory_saved"][key] > 0}


def saved(deployments: list[dict[str, Any]]) -> dict[str, float]:
    return {d["name"]: d["memory_saved"]["bytes"] for d in deployments}


def experts(deployments: list[dict[str, Any]]) -> dict[str, float]:
    return {f"{layer} {d['name']}": kept for d in deployments for layer, kept in enumerate(d["experts_kept"]) if kept}


def is_close(found: dict[str, float], expected: dict[str, float]) -> bool:
    if found.keys() != expected.keys():
        return False
    return all(abs(found[key] - expected[key]) <= 1e-9 * abs(expected[key]) for key in expected)


def busy(service: str, seconds: str) -> None:
    """Texts and images of all tasks, each with its label afterwards, at a rate that rises and falls."""
    began = time.monotonic()
    image = {"image": base64.b64encode(IMAGE.read_bytes()).decode()}
    rows: dict[str, list[tuple[Any, str]]] = {task: list(islice(test_rows(task), 600)) for task in TEXT_TASKS}
    rows[IMAGE_TASK] = [(image, IMAGE_LABEL)] * 600
    sent = 0
    while (spent := time.monotonic() - began) < float(seconds):
        labels = []
        for task in rows:
            given, label = rows[task][sent % 600]
            status, document = ask(service, "/classify", {"task": task, "inputs": given, "subject": f"busy-{sent}"})
            check(status == 200, f"{task} answered {status}: {document}")
            labels.append({"id": document["id"], "label": label})
        status, document = ask(service, "/feedback", {"items": labels})
        check(status == 200, f"feedback answered {status}: {document}")
        sent += 1
        time.sleep(0.1 * (1 + math.sin(spent / 15)))
    print(f"  {sent} rounds of {len(rows)} requests and labels")


def held(service: str) -> dict[str, dict[str, int]]:
    """What each experiment has recorded."""
    names = [line["name"] for line in get(service, "/experiments")["data"]]
    reports = [get(service, f"/experiments/{name}") for name in names]
    return {
        report["name"]: {
            "units": report["units"],
            "requests": sum(arm["requests"] for arm in report["arms"]),
            "labelled": sum(arm["labelled"] for arm in report["arms"]),
            "right": sum(arm["right"] for arm in report["arms"]),
        }
        for report in reports
    }


def label(service: str, file: str) -> None:
    """One more label, for a request that is recorded. Its answer is the last thing to happen before the kill."""
    expected = settled(service)
    text, truth = next(islice(test_rows("language"), ROWS, None))
    body = {"task": "language", "inputs": text, "subject": "the last subject"}
    status, document = ask(service, "/classify", body)
    check(status == 200 and document["experiment"], f"not in an experiment: {status} {document}")
    time.sleep(COMMIT_SECONDS)
    status, answer = ask(service, "/feedback", {"id": document["id"], "label": truth})
    check((status, answer) == (200, {"accepted": 1, "matched": 1, "unchanged": 0}), f"feedback: {status} {answer}")
    counts = expected[document["experiment"]["name"]]
    for key in ("units", "requests", "labelled"):
        counts[key] += 1
    counts["right"] += document["data"][0]["label"] == truth
    Path(file).write_text(json.dumps(expected), encoding="utf-8")
    print(f"  {document['experiment']['name']} holds {counts}")


def settled(service: str) -> dict[str, dict[str, int]]:
    """What the experiments hold once no label is on its way any more. Other requests may go on."""
    found: list[dict[str, dict[str, int]]] = [held(service)]

    def look() -> str:
        time.sleep(COMMIT_SECONDS)
        found.append(held(service))
        before, now = ([(one["labelled"], one["right"]) for one in each.values()] for each in found[-2:])
        return "" if before == now else "still counting"

    wait_for("the labels do not settle", REPORT_SECONDS, look)
    return found[-1]


def recall(service: str, file: str) -> None:
    """Nothing that was acknowledged is gone."""
    expected = json.loads(Path(file).read_text(encoding="utf-8"))

    def look() -> str:
        found = held(service)
        # The load that ran beside the kill has no labels, and is recorded as far as it was written.
        lost = [
            f"{name}: {key} was {count}, is {found[name][key]}"
            for name, counts in expected.items()
            for key, count in counts.items()
            if (found[name][key] != count if key in ("labelled", "right") else found[name][key] < count)
        ]
        return "; ".join(lost)

    wait_for("records are lost", 5, look)
    print(f"  {sum(one['labelled'] for one in expected.values())} labels are still there")


def keys(service: str, prometheus: str, key: str) -> None:
    """No key, a wrong one, the caller's where it may and where it may not, the probes, and Prometheus."""
    body = {"task": "language", "inputs": "Der Eintrag wurde gespeichert."}
    caller = {"authorization": f"Bearer {key}"}
    cases: list[tuple[str, Any, dict[str, str], int]] = [
        ("/classify", body, {}, 401),
        ("/classify", body, {"authorization": "Bearer wrong"}, 401),
        ("/classify", body, caller, 200),
        ("/metrics", None, caller, 403),
        ("/no-such-page", None, {}, 401),
        ("/readyz", None, {}, 200),
    ]
    for path, sent, headers, expected in cases:
        status, document = ask(service, path, sent, headers)
        check(status == expected, f"{path} with {sorted(headers)} answered {status}: {document}")

    def look() -> str:
        # What the service exported before it was replaced is remembered for five minutes, so the least counts.
        found = [query(prometheus, expr).get("") for expr in ('min(up{job="secateur"})', "min(secateur_auth_open)")]
        return "" if found == [1, 0] else f"up and open are {found}"

    wait_for("Prometheus is not let in, or the service is open", SCRAPES_SECONDS, look)
    print(f"  {len(cases)} callers treated as they should, Prometheus let in by its key")


def refused(service: str, key: str) -> None:
    """A key does not count any more."""
    status, document = ask(service, "/experiments", headers={"authorization": f"Bearer {key}"})
    check((status, document["error"]["code"]) == (401, "invalid_key"), f"answered {status}: {document}")


def load(service: str, file: str, seconds: str = "120") -> None:
    """Requests from several clients at once. Each stops when it is told that the service leaves, or reaches nobody."""
    began = time.time()
    sent: list[dict[str, Any]] = []
    lock = threading.Lock()
    texts = {task: [text for text, _ in islice(test_rows(task), 200)] for task in TEXT_TASKS}
    mark = f"load-{Path(file).stem}"

    def run(client: int) -> None:
        number, misses = 0, 0
        while time.time() < began + float(seconds) and misses < 3:
            task = TEXT_TASKS[number % len(TEXT_TASKS)]
            chosen = [texts[task][(8 * number + place) % 200] for place in range(8)]
            identity = f"{mark}-{client}-{number}"
            number += 1
            started = time.time()
            try:
                status, document = ask(
                    service, "/classify", {"task": task, "inputs": chosen}, {"x-request-id": identity}
                )
                outcome = document["error"]["code"] if status != 200 else "200"
            except (OSError, HTTPException, ValueError) as error:
                outcome, misses = type(error).__name__, misses + 1
                time.sleep(0.5)
            with lock:
                sent.append({"id": identity, "began": started, "ended": time.time(), "outcome": outcome})
            if outcome == "draining":
                return

    threads = [threading.Thread(target=run, args=(client,)) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Path(file).write_text(json.dumps({"mark": mark, "sent": sent}), encoding="utf-8")
    print(f"  load: {dict(Counter(one['outcome'] for one in sent))}")


def steady(file: str) -> None:
    """Nobody noticed anything."""
    sent = json.loads(Path(file).read_text(encoding="utf-8"))["sent"]
    others = [one for one in sent if one["outcome"] != "200"]
    check(bool(sent) and not others, f"{len(others)} of {len(sent)} requests were not answered: {others[:5]}")
    print(f"  {len(sent)} requests, all answered")


def drained(file: str, log: str) -> None:
    """Each request that began before the first refusal was answered, and each answer reached the client."""
    document = json.loads(Path(file).read_text(encoding="utf-8"))
    sent, mark = document["sent"], document["mark"]
    refusals = [one["ended"] for one in sent if one["outcome"] == "draining"]
    check(bool(refusals), "nobody was told that the service leaves: the load ended before the stop")
    allowed = {"200", "overloaded", "draining"}
    lost = [one for one in sent if one["began"] < min(refusals) and one["outcome"] not in allowed]
    check(not lost, f"{len(lost)} requests were lost: {lost[:5]}")
    answered = {one["id"] for one in sent if one["outcome"] == "200"}
    logged = set()
    for line in Path(log).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line) if line.startswith("{") else {}
        if entry.get("code") == 200 and str(entry.get("request_id", "")).startswith(f"{mark}-"):
            logged.add(entry["request_id"])
    check(answered == logged, f"answers without a client or a log line: {sorted(answered ^ logged)[:5]}")
    late = sum(one["outcome"] == "200" and one["ended"] > min(refusals) - 5 for one in sent)
    print(
        f"  {len(answered)} answers, {late} of them after the signal; {len(refusals)} clients told to leave; none lost"
    )


if __name__ == "__main__":
    main()
