"""E-values as numbers: kept finite, because JSON has no infinity."""

from math import exp

# e^700 is about 1e304, close under the largest double: "beyond all doubt", in a form every reader accepts.
MOST_LOG = 700.0
MOST = exp(MOST_LOG)


def from_log(log_e_value: float) -> float:
    """The e-value with this natural logarithm, at most e^700.

    An e-value is the money of a gambler who started with 1 and bets, fairly, against a hypothesis. While that is true
    the chance that the money ever reaches 1/a is at most a (Ville 1939), so one may look after every observation.
    """
    return exp(min(log_e_value, MOST_LOG))
