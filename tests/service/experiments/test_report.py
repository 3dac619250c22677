"""Reports from records by hand, against numbers that are published or that a person can compute."""

from dataclasses import replace
from typing import Any

import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from models.errors import CheckpointError
from service.deployments import Registry, State
from service.experiments.document import Report, as_json
from service.experiments.report import line, moment, shadow_dropped
from service.metrics import Metrics
from service.storage.events import Look, PairEvent, Step, StoredState, Tally
from tests.service.experiments.cases import (
    FULL,
    PRUNED,
    pair_tallies,
    records,
    registry,
    report_on,
    split_tallies,
    tally,
)
from tests.service.test_savings import manifest
from tests.service.toys import ToyModel, toy_checkpoint

__all__ = ["registry"]


def test_pairs_that_settle_it(registry: Registry) -> None:
    # 75 against 75 of 5,000: the evidence that a loss of one point is refuted is 344.76, and 40 are enough.
    report = report_on(registry, records("shadow", pair_tallies(4410, 75, 75, 440, disagree=160)))
    assert report.verdict == "non_inferior"
    assert report.units == 5000
    assert report.difference.e_non_inferior == pytest.approx(344.76, abs=0.005)
    assert (report.difference.lower, report.difference.upper) == pytest.approx((-0.008154, 0.008154), abs=1e-6)
    assert report.difference.mcnemar_p == 1
    assert report.agreement == 1 - 160 / 5000
    assert report.agreement_interval == pytest.approx(proportion_confint(4840, 5000, method="wilson"))
    assert report.needed is None
    assert report.first_decided.units == 5000
    assert report.words == ("mood-pruned is less accurate than mood-full by at most 0.82 points; 1 point is allowed.")


def test_pairs_that_do_not_settle_it_but_show_a_loss(registry: Registry) -> None:
    report = report_on(registry, records("shadow", pair_tallies(1800, 40, 15, 145, disagree=60)))
    assert (report.verdict, report.worse) == ("undecided", True)
    assert (report.difference.lower, report.difference.upper) == pytest.approx((-0.026172, -0.0006), abs=1e-6)
    assert report.difference.mcnemar_p == pytest.approx(mcnemar([[0, 40], [15, 0]]).pvalue)
    assert "between \u22122.62 and \u22120.06" in report.words
    assert report.words.endswith("It is worse, though, by at least 0.06 points.")
    assert report.first_decided is None
    assert report.needed.units > 2000
    assert report.needed.more == report.needed.units - 2000


def test_disagreements_alone_can_settle_it(registry: Registry) -> None:
    def found(units: int, disagree: int = 0) -> Any:
        tallies = [tally("unit_pairs", units - disagree, predicted="agree")]
        tallies += [tally("unit_pairs", disagree, predicted="candidate_failed"), tally("pairs", units)]
        return report_on(registry, records("shadow", tallies))

    # Without one disagreement the first pass is at 610 pairs.
    assert [found(n).verdict for n in (99, 100, 609, 610)] == [
        "insufficient_data",
        "undecided",
        "undecided",
        "non_inferior",
    ]
    assert found(610).difference.method == "label_free"
    assert found(610).difference.mcnemar_p is None
    assert "No true labels were needed" in found(610).words
    assert found(610, disagree=1).verdict == "undecided"  # a failed candidate has disagreed


def test_labels_count_once_there_are_enough_for_a_verdict(registry: Registry) -> None:
    def method(labelled: int) -> str:
        tallies = [
            tally("unit_pairs", 400, predicted="agree"),
            tally("labelled_pairs", labelled, predicted="both_right"),
        ]
        return str(report_on(registry, records("shadow", tallies)).difference.method)

    assert [method(n) for n in (0, 99, 100)] == ["label_free", "label_free", "paired_betting"]


def test_a_split(registry: Registry) -> None:
    # 4450 of 5000 against 4500 of 5000: -0.01 +- 0.0186189.
    report = report_on(registry, records("split", split_tallies(4450, 5000, 4500, 5000)))
    assert report.difference.estimate == pytest.approx(-0.01)
    assert (report.difference.lower, report.difference.upper) == pytest.approx((-0.0286189, 0.0086189), abs=1e-6)
    assert (report.verdict, report.units) == ("undecided", 10_000)
    assert report.difference.e_non_inferior is None
    control, candidate = report.arms
    assert (control.deployment, control.role, control.accuracy) == (FULL, "control", 0.9)
    assert (candidate.accuracy_lower, candidate.accuracy_upper) == pytest.approx(
        proportion_confint(4450, 5000, method="wilson")
    )
    assert report.pairs is report.agreement is None
    assert report.srm.alarm is False


def test_arms_that_get_other_shares_than_promised_are_not_compared(registry: Registry) -> None:
    # [5000, 5500] at halves: chi-square 23.81, e-value 15,561.
    found = split_tallies(5400, 5500, 4900, 5000)
    report = report_on(registry, records("split", found))
    assert report.verdict == "invalid"
    assert (report.srm.alarm, report.labels_srm.alarm) == (True, True)
    assert report.srm.chi_square == pytest.approx(23.81, abs=0.005)
    assert report.srm.e_value == pytest.approx(15_561, abs=0.5)
    assert [warning.partition(":")[0] for warning in report.warnings] == ["sample_ratio", "label_ratio"]
    assert report.words.startswith("The units do not reach the arms in the shares that the weights promise and ")
    assert report.words.endswith("the comparison cannot be trusted.")
    assert report.worse is False


def test_labels_for_one_arm_only_are_seen(registry: Registry) -> None:
    found = [row for row in split_tallies(5400, 5500, 4900, 5000) if row.name != "units"]
    found += [tally("units", 6000, FULL), tally("units", 6000, PRUNED)]
    report = report_on(registry, records("split", found))
    assert (report.srm.alarm, report.labels_srm.alarm, report.verdict) == (False, True, "invalid")


@pytest.mark.parametrize(("dropped", "verdict"), [(10, "non_inferior"), (11, "invalid")])
def test_more_than_a_thousandth_lost_is_too_much(registry: Registry, dropped: int, verdict: str) -> None:
    found = [*pair_tallies(4410, 75, 75, 440), tally("dropped", dropped, predicted="queue_full")]
    report = report_on(registry, records("shadow", found))
    assert (report.verdict, report.dropped["events"]) == (verdict, dropped)
    assert bool(report.warnings) is (verdict == "invalid")


def test_the_first_decision_is_kept(registry: Registry) -> None:
    steps = [Step(60.0, "report", "decided", "non_inferior at 3120 units"), Step(90.0, "operator", "traffic", "5 %")]
    found = replace(records("shadow", pair_tallies(1800, 40, 15, 145)), steps=steps)
    report = report_on(registry, found)
    assert report.verdict == "undecided"
    assert report.first_decided.model_dump() == {
        "verdict": "non_inferior",
        "units": 3120,
        "at": "1970-01-01T00:01:00Z",
    }
    assert [step.action for step in report.steps] == ["decided", "traffic"]


def test_the_timeline_ends_now_and_begins_with_the_way_of_comparing(registry: Registry) -> None:
    looks = [Look(n, at, 0.0, -0.1, 0.1, "undecided") for n, at in ((100, 50.0), (150, 10.0), (900, 20.0))]
    steps = [Step(30.0, "report", "method", "paired_betting")]
    found = replace(records("shadow", pair_tallies(1800, 40, 15, 145)), looks=looks, steps=steps)
    report = report_on(registry, found)
    assert [look.units for look in report.timeline] == [100, 2000]
    assert report.timeline[-1].at == report.updated == "2026-01-01T00:00:00Z"
    assert report.timeline[-1].lower == report.difference.lower


def confusions(arm: str, **right_of: tuple[int, int]) -> list[Tally]:
    found = []
    for truth, (right, n) in right_of.items():
        found += [tally("confusion", right, arm, truth, truth), tally("confusion", n - right, arm, truth, "zoo")]
    return found


def test_a_class_that_is_lost_is_a_warning(registry: Registry) -> None:
    found = [
        *pair_tallies(180, 13, 1, 6),
        *confusions(FULL, positive=(99, 100), negative=(94, 100)),
        *confusions(PRUNED, positive=(88, 100), negative=(93, 100)),
        tally("class_pairs", 11, truth="positive", predicted="only_control"),
        tally("class_pairs", 2, truth="negative", predicted="only_control"),
        tally("class_pairs", 1, truth="negative", predicted="only_candidate"),
    ]
    report = report_on(registry, records("shadow", found))
    negative, positive = report.classes  # in the order of the checkpoint's labels
    assert (negative.label, positive.label) == ("negative", "positive")
    assert positive.recall == {FULL: 0.99, PRUNED: 0.88}
    assert positive.lower[PRUNED] == pytest.approx(proportion_confint(88, 100, method="wilson")[0])
    # Exact McNemar: 2 / 2^11, twice for two classes by Holm; (2, 1) is 1.
    assert positive.p_value == pytest.approx(2 * 2 / 2**11)
    assert negative.p_value == 1
    assert [warning.partition(":")[0] for warning in report.warnings] == ["class_regression"]
    assert "'positive' in 88.0 % of cases, mood-full in 99.0 %" in report.warnings[0]


def test_a_class_of_a_split_is_compared_between_groups(registry: Registry) -> None:
    found = [*split_tallies(90, 100, 95, 100), *confusions(FULL, positive=(95, 100)), *confusions(PRUNED, new=(1, 2))]
    report = report_on(registry, records("split", found))
    positive, new = report.classes
    assert new.label == "new"  # a label the checkpoint does not know comes last
    assert (positive.n, positive.recall[PRUNED], positive.p_value) == ({FULL: 100, PRUNED: 0}, None, 1)


def test_latency_of_a_split(registry: Registry) -> None:
    slow = [float(value) for value in range(1000, 2000)]
    fast = [float(value) for value in range(1000)]
    report = report_on(registry, records("split", [], {FULL: slow, PRUNED: fast}))
    found = report.latency_ms
    assert found.verdict == "faster"
    assert found.arms[FULL].p50 == 1499.5
    assert found.arms[FULL].p95_interval == (1935.0, 1963.0)  # the 936th and the 964th of a thousand
    assert found.arms[FULL].curve[0] == pytest.approx(1009.99)
    assert len(found.arms[FULL].curve) == 99
    assert found.p95_ratio.estimate == pytest.approx(949.05 / 1949.05)
    swapped = report_on(registry, records("split", [], {FULL: fast, PRUNED: slow}))
    assert swapped.latency_ms.verdict == "slower"
    assert report_on(registry, records("shadow", [], {FULL: slow, PRUNED: fast})).latency_ms.verdict == "contended"


def test_an_experiment_that_nobody_has_met(registry: Registry) -> None:
    for mode in ("split", "shadow", "cascade"):
        report = report_on(registry, records(mode, []))
        assert (report.verdict, report.units, report.difference) == ("insufficient_data", 0, None)
        assert report.latency_ms.verdict == "insufficient_data"
        assert report.latency_ms.arms[FULL].p50_interval == (None, None)
        assert report.timeline == report.classes == report.warnings == []
        assert report.words
        assert Report.model_validate_json(report.model_dump_json()) == report


def test_a_cascade_is_counted_and_not_compared(registry: Registry) -> None:
    found = [tally("cascade", n, predicted=word) for word, n in (("accepted", 60), ("escalated", 35), ("fallback", 5))]
    found += [tally("labelled", 50, PRUNED), tally("right", 40, PRUNED), tally("units", 80, PRUNED)]
    report = report_on(registry, records("cascade", found))
    assert report.cascade.model_dump() == {
        "threshold": 0.8,
        "accepted": 60,
        "escalated": 35,
        "fallback": 5,
        "accepted_share": 0.6,
    }
    assert (report.verdict, report.difference, report.units) == ("insufficient_data", None, 80)
    assert report.arms[1].accuracy == 0.8
    assert "60.0 %" in report.words
    assert "no memory is saved" in report.words


def test_a_candidate_that_fails_is_told_of(registry: Registry) -> None:
    found = [tally("pairs", 3, predicted="candidate_failed"), tally("pairs", 97, predicted="agree")]
    found.append(tally("dp", 97, total=0.97, peak=0.4))
    report = report_on(registry, records("shadow", found))
    candidate = report.arms[1]
    assert (candidate.requests, candidate.errors) == (100, 3)
    assert report.warnings == ["candidate_failed: mood-pruned gave no answer to 3 items and counts as wrong there"]
    assert (report.mean_abs_dp, report.max_abs_dp) == (pytest.approx(0.01), 0.4)


def test_numbers_of_an_arm(registry: Registry) -> None:
    found = [
        tally("requests", 40, PRUNED),
        tally("errors", 4, PRUNED),
        tally("fallbacks", 3, PRUNED),
        tally("device_ms", 37, PRUNED, total=74.0),
        tally("repeats", 9),
        tally("overrides", 2),
    ]
    report = report_on(registry, records("split", found))
    arm = report.arms[1]
    assert (arm.requests, arm.errors, arm.fallbacks) == (40, 4, 3)
    assert arm.device_seconds_per_1000 == 2.0  # 2 ms each
    assert (report.repeats, report.overrides) == (9, 2)


def test_flips_and_disagreements_name_labels_and_ids_only(registry: Registry) -> None:
    pair = PairEvent("cls_1", 2, 60.0, "exp", 1, "u", "positive", "neutral", "disagree", 0.1, 0.2, 3.0, 2.0)
    found = records("shadow", [tally("flips", n, truth=a, predicted=b) for n, a, b in ((1, "a", "b"), (5, "b", "c"))])
    report = report_on(registry, replace(found, disagreements=[pair]))
    assert [(flip.control_label, flip.candidate_label, flip.n) for flip in report.flips] == [
        ("b", "c", 5),
        ("a", "b", 1),
    ]
    assert report.disagreements[0].model_dump() == {
        "id": "cls_1",
        "item": 2,
        "at": "1970-01-01T00:01:00Z",
        "control_label": "positive",
        "candidate_label": "neutral",
    }


def test_memory_of_arms_that_are_loaded_or_not(registry: Registry) -> None:
    # Two experts of 4 x 2 float32 instead of four, beside an embedding of 4 x 8.
    empty = records("split", [])
    assert report_on(registry, empty).memory.model_dump() == {
        "control_bytes": 256,
        "candidate_bytes": 192,
        "saved_ratio": 0.25,
        "basis": "loaded",
        "resident_bytes": 448,
    }
    registry.deployments[FULL].state = State.FAILED
    memory = report_on(registry, empty).memory
    assert (memory.control_bytes, memory.candidate_bytes, memory.saved_ratio, memory.basis) == (None, 192, None, None)
    # The manifest knows the parent: 96 parameters of four bytes.
    registry.deployments[PRUNED].loaded = toy_checkpoint(model=ToyModel(kept=2), manifest=manifest(96))
    memory = report_on(registry, empty).memory
    assert (memory.control_bytes, memory.saved_ratio, memory.basis) == (384, 0.5, "manifest")
    assert memory.resident_bytes == 192
    registry.deployments[PRUNED].state = State.LOADING
    assert report_on(registry, empty).memory.resident_bytes == 0


def test_regression_is_measured_and_not_judged(registry: Registry) -> None:
    registry.deployments[FULL].loaded = toy_checkpoint(problem_type="regression")
    report = report_on(registry, records("shadow", pair_tallies(4410, 75, 75, 440)))
    assert (report.verdict, report.difference) == ("insufficient_data", None)


@pytest.mark.parametrize(("state", "winner"), [("stopped", PRUNED), ("paused", None)])
def test_a_winner_is_named_once_the_experiment_has_ended(registry: Registry, state: Any, winner: str | None) -> None:
    found = records("split", [], stored=StoredState("exp", 1, "", state, 100, PRUNED))
    assert report_on(registry, found).winner == winner


def test_a_line_is_the_reports_own_words(registry: Registry) -> None:
    report = report_on(registry, records("shadow", pair_tallies(4410, 75, 75, 440)))
    shown = line(report).model_dump()
    assert shown == {key: as_json(report)[key] for key in shown}


def test_shadow_drops_come_from_the_lanes_own_counter() -> None:
    metrics = Metrics()
    metrics.inc("shadow_dropped_total", 41, experiment="exp", reason="busy")
    metrics.inc("shadow_dropped_total", 7, experiment="other", reason="busy")
    assert shadow_dropped(metrics, "exp") == {"busy": 41, "draining": 0, "unavailable": 0}


def test_moments_are_in_utc() -> None:
    assert moment(1767225600.9) == "2026-01-01T00:00:00Z"


def test_deployment_errors_do_not_break_a_report(registry: Registry) -> None:
    for deployment in registry.deployments.values():
        deployment.loaded, deployment.state = None, State.FAILED
        deployment.error_code = str(CheckpointError("gone"))
    report = report_on(registry, records("split", split_tallies(4450, 5000, 4500, 5000)))
    assert report.verdict == "undecided"


def test_labels_of_disagreements_alone_make_nothing_worse_than_it_is(registry: Registry) -> None:
    """10,000 pairs, 300 disagree, only those have labels: the candidate loses 160 and wins 110, half a point in all."""
    labelled = {"only_control": 160, "only_candidate": 110, "both_wrong": 30, "both_right": 0}
    tallies = [tally("labelled_pairs", n, predicted=word) for word, n in labelled.items()]
    tallies += [tally(name, 9700, predicted="agree") for name in ("unit_pairs", "pairs")]
    tallies += [tally(name, 300, predicted="disagree") for name in ("unit_pairs", "pairs")]
    report = report_on(registry, records("shadow", tallies, margin=0.02))
    assert report.difference.method == "label_free"
    assert report.difference.estimate == pytest.approx(-0.005)
    assert report.verdict == "non_inferior"
    assert [warning.partition(":")[0] for warning in report.warnings] == ["labels_picked"]


def test_labels_given_without_regard_to_the_answers_are_a_fair_sample(registry: Registry) -> None:
    fair = [
        *(tally(name, 9700, predicted="agree") for name in ("unit_pairs", "pairs")),
        *(tally(name, 300, predicted="disagree") for name in ("unit_pairs", "pairs")),
        *(tally("labelled_pairs", n, predicted=word) for word, n in (("both_right", 960), ("only_control", 40))),
    ]
    report = report_on(registry, records("shadow", fair))
    assert report.difference.method == "paired_betting"
    assert not report.warnings
