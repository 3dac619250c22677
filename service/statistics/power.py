"""How many units a comparison needs: before it starts, from rates expected, and under way, from rates seen.

Sizes are whole units. Accuracies and differences (candidate minus control) are fractions, alpha is two-sided, power is
the chance to conclude what is true. `discordance` is the share of items that one side alone gets right. Sizes "at one
look" are for a sample fixed beforehand; `anytime` ones are for bounds that hold at every look, as experiments use them.
"""

from collections.abc import Callable
from math import ceil, sqrt

from scipy.stats import norm

from service.statistics.comparison import Comparison, LabelFree, Paired, TwoArms
from service.statistics.verdict import DECIDED, FEWEST, verdict

# Beyond this a number helps nobody: the rates sit on the border between two words.
MOST_UNITS = 10_000_000
# Who looks all along stops at the first crossing, which comes before the mean does: worth this many standard errors of
# luck. Fitted to simulated stopping times at powers of 50, 80 and 90 %; `benchmarks.verdicts` prints how well it does.
LOOKING = 0.27


def split_size(control: float, candidate: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Units per arm to show that two accuracies differ, at one look: `(z_a + z_b)^2 (p q + p' q') / (p - p')^2`.

    0.90 against 0.89 needs 14,749. Raises ZeroDivisionError for equal accuracies.
    """
    return _whole(_scale(power, alpha) * _two_variances(control, candidate) / (control - candidate) ** 2)


def split_non_inferior_size(
    control: float, candidate: float, margin: float, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Units per arm to show, at one look, that the candidate is not worse by `margin`: as above, over (D + margin)^2.

    The true difference must be above -margin. 0.90 and 0.90 at 0.01 needs 14,128.
    """
    return _whole(_scale(power, alpha) * _two_variances(control, candidate) / (candidate - control + margin) ** 2)


def mcnemar_size(difference: float, discordance: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Pairs to show a difference at one look: `(z_a sqrt(psi) + z_b sqrt(psi - D^2))^2 / D^2`, psi the discordance.

    Connor, Biometrics 43, 1987. A difference of 0.01 at 3 % needs 2,353. Raises ZeroDivisionError for no difference.
    """
    z_alpha, z_power = _z(alpha, power)
    root = z_alpha * sqrt(discordance) + z_power * sqrt(discordance - difference**2)
    return _whole(root**2 / difference**2)


def non_inferior_size(
    margin: float, discordance: float, difference: float = 0.0, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Pairs to show, at one look, that the candidate is not worse by `margin`: `(z_a + z_b)^2 (psi - D^2) / (D + m)^2`.

    The true difference must be above -margin. A margin of 0.01 at 3 % needs 2,355.
    """
    return _whole(_scale(power, alpha) * (discordance - difference**2) / (difference + margin) ** 2)


def anytime_size(
    bound: float, discordance: float, difference: float = 0.0, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Pairs by which the lower bound has passed `bound`: -margin for `non_inferior`, 0 for `superior`.

    About twice the size at one look; 2.5 times and more where the discordance is no greater than the margin, because
    even without any discordance a margin of 0.01 takes 610 pairs. None if no ten million are enough.
    """
    luck = _luck(power)

    def unlucky(n: int) -> Paired:
        surplus = difference * n - luck * sqrt((discordance - difference**2) * n)
        discordant = max(discordance * n, abs(surplus))
        return Paired((discordant - surplus) / 2, (discordant + surplus) / 2, n)

    return _least(lambda n: unlucky(n).difference(0.0, alpha)[1].lower > bound)


def label_free_size(margin: float, disagreement: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Pairs for `non_inferior` without labels, looking at any time; disagreement: the share of items with two answers.

    None where no ten million are enough, as for a disagreement of the margin or more.
    """
    luck = _luck(power)

    def unlucky(n: int) -> LabelFree:
        expected = disagreement * n
        return LabelFree(max(0.0, expected + luck * sqrt(expected * (1 - disagreement))), n)

    return _least(lambda n: unlucky(n).difference(margin, alpha)[1].lower > -margin)


def split_anytime_size(
    bound: float, control: float, candidate: float, margin: float, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Units per arm of an even split by which the lower bound has passed `bound`; else as `anytime_size`."""
    luck = _luck(power)

    def unlucky(n: int) -> TwoArms:
        error = sqrt(_two_variances(control, candidate) / n)
        return TwoArms(n * min(1.0, candidate - luck * error / 2), n, n * min(1.0, control + luck * error / 2), n)

    return _least(lambda n: unlucky(n).difference(margin, alpha)[1].lower > bound)


def still_needed(comparison: Comparison, margin: float, alpha: float = 0.05) -> int | None:
    """Units in all, both arms together, at which a decided word would be said if the rates seen so far stayed the same.

    Nearer to the middle of what will happen than to a promise, and of the best case while nothing is discordant. None
    if the rates do not lead to a word within ten million units, or if a split has no units yet.
    """
    return _least(lambda units: verdict(comparison.projected(units), margin, alpha)[0] in DECIDED)


def _least(is_enough: Callable[[int], bool]) -> int | None:
    """The least number of units that is enough, from 100 on: doubled until it is, then halved towards it."""
    enough = FEWEST
    while not is_enough(enough):
        enough *= 2
        if enough > MOST_UNITS:
            return None
    too_few = enough // 2 if enough > FEWEST else FEWEST - 1
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        too_few, enough = (too_few, middle) if is_enough(middle) else (middle, enough)
    return enough


def _luck(power: float) -> float:
    """How many standard errors below its mean a run may be that still has to conclude."""
    return float(norm.ppf(power)) - LOOKING


def _two_variances(control: float, candidate: float) -> float:
    return control * (1 - control) + candidate * (1 - candidate)


def _z(alpha: float, power: float) -> tuple[float, float]:
    return float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))


def _scale(power: float, alpha: float) -> float:
    return float(sum(_z(alpha, power)) ** 2)


def _whole(units: float) -> int:
    return ceil(units - 1e-9)
