"""The published vectors, and what stickiness and ramps promise."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from service.assignment import BUCKETS, arm, bucket, is_enrolled

# key: first eight digest bytes for the salt demo:arm, its bucket, the bucket for demo:traffic.
VECTORS = {
    "user-1": ("29c2aec5aa437012", 9298, 6171),
    "user-2": ("50e36f115b1152f0", 2960, 312),
    "user-42": ("1bba043d426e767c", 7996, 9103),
    "a": ("ceae8463227f0d4c", 9516, 9487),
    "\u00e9": ("6238eaa1e53eaf5c", 9292, 7540),
    "e\u0301": ("663dabca9153ac38", 2872, 6537),
    "\u65e5\u672c\u8a9e": ("21f061ee85a56bca", 810, 5917),
    "\U0001f642": ("1e59f6640d1807bc", 7612, 8589),
}
HALVES = [("pruned", 5000), ("full", 5000)]


@pytest.mark.parametrize("key", VECTORS)
def test_published_vectors(key: str) -> None:
    digest, arm_bucket, traffic_bucket = VECTORS[key]
    assert sha256(b"demo:arm\x00" + key.encode()).hexdigest()[:16] == digest
    assert bucket("demo:arm", key) == arm_bucket
    assert bucket("demo:traffic", key) == traffic_bucket


def test_published_example() -> None:
    assert is_enrolled("demo", 2000, "user-2")
    assert arm("demo", HALVES, "user-2") == "pruned"
    assert not is_enrolled("demo", 2000, "user-1")


def test_published_counts() -> None:
    assert sum(bucket("demo:arm", f"user-{i}") < 5000 for i in range(1000)) == 516


def test_buckets_are_uniform() -> None:
    counts = [0] * 100
    for number in range(50_000):
        counts[bucket("demo:arm", f"user-{number}") // 100] += 1
    assert 0.001 < chisquare(counts).pvalue < 0.999


def test_arm_is_independent_of_enrolment() -> None:
    enrolled = [f"user-{i}" for i in range(20_000) if is_enrolled("demo", 2000, f"user-{i}")]
    pruned = sum(arm("demo", HALVES, key) == "pruned" for key in enrolled)
    assert chisquare([pruned, len(enrolled) - pruned]).pvalue > 0.001


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_ramp_is_monotone_and_moves_nobody_between_arms(key: str) -> None:
    enrolled = [is_enrolled("demo", percent * 100, key) for percent in range(101)]
    assert enrolled == sorted(enrolled)
    assert not enrolled[0]
    assert enrolled[100]
    assert arm("demo", HALVES, key) == arm("demo", HALVES, key)


def test_ranges_follow_the_order_of_the_arms() -> None:
    # user-2 has arm bucket 2960: inside [0, 2961), outside [0, 2960).
    assert arm("demo", [("a", 2961), ("b", BUCKETS - 2961)], "user-2") == "a"
    assert arm("demo", [("a", 2960), ("b", BUCKETS - 2960)], "user-2") == "b"
    assert arm("demo", [("a", 0), ("b", BUCKETS)], "user-2") == "b"


def test_weights_must_sum_to_all() -> None:
    with pytest.raises(ValueError, match="sum to 100"):
        arm("demo", [("a", 5000), ("b", 4999)], "user-2")
