"""What happens by itself: gauges, looks, decisions, ramp, guardrail, clean-up; and how reports are shared."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.deployments import Registry, State
from service.experiments import refresh
from service.experiments.control import Control
from service.experiments.refresh import Reports
from service.metrics import Metrics
from service.settings import Settings
from service.statistics.srm import srm
from service.storage.events import ExposureEvent, Feedback, StorageUnavailableError
from service.storage.store import Store
from tests.service.conftest import SECONDS, Start
from tests.service.experiments.cases import FULL, PRUNED
from tests.service.experiments.live import TOPICS, no_cache, report_of, split
from tests.service.toys import ToyLoader, toy_loader, toy_settings


class Bench:
    """The parts behind the reports, without a server."""

    def __init__(self, directory: Path, experiments: dict[str, Any], **sections: Any) -> None:
        self.settings: Settings = toy_settings(directory, experiments=experiments, **sections)
        self.metrics = Metrics()
        self.store = Store.open(self.settings.storage, None, self.metrics)
        self.control = Control(self.settings, self.store)
        self.registry = Registry(self.settings)
        load = toy_loader()
        for deployment in self.registry.deployments.values():
            deployment.loaded = load(deployment.path, "cpu", "float32", "auto")
            deployment.state = State.READY
        self.reports = Reports(self.settings, self.control, self.store, self.registry, self.metrics)

    def expose(self, arm: str, n: int, *, right: int = 0, status: int = 200, ms: float = 5.0) -> None:
        """n new units of an arm, all labelled if any is right."""
        first = time.monotonic_ns()
        for number in range(n):
            self.store.record(event(f"cls_{first}_{number}", arm, status, "neutral", ms))
        labels = [
            Feedback(f"cls_{first}_{number}", None, 0, "neutral" if number < right else "positive")
            for number in range(n if right else 0)
        ]
        asyncio.run(self.store.feedback(labels or [Feedback("cls_none", None, 0, "neutral")], True))

    def run(self, *calls: Callable[[Reports], Awaitable[Any]]) -> list[Any]:
        """Await calls one after the other in one loop, with the reports made anew for it."""
        self.reports = Reports(self.settings, self.control, self.store, self.registry, self.metrics)

        async def all_of() -> list[Any]:
            found = [await call(self.reports) for call in calls]
            await self.reports.stop()
            return found

        return asyncio.run(all_of())

    def refresh(self) -> None:
        self.run(lambda reports: reports.refresh())

    def report(self) -> Any:
        return self.run(lambda reports: reports.report("exp"))[0]

    def gauge(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"secateur_experiment_{name}", {"experiment": "exp", **labels})

    def steps(self) -> list[tuple[str, str]]:
        return [(step.actor, step.action) for step in self.store.steps("exp", 1)]


def event(id: str, arm: str, status: int, label: str, ms: float) -> ExposureEvent:
    is_answered = status == 200
    return ExposureEvent(
        id=id,
        item=0,
        request_id=id,
        at=time.time(),
        experiment="exp",
        revision=1,
        unit=id,
        intended=arm,
        served=arm if is_answered else None,
        source="subject",
        status=status,
        label=label if is_answered else None,
        score=0.5,
        tokens=1,
        queue_ms=1.0,
        infer_ms=1.0,
        total_ms=ms,
        device_ms=1.0,
        fingerprint="f",
    )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**fields: Any) -> Bench:
        made.append(Bench(tmp_path, split(**fields)))
        return made[-1]

    with no_cache():
        yield make
    for found in made:
        found.store.close()


def test_gauges_equal_the_report(bench: Callable[..., Bench]) -> None:
    found = bench(margin=0.4, traffic=60)
    assert found.gauge("units") is None
    found.expose(FULL, 150, right=140)
    found.expose(PRUNED, 150, right=130)
    found.refresh()
    report = found.report()
    assert report.difference.estimate == pytest.approx(-10 / 150)
    assert found.gauge("difference") == report.difference.estimate
    assert found.gauge("lower") == report.difference.lower
    assert found.gauge("upper") == report.difference.upper
    assert (found.gauge("units"), found.gauge("traffic_percent"), found.gauge("srm_alarm")) == (300, 60, 0)
    verdicts = {word: found.gauge("verdict", verdict=word) for word in refresh.WORDS}
    assert verdicts.pop(report.verdict) == 1
    assert set(verdicts.values()) == {0}


def test_what_is_not_known_has_no_gauge(bench: Callable[..., Bench]) -> None:
    found = bench()
    found.refresh()
    assert (found.gauge("difference"), found.gauge("agreement"), found.gauge("units")) == (None, None, 0)


def test_looks_are_kept_when_there_is_something_new_to_see(bench: Callable[..., Bench]) -> None:
    found = bench(margin=0.4)
    found.refresh()
    assert found.store.looks("exp", 1) == []
    found.expose(FULL, 120, right=110)
    found.expose(PRUNED, 120, right=110)
    found.refresh()
    (look,) = found.store.looks("exp", 1)
    report = found.report()
    assert (look.units, look.estimate, look.lower) == (240, report.difference.estimate, report.difference.lower)
    found.refresh()
    assert found.store.looks("exp", 1) == [look]
    found.expose(FULL, 1, right=1)
    found.refresh()
    assert [look.units for look in found.store.looks("exp", 1)] == [240, 241]
    assert [look.units for look in found.report().timeline] == [240, 241]


def test_the_first_decision_is_recorded_once(bench: Callable[..., Bench]) -> None:
    found = bench(margin=0.4)
    found.expose(FULL, 300, right=290)
    found.expose(PRUNED, 300, right=290)
    found.refresh()
    found.refresh()
    assert found.steps() == [("operator", "configured"), ("report", "method"), ("report", "decided")]
    decided = found.report().first_decided
    found.expose(PRUNED, 10, right=10)
    found.refresh()
    assert found.report().first_decided == decided
    assert (decided.verdict, decided.units) == ("non_inferior", 600)


def test_the_ramp_climbs_by_itself(bench: Callable[..., Bench]) -> None:
    found = bench(ramp={"steps": [5, 25, 100], "units": 40}, margin=0.4)
    seen = []
    for _ in range(4):
        found.expose(FULL, 20)
        found.expose(PRUNED, 20)
        found.refresh()
        seen.append(found.control.experiments["exp"].traffic)
    assert seen == [25, 100, 100, 100]
    assert [step.detail for step in found.store.steps("exp", 1) if step.actor == "ramp"] == [
        "25 % at 40 units",
        "100 % at 80 units",
    ]


def test_a_ramp_waits_for_its_units(bench: Callable[..., Bench]) -> None:
    found = bench(ramp={"steps": [5, 25], "units": 40})
    found.expose(FULL, 39)
    found.refresh()
    assert found.control.experiments["exp"].traffic == 5


def test_a_ramp_comes_down_when_the_candidate_is_inferior(bench: Callable[..., Bench]) -> None:
    found = bench(ramp={"steps": [5, 25], "units": 40})
    found.expose(FULL, 300, right=290)
    found.expose(PRUNED, 300, right=100)
    found.refresh()
    assert found.control.experiments["exp"].state == "paused"
    assert found.steps()[-1] == ("ramp", "paused")
    assert found.report().state == "paused"


def test_without_a_ramp_a_verdict_changes_nothing(bench: Callable[..., Bench]) -> None:
    found = bench()
    found.expose(FULL, 300, right=290)
    found.expose(PRUNED, 300, right=100)
    found.refresh()
    assert (found.report().verdict, found.control.experiments["exp"].state) == ("inferior", "running")


def test_the_guardrail_pauses_at_once(bench: Callable[..., Bench]) -> None:
    found = bench(ramp={"steps": [5, 25], "units": 40})
    found.expose(FULL, 200)
    found.expose(PRUNED, 200, status=500)
    found.refresh()
    assert found.steps()[-1] == ("guardrail", "paused")
    assert found.control.experiments["exp"].state == "paused"
    assert found.control.winners == {"mood": "mood-full"}
    assert found.report().winner is None  # the experiment has not ended
    found.refresh()
    assert found.steps()[-1] == ("guardrail", "paused")
    assert found.gauge("traffic_percent") == 0


def test_many_who_ask_share_one_build(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench()
    calls: list[str] = []
    read = found.store.tallies

    def counted(name: str, revision: int) -> Any:
        calls.append(name)
        return read(name, revision)

    monkeypatch.setattr(found.store, "tallies", counted)
    monkeypatch.setattr(refresh, "FRESH_SECONDS", 60.0)

    async def many(reports: Reports) -> None:
        await asyncio.gather(*(reports.report("exp") for _ in range(20)))
        await reports.report("exp")
        assert calls == ["exp"]
        reports.forget("exp")
        await reports.report("exp")
        assert calls == ["exp", "exp"]

    found.run(many)


def test_a_failed_build_is_not_kept(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench()
    monkeypatch.setattr(refresh, "FRESH_SECONDS", 60.0)

    def fails(*_: Any) -> None:
        raise StorageUnavailableError

    async def ask(reports: Reports) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(found.store, "tallies", fails)
            with pytest.raises(StorageUnavailableError):
                await reports.report("exp")
        assert (await reports.report("exp")).units == 0

    found.run(ask)


def test_who_gives_up_takes_nothing_from_the_others(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "FRESH_SECONDS", 60.0)

    async def ask(reports: Reports) -> None:
        impatient, patient = (asyncio.create_task(reports.report("exp")) for _ in range(2))
        await asyncio.sleep(0)
        impatient.cancel()
        assert (await patient).name == "exp"

    bench().run(ask)


def test_old_rows_go(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench()
    kept: list[float] = []
    monkeypatch.setattr(found.store, "forget", kept.append)
    found.run(lambda reports: reports.clean())
    assert kept == [pytest.approx(time.time() - 90 * 86_400, abs=5)]


def test_the_rounds_go_on_whatever_fails(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = bench()
    monkeypatch.setattr(refresh, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(refresh, "REFRESH_SECONDS", 0.01)
    rounds = iter([StorageUnavailableError(), RuntimeError("a bug")])
    done = asyncio.Event()

    async def poll() -> None:
        for problem in rounds:
            raise problem
        done.set()

    async def live(reports: Reports) -> None:
        monkeypatch.setattr(reports, "poll", poll)
        task = asyncio.create_task(reports.run())
        await asyncio.wait_for(done.wait(), SECONDS)
        task.cancel()

    found.run(live)
    assert [record.message for record in caplog.records if record.name == "secateur.experiments"] == [
        "the database failed, experiments wait",
        "experiments were not looked after",
    ]
    assert found.gauge("units") == 0


def test_one_that_fails_leaves_the_others_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fields,) = split().values()
    arms = [{"deployment": "topics-full", "weight": 50}, {"deployment": "topics-pruned", "weight": 50}]
    experiments = {"a": {**fields, "task": "topics", "arms": arms}, "exp": fields}
    bench = Bench(tmp_path, experiments, **TOPICS)
    bench.expose(FULL, 200)
    bench.expose(PRUNED, 200, status=500)
    read = bench.store.tallies

    def fails(name: str, revision: int) -> Any:
        if name == "a":
            raise RuntimeError("a bug")
        return read(name, revision)

    monkeypatch.setattr(bench.store, "tallies", fails)
    bench.refresh()
    assert bench.control.experiments["exp"].state == "paused"
    bench.store.close()


def test_a_running_service_looks_after_its_experiments(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(refresh, "REFRESH_SECONDS", 0.05)
    harness = start(experiments=split(ramp={"steps": [50, 100], "units": 5}))
    deadline = time.monotonic() + SECONDS
    number = 0
    while report_of(harness)["traffic"] < 100:
        assert time.monotonic() < deadline
        harness.classify("0", subject=f"user-{number}")
        number += 1
    assert harness.metric("experiment_units", experiment="exp") == 0


def test_a_broken_candidate_is_paused_and_its_errors_are_its_own(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intention to treat: requests meant for the candidate fail, and the arms still have their shares."""
    monkeypatch.setattr(refresh, "REFRESH_SECONDS", 0.2)
    harness = start(ToyLoader(), experiments=split(guardrail={"error_rate": 0.01}))
    broken = harness.loader.model(PRUNED)
    monkeypatch.setattr(broken, "classify", lambda _: (_ for _ in ()).throw(RuntimeError("broken")))
    codes: list[int] = []
    deadline = time.monotonic() + SECONDS
    while report_of(harness)["state"] == "running":
        assert time.monotonic() < deadline
        codes.append(harness.classify("0", subject=f"user-{len(codes)}").status_code)
    report = report_of(harness)
    arms = {arm["deployment"]: arm for arm in report["arms"]}
    assert arms[PRUNED]["errors"] == arms[PRUNED]["requests"] > 100
    assert arms[FULL]["errors"] == 0
    assert report["srm"]["alarm"] is False
    # By what was served, the arms would seem to have lost their shares.
    assert srm([arms[FULL]["requests"], 0], [50, 50]).alarm
    assert report["steps"][-1]["actor"] == "guardrail"
    assert {harness.classify("0", subject=f"user-{n}").status_code for n in range(20)} == {200}
