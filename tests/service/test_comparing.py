"""Two checkpoints in turns: the counts are theirs, the statistics those of other libraries, the order turns."""

from collections.abc import Sequence

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from models.classifier import Output
from models.dataset import Row
from models.errors import DataError
from service.comparing import WARM_UP, compare, summary
from tests.service.toys import LABELS, ToyModel, toy_checkpoint


class Logged(ToyModel):
    """Writes its name down at each pass; `sway` moves every class by one where the text holds 77."""

    def __init__(self, name: str, log: list[str], *, sway: bool = False) -> None:
        super().__init__()
        self.name, self.log, self.sway = name, log, sway

    def classify(self, sequences: Sequence[Sequence[int]]) -> Output:
        self.log.append(self.name)
        output = super().classify(sequences)
        rows = output.logits_BC.roll(1, 1) if self.sway and 77 in sequences[0] else output.logits_BC
        return Output(rows, output.routed_slots, output.dropped_slots)


def test_both_meet_every_row_and_the_order_turns() -> None:
    log: list[str] = []
    control, candidate = (toy_checkpoint(model=Logged(name, log, sway=name == "b")) for name in ("a", "b"))
    rows = [Row("0 77", LABELS[0])] * 3 + [Row("1 77", LABELS[2])] + [Row("1", LABELS[1])] * 6
    found = compare(control, candidate, rows, 0.01)
    assert (found.rows, found.only_control, found.only_candidate, found.agreement) == (10, 3, 1, 0.6)
    assert found.difference == pytest.approx(-0.2)
    turns = "".join(log[2 * min(WARM_UP, len(rows)) :])
    assert turns == "abba" * 5
    assert not found.is_non_inferior


def test_the_statistics_are_those_of_other_libraries() -> None:
    truth_N = np.zeros(1000, np.int64)
    label_NM = np.zeros((1000, 2), np.int64)
    label_NM[:30, 1] = 1
    label_NM[30:52, 0] = 1
    ms_NM = np.stack([np.arange(1.0, 1001), np.arange(1.0, 1001) / 2], axis=1)
    found = summary(label_NM, truth_N, ms_NM, 0.03)
    assert (found.only_control, found.only_candidate) == (30, 22)
    assert found.p_value == pytest.approx(mcnemar([[948, 30], [22, 0]], exact=True).pvalue)
    assert found.interval == pytest.approx((-0.022805, 0.006345), abs=1e-6)  # Tango's score interval, published numbers
    assert found.agreement_interval == pytest.approx(proportion_confint(948, 1000, method="wilson"))
    assert found.is_non_inferior
    assert not summary(label_NM, truth_N, ms_NM, 0.02).is_non_inferior
    median, high = found.timings
    assert (median.control_ms, median.candidate_ms, median.ratio) == (500.5, 250.25, 0.5)
    assert high.control_interval == (936, 964)
    assert median.ratio_interval[0] < 0.5 < median.ratio_interval[1]


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([], LABELS, "there is no row to compare on"),
        ([Row("0", "furious")], LABELS, "furious"),
        ([Row("void", LABELS[0])], LABELS, "row 1 has no tokens"),
        ([Row("0", LABELS[0])], ("x", "y", "z"), "different labels"),
    ],
)
def test_what_cannot_be_compared(rows: list[Row], labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare(toy_checkpoint(), toy_checkpoint(labels=labels), rows, 0.01)
