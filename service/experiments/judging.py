"""What an experiment's records allow to conclude: a comparison, its word, and what is still missing."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.deployments import Task
from service.experiments import words
from service.experiments.document import Difference, Needed, Word
from service.experiments.records import Counts, Records
from service.statistics.comparison import Comparison, LabelFree, Paired, TwoArms
from service.statistics.paired import betting_e_value, mcnemar_p
from service.statistics.power import still_needed
from service.statistics.srm import srm
from service.statistics.verdict import FEWEST, Reason, invalid_reasons, verdict


@dataclass(frozen=True)
class Judged:
    """The comparison and what follows from it. invalid: why the numbers are not to be trusted, if they are not."""

    units: int
    difference: Difference | None
    word: Word
    worse: bool
    invalid: Sequence[Reason]
    needed: Needed | None


def compared(records: Records) -> Comparison | None:
    """The comparison that the records allow, None in a cascade.

    A shadow is judged by its labelled pairs once there are enough for any verdict, and until then by how often its arms
    disagree, which needs no label; so too where labels were given to disagreements only.
    """
    counts = records.counts
    if records.experiment.mode == "cascade":
        return None
    if records.experiment.mode == "split":
        (n_0, right_0), (n_1, right_1) = (
            (counts.n("labelled", arm=arm), counts.n("right", arm=arm)) for arm in records.arms
        )
        return TwoArms(right_1, n_1, right_0, n_0)
    labelled, pairs = counts.n("labelled_pairs"), counts.n("unit_pairs")
    only_control, only_candidate = (
        counts.n("labelled_pairs", predicted=word) for word in ("only_control", "only_candidate")
    )
    if (labelled >= FEWEST and not are_labels_picked(records)) or not pairs:
        return Paired(only_control, only_candidate, labelled)
    return LabelFree(_disagreements(counts), pairs, only_control, only_candidate)


def are_labels_picked(records: Records) -> bool:
    """Whether a shadow's labels went to disagreements, so that the labelled pairs are no fair sample of all pairs.

    Who labels only what the arms disagree on saves work, and would make `Paired` call any difference ten times what it
    is. Pairs that one arm alone won are disagreements: their share of the labelled is held against the share of
    disagreements in all pairs, by the same sequential test as the arms' counts.
    """
    counts = records.counts
    labelled, pairs = counts.n("labelled_pairs"), counts.n("unit_pairs")
    won = counts.n("labelled_pairs", predicted="only_control") + counts.n("labelled_pairs", predicted="only_candidate")
    disagreements = _disagreements(counts)
    if won * pairs <= disagreements * labelled:
        return False
    return srm([won, labelled - won], [disagreements, pairs - disagreements]).alarm


def _disagreements(counts: Counts) -> int:
    """First pairs of a unit that disagree. A unit's first labelled pair may be another, and may be the only one to."""
    won = counts.n("labelled_pairs", predicted="only_control") + counts.n("labelled_pairs", predicted="only_candidate")
    return max(counts.n("unit_pairs") - counts.n("unit_pairs", predicted="agree"), won)


def judge(records: Records, task: Task, is_ratio_off: bool, are_labels_off: bool) -> Judged:
    """The verdict on these records. The flags: alarms on the arms' units, and on their labelled units."""
    counts, experiment = records.counts, records.experiment
    recorded = counts.n("items") + counts.n("overrides") + counts.n("pairs")
    invalid = tuple(
        invalid_reasons(
            sample_ratio=is_ratio_off, label_ratio=are_labels_off, dropped=counts.n("dropped"), recorded=recorded
        )
    )
    comparison = compared(records)
    is_regression = task.reference is not None and task.reference.problem_type == "regression"
    if comparison is None or is_regression:
        return Judged(counts.n("units"), None, "invalid" if invalid else "insufficient_data", False, invalid, None)
    word, worse = verdict(comparison, experiment.margin, experiment.alpha, is_invalid=bool(invalid))
    return Judged(
        units=round(comparison.units),
        difference=_difference(comparison, experiment.margin, experiment.alpha) if comparison.fewest else None,
        word=word,
        worse=worse,
        invalid=invalid,
        needed=_needed(comparison, word, experiment.margin, experiment.alpha),
    )


def _needed(comparison: Comparison, word: Word, margin: float, alpha: float) -> Needed | None:
    if word not in ("insufficient_data", "undecided"):
        return None
    units = still_needed(comparison, margin, alpha) if comparison.fewest else None
    more = None if units is None else max(units - round(comparison.units), 0)
    return Needed(units=units, more=more, words=words.needed_words(comparison, word, more))


def _difference(comparison: Comparison, margin: float, alpha: float) -> Difference:
    estimate, bounds = comparison.difference(margin, alpha)
    evidence = p_value = None
    if isinstance(comparison, Paired):
        counted = comparison.only_control, comparison.only_candidate
        evidence, p_value = betting_e_value(*counted, comparison.n, -margin), mcnemar_p(*map(round, counted))
    elif isinstance(comparison, LabelFree):
        evidence = betting_e_value(comparison.disagreements, 0, comparison.n, -margin)
    return Difference(
        estimate=estimate,
        lower=bounds.lower,
        upper=bounds.upper,
        method=comparison.method,
        e_non_inferior=evidence,
        mcnemar_p=p_value,
    )
