"""An interval of real numbers: what every estimate of an experiment is published with."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """All values from lower to upper, in the unit of the estimate."""

    lower: float
    upper: float

    def negated(self) -> "Interval":
        """The interval of the negative: what exchanging the arms makes of a difference."""
        return Interval(-self.upper, -self.lower)
