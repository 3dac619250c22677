"""What an experiment has seen of its two arms, in one of three forms: the difference, with bounds for every look.

Differences are accuracies, candidate minus control. Counts are whole in reports and fractions in projections.
"""

from dataclasses import dataclass
from typing import Literal

from service.statistics.interval import Interval
from service.statistics.means import PLANNED, two_arm_sequence
from service.statistics.paired import betting_interval, label_free_interval

Method = Literal["paired_betting", "label_free", "two_arm_sequence"]


@dataclass(frozen=True, slots=True)
class Paired:
    """n labelled items that both arms answered; only_control, only_candidate: those that one arm alone got right."""

    only_control: float
    only_candidate: float
    n: float

    @property
    def method(self) -> Method:
        return "paired_betting"

    @property
    def units(self) -> float:
        """Units in all."""
        return self.n

    @property
    def fewest(self) -> float:
        """Units of the smaller arm: both arms have all of them."""
        return self.n

    def difference(self, margin: float, alpha: float = 0.05) -> tuple[float, Interval]:
        """(estimate, bounds); the margin has no part in them."""
        estimate = (self.only_candidate - self.only_control) / self.n if self.n else 0.0
        return estimate, betting_interval(self.only_control, self.only_candidate, self.n, alpha)

    def projected(self, units: float) -> "Paired":
        """As it would be at so many units, if the rates stay; without any pair yet: if nothing is discordant."""
        factor = units / self.n if self.n else 0.0
        return Paired(self.only_control * factor, self.only_candidate * factor, units)


@dataclass(frozen=True, slots=True)
class LabelFree:
    """n items that both arms answered, with few true labels or none; a failed candidate is a disagreement.

    only_control, only_candidate: the disagreements known to be won by one arm. Labels may be chosen at will: those of
    disagreements are enough.
    """

    disagreements: float
    n: float
    only_control: float = 0
    only_candidate: float = 0

    @property
    def method(self) -> Method:
        return "label_free"

    @property
    def units(self) -> float:
        """Units in all."""
        return self.n

    @property
    def fewest(self) -> float:
        """Units of the smaller arm: both arms have all of them."""
        return self.n

    def difference(self, margin: float, alpha: float = 0.05) -> tuple[float, Interval]:
        """(estimate from the disagreements that have labels, bounds); the margin has no part in them."""
        only_control, only_candidate = self.only_control, self.only_candidate
        estimate = (only_candidate - only_control) / self.n if self.n else 0.0
        return estimate, label_free_interval(
            self.disagreements, self.n, alpha, only_control=only_control, only_candidate=only_candidate
        )

    def projected(self, units: float) -> "LabelFree":
        """As it would be at so many units, if the rates stay; without any item yet: if there is no disagreement."""
        factor = units / self.n if self.n else 0.0
        return LabelFree(self.disagreements * factor, units, self.only_control * factor, self.only_candidate * factor)


@dataclass(frozen=True, slots=True)
class TwoArms:
    """A split: n_1 labelled units of the candidate, right_1 of them right; n_0 and right_0 of the control."""

    right_1: float
    n_1: float
    right_0: float
    n_0: float

    @property
    def method(self) -> Method:
        return "two_arm_sequence"

    @property
    def units(self) -> float:
        """Units in all, of both arms together."""
        return self.n_1 + self.n_0

    @property
    def fewest(self) -> float:
        """Units of the smaller arm."""
        return min(self.n_1, self.n_0)

    def difference(self, margin: float, alpha: float = 0.05) -> tuple[float, Interval]:
        """(estimate, bounds); the margin is the floor of a perfect arm's variance."""
        return two_arm_sequence(self.right_1, self.n_1, self.right_0, self.n_0, margin, alpha, PLANNED)

    def projected(self, units: float) -> "TwoArms":
        """As it would be at so many units, if the rates and the shares of the arms stay."""
        factor = units / self.units if self.units else 0.0
        return TwoArms(self.right_1 * factor, self.n_1 * factor, self.right_0 * factor, self.n_0 * factor)


Comparison = Paired | LabelFree | TwoArms
