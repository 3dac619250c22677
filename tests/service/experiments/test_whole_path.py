"""From classify over feedback to the verdict, through a real socket: reports against a plain recomputation."""

import random
from collections import Counter
from collections.abc import Iterator
from math import log, sqrt
from typing import Any

import pytest
from scipy.stats import chisquare

from tests.service.conftest import Start
from tests.service.experiments.live import (
    arm_of,
    no_cache,
    report_of,
    report_when,
    send_labels,
    shadow,
    split,
    swayed_loader,
)
from tests.service.toys import LABELS


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with no_cache():
        yield


def test_a_split_is_what_a_plain_recomputation_says(start: Start) -> None:
    harness = start(swayed_loader(), experiments=split(margin=0.2))
    chance = random.Random(5)
    rows: list[dict[str, Any]] = []
    for number in range(300):
        subject = f"user-{chance.randrange(240)}"
        text = f"{chance.randrange(3)} 77" if chance.random() < 0.1 else str(chance.randrange(3))
        answer = harness.classify(text, subject=subject).json()
        truth = LABELS[int(text[0])] if chance.random() < 0.9 else chance.choice(LABELS)
        label = answer["data"][0]["label"]
        rows.append({"subject": subject, "arm": answer["variant"], "label": label, "truth": truth, "id": answer["id"]})
        if number % 10 == 0:  # an explicit variant is not analysed, and its label counts nowhere
            named = harness.classify("0", subject=subject, variant="full").json()
            rows.append({"subject": None, "id": named["id"], "truth": "negative"})
    enrolled = [row for row in rows if row["subject"]]
    report_when(harness, lambda report: sum(arm["requests"] for arm in report["arms"]) == len(enrolled))
    for begin in range(0, len(rows), 50):
        labels = [{"id": row["id"], "label": row["truth"]} for row in rows[begin : begin + 50]]
        assert send_labels(harness, labels).json() == {"accepted": len(labels), "matched": len(labels), "unchanged": 0}
    report = report_of(harness)

    first: dict[str, dict[str, Any]] = {}
    for row in enrolled:
        first.setdefault(row["subject"], row)
    right = Counter(row["arm"] for row in first.values() if row["label"] == row["truth"])
    labelled = Counter(row["arm"] for row in first.values())
    for arm in ("mood-full", "mood-pruned"):
        found = arm_of(report, arm)
        assert found["requests"] == sum(row["arm"] == arm for row in enrolled)
        assert (found["units"], found["labelled"], found["right"]) == (labelled[arm], labelled[arm], right[arm])
        assert found["accuracy"] == right[arm] / labelled[arm]
        assert (found["errors"], found["fallbacks"], found["weight"]) == (0, 0, 50)
        assert found["device_seconds_per_1000"] > 0
        assert report["latency_ms"]["arms"][arm]["n"] == found["requests"]
    assert report["units"] == len(first)
    assert report["repeats"] == len(enrolled) - len(first)
    assert report["overrides"] == len(rows) - len(enrolled)
    for truth in LABELS:
        row = next(row for row in report["classes"] if row["label"] == truth)
        for arm in labelled:
            of_class = [kept for kept in first.values() if kept["arm"] == arm and kept["truth"] == truth]
            assert row["n"][arm] == len(of_class)
            assert row["recall"][arm] == sum(kept["label"] == truth for kept in of_class) / len(of_class)

    counts = [labelled["mood-full"], labelled["mood-pruned"]]
    assert report["srm"]["counts"] == {"mood-full": counts[0], "mood-pruned": counts[1]}
    assert report["srm"]["p_value"] == pytest.approx(chisquare(counts).pvalue)
    assert report["labels_srm"]["e_value"] == report["srm"]["e_value"]
    lower, upper = two_arms(right["mood-pruned"], counts[1], right["mood-full"], counts[0], margin=0.2)
    assert report["difference"]["lower"] == pytest.approx(lower)
    assert report["difference"]["upper"] == pytest.approx(upper)
    assert report["difference"]["method"] == "two_arm_sequence"
    assert report["verdict"] == ("insufficient_data" if min(counts) < 100 else "undecided")


def two_arms(right_1: int, n_1: int, right_0: int, n_0: int, margin: float) -> tuple[float, float]:
    """The formula of arXiv 2103.06476 as it is printed, with the floor of the better-looking arm's variance."""

    def variance(right: int, n: int) -> float:
        share = (right + 1) / (n + 2)
        return share * (1 - share)

    n, floor, alpha = n_1 + n_0, margin * (1 - margin), 0.05
    r2 = (-2 * log(alpha) + log(1 - 2 * log(alpha))) / 10_000
    bounds = []
    for sign, v_1, v_0 in (
        (-1, max(variance(right_1, n_1), floor), None),
        (1, None, max(variance(right_0, n_0), floor)),
    ):
        s2 = n * ((v_1 or variance(right_1, n_1)) / n_1 + (v_0 or variance(right_0, n_0)) / n_0)
        width = sqrt(s2) * sqrt(2 * (n * r2 + 1) / (n * n * r2) * log(sqrt(n * r2 + 1) / alpha))
        bounds.append(right_1 / n_1 - right_0 / n_0 + sign * width)
    return bounds[0], bounds[1]


WORDS = {
    (True, True): "both_right",
    (True, False): "only_control",
    (False, True): "only_candidate",
    (False, False): "both_wrong",
}


def test_a_shadow_is_what_a_plain_recomputation_says(start: Start) -> None:
    harness = start(swayed_loader(), experiments=shadow(margin=0.3), engine={"shadow_queue_items": 1000})
    rows = []
    for number in range(130):
        word = number % 3
        text = f"{word} {1000 + number}" + (" 77" if number % 13 == 0 else "")
        rows.append((harness.classify(text).json(), word, number % 13 == 0))
    harness.classify("1 1001")  # seen before: a pair more, and no unit more
    report = report_when(harness, lambda report: arm_of(report, "mood-pruned")["requests"] == 131)
    assert report["units"] == 130
    assert (report["verdict"], report["difference"]["method"]) == ("non_inferior", "label_free")
    assert report["agreement"] == 120 / 130
    assert report["max_abs_dp"] > report["mean_abs_dp"] > 0
    assert {(flip["control_label"], flip["candidate_label"]): flip["n"] for flip in report["flips"]} == Counter(
        (LABELS[word], LABELS[(word + 1) % 3]) for _, word, is_swayed in rows if is_swayed
    )
    assert len(report["disagreements"]) == 10
    assert set(report["disagreements"][0]) == {"id", "item", "at", "control_label", "candidate_label"}

    # The control is wrong in four items; in the first of them the candidate disagrees, and is right.
    labels, pairs = [], Counter[str]()
    for number, (answer, word, is_swayed) in enumerate(rows):
        truth = (word + 1) % 3 if number in (0, 1, 20, 40) else word
        labels.append({"id": answer["id"], "label": LABELS[truth]})
        pairs[WORDS[word == truth, (word + 1 if is_swayed else word) % 3 == truth]] += 1
    for begin in range(0, len(labels), 50):
        assert send_labels(harness, labels[begin : begin + 50]).status_code == 200
    report = report_of(harness)
    assert report["pairs"] == {**pairs, "candidate_failed": 0}
    assert pairs["only_candidate"] == 1
    assert report["difference"]["method"] == "paired_betting"
    assert report["difference"]["estimate"] == pytest.approx((pairs["only_candidate"] - pairs["only_control"]) / 130)
    control, candidate = arm_of(report, "mood-full"), arm_of(report, "mood-pruned")
    assert control["right"] == pairs["both_right"] + pairs["only_control"]
    assert candidate["right"] == pairs["both_right"] + pairs["only_candidate"]
    assert candidate["requests"] == 131
    assert report["latency_ms"]["verdict"] == "contended"
    assert report["memory"]["saved_ratio"] == 0.25
    assert report["srm"] is report["labels_srm"] is None


def test_equal_arms_are_never_told_apart(start: Start) -> None:
    """A/A through HTTP: seeded subjects, labels by chance, a look after every 50."""
    harness = start(experiments=split(margin=0.3))
    chance = random.Random(7)
    for begin in range(0, 500, 50):
        ids = [harness.classify("0", subject=f"user-{n}").json()["id"] for n in range(begin, begin + 50)]
        labels = [{"id": id, "label": "negative" if chance.random() < 0.8 else "neutral"} for id in ids]
        assert send_labels(harness, labels).status_code == 200
        report = report_when(harness, lambda report: report["units"] == begin + 50)  # noqa: B023
        assert report["verdict"] not in ("inferior", "superior", "invalid")
        assert report["latency_ms"]["verdict"] in ("insufficient_data", "undecided")
    assert report["verdict"] == "non_inferior"
    assert abs(report["difference"]["estimate"]) < 0.1
