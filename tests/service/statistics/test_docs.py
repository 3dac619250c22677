"""docs/statistics.md publishes what the code does."""

import re
from pathlib import Path
from typing import get_args

import pytest

from service.assignment import arm, bucket, is_enrolled
from service.statistics.latency import quantile_sequence
from service.statistics.paired import betting_e_value, betting_interval, mcnemar_p, tango_interval
from service.statistics.power import anytime_size, non_inferior_size
from service.statistics.verdict import Word
from tests.service.test_assignment import VECTORS

DOCS = (Path(__file__).parents[3] / "docs" / "statistics.md").read_text(encoding="utf-8")
TEXT = " ".join(DOCS.split())


def rows(pattern: str) -> list[tuple[str, ...]]:
    return [match.groups() for match in re.finditer(rf"^{pattern}$", DOCS, re.MULTILINE)]


def test_assignment_vectors_are_those_of_the_code() -> None:
    published = {
        bytes.fromhex(key).decode(): (digest, int(arm_bucket), int(traffic_bucket))
        for key, digest, arm_bucket, traffic_bucket in rows(
            r"\| .* \| ([0-9a-f]+) \| ([0-9a-f]{16}) \| (\d+) \| (\d+) \|"
        )
    }
    assert published == VECTORS
    for key, (_, arm_bucket, traffic_bucket) in published.items():
        assert (bucket("demo:arm", key), bucket("demo:traffic", key)) == (arm_bucket, traffic_bucket)


def test_assignment_examples() -> None:
    halves = [("pruned", 5000), ("full", 5000)]
    assert is_enrolled("demo", 2000, "user-2")
    assert arm("demo", halves, "user-2") == "pruned"
    assert not is_enrolled("demo", 2000, "user-1")


def test_words_are_those_there_are_in_their_order() -> None:
    assert [word for (word,) in rows(r"\| `([a-z_]+)` \| [^|]+ \|")] == list(get_args(Word))


def test_planned_sizes_are_those_of_the_planner() -> None:
    sizes = rows(r"\| (\d+) % \| ([\d,]+) \| ([\d,]+) \|")
    assert len(sizes) == 5
    for percent, one_look, anytime in sizes:
        discordance = int(percent) / 100
        assert int(one_look.replace(",", "")) == non_inferior_size(0.01, discordance)
        assert int(anytime.replace(",", "")) == anytime_size(-0.01, discordance)


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("bring 37.0 against", betting_e_value(0, 0, 600, -0.01)),
        ("brings 344.8, bounds", betting_e_value(75, 75, 5000, -0.01)),
        ("±0.00815:", betting_interval(75, 75, 5000).upper),
        ("[-0.0262,", betting_interval(40, 15, 2000).lower),
        ("(10, 2): 0.0386", mcnemar_p(10, 2)),
        ("(30, 22, 1000): [-0.0228,", tango_interval(30, 22, 1000).lower),
    ],
)
def test_examples(said: str, value: float) -> None:
    assert said in TEXT
    number = re.findall(r"-?\d+\.\d+", said)[-1]
    assert f"{value:.{len(number.split('.')[1])}f}" == number


def test_the_sample_from_which_a_percentile_has_an_upper_bound() -> None:
    assert "from 623 samples on" in TEXT
    assert quantile_sequence(range(622), 0.95, 0.025)[1] is None
    assert quantile_sequence(range(623), 0.95, 0.025)[1] is not None
