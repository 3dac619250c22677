"""Sticky assignment of requests to experiment arms: pure functions of a salt and a key, no state.

Percentages are integers in hundredths of a percent ("basis points"), so 100 % is 10000 and buckets compare exactly.
"""

from collections.abc import Sequence
from hashlib import sha256

BUCKETS = 10_000


def bucket(salt: str, key: str) -> int:
    """Return the bucket of `key` in [0, 10000): the first 8 digest bytes, big endian, modulo 10000.

    Keys are compared as UTF-8 bytes without Unicode normalisation. Raises UnicodeEncodeError for lone surrogates.
    """
    digest = sha256(salt.encode() + b"\x00" + key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS


def is_enrolled(salt: str, traffic_points: int, key: str) -> bool:
    """Return whether `key` takes part when `traffic_points` hundredths of a percent of the traffic do."""
    return bucket(f"{salt}:traffic", key) < traffic_points


def arm(salt: str, arms: Sequence[tuple[str, int]], key: str) -> str:
    """Return the arm whose cumulative half-open range, in the given order, holds the bucket of `key`.

    arms: (name, weight in basis points). Raises ValueError unless the weights sum to 10000.
    """
    if sum(points for _, points in arms) != BUCKETS:
        raise ValueError("arm weights must sum to 100 percent")
    left = bucket(f"{salt}:arm", key)
    for name, points in arms:
        left -= points
        if left < 0:
            return name
    raise AssertionError("unreachable: the ranges cover every bucket")
